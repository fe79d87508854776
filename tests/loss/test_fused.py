"""The fused pass against the float64 oracle: values and gradients for every divergence, size and model quirk."""

import itertools

import oracle
import pytest
import torch
from fused_case import Case, N, V
from torch import nn
from variants import ALL

from gkd.loss import DIVERGENCES, Divergence, make_divergence
from gkd.loss.fused import fused_divergence
from gkd.loss.settings import FusedOutput, LossSettings
from gkd.loss.signals import DenseSignal, Head, TopKSignal

TAILS = ["bucket", "renormalize", "renormalize_both", "ignore"]


def goes_with(name, parameters, tail, k):
    divergence = make_divergence(name, **parameters)
    if tail == "ignore":
        return divergence.name == "forward_kl"
    if tail == "renormalize_both":
        return k > 1
    return tail == "bucket" or not divergence.needs_teacher_support


@pytest.mark.parametrize("k", [1, 5, V - 1, V, V + 9])
@pytest.mark.parametrize("tail", TAILS)
def test_top_k_of_a_dense_teacher(k, tail):
    for name, parameters in ALL:
        if not goes_with(name, parameters, tail, k):
            continue
        # The oracle's tail is 1 - sum: eight digits are enough to tell the formulas apart.
        case = Case()
        case.check(name, parameters, teacher_top_k=k, top_k_tail=tail, loss_temperature=1.5, rtol=1e-7, atol=1e-9)


def test_all_of_the_vocabulary_as_top_k_is_the_dense_loss_exactly():
    dense, top = Case(dtype=torch.float32), Case(dtype=torch.float32)
    a, b = dense.fused(), top.fused(teacher_top_k=V)
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(*(torch.autograd.grad(o.loss, c.hidden)[0] for o, c in ((a, dense), (b, top))))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("k", [1, 6, V])
def test_top_k_signal_is_the_dense_teacher_cut(k, tail):
    for name, parameters in ALL:
        if not goes_with(name, parameters, tail, k):
            continue
        dense, sparse = Case(), Case()
        top = dense.logits()[1].log_softmax(-1).topk(k, dim=-1)
        shuffle = torch.randperm(k, generator=torch.Generator().manual_seed(1))  # the order of the ids is free
        sparse.signal = TopKSignal(top.indices[:, shuffle], top.values[:, shuffle])
        options = {"ce": True, "report_kls": True}
        expected = dense.fused(name, parameters, teacher_top_k=k, top_k_tail=tail, **options)
        output = sparse.fused(name, parameters, top_k_tail=tail, **options)
        for field in ("loss", "divergence", "cross_entropy", "student_entropy", "agreement", "forward_kl"):
            torch.testing.assert_close(getattr(output, field), getattr(expected, field), rtol=1e-6, atol=1e-8)
        pairs = zip(
            torch.autograd.grad(output.loss, sparse.leaves()),
            torch.autograd.grad(expected.loss, dense.leaves()),
            strict=True,
        )
        for gradient, wanted in pairs:
            torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-8)
        hit = (top.indices == dense.targets[:, None]).any(-1)
        torch.testing.assert_close(output.teacher_log_prob[hit], expected.teacher_log_prob[hit])
        assert (output.teacher_log_prob >= expected.teacher_log_prob - 1e-9).all()
        assert (output.teacher_entropy <= expected.teacher_entropy + 1e-6).all()


PAIR = (3, V - 2)  # the student ends a turn with the one, the teacher with the other


@pytest.mark.parametrize("options", [{"chunk_size": 5, "ce": True}, {"teacher_top_k": 4}, {"shared_vocab": V - 1}])
def test_two_tokens_of_the_teacher_in_each_others_place(options):
    for name, parameters in ALL:
        case, plain = Case(), Case()
        for one in (case, plain):
            one.targets = one.targets.clamp(max=V - 2)
            one.targets[:6] = torch.tensor([*PAIR, *PAIR, 0, 1])
        case.signal = case.signal.exchanging(PAIR)
        output = case.check(name, parameters, rtol=1e-7, atol=1e-9, **options)
        wanted = case.logits()[1][:, : options.get("shared_vocab")].log_softmax(-1)
        torch.testing.assert_close(output.teacher_log_prob, wanted.gather(1, case.targets[:, None])[:, 0])
        assert not torch.allclose(output.loss, plain.fused(name, parameters, **options).loss)


