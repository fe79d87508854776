"""Teachers with another tokenizer in the fused pass: against the definition in float64, and against what is known."""

from dataclasses import replace

import oracle
import pytest
import torch
from aligned_case import DS, PATTERNS, AlignedCase, numbered
from torch import nn
from variants import ALL

from gkd.loss import DIVERGENCES, make_divergence
from gkd.loss.fused import fused_divergence
from gkd.loss.parts import SignalPart, SplitSignal, fused_by_part
from gkd.loss.settings import LossSettings
from gkd.loss.signals import IN_FULL, IN_TEXT, NOT_COMPARED, AlignedSignal, DenseSignal, Head
from gkd.loss.token_weights import TokenGroups

TOKENS = sum(n for n, _ in PATTERNS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ce": True, "chunk_size": 3},
        {"loss_temperature": 1.7, "ce": True},
        {"loss_temperature": 0.8, "teacher_loss_temperature": 1.3, "scale_by_temperature_squared": True},
    ],
)
def test_every_divergence_is_its_definition(options):
    for name, parameters in ALL:
        AlignedCase().check(name, parameters, **options)
        AlignedCase(scale=0.7, softcap=3.0, seed=1).check(name, parameters, **options)


@pytest.mark.parametrize(
    ("vocab", "teacher_vocab", "common"), [(7, 40, 5), (40, 7, 5), (9, 9, 0), (9, 9, 9), (9, 12, 9)]
)
def test_vocabularies_of_any_size_and_overlap(vocab, teacher_vocab, common):
    """0: no common token. All of the smaller vocabulary: no rest, so both are taken given a common token."""
    for name in DIVERGENCES:
        AlignedCase(vocab=vocab, teacher_vocab=teacher_vocab, common=common).check(name, ce=True)


@pytest.mark.parametrize("pattern", [(1, 1), (1, 2), (2, 1), (2, 2), (5, 3), (2, 0), (0, 2)])
def test_every_kind_of_group_alone(pattern):
    AlignedCase([pattern]).check("reverse_kl")
    AlignedCase([pattern] * 3).check("jsd", ce=True)


