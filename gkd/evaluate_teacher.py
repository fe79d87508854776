"""A teacher on a server, as the evaluation needs it: it writes, it scores, and it tells a text's log-probabilities.

What a server tells exactly: its completions, the log-probability of a given token (so its perplexity), and its K most
likely tokens with the mass of the rest. So a divergence is that of K + 1 outcomes, a lower bound of the one over the
whole vocabulary (`gkd.teachers.server`), and the table's footnote says so.

B rows, T tokens, N targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gkd.rollouts import SamplingSettings, VLLMRollout
from gkd.signals import TeacherSignal
from gkd.teachers import ServerTeacher
from gkd.trainer import GKDTrainer


class ServedTeacher:
    """Stands where the harness has a model.

    Args:
        teacher: the training's own.
        seed: of the sampling.
        vocabulary: ids from here on are an error, since the student could not read them.
    """

    def __init__(self, teacher: ServerTeacher, *, seed: int, vocabulary: int) -> None:
        self.teacher, self.seed, self.vocabulary = teacher, seed, vocabulary

    @property
    def top_k(self) -> int:
        return self.teacher.top_k

    def generate(self, prompts: list[list[int]], sampling: SamplingSettings) -> list[list[int]]:
        """One completion of each prompt; the random numbers belong to no training step."""
        rollout = VLLMRollout(
            self.teacher.client,
            self.teacher.served,
            sampling,
            seed=self.seed,
            source="evaluation",
            vocabulary=self.vocabulary,
        )
        return rollout.generate(prompts, step=0)

    def score(self, batch: dict[str, Tensor]) -> TeacherSignal:
        """As `gkd.teachers.Teacher.score`."""
        return self.teacher.score(batch)

    def nll(self, sequences: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
        """-log p in nats of the tokens of each (context, text)'s text."""
        starts = [(context + text, len(context)) for context, text in sequences]
        return [[-value for value in values] for values in self.teacher.log_probs(starts)]


def teacher_of(trainer: GKDTrainer) -> Any:
    """What the evaluation compares with: the teacher's model, a teacher on a server, or None when there is no single
    teacher that could write and be measured."""
    teacher = trainer.teacher
    if isinstance(teacher, ServerTeacher):
        vocabulary = trainer.accelerator.unwrap_model(trainer.model).config.get_text_config().vocab_size
        return ServedTeacher(teacher, seed=trainer.args.seed, vocabulary=int(vocabulary))
    return teacher.model
