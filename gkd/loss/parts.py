"""Several teachers, or losses, in one micro-batch: the fused pass runs once for each, over its own targets.

The parts are disjoint and share the student's head, the step's denominator and one place for the gradients, so that a
trained head's stands once however many parts there are.

Shapes: N target tokens on this rank, n of one part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from gkd.loss.chunks import Gradients
from gkd.loss.fused import Weigh, attached, run_pass, wanted_gradients, weighed
from gkd.loss.settings import FusedOutput, LossSettings
from gkd.loss.signals import IN_FULL, AlignedSignal, Head, TeacherSignal


@dataclass(frozen=True, eq=False)
class SignalPart:
    """What one of several teachers says.

    Attributes:
        places: [n] which of the batch's N targets it is about, in their order.
        signal: of these targets.
        settings: the loss's, as they are for this teacher; None is as for all.
        weight: multiplies its divergence.
        around: its head is whole and in its place inside.
    """

    places: Tensor
    signal: TeacherSignal | AlignedSignal
    settings: LossSettings | None = None
    weight: float = 1.0
    around: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True, eq=False)
class SplitSignal:
    """What several teachers say of a micro-batch's targets: the parts are disjoint, and hold all of them."""

    parts: Sequence[SignalPart]

    def exchanging(self, pair: tuple[int, int]) -> SplitSignal:
        """The same with two tokens in each other's place, in all of them."""
        return SplitSignal([replace(part, signal=part.signal.exchanging(pair)) for part in self.parts])


def fused_by_part(
    student_hidden: Tensor,
    student_head: Head,
    split: SplitSignal,
    targets: Tensor,
    weights: Tensor,
    settings: LossSettings,
    *,
    ce_weights: Tensor | None = None,
    check_ids: bool = True,
    weigh: Weigh | None = None,
) -> FusedOutput:
    """The sum of the parts' `fused_divergence`, each at its own targets; what is said of each target stands in the
    order of the targets.

    Args:
        student_hidden: [N, Ds]. student_head: as in `fused_divergence`.
        split: the teachers'.
        targets: [N] token ids. weights, ce_weights, check_ids, weigh: as in `fused_divergence`.
        settings: of the parts that have none of their own.

    Raises:
        ValueError: as `fused_divergence`.
    """
    order = torch.cat([part.places for part in split.parts]).to(student_hidden.device)
    assert order.shape[0] == targets.shape[0], "the parts do not hold each target once"
    hidden = student_hidden.index_select(0, order)
    inputs, gradients = wanted_gradients(hidden, student_head)
    factor = torch.cat([torch.full_like(part.places, part.weight, dtype=weights.dtype) for part in split.parts])
    factor = factor.to(weights.device)

    def run(weights: Tensor, ce_weights: Tensor | None, gradients: Gradients) -> FusedOutput:
        outputs, start = [], 0
        for part in split.parts:
            at = slice(start, start + part.places.shape[0])
            start = at.stop
            with part.around():
                output = run_pass(
                    hidden[at],
                    student_head,
                    part.signal,
                    targets.index_select(0, order[at]),
                    weights[at],
                    part.settings or settings,
                    ce_weights=None if ce_weights is None else ce_weights[at],
                    check_ids=check_ids,
                    gradients=replace(gradients, hidden=None if gradients.hidden is None else gradients.hidden[at]),
                )
            outputs.append(output)
        return _together(outputs)

    own_weights = weights.index_select(0, order) * factor
    own_ce_weights = None if ce_weights is None else ce_weights.index_select(0, order)
    in_place = None if weigh is None else lambda output: weigh(_ordered(output, order)).index_select(0, order)
    output = weighed(run, own_weights, own_ce_weights, gradients, in_place)
    return attached(_ordered(output, order), inputs, gradients)


def _ordered(output: FusedOutput, order: Tensor) -> FusedOutput:
    """What stands in the order of the parts in that of the targets."""
    values = {field.name: getattr(output, field.name) for field in fields(FusedOutput) if field.name != "loss"}
    moved = {
        name: torch.empty_like(order, dtype=value.dtype).index_copy_(0, order, value)
        for name, value in values.items()
        if value is not None
    }
    return replace(output, **moved)


def _together(outputs: Sequence[FusedOutput]) -> FusedOutput:
    """The parts' values one behind the other; NaN where a part does not tell what another one tells (a kind: in
    full)."""
    values = {}
    for name in (field.name for field in fields(FusedOutput) if field.name != "loss"):
        found = [getattr(output, name) for output in outputs]
        known = next((value for value in found if value is not None), None)
        if known is not None:
            rows = [
                known.new_full(output.student_entropy.shape, torch.nan if known.is_floating_point() else IN_FULL)
                if value is None
                else value
                for value, output in zip(found, outputs, strict=True)
            ]
            values[name] = torch.cat(rows)
    loss = torch.stack([output.loss for output in outputs]).sum()
    return FusedOutput(loss=loss, **values)