def test_single_precision():
    for name, parameters in ALL:
        case = AlignedCase(PATTERNS * 3, vocab=1200, teacher_vocab=900, common=700, dtype=torch.float32)
        case.check(name, parameters, ce=True, rtol=3e-4, atol=3e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_heads(dtype):
    for name in DIVERGENCES:
        case = AlignedCase(PATTERNS * 3, vocab=300, teacher_vocab=200, common=150, dtype=dtype, bias=False)
        case.weights = case.weights * 1e-6
        output = case.fused(name)
        _, per_token = case.expected(name)
        torch.testing.assert_close(output.divergence.double(), per_token, rtol=1e-4, atol=1e-5)
        scale = 2.0**14
        hidden, weight = torch.autograd.grad(output.loss * scale, (case.hidden, case.weight))
        assert hidden.dtype == weight.dtype == dtype
        twin = AlignedCase(PATTERNS * 3, vocab=300, teacher_vocab=200, common=150, dtype=dtype, bias=False)
        twin.hidden, twin.weight = (x.detach().double().requires_grad_() for x in (case.hidden, case.weight))
        twin.head, twin.weights = Head(twin.weight), case.weights
        expected = torch.autograd.grad(twin.expected(name)[0], (twin.hidden, twin.weight))
        for ours, wanted in zip((hidden, weight), expected, strict=True):
            error = (ours.double() / scale - wanted).norm() / wanted.norm()
            assert error < 2 * torch.finfo(dtype).eps, (name, float(error))


def same_tokenizer(case, shuffle):
    """A dense signal at all targets, and the same teacher with its ids in another order, aligned one to one."""
    n, vocab = case.targets.shape[0], case.weight.shape[0]
    dense = DenseSignal(
        case.signal.teacher.hidden, Head(case.signal.teacher.head.weight, case.signal.teacher.head.bias)
    )
    order = torch.randperm(vocab) if shuffle else torch.arange(vocab)  # student's id -> teacher's id
    weight, bias = (torch.empty_like(x).index_copy_(0, order, x) for x in (dense.head.weight, dense.head.bias))
    one = torch.arange(n)
    aligned = AlignedSignal(
        DenseSignal(dense.hidden, Head(weight, bias)),
        order[case.targets],
        one[:0].new_tensor(range(vocab)),
        order,
        one,
        one,
        one,
    )
    return dense, aligned


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("options", [{}, {"ce": True, "loss_temperature": 1.4, "report_kls": True, "chunk_size": 4}])
def test_the_same_tokenizer_gives_the_ordinary_loss(shuffle, options):
    for name, parameters in ALL:
        case = AlignedCase([(1, 1)] * 13, vocab=50, teacher_vocab=50, dtype=torch.float32)
        dense, aligned = same_tokenizer(case, shuffle)
        found = []
        for case.signal in (dense, aligned):
            output = case.fused(name, parameters, **options)
            found.append((output, torch.autograd.grad(output.loss, case.leaves())))
        (ordinary, gradients), (output, ours) = found
        for field in ("loss", "divergence", "student_entropy", "teacher_entropy", "agreement", "teacher_log_prob"):
            torch.testing.assert_close(getattr(output, field), getattr(ordinary, field), rtol=1e-6, atol=1e-6)
        for field in ("cross_entropy", "forward_kl", "reverse_kl") if "ce" in options else ():
            torch.testing.assert_close(getattr(output, field), getattr(ordinary, field), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours, gradients, rtol=1e-6, atol=1e-6)


# --- one model of symbols, seen through two codes ----------------------------------------

BYTES = ["0", "1", "2", "3"]
PAIRS = [a + b for a in BYTES for b in BYTES]
LEFT, RIGHT = ["0", "1", "2", "30", "31", "32", "33"], ["0", "1", "3", "20", "21", "230", "231", "232", "233", "22"]


def view(code, chain, text):
    """Head, hidden states and targets of a Markov chain's tokens: exactly its probabilities, by the symbol before."""
    weight = torch.zeros(len(code), len(BYTES), dtype=chain.dtype)
    for v, token in enumerate(code):
        for before in range(len(BYTES)):
            at = before
            for symbol in token:
                weight[v, before] += chain[at, int(symbol)].log()
                at = int(symbol)
    assert torch.allclose(weight.exp().sum(0), torch.ones(len(BYTES), dtype=chain.dtype)), "no token begins another"
    targets, before, position = [], [], 1
    while position < len(text):
        token = next((token for token in code if text.startswith(token, position)), None)
        if token is None:
            break
        targets.append(code.index(token))
        before.append(int(text[position - 1]))
        position += len(token)
    return weight, torch.eye(len(BYTES), dtype=chain.dtype)[before], targets


def groups_of(*lengths):
    """Tokens on both sides between two common borders."""
    ends = [torch.tensor(of).cumsum(0).tolist() for of in lengths]
    common = sorted(set(ends[0]) & set(ends[1]))
    counts = [[0, *(sum(end <= border for end in side) for border in common)] for side in ends]
    patterns = [tuple(side[i + 1] - side[i] for side in counts) for i in range(len(common))]
    rest = [len(side) - count[-1] for side, count in zip(ends, counts, strict=True)]
    return [*patterns, (rest[0], 0), (0, rest[1])]


@pytest.mark.parametrize(
    ("left", "right"), [(BYTES, PAIRS), (PAIRS, BYTES), (LEFT, RIGHT), (RIGHT, LEFT), (RIGHT, BYTES)]
)
def test_two_views_of_one_model_have_no_loss_and_no_gradient(left, right):
    generator = torch.Generator().manual_seed(3)
    chain = torch.rand(4, 4, generator=generator, dtype=torch.float64).add(0.1)
    chain /= chain.sum(-1, keepdim=True)
    text = "".join(map(str, torch.randint(0, 4, (200,), generator=generator).tolist()))
    weight, hidden, targets = view(left, chain, text)
    teacher_weight, teacher_hidden, own = view(right, chain, text)
    patterns = groups_of([len(left[v]) for v in targets], [len(right[v]) for v in own])
    assert len({*patterns}) > 1 or PAIRS in (left, right)
    both = [token for token in left if token in right]
    # A symbol that begins longer tokens on the other side would say something else there.
    assert all(not any(other != token and other.startswith(token) for other in left + right) for token in both)
    ids = [torch.tensor([code.index(token) for token in both], dtype=torch.long) for code in (left, right)]
    for dtype in (torch.float64, torch.float32):
        signal = AlignedSignal(
            DenseSignal(teacher_hidden.to(dtype), Head(teacher_weight.to(dtype))),
            torch.tensor(own),
            *ids,
            *numbered(patterns),
        )
        for name, parameters in ALL:
            leaves = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
            settings = LossSettings(make_divergence(name, **parameters))
            weights = torch.full((len(targets),), 1 / len(targets))
            output = fused_divergence(leaves[0], Head(leaves[1]), signal, torch.tensor(targets), weights, settings)
            gradients = torch.autograd.grad(output.loss, leaves)
            assert abs(output.loss.item()) < 1e-6, name
            if name != "total_variation":  # |p - q| has a kink where they are equal: the sign is that of a rounding
                assert max(gradient.abs().max().item() for gradient in gradients) < 1e-6, name
            assert (output.kinds != NOT_COMPARED).sum() >= len(targets) - 3


def test_joined_tokens_make_the_digits_of_one_model_agree():
    """The student writes two digits as one token, the teacher each by itself: both codes of one chain of symbols, the
    longest token first, as tokenizers write. What a digit by itself says about the symbol after it is left out: the
    student goes by the last symbol alone."""
    generator = torch.Generator().manual_seed(7)
    digits = 3  # symbols 0 to 2; symbol 3 is a letter
    chain = torch.rand(4, 4, generator=generator, dtype=torch.float64).add(0.1)
    chain /= chain.sum(-1, keepdim=True)
    text = [*torch.randint(0, 4, (60,), generator=generator).tolist(), 3]
    code = [*((s,) for s in range(4)), *((a, b) for a in range(digits) for b in range(digits))]
    weight = torch.full((len(code), 4), -torch.inf, dtype=torch.float64)
    for before in range(4):
        for v, token in enumerate(code):
            first = chain[before, token[0]]
            if len(token) == 2:
                weight[v, before] = (first * chain[token[0], token[1]]).log()
            else:  # a digit by itself is the last one: a letter follows
                weight[v, before] = (first * (chain[token[0], 3] if token[0] < digits else 1)).log()
    targets, places, patterns, at = [], [], [], 1
    while at < len(text):
        pair = tuple(text[at : at + 2])
        token = pair if len(pair) == 2 and max(pair) < digits else pair[:1]
        targets.append(code.index(token))
        places.append(text[at - 1])
        patterns.append((1, len(token)))
        at += len(token)
    one, eye = torch.arange(4), torch.eye(4, dtype=torch.float64)
    joined = torch.tensor([[code.index(token) for token in code[4:]], [token[0] for token in code[4:]]])
    signal = AlignedSignal(
        DenseSignal(eye[text[:-1]], Head(chain.log().t().contiguous())),
        torch.tensor(text[1:]),
        one,
        one,
        *numbered(patterns),
    )
    for name, parameters in ALL:
        found = {}
        for joins in (None, joined):
            leaf = eye[places].requires_grad_()
            settings = LossSettings(make_divergence(name, **parameters))
            weights = torch.full((len(targets),), 1 / len(targets))
            own = replace(signal, student_joined=joins)
            output = fused_divergence(leaf, Head(weight), own, torch.tensor(targets), weights, settings)
            (gradient,) = torch.autograd.grad(output.loss, leaf)
            found[joins is None] = output.loss.item(), gradient.abs().max().item()
        assert found[True][0] > 1e-3
        assert abs(found[False][0]) < 1e-6, name
        assert found[False][1] < 1e-6 or name == "total_variation", name


@pytest.mark.parametrize("left", [0, 2])
def test_joined_tokens_are_their_definition(left):
    for name, parameters in ALL:
        for side in ("student", "teacher", "both"):
            case, generator = AlignedCase(), torch.Generator().manual_seed(2)
            change = {}
            for one, vocab in (("student", 23), ("teacher", 19)):
                if side in (one, "both"):
                    ids = set(getattr(case.signal, f"{one}_ids").tolist())
                    others = torch.tensor([v for v in range(vocab) if v not in ids][left:])
                    change[f"{one}_joined"] = torch.stack(
                        [others, torch.randint(0, 11, others.shape, generator=generator)]
                    )
            case.signal = replace(case.signal, **change)
            case.check(name, parameters, ce=True, chunk_size=5)


# --- where the gradient goes ----------------------------------------


@pytest.mark.parametrize("pattern", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (3, 2)])
@pytest.mark.parametrize("beginnings", [(1, 1), (4, 1), (1, 4), (3, 5)])
def test_the_gradient_lands_on_the_places_that_predict_the_completion(pattern, beginnings):
    """Whole sequences behind prompts of different lengths (one with a BOS, another question): a token is predicted by
    the place before it."""
    patterns = [(1, 1), pattern, (2, 0), (1, 1)]
    case = AlignedCase(patterns)
    n, m = case.targets.numel(), case.signal.targets.numel()
    places, generator = [], torch.Generator().manual_seed(5)
    for prompt, count in zip(beginnings, (n, m), strict=True):
        places.append(torch.arange(prompt - 1, prompt - 1 + count))
    hidden = torch.randn(beginnings[0] + n + 3, DS, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.full((beginnings[1] + m + 3, case.signal.teacher.hidden.shape[1]), float("nan")).double()
    teacher[places[1]] = case.signal.teacher.hidden
    case.signal = replace(case.signal, teacher=replace(case.signal.teacher, hidden=teacher[places[1]]))
    case.hidden = hidden[places[0]]
    for name in DIVERGENCES:
        (gradient,) = torch.autograd.grad(case.fused(name).loss, hidden, retain_graph=True)
        compared = places[0][(case.signal.group >= 0)]
        assert _where_not_zero(gradient) == compared.tolist(), name
        torch.testing.assert_close(gradient, torch.autograd.grad(case.expected(name)[0], hidden, retain_graph=True)[0])


def _where_not_zero(gradient):
    return gradient.abs().sum(-1).gt(0).nonzero()[:, 0].tolist()


def test_tokens_that_are_not_compared_have_their_cross_entropy_alone():
    case = AlignedCase([(2, 0), (1, 1), (0, 1), (3, 0)])
    output = case.check("jsd", ce=True)
    assert output.kinds.tolist() == [NOT_COMPARED] * 2 + [IN_FULL] + [NOT_COMPARED] * 3
    assert output.divergence[output.kinds == NOT_COMPARED].eq(0).all()
    none = AlignedCase([(2, 0), (0, 3)])
    assert none.check("jsd").loss.item() == 0
    none.check("jsd", ce=True)


@pytest.mark.parametrize("patterns", [[], [(0, 3)]])
def test_no_targets_is_a_zero_that_reaches_every_parameter(patterns):
    case = AlignedCase(patterns)
    output = case.fused(ce=True, report_kls=True)
    assert output.loss.item() == 0
    output.loss.backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in case.leaves())
    assert output.divergence.shape == output.cross_entropy.shape == output.kinds.shape == (0,)


