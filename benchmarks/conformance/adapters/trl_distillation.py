"""TRL's DistillationTrainer: answers of the student alone."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from conformance.adapters import Adapter
from conformance.loss_cases import LossCall
from conformance.material import Run
from conformance.result import NotApplicable, Source

_FILE = "trl/trainer/distillation_trainer.py"
_SOURCES = {
    "the student writes without dropout": Source(
        _FILE, "prompt_completion_ids = unwrapped_model.generate(", "the model is in training mode, dropout and all"
    ),
    "no other sampling rule left over from it": Source(
        _FILE,
        "generation_kwargs = {",
        "rules that are not named here are taken from the model's generation config",
    ),
    "evaluation does not shift the training": Source(
        _FILE,
        "prompt_completion_ids = unwrapped_model.generate(",
        "draws from the global random state, which an evaluation moves on",
    ),
}


class TRLDistillation(Adapter):
    name, package, sources = "TRL Distillation", "trl", _SOURCES
    prompts_only = True

    def loss(self, call: LossCall) -> Any:
        if call.student_head.shape[0] != call.teacher_head.shape[0]:
            raise NotApplicable("refuses heads of different sizes")
        found, _, _ = _chunked_divergence_loss(
            call.student_hidden,
            call.teacher_hidden,
            call.student_head,
            call.teacher_head,
            (call.labels != -100).long(),
            call.beta,
            temperature=call.temperature,
        )
        return found

    def trainer(self, run: Run) -> Any:
        if run.share < 1:
            raise NotApplicable("the student's own answers only")
        evaluated = run.eval_conversations
        return DistillationTrainer(
            model=run.student,
            teacher_model=run.teacher,
            args=DistillationConfig(max_completion_length=run.new_tokens, **run.arguments()),
            train_dataset=Dataset.from_list([{"prompt": row[:-1]} for row in run.conversations]),
            eval_dataset=Dataset.from_list([{"prompt": row[:-1]} for row in evaluated]) if evaluated else None,
            processing_class=run.tokenizer,
        )


ADAPTER = TRLDistillation()
