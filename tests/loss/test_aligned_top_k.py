"""The K most likely tokens of a teacher with another tokenizer: against the definition in float64, of one in the same
process and of one that tells no more than these."""

from dataclasses import replace

import pytest
import torch
from aligned_case import PATTERNS, AlignedCase
from variants import ALL

from gkd.loss import DIVERGENCES, make_divergence
from gkd.loss.by_source import split_by_source
from gkd.loss.fused import fused_divergence
from gkd.loss.overlap import LOOKED_AT, top_k_overlap
from gkd.loss.parts import fused_by_part
from gkd.loss.settings import LossSettings
from gkd.loss.signals import AlignedSignal, DenseSignal, Head, TopKSignal

TAILS = ("bucket", "renormalize", "renormalize_both", "ignore")


def joined(case, left=2):
    """The same with tokens that count with a common one, on both sides."""
    generator, change = torch.Generator().manual_seed(2), {}
    for side, vocab in (("student", 23), ("teacher", 19)):
        ids = set(getattr(case.signal, f"{side}_ids").tolist())
        others = torch.tensor([v for v in range(vocab) if v not in ids][left:])
        change[f"{side}_joined"] = torch.stack([others, torch.randint(0, 11, others.shape, generator=generator)])
    case.signal = replace(case.signal, **change)
    return case


@pytest.mark.parametrize("k", [1, 4, 12, 19])
@pytest.mark.parametrize("told", [False, True], ids=["in process", "by a server"])
def test_every_divergence_is_its_definition(k, told):
    """Also with tokens that count with a common one, some of which are among the K and some are not."""
    for name, parameters in ALL:
        for make in (lambda: AlignedCase(), lambda: joined(AlignedCase(softcap=3.0, seed=1))):
            case = make().as_a_server_tells(k) if told else make()
            case.check(name, parameters, ce=True, chunk_size=5, teacher_top_k=k, report_kls=True)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("common", [2, 11])
def test_every_tail_is_its_definition(tail, common):
    """With 2 common tokens there are places at which none of the K is one: nothing is compared there."""
    names = [name for name in DIVERGENCES if tail == "bucket" or name == "forward_kl"]
    names += [name for name in ("jsd", "total_variation") if tail in ("renormalize", "renormalize_both")]
    for name in names:
        for told in (False, True):
            case = AlignedCase(common=common)
            case = case.as_a_server_tells(6) if told else case
            case.check(name, teacher_top_k=3, top_k_tail=tail, ce=True)
            if not told:
                case.check(name, teacher_top_k=3, top_k_tail=tail, loss_temperature=1.6)


@pytest.mark.parametrize("pattern", [(1, 1), (1, 2), (2, 1), (2, 2), (5, 3), (2, 0), (0, 2)])
def test_every_kind_of_group_alone_and_where_the_gradient_goes(pattern):
    for name in DIVERGENCES:
        case = AlignedCase([(1, 1), pattern]).as_a_server_tells(5)
        case.check(name)
        (gradient,) = torch.autograd.grad(case.fused(name).loss, case.hidden)
        assert gradient.abs().sum(-1).gt(0).tolist() == case.signal.group.ge(0).tolist()


@pytest.mark.parametrize(
    ("vocab", "teacher_vocab", "common"), [(7, 40, 5), (40, 7, 5), (9, 9, 0), (9, 9, 9), (9, 12, 9), (12, 9, 9)]
)
def test_all_of_the_vocabulary_is_the_comparison_in_full(vocab, teacher_vocab, common):
    for name in DIVERGENCES:
        sizes = {"vocab": vocab, "teacher_vocab": teacher_vocab, "common": common}
        whole, case = AlignedCase(**sizes), AlignedCase(**sizes).as_a_server_tells(teacher_vocab)
        wanted, output = (one.fused(name, ce=True, report_kls=True) for one in (whole, case))
        fields = ("loss", "divergence", "agreement", "teacher_entropy", "teacher_log_prob", "forward_kl", "reverse_kl")
        for field in fields:
            torch.testing.assert_close(getattr(output, field), getattr(wanted, field), rtol=1e-9, atol=1e-12)
        gradients = [torch.autograd.grad(o.loss, c.leaves()) for o, c in ((wanted, whole), (output, case))]
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)
        for k in (1, teacher_vocab - 1):
            case = AlignedCase(**sizes)
            case.check(name, teacher_top_k=k)
            case.as_a_server_tells(k).check(name)