def test_statistics():
    case = AlignedCase(PATTERNS * 2)
    output = case.fused("jsd", ce=True, report_kls=True, loss_temperature=1.6, chunk_size=4)
    (z, zt), signal = case.logits(), case.signal
    log_p, log_q = z.detach().log_softmax(-1), zt.log_softmax(-1)
    torch.testing.assert_close(output.student_entropy, -(log_p.exp() * log_p).sum(-1))
    torch.testing.assert_close(output.cross_entropy, -log_p.gather(1, case.targets[:, None])[:, 0])
    own = log_q.gather(1, signal.targets[:, None])[:, 0]
    pairs = dict(zip(signal.student_ids.tolist(), signal.teacher_ids.tolist(), strict=True))
    for i, (at, number) in enumerate(zip(signal.border.tolist(), signal.group.tolist(), strict=True)):
        n, m = (int((side == number).sum()) for side in (signal.group, signal.teacher_group))
        kind = NOT_COMPARED if number < 0 else IN_FULL if n == m == 1 else IN_TEXT
        assert output.kinds[i] == kind
        wanted = own[signal.teacher_group == number].sum() / n if number >= 0 else torch.tensor(0.0)
        torch.testing.assert_close(output.teacher_log_prob[i], wanted.to(own.dtype))
        if at < 0:
            for name in ("teacher_entropy", "agreement", "forward_kl", "reverse_kl"):
                assert getattr(output, name)[i] == 0
            continue
        torch.testing.assert_close(output.teacher_entropy[i], -(log_q[at].exp() * log_q[at]).sum())
        assert output.agreement[i] == (pairs.get(int(log_p[i].argmax())) == int(log_q[at].argmax()))
        p, q = case.outcomes((z[i] / 1.6).softmax(-1), (zt[at] / 1.6).softmax(-1))
        torch.testing.assert_close(output.forward_kl[i], oracle.kl(q, p).detach())
        torch.testing.assert_close(output.reverse_kl[i], oracle.kl(p, q).detach())
    parts = (case.weights * output.divergence).sum() + (case.ce_weights * output.cross_entropy).sum()
    torch.testing.assert_close(output.loss.detach(), parts)


