"""TRL's GOLDTrainer, with its default way of merging tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from datasets import Dataset
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.gold.gold_trainer import ULDLoss
from trl.experimental.utils import encode_with_byte_offsets

from conformance.adapters import Adapter
from conformance.loss_cases import LossCall
from conformance.material import Run
from conformance.result import NotApplicable, Source
from conformance.spelling_cases import MERGES, Text

_FILE = "trl/experimental/gold/gold_trainer.py"
_COUNT = Source(
    _FILE,
    "return jsd_sum / num_items_in_batch",
    "the count is of the rows' own answers, taken before the student's stand in their place",
)
_WINDOW = Source(
    _FILE,
    "repeat_count=self.args.gradient_accumulation_steps,",
    "the window is given out once for each micro-batch, and its tokens are counted as often",
)
_RULES = Source(
    _FILE, "generation_kwargs = {", "rules that are not named here are taken from the model's generation config"
)
_PLACES = Source(
    _FILE,
    "student_answer_logits = student_logits[i, student_start : student_start + student_size]",
    "these positions predict the token behind the one that they stand at",
)
_SORTED = Source(
    _FILE,
    "aligned_loss = F.l1_loss(student_sorted, teacher_sorted",
    "sorted probabilities of tokens that do not mean the same; so for what is not matched in the hybrid",
)
SOURCES = {
    "never below 0 with a bf16 teacher": Source(
        _FILE,
        "teacher_log_probs = F.log_softmax(teacher_logits, dim=-1)",
        "log-probabilities in the dtype of the logits: in bf16 they do not add up to 1",
    ),
    "the rows' answers, four micro-batches": _WINDOW,
    "own answers": _COUNT,
    "own answers, four micro-batches": _WINDOW,
    "answers that nobody reads have no say": _COUNT,
    "a student's padding rows": Source(
        _FILE,
        "teacher_model.resize_token_embeddings(",
        "the teacher's new rows are like its other ones: it gives them probability",
    ),
    "two ranks, own answers": _COUNT,
    "two ranks, the rows' answers": Source(
        _FILE,
        "return jsd_sum / num_items_in_batch",
        "the count is of all ranks, and the gradient is averaged over them once more",
    ),
    "answers that nobody reads leave prompts whole": Source(
        _FILE, "input_ids = input_ids[drop:]", "the prompt is cut so that prompt and unread answer fit"
    ),
    "the end of the turn stops, not only the config's token": Source(
        _FILE,
        "self.generation_config.eos_token_id = self.model.generation_config.eos_token_id",
        "the tokenizer's end of a turn is no stop token",
    ),
    "no repetition penalty left over from the model's config": _RULES,
    "no other sampling rule left over from it": _RULES,
    "evaluation does not shift the training": Source(
        _FILE,
        "generated_outputs = model.generate(",
        "draws from the global random state, which an evaluation moves on",
    ),
    "one Markov model in two codes: loss 0, gradient 0": _SORTED,
}
_OBSERVED = {
    **{f"gradient where the text is predicted, {name}": _PLACES for name in MERGES},
    "one Markov model in two codes: loss 0, gradient 0": _PLACES,
    "numbers, from a teacher that splits digits": _PLACES,
    "the same tokenizer: the ordinary loss": _PLACES,
}


class TRLGOLD(Adapter):
    name, package, sources = "TRL GOLD (observed)", "trl", {**SOURCES, **_OBSERVED}
    merge = "observed"

    def loss(self, call: LossCall) -> Any:
        """Its static method, on logits: the loss of teachers with the student's tokenizer."""
        ours, theirs = call.logits()
        if ours.shape != theirs.shape:
            raise NotApplicable("the trainer cuts or widens the teacher's head: see the step")
        return GOLDTrainer.generalized_jsd_loss(ours, theirs, call.labels, call.beta, call.temperature)

    def ways(self) -> dict[str, Callable[[Text], Any]]:
        return {name: uld(self.merge, hybrid) for name, hybrid in (("ULD", False), ("hybrid", True))}

    def groups(self, student: Any, teacher: Any, text: str, student_ids: list[int], teacher_ids: list[int]) -> Any:
        """By the byte offsets that its data set and its trainer make."""
        offsets = []
        for tokenizer in (student, teacher):
            try:
                [(_, spans)] = encode_with_byte_offsets(tokenizer.backend_tokenizer, [text])
            except NotImplementedError as error:
                raise NotApplicable("refuses tokenizers that are not byte-level") from error
            offsets.append(spans)
        return list(zip(*ULDLoss._align_by_byte_offsets(*offsets), strict=True))

    def trainer(self, run: Run) -> Any:
        values = run.arguments() | {
            "lmbda": run.share,
            "top_p": 1.0,
            "max_completion_length": run.new_tokens,
            "max_length": run.max_length,
        }
        evaluated = run.eval_conversations
        return GOLDTrainer(
            model=run.student,
            teacher_model=run.teacher,
            args=GOLDConfig(**values),
            train_dataset=Dataset.from_list([{"messages": row} for row in run.conversations]),
            eval_dataset=Dataset.from_list([{"messages": row} for row in evaluated]) if evaluated else None,
            processing_class=run.tokenizer,
        )


def uld(merge: str, hybrid: bool) -> Callable[[Text], Any]:
    """The loss for teachers with another tokenizer (`ULDLoss`), called as the trainer calls it."""

    def loss(text: Text) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            config = GOLDConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                use_uld_loss=True,
                uld_token_merge_strategy=merge,
                uld_use_hybrid_loss=hybrid,
                beta=text.beta,
            )
        inputs = {}
        for name, side in (("student", text.student), ("teacher", text.teacher)):
            ids = torch.tensor([side.ids])
            labels = ids.clone()
            labels[:, : side.prompt_length] = -100
            ends = list(accumulate(len(side.pieces[i]) for i in side.completion[:-1]))
            spans = [(0, 0)] * side.prompt_length + list(zip([0, *ends[:-1]], ends, strict=True)) + [(ends[-1],) * 2]
            inputs |= {
                f"{name}_labels": labels,
                f"{name}_input_ids": ids,
                f"{name}_byte_offsets": torch.tensor([spans]),
            }
        function = ULDLoss(config, text.student, text.teacher, torch.device("cpu"))
        return function(student_logits=text.logits[None], teacher_logits=text.teacher_logits[None], **inputs).sum()

    return loss


ADAPTER = TRLGOLD()
