"""Each divergence against its definition from probabilities in float64; TRL's dense loss; the registry's errors."""

import doctest
import math
import warnings
from pathlib import Path

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.experimental.gkd import GKDTrainer as TRLTrainer
from variants import IDS, VARIANTS, logits, softmax_gradient

from gkd.loss import DIVERGENCES, Divergence, make_divergence
from gkd.loss.dense import generalized_jsd_loss


@pytest.mark.parametrize(("name", "parameters"), VARIANTS, ids=IDS)
@pytest.mark.parametrize("vocab", [2, 11, 1500])
def test_value_and_gradient_are_the_definition(name, parameters, vocab):
    z, zt = logits(3, 5, vocab, seed=1).requires_grad_(), logits(3, 5, vocab, seed=2)
    expected = oracle.divergence(name, z.softmax(-1), zt.softmax(-1), **parameters)
    (gradient,) = torch.autograd.grad(expected.sum(), z)

    divergence = make_divergence(name, **parameters)
    a, b = z.detach().log_softmax(-1), zt.log_softmax(-1)
    torch.testing.assert_close(divergence(a, b), expected.detach(), rtol=1e-11, atol=1e-12)
    assert divergence.phi_a is not None
    torch.testing.assert_close(softmax_gradient(divergence.phi_a(a, b), a.exp()), gradient, rtol=1e-9, atol=1e-12)

    p, kept = a.exp(), a.exp()
    value, slope = divergence.value_and_slope(a.clone(), b.clone(), p, b.exp())
    torch.testing.assert_close(value, expected.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(softmax_gradient(slope, p), gradient, rtol=1e-9, atol=1e-12)
    assert torch.equal(p, kept), "rows() must leave p alone"


@pytest.mark.parametrize(("name", "parameters"), VARIANTS, ids=IDS)
def test_phi_a_is_the_derivative_of_phi(name, parameters):
    divergence = make_divergence(name, **parameters)
    a, b = logits(4, 9, seed=3).log_softmax(-1).requires_grad_(), logits(4, 9, seed=4).log_softmax(-1)
    (auto,) = torch.autograd.grad(divergence.phi(a, b).sum(), a)
    ours = divergence.phi_a(a.detach(), b)
    # Up to a multiple of p, which cancels in the gradient of the logits.
    ratio = (auto - ours) / a.detach().exp()
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "parameters"), VARIANTS, ids=IDS)
def test_extreme_logits_stay_finite(name, parameters):
    z, zt = (
        logits(6, 40, seed=6, scale=1e4, dtype=torch.float32),
        logits(6, 40, seed=7, scale=1e4, dtype=torch.float32),
    )
    a, b = z.log_softmax(-1), zt.log_softmax(-1)
    divergence = make_divergence(name, **parameters)
    for value, slope in (
        divergence.value_and_slope(a.clone(), b.clone(), a.exp(), b.exp()),
        (divergence(a, b), divergence.phi_a(a, b)),
    ):
        assert torch.isfinite(value).all()
        assert torch.isfinite(slope).all()
        assert (value >= 0).all()
    if name == "forward_kl":  # p underflows to 0 here; the log-probabilities do not
        expected = divergence(z.double().log_softmax(-1), zt.double().log_softmax(-1))
        torch.testing.assert_close(value.double(), expected)


@settings(max_examples=60, deadline=None)
@given(
    variant=st.sampled_from(VARIANTS),
    vocab=st.integers(2, 60),
    scale=st.floats(0.0, 30.0),
    gap=st.floats(0.0, 1.0),
    seed=st.integers(0, 10_000),
)
def test_never_negative_and_right_in_single_precision(variant, vocab, scale, gap, seed):
    name, parameters = variant
    z = logits(3, vocab, seed=seed, scale=scale)
    zt = z + gap * logits(3, vocab, seed=seed + 1, scale=1.0)
    z, zt = z.float(), zt.float()
    a, b = z.log_softmax(-1), zt.log_softmax(-1)
    value, _ = make_divergence(name, **parameters).value_and_slope(a.clone(), b.clone(), a.exp(), b.exp())
    assert (value >= -1e-6).all()
    if name == "adaptive_kl":
        return  # where two masses straddle mu, one rounding moves a token between head and tail
    expected = make_divergence(name, **parameters)(z.double().log_softmax(-1), zt.double().log_softmax(-1))
    torch.testing.assert_close(value.double(), expected, rtol=2e-4, atol=2e-6)