def test_the_cut_into_chunks_and_calls_does_not_matter():
    whole = AlignedCase(PATTERNS * 2)
    wanted = whole.fused(ce=True)
    gradients = torch.autograd.grad(wanted.loss, whole.leaves())
    for chunk in (1, 2, 5, 100):
        case = AlignedCase(PATTERNS * 2)
        output = case.fused(ce=True, chunk_size=chunk)
        torch.testing.assert_close(output.loss, wanted.loss)
        torch.testing.assert_close(torch.autograd.grad(output.loss, case.leaves()), gradients)


def test_a_part_beside_a_teacher_of_the_same_tokenizer():
    case, whole = AlignedCase(), AlignedCase([(1, 1)] * 20)
    n = case.targets.numel()
    order = torch.randperm(n + 20, generator=torch.Generator().manual_seed(1))
    other = DenseSignal(whole.signal.teacher.hidden, Head(torch.randn(23, 9, dtype=torch.float64)))
    split = SplitSignal([SignalPart(order[:n], case.signal), SignalPart(order[n:], other)])
    apart = (case.hidden, case.targets, case.weights), (whole.hidden, whole.targets, whole.weights)
    hidden, targets, weights = (torch.cat(pair)[order.argsort()] for pair in zip(*apart, strict=True))
    settings = LossSettings(make_divergence("jsd"))
    output = fused_by_part(hidden, case.head, split, targets, weights, settings)
    wanted = (
        case.fused("jsd"),
        fused_divergence(whole.hidden, case.head, other, whole.targets, whole.weights, settings),
    )
    loss = wanted[0].loss + wanted[1].loss
    torch.testing.assert_close(output.loss, loss)
    assert torch.equal(output.kinds[order], torch.cat([wanted[0].kinds, torch.full((20,), IN_FULL)]).to(torch.int8))
    leaves = [*case.leaves(), whole.hidden]
    torch.testing.assert_close(torch.autograd.grad(output.loss, leaves), torch.autograd.grad(loss, leaves))


