"""Another divergence for each source of sequences: the targets of a micro-batch split up by who wrote them.

N target tokens, n of one part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gkd.loss.parts import SignalPart, SplitSignal
from gkd.loss.settings import LossSettings
from gkd.loss.signals import AlignedSignal, TeacherSignal

Overrides = Mapping[str, Any]  # attributes of LossSettings


def split_by_source(
    signal: TeacherSignal | AlignedSignal | SplitSignal,
    sources: Tensor,
    settings: LossSettings,
    overrides: Sequence[Overrides],
) -> SplitSignal:
    """The same signal in parts that hold one source each, with the settings of that source.

    There is a part for every source on every rank, also where it has no target: a part may gather its teacher's head,
    for which all ranks have to come. Waits for the device once.

    Args:
        signal: of N targets.
        sources: [N] numbers of who wrote each of them, 0 to len(overrides) - 1.
        settings: the loss's for parts that have none of their own.
        overrides: of each source, what is not as for all: attributes of `LossSettings` by name.
    """
    if not isinstance(signal, SplitSignal):
        signal = SplitSignal([SignalPart(torch.arange(sources.shape[0], device=sources.device), signal)])
    counts = [torch.bincount(sources.index_select(0, p.places), minlength=len(overrides)) for p in signal.parts]
    sizes = torch.stack(counts).tolist()
    parts = []
    for part, counted in zip(signal.parts, sizes, strict=True):
        order = torch.argsort(sources.index_select(0, part.places), stable=True)
        for at, changed in zip(order.split(counted), overrides, strict=True):
            own = part.settings or settings
            parts.append(
                replace(
                    part,
                    places=part.places.index_select(0, at),
                    signal=part.signal.at(at),
                    settings=replace(own, **changed) if changed else part.settings,
                )
            )
    return SplitSignal(parts)