def test_hand_computed_scale_of_jsd():
    teacher, student = (torch.tensor(p, dtype=torch.float64) for p in ([0.7, 0.2, 0.1], [0.4, 0.4, 0.2]))
    values = {
        beta: float(make_divergence("jsd", beta=beta)(student.log(), teacher.log())) for beta in (0, 0.1, 0.5, 0.9, 1)
    }
    # 0.7 ln(7/4) + 0.2 ln(1/2) + 0.1 ln(1/2), and 0.4 ln(4/7) + 0.4 ln 2 + 0.2 ln 2
    assert values[0] == pytest.approx(0.7 * math.log(1.75) - 0.3 * math.log(2), abs=1e-12)
    assert values[1] == pytest.approx(-0.4 * math.log(1.75) + 0.6 * math.log(2), abs=1e-12)
    assert [round(values[beta], 4) for beta in (0.1, 0.5, 0.9)] == [0.0165, 0.0462, 0.0171]


def test_jsd_is_a_mix_of_the_two_skewed_kls():
    a, b, beta = logits(5, 20, seed=8).log_softmax(-1), logits(5, 20, seed=9).log_softmax(-1), 0.3
    mix = beta * make_divergence("skew_forward_kl", skew_lambda=beta)(a, b)
    mix += (1 - beta) * make_divergence("skew_reverse_kl", skew_lambda=1 - beta)(a, b)
    torch.testing.assert_close(make_divergence("jsd", beta=beta)(a, b), mix)


def test_alpha_beta_reaches_its_named_members():
    a, b = logits(5, 20, seed=8).log_softmax(-1), logits(5, 20, seed=9).log_softmax(-1)
    hellinger = 0.5 * ((a / 2).exp() - (b / 2).exp()).square().sum(-1)
    torch.testing.assert_close(make_divergence("alpha_beta")(a, b), 4 * hellinger)
    squared = 0.5 * (a.exp() - b.exp()).square().sum(-1)
    torch.testing.assert_close(make_divergence("alpha_beta", ab_alpha=1, ab_beta=1)(a, b), squared)
    near = make_divergence("alpha_beta", ab_alpha=1 - 1e-5, ab_beta=1e-5)(a, b)
    torch.testing.assert_close(near, make_divergence("forward_kl")(a, b), rtol=1e-3, atol=1e-4)


def test_a_new_divergence_is_an_integrand_and_a_line(monkeypatch):
    def chi_squared() -> Divergence:
        return Divergence(
            "chi_squared",
            phi=lambda a, b: (b.exp() - a.exp()) ** 2 / a.exp(),
            phi_a=lambda a, b: a.exp() - (2 * b - a).exp(),
        )

    monkeypatch.setitem(DIVERGENCES, "chi_squared", chi_squared)
    monkeypatch.setitem(DIVERGENCES, "chi_squared_by_autograd", lambda: Divergence("auto", chi_squared().phi))
    z, zt = logits(4, 8, seed=1).requires_grad_(), logits(4, 8, seed=2)
    s, t = z.softmax(-1), zt.softmax(-1)
    expected = ((t - s) ** 2 / s).sum(-1)
    (gradient,) = torch.autograd.grad(expected.sum(), z)
    a, b = z.detach().log_softmax(-1), zt.log_softmax(-1)
    for name in ("chi_squared", "chi_squared_by_autograd"):
        value, slope = make_divergence(name).value_and_slope(a.clone(), b.clone(), a.exp(), b.exp())
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(softmax_gradient(slope, a.exp()), gradient)


