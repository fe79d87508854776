"""The compiled rows against the eager ones, which the float64 oracle holds; they need a C++ compiler on a CPU."""

import logging
import shutil

import pytest
import torch
from fused_case import Case
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import fresh_cache

from gkd.loss import compiled as fused_compiled
from gkd.loss import make_divergence
from gkd.loss.chunks import even_cuts
from gkd.loss.compiled import can_compile
from gkd.loss.fused import fused_divergence
from gkd.loss.settings import LossSettings

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
ALL = {"softcap": 5.0, "scale": 0.5}
CASES = [
    ("jsd", {}, {"ce": True, "report_kls": True, "loss_temperature": 2.0, "scale_by_temperature_squared": True} | ALL),
    ("reverse_kl", {}, {}),
    ("forward_kl", {}, {"exchanged": (3, 30), "ce": True}),
    ("skew_forward_kl", {"teacher_vocab": 41}, {"shared_vocab": 30, "teacher_loss_temperature": 3.0}),
]


@compiler
@pytest.mark.parametrize(("name", "sizes", "options"), CASES, ids=[case[0] for case in CASES])
def test_equal_to_the_eager_rows(name, sizes, options):
    model = {key: options[key] for key in ALL if key in options}
    options = {key: value for key, value in options.items() if key not in ALL}
    cases = [Case(**sizes, **model) for _ in range(2)]
    exchanged = options.pop("exchanged", None)
    for case in cases:
        if exchanged is not None:
            case.signal = case.signal.exchanging(exchanged)
        case.targets.clamp_(max=29)
    # 13 rows in chunks of 5: the last one is shorter and must not be a new compilation's first
    ours, eager = (
        case.fused(name, chunk_size=5, compiled=c, **options) for case, c in zip(cases, (True, False), strict=True)
    )
    for field, value in vars(eager).items():
        found = getattr(ours, field)
        assert (found is None) == (value is None), field
        if value is not None:
            torch.testing.assert_close(found, value, msg=lambda text, field=field: f"{field}: {text}")
    gradients = [torch.autograd.grad(out.loss, case.leaves()) for out, case in zip((ours, eager), cases, strict=True)]
    torch.testing.assert_close(*gradients)


@compiler
def test_near_equal_models_in_bf16_are_never_below_zero():
    case = Case(dtype=torch.bfloat16, bias=False, n=40, vocab=300)
    noise = torch.randn(case.hidden.shape, generator=torch.Generator().manual_seed(1)).mul(1e-2).bfloat16()
    case.signal = type(case.signal)((case.hidden + noise).detach(), type(case.head)(case.weight.detach()))
    output = case.fused("jsd", compiled=True)
    assert float(output.divergence.min()) >= -1e-6
    assert float(output.divergence.max()) > 0
    torch.testing.assert_close(output.divergence, case.fused("jsd", compiled=False).divergence, atol=1e-6, rtol=1e-2)


def test_compiled_where_it_can_be():
    cpu, jsd = torch.device("cpu"), make_divergence("jsd")
    assert not can_compile(LossSettings(jsd), cpu, 100)
    assert can_compile(LossSettings(jsd, compiled=True), cpu, 100)
    assert not can_compile(LossSettings(jsd, teacher_top_k=5), torch.device("cuda"), 100)
    assert not can_compile(LossSettings(make_divergence("adaptive_kl")), torch.device("cuda"), 100)


@pytest.mark.parametrize(("name", "options"), [("adaptive_kl", {}), ("jsd", {"teacher_top_k": 5})])
def test_asking_for_what_cannot_be_compiled_is_an_error(name, options):
    with pytest.raises(ValueError, match="compiled=True has no effect"):
        LossSettings(make_divergence(name), compiled=True, **options)


# -------------------------------------------------------------------------------------- a machine without a compiler


JSD = make_divergence("jsd")


def run(case, settings):
    return fused_divergence(case.hidden, case.head, case.signal, case.targets, case.weights, settings)


@pytest.fixture
def by_default(monkeypatch):
    """As on CUDA, where compiling is the default; nothing is compiled yet."""
    monkeypatch.setattr(fused_compiled, "_pays", lambda _device: True)
    monkeypatch.setattr(fused_compiled, "_failure", None)
    monkeypatch.setattr(fused_compiled, "_WORKS", set())
    fused_compiled._compiled.cache_clear()
    torch._dynamo.reset()
    yield
    fused_compiled._compiled.cache_clear()
    torch._dynamo.reset()


@pytest.fixture
def no_compiler():
    with fresh_cache(), torch._inductor.config.patch({"cpp.cxx": (None, "/no/such/c++"), "fx_graph_cache": False}):
        yield


def test_without_a_compiler_the_eager_rows_do_it_with_one_warning(by_default, no_compiler, caplog):
    cases = [Case() for _ in range(3)]
    with caplog.at_level(logging.WARNING, logger="gkd"):
        first, second = (case.fused(chunk_size=5) for case in cases[:2])
        other = cases[1].fused("reverse_kl", chunk_size=5)  # another spec does not try again
    eager = cases[2].fused(compiled=False, chunk_size=5)
    for output in (first, second):
        torch.testing.assert_close(output.loss, eager.loss)
        torch.testing.assert_close(output.divergence, eager.divergence)
    torch.testing.assert_close(
        torch.autograd.grad(first.loss, cases[0].leaves()), torch.autograd.grad(eager.loss, cases[2].leaves())
    )
    assert other.loss.isfinite()
    told = [record.getMessage() for record in caplog.records if "cannot be compiled" in record.getMessage()]
    assert len(told) == 1
    assert "loss_compile=False" in told[0]


def test_who_asks_for_it_by_name_is_told(by_default, no_compiler):
    with pytest.raises(RuntimeError, match="compiler"):
        Case().fused(compiled=True)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), torch.AcceleratorError("illegal access")])
def test_the_devices_own_trouble_is_no_missing_compiler(by_default, monkeypatch, error):
    def broken(*_args, **_options):
        raise error

    monkeypatch.setattr(torch, "compile", lambda *_args, **_options: broken)
    with pytest.raises(type(error)):
        Case().fused()
    assert fused_compiled._failure is None


def test_what_fails_after_it_has_worked_is_not_hidden(by_default, monkeypatch):
    calls = []

    def once(function, **_options):
        def run(*args):
            calls.append(1)
            if len(calls) > 1:
                raise RuntimeError("something else")
            return function(*args)

        return run

    monkeypatch.setattr(torch, "compile", once)
    run(Case(), LossSettings(JSD))
    with pytest.raises(RuntimeError, match="something else"):
        run(Case(), LossSettings(JSD))


def test_one_graph_for_all_numbers_of_rows(by_default, monkeypatch):
    """Also for what a chunk leaves over: a single row would be compiled for itself, for seconds."""
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=counter, **options))
    for n in (13, 1, 11, 6, 16, 21, 2, 31, 5, 10):
        ours, eager = (run(Case(n=n), LossSettings(JSD, chunk_size=5, compiled=c)) for c in (None, False))
        torch.testing.assert_close(ours.divergence, eager.divergence)
    assert counter.frame_count == 1


@pytest.mark.parametrize("most", [1, 2, 3, 5, 100])
def test_cuts_are_even(most):
    for count in range(40):
        sizes = [at.stop - at.start for at in even_cuts(count, most)]
        assert sum(sizes) == count
        assert len(sizes) == -(-count // most)
        assert not sizes or max(sizes) - min(sizes) <= 1
        assert [at.start for at in even_cuts(count, most)] == [sum(sizes[:i]) for i in range(len(sizes))]
