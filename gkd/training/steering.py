"""`Steering`: what a run does about its own rollouts: the guard against collapse, and `lmbda="auto"`.

A collapse of an on-policy run is a matter of tens of steps, and it does not come back by itself: rollouts that never
end, end at once, or repeat themselves. The guard judges a window of steps by `gkd.training.health`, before the last of
them is trained on, and acts as `collapse_guard` says.

`lmbda="auto"` is nearest to DistiLLM's adaptive scheduler (arXiv 2402.03898), which raises the share of the student's
text where the validation loss asks for it. Here the rollouts themselves say whether they are fit to be trained on.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import TrainerCallback

from gkd.data.sequences import TokenSequence
from gkd.data.sources import SOURCES
from gkd.rollouts.hygiene import Verdict
from gkd.training.health import Health, Signal, count_rollouts

logger = logging.getLogger(__name__)

MOST_ROLLBACKS = 2
AUTO_START, AUTO_LEAST, AUTO_STEP = 0.25, 0.1, 0.05
_SLACK = 0.05  # of the shares of lmbda="auto": a few rollouts are no trend
_STUDENT = SOURCES.index("student")


class RollBackError(Exception):
    """Training goes on from an earlier checkpoint, on all ranks; nobody outside of the trainer sees this."""

    def __init__(self, checkpoint: str) -> None:
        super().__init__(checkpoint)
        self.checkpoint = checkpoint


@dataclass
class SteeringState:
    """What a checkpoint keeps of it.

    Attributes:
        health: of the rollouts.
        lmbda_factor, learning_rate_factor: what the fields are multiplied by.
        auto: the share of `lmbda="auto"`.
        since: steps since that was last decided on.
        rollbacks: made so far.
        events: what the guard found and did: step, signals, action.
        alarmed: the window is beyond a limit, and that has been told.
        healthy: name of the last checkpoint that was saved while all was calm, and whose own rollouts were so, too.
        candidate: one that was saved while all was calm, and whose rollouts have not been seen yet.
        is_calm: whether all is now. ended: the guard has ended the run.
    """

    health: Health = field(default_factory=Health)
    lmbda_factor: float = 1.0
    learning_rate_factor: float = 1.0
    auto: float = AUTO_START
    since: int = 0
    rollbacks: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    alarmed: bool = False
    healthy: str | None = None
    candidate: str | None = None
    is_calm: bool = True
    ended: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        plain = {name: value for name, value in vars(self).items() if name != "health"}
        return copy.deepcopy({**plain, "health": self.health.as_dict()})

    @classmethod
    def of(cls, state: dict[str, Any] | None) -> SteeringState:
        """What `as_dict` gave; a new one of None."""
        if state is None:
            return cls()
        values = copy.deepcopy(state)
        return cls(**{**values, "health": Health(**values["health"])})


class Steering(TrainerCallback):
    """Counts the rollouts of each step, and acts on what it finds. It costs nothing where it is off.

    Args:
        trainer: its record keeps the state; its arguments say what is to be done.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._args = trainer, trainer.args
        device = trainer.accelerator.device
        self._entropies = torch.zeros(3, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)

    @property
    def guards(self) -> bool:
        """Whether there is a guard."""
        return bool(self._args.collapse_guard != "off")

    @property
    def state(self) -> SteeringState:
        """In the run's record."""
        found: SteeringState = self._trainer.record.steering
        return found

    @property
    def has_ended(self) -> bool:
        """Whether the guard has ended the run: no step is made any more."""
        return self.state.ended and self._args.collapse_guard in ("stop", "rollback")

    def lmbda(self, share: float) -> float:
        """The student's share in place of `share`, which the field says."""
        return share * self.state.lmbda_factor

    def logged(self) -> dict[str, float]:
        """For the log: how often the guard has acted, once it has, and by what."""
        if not self.state.events:
            return {}
        factors = {
            "guard/lmbda_factor": self.state.lmbda_factor,
            "guard/learning_rate_factor": self.state.learning_rate_factor,
        }
        changed = {name: value for name, value in factors.items() if value != 1}
        return {"guard/events": float(len(self.state.events)), **changed}

    # --------------------------------------------------------------------------------------------- one step

    def observe(self, output: Any, sources: Tensor) -> None:
        """A micro-batch was trained on; nothing waits for the device."""
        if not self.guards or output.teacher_entropy is None:
            return
        mine = (sources == _STUDENT).to(self._entropies.dtype)
        values = torch.stack([output.student_entropy, output.teacher_entropy, torch.ones_like(output.student_entropy)])
        self._entropies += values.detach().nan_to_num().to(self._entropies.dtype) @ mine

    def counts(
        self, rows: Sequence[TokenSequence], written: Sequence[TokenSequence], verdicts: Sequence[Verdict]
    ) -> Tensor:
        """This rank's counts of a window, to be added up with the others'; [0] where nobody wants them."""
        if not (self.guards or self._args.decides_share):
            return torch.zeros(0, dtype=torch.int64)
        found = count_rollouts(rows, written, verdicts, self._trainer.hygiene, self._args.teacher_writes)
        student, teacher, targets = self._entropies.tolist()
        self._entropies.zero_()
        return torch.tensor([*found, round(1e6 * student), round(1e6 * teacher), round(targets)])

    def judge(self, counts: Tensor) -> None:
        """All ranks' counts of the window that is about to be trained on.

        Raises:
            RollBackError: it is not; on all ranks.
        """
        if len(counts) == 0 or self.state.ended:
            return
        state, window = self.state, self._args.collapse_window
        state.health.add(counts.tolist(), window)
        if self._args.decides_share:
            self._decide_share(window)
        if not self.guards:
            return
        signals = state.health.judge(self._args.collapse_threshold, isinstance(self._args.max_new_tokens, str))
        full = len(state.health.steps) >= window
        firing = [signal for signal in signals if signal.fires] if full else []
        if signals:
            self._confirm(signals)
        if firing and not state.alarmed:
            self._act(firing)
        elif not firing:
            state.alarmed = False

    def _confirm(self, signals: list[Signal]) -> None:
        """Whether all is calm; and if it is, that the last checkpoint was sound, whose rollouts these are. Before
        there is one, it is enough that nothing is beyond a limit."""
        state = self.state
        seen = [*signals, *state.health.of_last_step(signals)]
        state.is_calm = all(signal.is_calm for signal in seen)
        first = state.healthy is None and not any(signal.fires for signal in seen)
        if state.is_calm or first:
            state.healthy = state.candidate or state.healthy
        state.candidate = None

    def _decide_share(self, window: int) -> None:
        """Every so many steps: up while the rollouts are as sound as the reference, else down."""
        state = self.state
        state.since += 1
        shares = state.health.shares()
        if state.since < window or shares is None:
            return
        own, reference = shares
        sound = all(own[name] <= reference[name] + _SLACK for name in ("truncated", "repetitive"))
        state.since, state.auto = 0, min(1.0, max(AUTO_LEAST, state.auto + (AUTO_STEP if sound else -AUTO_STEP)))

    # --------------------------------------------------------------------------------------------- the guard

    def _act(self, firing: list[Signal]) -> None:
        state, step, guard = self.state, self._trainer.state.global_step, self._args.collapse_guard
        state.alarmed, state.is_calm = True, False
        action, healthy = guard, self._healthy()
        if guard == "rollback" and state.rollbacks >= MOST_ROLLBACKS:
            action = "stop"
        if action in ("lower_lmbda", "rollback"):
            state.lmbda_factor /= 2
            state.health.forget_window()
            state.alarmed = False
        if action == "rollback":
            state.rollbacks += 1
            state.learning_rate_factor /= 2
        if action == "stop":
            state.ended = True
        back = healthy if action in ("rollback", "stop") else None
        event = {"step": step, "signals": [signal.in_words() for signal in firing], "action": action}
        if back is not None:
            event["back_to"] = back.rsplit("-", 1)[-1]
        state.events.append(event)
        if self._trainer.is_world_process_zero():
            logger.warning("collapse_guard=%s: %s", guard, in_words(event, self._in_place(action, back)))
        if back is not None:
            raise RollBackError(back)
        if action == "rollback":
            self._trainer.optimizer_settings.scale()

    def _in_place(self, action: str, back: str | None) -> str:
        if back is None and action in ("rollback", "stop"):
            return "no checkpoint of this run was saved while all was well: the weights stay as they are"
        return ""

    def _healthy(self) -> str | None:
        """The folder of the last sound checkpoint, where it is whole. An engine of DeepSpeed cannot go back."""
        if self._trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return None
        found: str | None = self._trainer.checkpoints.that_can_be_gone_on_from(self.state.healthy)
        return found

    def saving(self, name: str) -> None:
        """A checkpoint of this name is about to be complete."""
        if self.guards and not self.state.ended:
            self.state.candidate = name if self.state.is_calm else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.has_ended:
            control.should_training_stop = True

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.has_ended:
            control.should_training_stop = True


def check_steering(trainer: Any) -> None:
    """Refuse what the trainer's engine cannot do.

    Raises:
        ValueError: naming the field, the value and the remedy.
    """
    deepspeed = trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
    if deepspeed and trainer.args.collapse_guard == "rollback":
        raise ValueError(
            "collapse_guard='rollback' does not go with DeepSpeed, whose engine cannot go back within a process: set "
            "'stop' or 'lower_lmbda', and go on from an earlier checkpoint (resume_from_checkpoint)"
        )


_DID = {
    "warn": "nothing is changed",
    "lower_lmbda": "lmbda is halved",
    "rollback": "lmbda and learning rate are halved",
    "stop": "the run ends",
}


def in_words(event: dict[str, Any], remark: str = "") -> str:
    """What the guard found and did, in one line."""
    back = f", from checkpoint-{event['back_to']}" if "back_to" in event else ""
    found = f"the student's rollouts have collapsed at step {event['step']}: {', '.join(event['signals'])}"
    return f"{found}; {_DID[event['action']]}{back}{f'; {remark}' if remark else ''}"