def test_trained_tied_and_frozen_heads():
    case = AlignedCase(bias=False)
    embedding = nn.Parameter(case.weight.detach().clone())

    def gradient(run):
        case.hidden, case.weight = embedding[case.targets.flip(0)], embedding
        case.head = Head(embedding)
        return torch.autograd.grad(run(), embedding)[0]

    torch.testing.assert_close(gradient(lambda: case.fused(ce=True).loss), gradient(lambda: case.expected(ce=True)[0]))
    frozen, whole = AlignedCase(), AlignedCase()
    frozen.weight.requires_grad_(False)
    frozen.bias.requires_grad_(False)
    frozen.fused().loss.backward()
    assert frozen.weight.grad is None
    torch.testing.assert_close(frozen.hidden.grad, torch.autograd.grad(whole.fused().loss, whole.hidden)[0])
    with torch.no_grad():
        output = whole.fused()
    assert not output.loss.requires_grad
    torch.testing.assert_close(output.loss, frozen.fused().loss.detach())


def test_autocast_decides_the_dtype_of_the_products():
    case = AlignedCase(dtype=torch.float32, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = case.fused()
    halves = AlignedCase(dtype=torch.float32, bias=False)
    for tensor in (halves.hidden, halves.weight):
        tensor.data = tensor.data.bfloat16().float()
    head, hidden = halves.signal.teacher.head, halves.signal.teacher.hidden.bfloat16().float()
    head = replace(head, weight=head.weight.bfloat16().float(), bias=head.bias.bfloat16().float())
    halves.signal = replace(halves.signal, teacher=DenseSignal(hidden, head))
    torch.testing.assert_close(rounded.divergence, halves.fused().divergence, rtol=1e-4, atol=1e-5)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(rounded.loss, (case.hidden, case.weight)))