def test_two_tokens_exchanged_twice_are_where_they_were():
    case, plain = Case(), Case()
    case.signal = case.signal.exchanging(PAIR).exchanging(PAIR)
    assert torch.equal(case.fused().loss, plain.fused().loss)


def test_exchanged_tokens_of_a_top_k_signal_are_those_of_the_dense_one():
    for k in (1, 6, V):
        dense, sparse = Case(), Case()
        top = dense.logits()[1].log_softmax(-1).topk(k, dim=-1)
        dense.signal = dense.signal.exchanging(PAIR)
        sparse.signal = TopKSignal(top.indices, top.values).exchanging(PAIR)
        expected, output = dense.fused(teacher_top_k=k, ce=True), sparse.fused(ce=True)
        torch.testing.assert_close(output.divergence, expected.divergence, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(output.agreement, expected.agreement)


def test_a_token_that_is_not_compared_cannot_stand_for_another():
    case = Case()
    case.signal = case.signal.exchanging((3, V - 1))
    with pytest.raises(ValueError, match="cannot stand for each other: not both are among the 36 compared tokens"):
        case.fused(shared_vocab=V - 1)


def test_top_k_signal_can_be_cut_further():
    case, wide = Case(), Case()
    top = case.logits()[1].log_softmax(-1).topk(9, dim=-1)
    case.signal, wide.signal = TopKSignal(top.indices[:, :4], top.values[:, :4]), TopKSignal(*reversed(top))
    torch.testing.assert_close(case.fused().loss, wide.fused(teacher_top_k=4).loss)


def test_tail_bucket_never_exceeds_the_whole_divergence():
    for name in ("forward_kl", "reverse_kl", "jsd", "total_variation"):
        whole = Case(n=40).fused(name).divergence
        previous = torch.zeros_like(whole)
        for k in (1, 3, 10, 30):
            part = Case(n=40).fused(name, teacher_top_k=k).divergence
            assert (part <= whole + 1e-9).all()
            assert (part >= previous - 1e-9).all(), "a finer partition sees more"
            previous = part


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "renormalize_both"])
def test_top_k_is_never_negative_nor_wild_with_a_peaked_teacher(tail):
    case = Case(n=30, dtype=torch.float32)
    with torch.no_grad():
        case.signal.head.weight.mul_(200)  # tails far below the resolution of 1 - sum
        case.weight.mul_(50)
    for name in ("jsd", "forward_kl", "total_variation", "skew_forward_kl"):
        output = case.fused(name, teacher_top_k=3, top_k_tail=tail)
        assert (output.divergence >= 0).all()
        gradients = torch.autograd.grad(output.loss, case.leaves())
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_single_precision():
    for name, parameters in ALL:
        Case(n=40, vocab=1200, dtype=torch.float32).check(name, parameters, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_single(dtype):
    """Against float64 of the same half-precision factors: what is left is one rounding of the [C, V] gradient."""
    for name in DIVERGENCES:
        case = Case(n=40, vocab=300, dtype=dtype, bias=False)
        case.weights = case.weights * 1e-6  # a token's weight in a large batch: underflows in fp16 if applied early
        output = case.fused(name)
        assert output.divergence.dtype == torch.float32
        z, zt = (logits.detach() for logits in case.logits())
        z.requires_grad_()
        per_token = oracle.divergence(name, z.softmax(-1), zt.softmax(-1))
        torch.testing.assert_close(output.divergence.double(), per_token, rtol=1e-4, atol=1e-5)
        (by_logits,) = torch.autograd.grad((case.weights * per_token).sum(), z)
        scale = 2.0**14  # what a gradient scaler does
        hidden, weight = torch.autograd.grad(output.loss * scale, (case.hidden, case.weight))
        assert hidden.dtype == weight.dtype == dtype
        eps = torch.finfo(dtype).eps
        for ours, expected in (
            (hidden, by_logits @ case.weight.double()),
            (weight, by_logits.t() @ case.hidden.double()),
        ):
            error = (ours.double() / scale - expected).norm() / expected.norm()
            assert error < 2 * eps, (name, float(error))


def test_nearly_equal_models_in_bf16_are_not_negative():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5000, 64, generator=generator).bfloat16()
    hidden = torch.randn(50, 64, generator=generator).mul(0.3).bfloat16()
    for nudge, (name, parameters) in itertools.product((0.0, 1e-3, 1e-2), ALL):
        other = (hidden.float() * (1 + nudge)).bfloat16()
        settings_ = LossSettings(make_divergence(name, **parameters))
        signal, targets = DenseSignal(other, Head(weight)), torch.zeros(50, dtype=torch.long)
        output = fused_divergence(hidden, Head(weight), signal, targets, torch.ones(50), settings_)
        assert (output.divergence >= -1e-6).all(), name


