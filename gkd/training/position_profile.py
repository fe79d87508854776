"""Divergence along the position in the completion: sums by bucket of positions, source and third of the training.

Buckets grow with the position, two to an octave, because what differs along a completion differs most at its start;
a long completion costs no more room than a short one. Like `gkd.training.metrics`, ranks add to their own sums and
meet in one collective, `flush`; nothing waits for the device in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gkd.common.devices import sum_dtype
from gkd.data.sources import SOURCES
from gkd.training.metrics import Reduce

# First position of each bucket, counted from 1; the last bucket is open.
STARTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
THIRDS = 3


class PositionProfile:
    """Collects per-target divergences by position; one for the whole training."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._shape = (2, THIRDS, len(SOURCES), len(STARTS))  # sums and counts
        self._totals = torch.zeros(self._shape, dtype=torch.float64)  # over all ranks
        self._own = torch.zeros(
            self._shape, dtype=sum_dtype(device), device=device
        )  # of this rank, since the last flush
        self._starts = torch.tensor(STARTS, device=device)

    def add(self, divergence: Tensor, sources: Tensor, positions: Tensor, step: int, max_steps: int) -> None:
        """Add a micro-batch.

        Args:
            divergence: [N], nats.
            sources: [N], indices into SOURCES.
            positions: [N], of each target among its row's targets, from 1 (`gkd.data.targets.Targets.places`).
            step, max_steps: optimizer steps done, and in all.
        """
        third = min(THIRDS * step // max(max_steps, 1), THIRDS - 1)
        buckets = torch.bucketize(positions, self._starts, right=True) - 1
        places = sources * len(STARTS) + buckets
        for own, values in zip(self._own[:, third], (divergence, torch.ones_like(divergence)), strict=True):
            own.view(-1).index_add_(0, places, values.detach().to(own.dtype))

    def flush(self, sum_over_ranks: Reduce) -> None:
        """Reduce over ranks (every rank calls this)."""
        self._totals += sum_over_ranks(self._own.flatten()).cpu().double().view(self._shape)
        self._own.zero_()

    def as_dict(self) -> dict[str, Any]:
        """Plain lists for JSON: `starts`, and by source `sums` and `counts` [thirds, buckets], at the last flush."""
        sums, counts = self._totals
        return {
            "starts": list(STARTS),
            "sums": {source: sums[:, j].tolist() for j, source in enumerate(SOURCES)},
            "counts": {source: counts[:, j].long().tolist() for j, source in enumerate(SOURCES)},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `as_dict` gave, after a resume."""
        for j, source in enumerate(SOURCES):
            self._totals[0, :, j] = torch.tensor(state["sums"][source], dtype=torch.float64)
            self._totals[1, :, j] = torch.tensor(state["counts"][source], dtype=torch.float64)
