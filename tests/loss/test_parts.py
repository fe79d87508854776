"""Several teachers in one micro-batch: the parts add up to what each gives alone, at its own targets."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from gkd.loss.fused import fused_divergence
from gkd.loss.parts import SignalPart, SplitSignal, fused_by_part
from gkd.loss.registry import DIVERGENCES, make_divergence
from gkd.loss.settings import FusedOutput, LossSettings
from gkd.loss.signals import DenseSignal, Head, TopKSignal

V, N, K = 23, 11, 5
PLACES = ([1, 4, 5, 10], [0, 2, 9], [3, 6, 7, 8], [])


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def split(divergence: str) -> list[SignalPart]:
    """A dense teacher; one with a larger head of another width, cut to its top 3; a server; one without a target."""
    settings = LossSettings(make_divergence(divergence))
    top = drawn(len(PLACES[2]), V, seed=5).mul(2).log_softmax(-1).topk(K)
    signals = (
        (DenseSignal(drawn(4, 8, seed=1), Head(drawn(V, 8, seed=2))), settings, 1.0),
        (
            DenseSignal(drawn(3, 12, seed=3), Head(drawn(V + 4, 12, seed=4), softcap=5.0)),
            LossSettings(settings.divergence, teacher_top_k=3, shared_vocab=V),
            2.5,
        ),
        (TopKSignal(top.indices, top.values), LossSettings(settings.divergence, teacher_top_k=K), 0.5),
        (DenseSignal(drawn(0, 8, seed=1), Head(drawn(V, 8, seed=6))), settings, 1.0),
    )
    return [SignalPart(torch.tensor(p, dtype=torch.long), *s) for p, s in zip(PLACES, signals, strict=True)]


@pytest.mark.parametrize("with_ce", [False, True], ids=["", "cross-entropy"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_parts_add_up(divergence, with_ce):
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(7))
    weights, ce_weights = torch.rand(N), torch.rand(N) if with_ce else None
    parts = split(divergence)

    def student() -> tuple[torch.Tensor, Head]:
        return drawn(N, 16, seed=8).requires_grad_(), Head(drawn(V, 16, seed=9).mul(0.3).requires_grad_())

    hidden, head = student()
    found = fused_by_part(
        hidden,
        head,
        SplitSignal(parts),
        targets,
        weights,
        LossSettings(make_divergence(divergence)),
        ce_weights=ce_weights,
    )
    found.loss.backward()
    alone, alone_head = student()
    outputs = []
    for part in parts:
        at = part.places
        outputs.append(
            fused_divergence(
                alone[at],
                alone_head,
                part.signal,
                targets[at],
                weights[at] * part.weight,
                part.settings,
                ce_weights=None if ce_weights is None else ce_weights[at],
            )
        )
    total = torch.stack([output.loss for output in outputs]).sum()
    total.backward()
    torch.testing.assert_close(found.loss, total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hidden.grad, alone.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(head.weight.grad, alone_head.weight.grad, rtol=1e-5, atol=1e-6)
    for name in (field.name for field in fields(FusedOutput) if field.name != "loss"):
        of_parts = [getattr(output, name) for output in outputs]
        values = getattr(found, name)
        if all(value is None for value in of_parts):
            assert values is None, name
            continue
        for part, own in zip(parts, of_parts, strict=True):
            expected = torch.full((len(part.places),), torch.nan) if own is None else own
            torch.testing.assert_close(values[part.places], expected, equal_nan=True, rtol=1e-6, atol=1e-6)
    assert found.top_k_mass.isnan().tolist() == [i not in PLACES[2] for i in range(N)]