def test_autocast_decides_the_dtype_of_the_products():
    case = Case(dtype=torch.float32, bias=False, n=64)
    exact = case.fused("forward_kl")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = case.fused("forward_kl")
    z = case.hidden.bfloat16().double() @ case.weight.bfloat16().double().t()
    head = case.signal.head
    zt = case.signal.hidden.bfloat16().double() @ head.weight.bfloat16().double().t() + head.bias.bfloat16().double()
    expected = oracle.divergence("forward_kl", z.softmax(-1), zt.softmax(-1))
    assert rounded.divergence.dtype == torch.float32
    torch.testing.assert_close(rounded.divergence.double(), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rounded.divergence, exact.divergence, rtol=1e-4)
    gradient, weight_gradient = torch.autograd.grad(rounded.loss, (case.hidden, case.weight))
    assert gradient.dtype == weight_gradient.dtype == torch.float32


def test_logits_of_ten_thousand():
    for name, parameters in ALL:
        case = Case(dtype=torch.float32)
        with torch.no_grad():
            case.weight.mul_(3e3)
            case.signal.head.weight.mul_(4e3)
        output = case.fused(name, parameters, ce=True)
        tensors = [output.loss, *torch.autograd.grad(output.loss, case.leaves()), output.student_entropy]
        assert all(torch.isfinite(tensor).all() for tensor in tensors), name


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "adaptive_kl"])
@pytest.mark.parametrize("options", [{}, {"loss_temperature": 1.7}, {"teacher_top_k": 3}])
def test_gradcheck(name, options):
    case = Case(n=3, vocab=11, softcap=4.0, scale=0.8)
    options = LossSettings(make_divergence(name), chunk_size=2, **options)

    def loss(hidden, weight, bias):
        head = Head(weight, bias, case.head.logit_scale, case.head.softcap)
        output = fused_divergence(
            hidden, head, case.signal, case.targets, case.weights, options, ce_weights=case.ce_weights
        )
        return output.loss

    assert torch.autograd.gradcheck(loss, (case.hidden, case.weight, case.bias))


def test_no_targets_is_a_zero_that_reaches_every_parameter():
    case = Case(n=0)
    case.check(ce=True, report_kls=True)
    output = case.fused(ce=True, report_kls=True)
    assert output.loss.item() == 0
    output.loss.backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in case.leaves())
    assert output.divergence.shape == output.cross_entropy.shape == (0,)


def test_all_masked_is_a_zero_gradient():
    case = Case()
    case.weights.zero_()
    case.ce_weights.zero_()
    case.check(ce=True)
    output = case.fused(ce=True)
    assert all(not gradient.any() for gradient in torch.autograd.grad(output.loss, case.leaves()))
    assert bool((output.divergence > 0).all()), "the figures are still those of the tokens"


def test_frozen_head_costs_no_product_and_gets_no_gradient():
    products, aten = [], torch.ops.aten

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (aten.mm.out, aten.mm.default, aten.addmm.out, aten.addmm_.default):
                products.append(func)
            return func(*args, **(kwargs or {}))

    def count(case):
        products.clear()
        with Count():
            output = case.fused("jsd", chunk_size=N)
        return len(products), output

    trained, frozen, evaluated = (Case(bias=False) for _ in range(3))
    frozen.weight.requires_grad_(False)
    assert count(trained)[0] == 4
    number, output = count(frozen)
    assert number == 3
    output.loss.backward()
    assert frozen.weight.grad is None
    wanted = torch.autograd.grad(trained.fused("jsd").loss, trained.hidden)[0]
    torch.testing.assert_close(frozen.hidden.grad, wanted)
    with torch.no_grad():
        number, output = count(evaluated)
    assert number == 2
    assert not output.loss.requires_grad


def test_only_the_head_may_be_trained():
    case, whole = Case(), Case()
    case.hidden = case.hidden.detach()
    gradients = torch.autograd.grad(case.fused().loss, (case.weight, case.bias))
    expected = torch.autograd.grad(whole.fused().loss, (whole.weight, whole.bias))
    torch.testing.assert_close(gradients, expected)


