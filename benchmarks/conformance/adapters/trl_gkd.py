"""TRL's GKDTrainer."""

from __future__ import annotations

from typing import Any

from trl.experimental.gkd import GKDConfig, GKDTrainer

from conformance.adapters.drop_in import GKDLike
from conformance.loss_cases import LossCall
from conformance.result import NotApplicable, Source

_COUNT = Source(
    "trl/experimental/gkd/gkd_trainer.py",
    "return jsd_sum / num_items_in_batch",
    "the count is of the rows' own answers, taken before the student's stand in their place",
)
_RULES = Source(
    "trl/experimental/gkd/gkd_trainer.py",
    "generation_kwargs = {",
    "rules that are not named here are taken from the model's generation config",
)
_SOURCES = {
    "never below 0 with a bf16 teacher": Source(
        "trl/experimental/gkd/gkd_trainer.py",
        "teacher_log_probs = F.log_softmax(teacher_logits, dim=-1)",
        "log-probabilities in the dtype of the logits: in bf16 they do not add up to 1",
    ),
    "own answers": _COUNT,
    "own answers, four micro-batches": _COUNT,
    "answers that nobody reads have no say": _COUNT,
    "two ranks, own answers": _COUNT,
    "two ranks, the rows' answers": Source(
        "trl/experimental/gkd/gkd_trainer.py",
        "return jsd_sum / num_items_in_batch",
        "the count is of all ranks, and the gradient is averaged over them once more",
    ),
    "answers that nobody reads leave prompts whole": Source(
        "trl/experimental/utils.py",
        "sample_ids = message_input_ids_full[-self.max_length :]",
        "the prompt is cut so that prompt and unread answer fit",
    ),
    "the end of the turn stops, not only the config's token": Source(
        "trl/experimental/gkd/gkd_trainer.py",
        "self.generation_config.eos_token_id = self.model.generation_config.eos_token_id",
        "the tokenizer's end of a turn is no stop token",
    ),
    "no repetition penalty left over from the model's config": _RULES,
    "no other sampling rule left over from it": _RULES,
    "evaluation does not shift the training": Source(
        "trl/experimental/gkd/gkd_trainer.py",
        "generated_outputs = model.generate(",
        "draws from the global random state, which an evaluation moves on",
    ),
}


class TRLGKD(GKDLike):
    trainer_class, config_class = GKDTrainer, GKDConfig
    name, package, sources = "TRL GKD", "trl", _SOURCES

    def loss(self, call: LossCall) -> Any:
        """Its static method, on logits."""
        ours, theirs = call.logits()
        if ours.shape != theirs.shape:
            raise NotApplicable("refuses heads of different sizes")
        return GKDTrainer.generalized_jsd_loss(ours, theirs, call.labels, call.beta, call.temperature)


ADAPTER = TRLGKD()
