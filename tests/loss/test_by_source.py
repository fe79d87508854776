"""Another divergence for each source: the parts against float64 definitions, and signals of some targets alone."""

import oracle
import pytest
import torch
from aligned_case import AlignedCase
from fused_case import Case

from gkd.loss import make_divergence
from gkd.loss.by_source import split_by_source
from gkd.loss.fused import fused_divergence
from gkd.loss.parts import SignalPart, SplitSignal, fused_by_part
from gkd.loss.settings import LossSettings
from gkd.loss.signals import TopKSignal

COMMON = LossSettings(make_divergence("jsd", beta=0.3))
NAMES = ("reverse_kl", "jsd", "forward_kl")
OVERRIDES = ({"divergence": make_divergence("reverse_kl")}, {}, {"divergence": make_divergence("forward_kl")})


def sources_of(case, seed=3):
    return torch.randint(0, 3, case.targets.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("only", [None, 0, 1], ids=["mixed", "data alone", "student alone"])
def test_loss_and_gradient_are_the_weighted_sum_over_sources(only):
    case = Case()
    sources = sources_of(case) if only is None else torch.full_like(case.targets, only)
    split = split_by_source(case.signal, sources, COMMON, OVERRIDES)
    assert len(split.parts) == 3, "a part for each source, whoever is in the batch"
    found = fused_by_part(
        case.hidden, case.head, split, case.targets, case.weights, COMMON, ce_weights=case.ce_weights
    )
    z, zt = case.logits()
    p, q = z.softmax(-1), zt.softmax(-1)
    each = torch.stack([oracle.divergence(name, p, q, **({"beta": 0.3} if name == "jsd" else {})) for name in NAMES])
    of_token = each.gather(0, sources[None])[0]
    ce = -z.log_softmax(-1).gather(1, case.targets[:, None])[:, 0]
    wanted = (case.weights * of_token + case.ce_weights * ce).sum()
    torch.testing.assert_close(found.loss, wanted, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(found.divergence, of_token.detach(), rtol=1e-9, atol=1e-11)
    gradients = torch.autograd.grad(found.loss, case.leaves())
    for mine, true in zip(gradients, torch.autograd.grad(wanted, case.leaves()), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-10)


def test_a_teacher_of_several_keeps_its_own_weight_and_top_k():
    case = Case()
    sources = sources_of(case)
    halves = [torch.arange(0, 13, 2), torch.arange(1, 13, 2)]
    parts = [
        SignalPart(halves[0], case.signal.at(halves[0]), LossSettings(COMMON.divergence, teacher_top_k=4), 2.0),
        SignalPart(halves[1], case.signal.at(halves[1])),
    ]
    split = split_by_source(SplitSignal(parts), sources, COMMON, OVERRIDES)
    found = fused_by_part(case.hidden, case.head, split, case.targets, case.weights, COMMON)
    wanted = torch.zeros((), dtype=torch.float64)
    for half, weight, top_k in ((halves[0], 2.0, 4), (halves[1], 1.0, None)):
        for source, name in enumerate(NAMES):
            at = half[sources[half] == source]
            divergence = OVERRIDES[source].get("divergence", COMMON.divergence)
            one = fused_divergence(
                case.hidden[at], case.head, case.signal.at(at), case.targets[at], case.weights[at] * weight,
                LossSettings(divergence, teacher_top_k=top_k),
            )  # fmt: skip
            assert divergence.name.startswith(name)
            wanted = wanted + one.loss
    torch.testing.assert_close(found.loss, wanted)
    for mine, true in zip(*(torch.autograd.grad(loss, case.leaves()) for loss in (found.loss, wanted)), strict=True):
        torch.testing.assert_close(mine, true)


def test_a_signal_at_some_targets_is_that_of_these_targets():
    case = Case()
    at = torch.tensor([1, 4, 5, 12])
    logits = case.signal.head.logits(case.signal.hidden)
    some_hidden = case.signal.at(at)
    torch.testing.assert_close(some_hidden.head.logits(some_hidden.hidden), logits[at])
    top = logits.log_softmax(-1).topk(3)
    some = TopKSignal(top.indices, top.values).at(at)
    assert torch.equal(some.ids, top.indices[at])
    assert torch.equal(some.log_probs, top.values[at])


@pytest.mark.parametrize("groups", [(0, 1, 4), (2,), (3, 5, 6, 7), ()], ids=str)
def test_an_aligned_signal_at_some_groups_is_that_of_these_groups(groups):
    case = AlignedCase()
    places = torch.tensor([i for i, g in enumerate(case.signal.group.tolist()) if g in groups], dtype=torch.long)
    divergence = make_divergence("jsd")
    whole = fused_divergence(
        case.hidden, case.head, case.signal, case.targets, torch.zeros(len(case.targets)).index_fill(
            0, places, 1.0
        ), LossSettings(divergence),
    )  # fmt: skip
    part = fused_divergence(
        case.hidden[places], case.head, case.signal.at(places), case.targets[places], torch.ones(len(places)),
        LossSettings(divergence),
    )  # fmt: skip
    torch.testing.assert_close(part.loss, whole.loss)
    torch.testing.assert_close(part.divergence, whole.divergence[places])
    for mine, true in zip(*(torch.autograd.grad(x.loss, case.leaves()) for x in (part, whole)), strict=True):
        torch.testing.assert_close(mine, true)