def test_backward_needs_no_head():
    """ZeRO-3 gathers the head around the forward pass only; after it the weight is an empty shell."""
    case, whole = Case(bias=False), Case(bias=False)
    weight = nn.Parameter(case.weight.detach().clone())
    case.head = Head(weight)
    loss = case.fused().loss
    with torch.no_grad():
        weight.fill_(float("nan"))
    (gradient,) = torch.autograd.grad(loss, case.hidden)
    torch.testing.assert_close(gradient, torch.autograd.grad(whole.fused().loss, whole.hidden)[0])


def test_a_second_backward_gives_the_same_gradient():
    case = Case()
    loss = case.fused().loss
    first = torch.autograd.grad(3 * loss, case.leaves(), retain_graph=True)
    second = torch.autograd.grad(3 * loss, case.leaves())
    torch.testing.assert_close(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, case.leaves())


def test_tied_head_adds_to_the_embedding_gradient():
    case = Case(bias=False)
    embedding = nn.Parameter(case.weight.detach().clone())
    tokens = case.targets.flip(0)

    def loss(run):
        case.hidden, case.weight = embedding[tokens], embedding
        case.head = Head(embedding)
        return torch.autograd.grad(run(), embedding)[0]

    torch.testing.assert_close(loss(lambda: case.fused().loss), loss(lambda: case.expected()[0]))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_statistics(temperature):
    case = Case(n=30, vocab=3)  # so few that the two models sometimes agree
    output = case.fused("jsd", ce=True, report_kls=True, loss_temperature=temperature, chunk_size=8)
    z, zt = (t.detach() for t in case.logits())
    for name, logits in (("student_entropy", z), ("teacher_entropy", zt)):
        p = logits.softmax(-1)
        torch.testing.assert_close(getattr(output, name), -(p * p.log()).sum(-1))
    chosen = zt.log_softmax(-1).gather(1, case.targets[:, None])[:, 0]
    torch.testing.assert_close(output.teacher_log_prob, chosen)
    ce = nn.functional.cross_entropy(z, case.targets, reduction="none")
    torch.testing.assert_close(output.cross_entropy, ce)
    torch.testing.assert_close(output.agreement, (z.argmax(-1) == zt.argmax(-1)).double())
    assert 0 < output.agreement.mean() < 1
    s, t = (z / temperature).softmax(-1), (zt / temperature).softmax(-1)
    torch.testing.assert_close(output.forward_kl, oracle.kl(t, s))
    torch.testing.assert_close(output.reverse_kl, oracle.kl(s, t))
    plain = case.fused("jsd", loss_temperature=temperature)
    assert plain.cross_entropy is plain.forward_kl is plain.reverse_kl is None


def test_an_integrand_alone_is_enough(monkeypatch):
    bare = Divergence("bare", make_divergence("jsd").phi)
    monkeypatch.setitem(DIVERGENCES, "bare", lambda: bare)
    a, b = Case(), Case()
    new, known = a.fused("bare", ce=True, teacher_top_k=5), b.fused("jsd", ce=True, teacher_top_k=5)
    torch.testing.assert_close(new.loss, known.loss)
    torch.testing.assert_close(torch.autograd.grad(new.loss, a.leaves()), torch.autograd.grad(known.loss, b.leaves()))


def test_fifty_steps_end_in_the_weights_of_the_dense_loss():
    def train(fused):
        case = Case(dtype=torch.float32, vocab=101, n=32)
        parameters = [nn.Parameter(leaf.detach().clone()) for leaf in case.leaves()]
        optimizer = torch.optim.Adam(parameters, lr=1e-2)
        for _ in range(50):
            case.hidden, case.weight, case.bias = parameters
            case.head = Head(case.weight, case.bias)
            loss = case.fused(chunk_size=7).loss if fused else case.expected()[0].float()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return parameters

    for ours, dense in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-5)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="37 rows and the teacher's 41"):
        Case(teacher_vocab=41).fused()
    with pytest.raises(ValueError, match="shared_vocab=40 is more than the 37"):
        Case(teacher_vocab=41).fused(shared_vocab=40)
    case = Case()
    case.targets[3] = 36
    with pytest.raises(ValueError, match="target is outside the 30"):
        case.fused(shared_vocab=30)
    case.targets[3] = -100
    with pytest.raises(ValueError, match="target is outside"):
        case.fused()
    case = Case()
    case.signal = TopKSignal(torch.full((N, 2), V), torch.full((N, 2), -1.0))
    with pytest.raises(ValueError, match="top-k id is outside"):
        case.fused()
    case = Case()
    case.signal = DenseSignal(case.signal.hidden[:-1], case.signal.head)
    with pytest.raises(ValueError, match="13 hidden states, 12 rows"):
        case.fused()
    case = Case()
    case.signal = DenseSignal(case.hidden.detach(), case.signal.head)
    with pytest.raises(ValueError, match="do not fit the head's weight"):
        case.fused()