@pytest.mark.parametrize("k", [6, 50])
@pytest.mark.parametrize("tail", TAILS)
def test_the_same_tokenizer_gives_the_ordinary_loss(k, tail):
    """The teacher's ids in another order, one to one with the student's."""
    for name, parameters in ALL if tail == "bucket" else [("forward_kl", {})]:
        case = AlignedCase([(1, 1)] * 13, vocab=50, teacher_vocab=50, dtype=torch.float32)
        order = torch.randperm(50, generator=torch.Generator().manual_seed(5))  # student's id -> teacher's
        log_q = case.logits()[1].log_softmax(-1).float()
        top = log_q.topk(k, dim=-1)
        ordinary = TopKSignal(top.indices, top.values)
        own = log_q.gather(1, case.targets[:, None])[:, 0]
        one = torch.arange(13)
        aligned = AlignedSignal(
            TopKSignal(order[top.indices], top.values, own),
            order[case.targets],
            torch.arange(50),
            order,
            one,
            one,
            one,
            size=50,
        )
        found = []
        for case.signal in (ordinary, aligned):
            output = case.fused(name, parameters, ce=True, report_kls=True, top_k_tail=tail)
            found.append((output, torch.autograd.grad(output.loss, case.leaves())))
        (plain, gradients), (output, ours) = found
        for field in ("loss", "divergence", "teacher_entropy", "agreement", "top_k_mass", "forward_kl", "reverse_kl"):
            torch.testing.assert_close(getattr(output, field), getattr(plain, field), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(output.teacher_log_prob, own)
        torch.testing.assert_close(ours, gradients, rtol=1e-6, atol=1e-6)


def test_what_the_teacher_does_not_tell_of_is_not_counted():
    case = AlignedCase([(1, 1), (2, 2), (2, 0)]).as_a_server_tells(4)
    output = case.fused("jsd", ce=True)
    mass = case.signal.teacher.log_probs.exp().sum(1)
    assert output.top_k_mass.isnan().tolist() == [False, False, True, True, True]
    torch.testing.assert_close(output.top_k_mass[:2], mass[:2])
    assert AlignedCase().fused("jsd", teacher_top_k=4).top_k_mass is None


def test_parts_of_a_batch_by_source_and_a_smaller_k_for_one():
    """Groups stay whole; what is said of each target is what a call of its own says."""
    case = joined(AlignedCase(PATTERNS * 2)).as_a_server_tells(7)
    half = sum(n for n, _ in PATTERNS)
    sources = torch.arange(2 * half) // half
    settings = LossSettings(make_divergence("jsd"))
    split = split_by_source(case.signal, sources, settings, [{}, {"teacher_top_k": 3}])
    output = fused_by_part(case.hidden, case.head, split, case.targets, case.weights, settings)
    wanted = [case.expected("jsd", teacher_top_k=k)[1] for k in (7, 3)]
    torch.testing.assert_close(output.divergence, torch.cat([wanted[0][:half], wanted[1][half:]]))
    assert output.loss.requires_grad


def test_single_precision_and_very_sure_models():
    for name, parameters in ALL:
        sizes = {"vocab": 1200, "teacher_vocab": 900, "common": 700, "dtype": torch.float32}
        AlignedCase(PATTERNS * 3, **sizes).as_a_server_tells(40).check(name, parameters, ce=True, rtol=3e-4, atol=3e-5)
        case = joined(AlignedCase(PATTERNS * 2, dtype=torch.float32))
        with torch.no_grad():
            case.weight.mul_(3e3)
            case.signal.teacher.head.weight.mul_(4e3)
        output = case.as_a_server_tells(5).fused(name, parameters, ce=True)
        tensors = [output.loss, *torch.autograd.grad(output.loss, case.leaves()), output.divergence]
        assert all(torch.isfinite(tensor).all() for tensor in tensors), name


def test_equal_models_have_no_loss_and_no_gradient():
    weight = torch.randn(31, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    hidden = torch.randn(9, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
    one, ids = torch.arange(9), torch.arange(31)
    dense = DenseSignal(hidden.detach(), Head(weight.detach()))
    for name in DIVERGENCES:
        signal = AlignedSignal(dense, one, ids, ids, one, one, one)
        settings = LossSettings(make_divergence(name), teacher_top_k=5)
        output = fused_divergence(hidden, Head(weight), signal, one, torch.ones(9), settings)
        gradients = torch.autograd.grad(output.loss, (hidden, weight))
        assert abs(output.loss.item()) < 1e-6, name
        assert all(gradient.abs().max() < 1e-5 for gradient in gradients) or name == "total_variation", name


@pytest.mark.parametrize("told", [None, 3, 9])
def test_the_overlap_is_that_of_tokens_that_both_spell_alike(told):
    case = AlignedCase(PATTERNS * 12)
    settings, (z, zt) = LossSettings(make_divergence("jsd")), case.logits()
    signal = case.signal
    pairs = dict(zip(signal.student_ids.tolist(), signal.teacher_ids.tolist(), strict=True))
    case = case if told is None else case.as_a_server_tells(told)
    found = top_k_overlap(case.hidden, case.head, case.signal, settings, 5)
    k = min(5, told or 5)
    borders = (signal.border >= 0).nonzero()[:, 0].tolist()
    places = [borders[round(i * (len(borders) - 1) / (LOOKED_AT - 1))] for i in range(LOOKED_AT)]
    assert len(borders) > LOOKED_AT
    assert (~found.isnan()).nonzero()[:, 0].tolist() == places
    for at in places:
        own = {pairs.get(i) for i in z[at].topk(k).indices.tolist()}
        theirs = set(zt[signal.border[at]].topk(k).indices.tolist())
        assert found[at].item() == pytest.approx(len(own & theirs) / k)
    none = AlignedCase([(2, 0), (0, 1)])
    assert top_k_overlap(none.hidden, none.head, none.signal, settings, 5).isnan().all()


def test_signals_that_do_not_fit_are_refused():
    case = AlignedCase().as_a_server_tells(4)
    with pytest.raises(ValueError, match=r"loss_temperature=2.0 .*needs the teacher's full distribution"):
        case.fused(loss_temperature=2.0)
    told = case.signal.teacher
    case.signal = replace(case.signal, teacher=replace(told, own=None))
    with pytest.raises(ValueError, match="needs the log-probabilities of its own tokens"):
        case.fused()
    case.signal = replace(case.signal, teacher=told.at(torch.arange(3)))
    with pytest.raises(ValueError, match="3 rows of the signal, 17 targets"):
        case.fused()
