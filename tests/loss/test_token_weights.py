"""Weights of single tokens: each rule from its equation, one token at a time, and what a weight does to the loss."""

import math

import pytest
import torch
from fused_case import Case

from gkd.loss import make_divergence
from gkd.loss.by_source import split_by_source
from gkd.loss.fused import fused_divergence
from gkd.loss.overlap import LOOKED_AT, top_k_overlap
from gkd.loss.parts import fused_by_part
from gkd.loss.settings import LossSettings
from gkd.loss.signals import DenseSignal, Head, TopKSignal
from gkd.loss.token_weights import TOKEN_WEIGHTS, TokenView

LENGTHS = (4, 1, 0, 7)


def view(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [row for row, n in enumerate(LENGTHS) for _ in range(n)]
    places = [place for n in LENGTHS for place in range(1, n + 1)]
    draw = [torch.rand(len(rows), generator=generator, dtype=torch.float64) * 3 for _ in range(5)]
    whole = torch.zeros(len(rows), dtype=torch.long)
    return TokenView(
        ids=whole, rows=torch.tensor(rows), places=torch.tensor(places), sources=whole, row_numbers=whole,
        divergence=draw[0], student_log_prob=-draw[1], teacher_log_prob=-draw[2], student_entropy=draw[3],
        teacher_entropy=draw[4], agreement=draw[0], shape=(len(LENGTHS), 9),
    )  # fmt: skip


def by_row(seen):
    return [[i for i, row in enumerate(seen.rows.tolist()) if row == wanted] for wanted in range(len(LENGTHS))]


def test_iw_opd():
    seen = view()
    gap = [abs(t - s) for t, s in zip(seen.teacher_log_prob.tolist(), seen.student_log_prob.tolist(), strict=True)]
    wanted = {}
    for row in by_row(seen):
        for place, i in enumerate(row):
            wanted[i] = 1 + 0.5 * (1 - sum(gap[j] for j in row[:place]) / sum(gap[j] for j in row))
    torch.testing.assert_close(
        TOKEN_WEIGHTS["iw_opd"](seen), torch.tensor([wanted[i] for i in range(12)], dtype=torch.float64)
    )


def test_the_teachers_entropy():
    seen = view()
    wanted = [max(0.1, math.exp(-h)) for h in seen.teacher_entropy.tolist()]
    torch.testing.assert_close(TOKEN_WEIGHTS["teacher_entropy"](seen), torch.tensor(wanted, dtype=torch.float64))


def test_disagreement_keeps_half_of_each_completion():
    seen = view()
    wanted = torch.zeros(12, dtype=torch.float64)
    for row in by_row(seen):
        h, d = (v[row] / max(v[row].tolist(), default=1.0) for v in (seen.student_entropy, seen.divergence))
        score = (h + d - h * d).tolist()
        for i in sorted(range(len(row)), key=lambda i: -score[i])[: math.ceil(len(row) / 2)]:
            wanted[row[i]] = 1
    assert torch.equal(TOKEN_WEIGHTS["disagreement"](seen), wanted)


@pytest.mark.parametrize("rule", TOKEN_WEIGHTS)
def test_a_rule_looks_at_one_completion_at_a_time(rule):
    seen = view()
    alone = by_row(seen)[3]
    values = {name: getattr(seen, name)[alone] for name in vars(seen) if name not in ("shape", "rows")}
    part = TokenView(**values, rows=torch.zeros(len(alone), dtype=torch.long), shape=(1, 7))
    torch.testing.assert_close(TOKEN_WEIGHTS[rule](part), TOKEN_WEIGHTS[rule](seen)[alone])


@pytest.mark.parametrize("in_parts", [False, True], ids=["", "in parts"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("ce", [False, True], ids=["", "cross-entropy"])
def test_a_weight_multiplies_a_tokens_term_and_gets_no_gradient(trained, ce, in_parts):
    case, settings = Case(), LossSettings(make_divergence("jsd"))
    head = case.head if trained else Head(case.weight.detach(), case.bias.detach())
    leaves = case.leaves() if trained else [case.hidden]
    ce_weights, signal, run = case.ce_weights if ce else None, case.signal, fused_divergence
    if in_parts:
        sources = torch.arange(13) % 3
        signal, run = split_by_source(signal, sources, settings, ({}, {}, {})), fused_by_part

    def weigh(output):
        return (output.divergence + output.student_entropy * 0.1 - output.cross_entropy * 0.01).abs()

    found = run(case.hidden, head, signal, case.targets, case.weights, settings, ce_weights=ce_weights, weigh=weigh)
    z, zt = case.logits()
    log_p, log_q = z.log_softmax(-1), zt.log_softmax(-1)
    m = torch.logaddexp(log_p, log_q) - math.log(2)
    d = 0.5 * ((log_p.exp() * (log_p - m)).sum(-1) + (log_q.exp() * (log_q - m)).sum(-1))
    cross = -log_p.gather(1, case.targets[:, None])[:, 0]
    factor = (d - 0.1 * (log_p.exp() * log_p).sum(-1) - cross * 0.01).abs().detach()
    wanted = (factor * (case.weights * d + (case.ce_weights * cross if ce else 0))).sum()
    torch.testing.assert_close(found.loss, wanted, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.token_weights, factor, rtol=1e-9, atol=1e-10)
    for mine, true in zip(*(torch.autograd.grad(loss, leaves) for loss in (found.loss, wanted)), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("n", [0, 1, 5, 200])
def test_the_overlap_of_the_most_likely_tokens(n):
    case, settings = Case(n=n), LossSettings(make_divergence("jsd"), shared_vocab=30)
    found = top_k_overlap(case.hidden, case.head, case.signal.exchanging((1, 2)), settings, 4)
    seen = ~found.isnan()
    assert int(seen.sum()) == min(n, LOOKED_AT)
    z, zt = case.student_logits()[:, :30], case.signal.head.logits(case.signal.hidden)[:, :30]
    for i in seen.nonzero()[:, 0].tolist():
        theirs = {{1: 2, 2: 1}.get(v, v) for v in zt[i].topk(4).indices.tolist()}
        assert float(found[i]) == len(theirs & set(z[i].topk(4).indices.tolist())) / 4


def test_the_overlap_with_a_servers_tokens():
    case = Case(n=6)
    top = case.signal.head.logits(case.signal.hidden).log_softmax(-1).topk(5)
    served = TopKSignal(top.indices, top.values)
    settings = LossSettings(make_divergence("jsd"))
    assert isinstance(case.signal, DenseSignal)
    for k, most in ((3, 3), (5, 5), (9, 5)):
        found = top_k_overlap(case.hidden, case.head, served, settings, k)
        torch.testing.assert_close(found, top_k_overlap(case.hidden, case.head, case.signal, settings, most))