@pytest.mark.parametrize("options", [{"loss_temperature": 2.0}, {"teacher_loss_temperature": 2.0}])
def test_a_top_k_signal_has_no_temperature(options):
    case = Case()
    case.signal = TopKSignal(torch.zeros(N, 1, dtype=torch.long), torch.full((N, 1), -0.5))
    with pytest.raises(ValueError, match="temperature"):
        case.fused(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_temperature": 0.0}, r"^loss_temperature=0.0 is out of range \(0, inf\)"),
        ({"teacher_loss_temperature": -1.0}, r"^teacher_loss_temperature=-1.0 is out of range"),
        ({"teacher_top_k": 0}, "teacher_top_k=0 is out of range: use a whole number of at least 1"),
        ({"chunk_size": 0}, "chunk_size=0 is out of range: use a whole number of at least 1"),
        ({"shared_vocab": -5}, "shared_vocab=-5 is out of range: use a whole number of at least 1"),
        ({"top_k_tail": "drop"}, "bucket, renormalize"),
        ({"top_k_tail": "ignore"}, "defined for the forward KL only"),
        ({"top_k_tail": "renormalize_both", "teacher_top_k": 1}, "compares nothing with teacher_top_k=1"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LossSettings(make_divergence("jsd"), **options)


@pytest.mark.parametrize("name", ["reverse_kl", "adaptive_kl", "symmetric_kl"])
def test_a_teacher_without_tail_is_refused_where_that_is_infinite(name):
    with pytest.raises(ValueError, match="infinite"):
        LossSettings(make_divergence(name), top_k_tail="renormalize")


def test_output_is_what_the_docstring_says():
    assert isinstance(Case().fused(), FusedOutput)


# ------------------------------------------------------------------------------------------------ reduced precision


class Lowered(Case):
    """Sizes at which rounding averages out, in bf16 or fp16, with a float64 twin of the very same numbers."""

    def __init__(self, dtype, seed=0):
        super().__init__(n=32, vocab=400, dtype=dtype, seed=seed)

    def gradient(self):
        return torch.autograd.grad(self.fused(chunk_size=7).loss, self.leaves())

    def exact(self):
        return torch.autograd.grad(self.expected()[0], self.leaves())


def distance(found, exact):
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_not_rounded(dtype):
    """Rounded to bf16, they would put several per cent of noise into the gradients."""
    case = Lowered(dtype)
    eps = torch.finfo(dtype).eps
    for found, exact in zip(case.gradient(), case.exact(), strict=True):
        assert distance(found, exact) < eps  # bf16: 0.8 %
    assert float(case.fused().loss.detach()) == pytest.approx(float(case.expected()[0].detach()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_that_leave_fp32_behind(monkeypatch, dtype):
    """What CUDA's matrix products can do (torch 2.8), emulated: the same numbers, and bf16 factors all the way."""
    seen = []

    def wide(function):
        def product(*args, out_dtype=None, out=None):
            factors = args[-2:]
            seen.append((function.__name__, out_dtype, {factor.dtype for factor in factors}))
            if out_dtype is None:
                return function(*args) if out is None else function(*args, out=out)
            assert {factor.dtype for factor in factors} == {dtype}
            result = function(*args[:-2], *(factor.to(out_dtype) for factor in factors))
            return result if out is None else out.copy_(result)

        return product

    exact = Lowered(dtype).exact()
    monkeypatch.setattr("gkd.loss.projection.has_wide_products", lambda _device, _dtype: True)
    monkeypatch.setattr(torch, "mm", wide(torch.mm))
    monkeypatch.setattr(torch, "addmm", wide(torch.addmm))
    for found, expected in zip(Lowered(dtype).gradient(), exact, strict=True):
        assert distance(found, expected) < torch.finfo(dtype).eps
    assert ("mm", torch.float32, {dtype}) in seen
    # fp16's range may not hold a row's factor: there the head's gradient is multiplied in fp32
    assert (("addmm", torch.float32, {dtype}) in seen) == (dtype == torch.bfloat16)
