"""What every teacher owes, and what it may leave to the defaults."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gkd.loss.integrand import Divergence
from gkd.loss.parts import SplitSignal
from gkd.loss.settings import LossSettings
from gkd.loss.signals import TeacherSignal
from gkd.models.facts import model_name, revision_of
from gkd.models.zero import gathered
from gkd.rollouts.base import Rollout, SamplingSettings

WINDOW = "teacher_hidden"  # what `score_window` has kept stands under this name in a batch


class Teacher(ABC):
    """Says what the teacher thinks of the N targets of a micro-batch. A new one says so in `score`.

    Attributes:
        model: the frozen model in this process; None when it is elsewhere, or there is not one.
        callbacks: of the training, which the trainer adds to its own.
        loaded: False while a model that can be done without is not in memory (`teacher_scores_dir`).
        remote: it is asked over a network, where one rank can fail alone.
        top_k: how many tokens it scores at a position; None is all of them.
        together: its model is split up over the ranks, so that all of them ask it at once, or none.
        scores_windows: a whole window at a time is cheaper for it than one micro-batch at a time.
        writes: it has `rollout` and `log_probs`, in the place of a model that could be asked for them.
        follows: it changes while the student trains, so that nothing it says holds for long.
        writes_only: nothing is compared with it, and `score` refuses.
        missing: there is none.
    """

    model: Any = None
    callbacks: Sequence[Any] = ()
    loaded: bool = True
    remote: bool = False
    top_k: int | None = None
    together: bool = False
    scores_windows: bool = False
    writes: bool = False
    follows: bool = False
    writes_only: bool = False
    missing: bool = False

    @abstractmethod
    def score(self, batch: dict[str, Tensor]) -> TeacherSignal | SplitSignal:
        """`input_ids`, `attention_mask`, `labels` [B, T] -> a signal for the N targets, in row-major order."""

    def head_parameters(self) -> Iterable[Tensor | None]:
        """Parameters that the signal refers to and that ZeRO-3 may have sharded."""
        return ()

    def head_here(self) -> AbstractContextManager[None]:
        """Inside, what its signal refers to is whole, and where the loss is taken. A collective under ZeRO-3."""
        return gathered(self.head_parameters())

    def borrowed(self) -> Iterable[Tensor]:
        """Parameters that another model's engine may have split up, and that are gathered while it scores."""
        return ()

    def each(self) -> Sequence[Teacher]:
        """The teachers that this one is made of, in the order of their numbers: itself, or several."""
        return [self]

    def settings_of_each(self) -> Sequence[LossSettings | None]:
        """The loss's settings for each of them; None where they are those for all."""
        return [None] * len(self.each())

    def compare_by(self, divergence: Divergence) -> None:  # noqa: B027
        """The divergence changes: of the loss's settings that a teacher has for itself, too."""

    def models(self) -> list[Callable[[], Any]]:
        """What gives the model of each of them, for those that write."""
        return [partial(getattr, one, "model") for one in self.each()]

    def repo(self, kwargs: Any = None) -> tuple[str | None, str | None]:
        """Name and revision of where it comes from, for the model card; None where it has no name.

        Args:
            kwargs: that it was loaded with.
        """
        return (None, None) if self.model is None else (model_name(self.model), revision_of(self.model, kwargs))

    def identity(self) -> str | None:
        """What distinguishes it from other teachers; None where its weights do."""
        return type(self).__name__ if self.model is None else None

    def state(self) -> Mapping[str, Tensor]:
        """What of it changes while the student trains and is nobody else's, for checkpoints; tensors by name."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave.

        Raises:
            ValueError: it is another teacher's.
        """
        assert not state, f"{type(self).__name__} has no state"

    def rollout(self, settings: SamplingSettings, *, seed: int, source: str) -> Rollout:
        """What samples from it; `source` keys the random numbers."""
        raise NotImplementedError(f"{type(self).__name__} writes through its model")

    def log_probs(self, sequences: Sequence[tuple[list[int], int]]) -> list[list[float]]:
        """log p, in nats, of the tokens from `start` on of each (ids, start), given all before them."""
        raise NotImplementedError(f"{type(self).__name__} is asked through its model")

    def score_window(self, batches: Sequence[dict[str, Tensor]], device: torch.device) -> list[dict[str, Tensor]]:
        """What is kept of a whole window in CPU memory, for each micro-batch: last hidden states by the name under
        which they stand in it from then on (`teacher_hidden...`). None where a micro-batch at a time is as cheap."""
        return []

    def signal_of(self, hidden: Tensor) -> TeacherSignal:
        """The signal of hidden states that `score_window` gave."""
        raise NotImplementedError(f"{type(self).__name__} scores no window ahead")
