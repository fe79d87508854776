"""The compiled rows against the eager ones, which the float64 oracle holds; they need a C++ compiler on a CPU."""

import shutil

import pytest
import torch
from test_fused import Case

from gkd.divergence import make_divergence
from gkd.fused import LossSettings
from gkd.fused_compiled import can_compile

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
ALL = {"softcap": 5.0, "scale": 0.5}
CASES = [
    ("jsd", {}, {"ce": True, "report_kls": True, "loss_temperature": 2.0, "scale_by_temperature_squared": True} | ALL),
    ("reverse_kl", {}, {}),
    ("skew_forward_kl", {"teacher_vocab": 41}, {"shared_vocab": 30, "teacher_loss_temperature": 3.0}),
]


@compiler
@pytest.mark.parametrize(("name", "sizes", "options"), CASES, ids=[case[0] for case in CASES])
def test_equal_to_the_eager_rows(name, sizes, options):
    model = {key: options[key] for key in ALL if key in options}
    options = {key: value for key, value in options.items() if key not in ALL}
    cases = [Case(**sizes, **model) for _ in range(2)]
    for case in cases:
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
