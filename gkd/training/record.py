"""`Ledger`: what was trained on so far, sequences and target tokens by source."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from gkd.data.sources import SOURCES


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
