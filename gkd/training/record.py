"""`Record`: what a checkpoint keeps of a training beside the Trainer's own files; `Ledger`: what was trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gkd.data.sources import SOURCES
from gkd.training.position_profile import PositionProfile
from gkd.training.steering import SteeringState


@dataclass
class Ledger:
    """What the model has been trained on so far: sequences and target tokens by source, over all ranks."""

    sequences: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SOURCES, 0))
    targets: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SOURCES, 0))

    def add(self, counts: Tensor) -> None:
        """Add one window: `counts` [2, 3] int, sequences and targets in the order of SOURCES."""
        for i, source in enumerate(SOURCES):
            self.sequences[source] += int(counts[0, i])
            self.targets[source] += int(counts[1, i])

    def as_dict(self) -> dict[str, dict[str, int]]:
        return {"sequences": dict(self.sequences), "targets": dict(self.targets)}

    def load(self, state: dict[str, dict[str, int]]) -> None:
        self.sequences.update(state["sequences"])
        self.targets.update(state["targets"])


@dataclass
class Record:
    """What the run has done so far, over resumes and all ranks.

    Attributes:
        profile: the divergence along the position.
        ledger: what was trained on.
        tokens: of all sequences of all windows, prompts included.
        nonfinite_steps: skipped, for a loss or gradient that was not finite.
        empty_steps: left out, for want of a target.
        steering: what the guard against collapse and lmbda=auto know.
        reward_mean: running mean of the reward; None before the first.
    """

    profile: PositionProfile
    ledger: Ledger = field(default_factory=Ledger)
    tokens: int = 0
    nonfinite_steps: int = 0
    empty_steps: int = 0
    reward_mean: float | None = None
    steering: SteeringState = field(default_factory=SteeringState)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "ledger": self.ledger.as_dict(),
            "num_tokens": self.tokens,
            "positions": self.profile.as_dict(),
            "nonfinite_steps": self.nonfinite_steps,
            "empty_steps": self.empty_steps,
            "reward_mean": self.reward_mean,
            "steering": self.steering.as_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `as_dict` gave, after a resume."""
        self.ledger.load(state["ledger"])
        if "positions" in state:
            self.profile.load(state["positions"])
        self.tokens = state["num_tokens"]
        self.nonfinite_steps = state.get("nonfinite_steps", 0)
        self.empty_steps = state.get("empty_steps", 0)
        self.reward_mean = state.get("reward_mean")
        self.steering = SteeringState.of(state.get("steering"))