@pytest.mark.parametrize("name", ["jds", "", "JSD", "kl"])
def test_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match="forward_kl, jsd, reverse_kl"):
        make_divergence(name)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("forward_kl", {"beta": 0.3}, "beta=0.3 has no effect"),
        ("jsd", {"skew_lambda": 0.2}, "skew_lambda=0.2 has no effect"),
        ("total_variation", {"ab_alpha": 2.0}, "ab_alpha=2.0 has no effect"),
        ("jsd", {"akl_mu": 0.4}, "akl_mu=0.4 has no effect"),
        ("jsd", {"beta": -0.1}, "beta must be between 0 and 1"),
        ("jsd", {"beta": 1.01}, "beta must be between 0 and 1"),
        ("skew_forward_kl", {"skew_lambda": 1.0}, "skew_lambda must be in"),
        ("skew_reverse_kl", {"skew_lambda": -0.1}, "skew_lambda must be in"),
        ("alpha_beta", {"ab_alpha": 0.0}, "forward_kl"),
        ("alpha_beta", {"ab_beta": -1.0}, "above 0"),
        ("adaptive_kl", {"akl_mu": 1.0}, "akl_mu must be between"),
        ("symmetric_kl", {"symmetric_kl_weight": 1.1}, "symmetric_kl_weight must be between"),
        ("jsd", {"symmetric_kl_weight": 0.4}, "symmetric_kl_weight=0.4 has no effect"),
    ],
)
def test_parameters_that_cannot_be_honoured_are_refused(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        make_divergence(name, **parameters)


def test_skew_zero_is_the_plain_kl():
    assert make_divergence("skew_forward_kl", skew_lambda=0.0).name == "forward_kl"
    assert make_divergence("skew_reverse_kl", skew_lambda=0.0).name == "reverse_kl"


@pytest.mark.parametrize(("beta", "warned"), [(0, 0), (0.01, 1), (0.05, 0), (0.5, 0), (0.95, 0), (0.99, 1), (1, 0)])
def test_warns_where_the_jsd_shrinks(beta, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_divergence("jsd", beta=beta)
    assert len(caught) == warned
    assert all("beta(1-beta)" in str(warning.message) for warning in caught)


# --- the dense loss against TRL 1.16's -------------------------------------------------------------------------------

LABELS = torch.tensor([[-100, -100, 3, 4, 1], [-100, 2, 2, -100, -100]])


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("labels", [None, LABELS, torch.full_like(LABELS, -100)], ids=["none", "some", "masked"])
def test_dense_loss_is_trls(beta, temperature, reduction, labels):
    ours, theirs = (logits(2, 5, 13, seed=1).requires_grad_() for _ in range(2))
    teacher = logits(2, 5, 13, seed=2)
    arguments = {"beta": beta, "temperature": temperature, "reduction": reduction}
    loss = generalized_jsd_loss(ours, teacher, labels, **arguments)
    expected = TRLTrainer.generalized_jsd_loss(theirs, teacher, labels, **arguments)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    (grad,) = torch.autograd.grad(loss.sum(), ours)
    (expected_grad,) = torch.autograd.grad(expected.sum(), theirs)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("items", [7, torch.tensor(7)])
def test_dense_loss_divides_by_the_global_count(items):
    student, teacher = logits(2, 5, 13, seed=1), logits(2, 5, 13, seed=2)
    ours = generalized_jsd_loss(student, teacher, LABELS, num_items_in_batch=items)
    torch.testing.assert_close(
        ours, TRLTrainer.generalized_jsd_loss(student, teacher, LABELS, num_items_in_batch=items)
    )
    torch.testing.assert_close(ours, generalized_jsd_loss(student, teacher, LABELS, reduction="sum") / 7)


def test_dense_loss_of_half_precision_is_taken_in_single():
    student, teacher = (logits(64, 999, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
    close = student + 0.01 * teacher
    loss = generalized_jsd_loss(close, student, reduction="none").sum(-1)
    assert loss.dtype == torch.float32
    expected = generalized_jsd_loss(close.double(), student.double(), reduction="none").sum(-1)
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=2e-6)
    assert generalized_jsd_loss(close.double(), student.double()).dtype == torch.float64


@pytest.mark.parametrize("bad", [{"beta": 2}, {"temperature": 0}, {"reduction": "avg"}])
def test_dense_loss_refuses_what_has_no_meaning(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        generalized_jsd_loss(logits(2, 3), logits(2, 3), **bad)


def test_the_guide_runs():
    guide = Path(__file__).resolve().parents[2] / "docs" / "losses.md"
    try:
        failed, attempted = doctest.testfile(str(guide), module_relative=False)
    finally:
        DIVERGENCES.pop("chi_squared", None)
    assert attempted > 20
    assert failed == 0
