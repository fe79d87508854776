"""Sums and counts by source, reduced over ranks once per logged step; and the ledger of what was trained on.

Every average is token-weighted (or sequence-weighted) over all ranks: sums travel, means are taken at the end. Ranks
add to their own sums and meet in one collective that all of them enter, `Meter.flush`.
"""

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