def test_very_sure_models_stay_finite():
    for name, parameters in ALL:
        case = AlignedCase(PATTERNS * 2, dtype=torch.float32)
        with torch.no_grad():
            case.weight.mul_(3e3)
            case.signal.teacher.head.weight.mul_(4e3)
        output = case.fused(name, parameters, ce=True)
        tensors = [output.loss, *torch.autograd.grad(output.loss, case.leaves()), output.divergence]
        assert all(torch.isfinite(tensor).all() for tensor in tensors), name


def test_weights_are_left_alone():
    case = AlignedCase()
    before = case.weights.clone(), case.ce_weights.clone()
    case.fused(ce=True)
    assert torch.equal(before[0], case.weights)
    assert torch.equal(before[1], case.ce_weights)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher_ids": torch.arange(3)}, "11 common tokens of the student and 3 of the teacher"),
        ({"border": torch.full((TOKENS,), -1)}, "do not lead from each group's first token"),
        ({"teacher_group": torch.full((17,), -1)}, "tokens of one side only"),
        ({"group": torch.zeros(3, dtype=torch.long)}, "3 groups of the student's"),
        ({"targets": torch.full((17,), 19)}, "teacher's target is outside the 19"),
        ({"teacher_joined": torch.tensor([[19], [0]])}, "joined token of the teacher's is outside the 19"),
        ({"student_joined": torch.tensor([[2], [11]])}, "common token's place is outside the 11"),
        ({"student_ids": torch.arange(20, 31)}, "common token's id is outside the 23"),
    ],
)
def test_signals_that_do_not_fit_are_refused(change, words):
    case = AlignedCase()
    assert case.signal.teacher_group.numel() == 17
    case.signal = replace(case.signal, **change)
    with pytest.raises(ValueError, match=words):
        case.fused()


def test_settings_that_mean_nothing_here_are_refused():
    with pytest.raises(ValueError, match="shared_vocab=5 has no effect on a teacher with another tokenizer"):
        AlignedCase().fused(shared_vocab=5)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_groups_of_tokens_are_weighed(frozen):
    """One factor for each group, from what the pass says, as `gkd.training.token_weights` gives them."""
    case = AlignedCase(PATTERNS * 2)
    groups = TokenGroups(case.signal.group, torch.device("cpu"))
    factors = groups.mean(torch.rand(case.targets.shape, generator=torch.Generator().manual_seed(6)).double() + 0.2)
    for number in set(case.signal.group.tolist()) - {-1}:
        assert len(set(factors[case.signal.group == number].tolist())) == 1
    if frozen:
        case.weight.requires_grad_(False)
        case.bias.requires_grad_(False)
    settings, ce = LossSettings(make_divergence("jsd")), case.ce_weights
    arguments = (case.hidden, case.head, case.signal, case.targets, case.weights, settings)
    output = fused_divergence(*arguments, ce_weights=ce, weigh=lambda output: factors)
    case.weights, case.ce_weights = case.weights * factors, ce * factors
    wanted = case.expected("jsd", ce=True)[0]
    torch.testing.assert_close(output.loss, wanted)
    leaves = [case.hidden] if frozen else case.leaves()
    torch.testing.assert_close(torch.autograd.grad(output.loss, leaves), torch.autograd.grad(wanted, leaves))
