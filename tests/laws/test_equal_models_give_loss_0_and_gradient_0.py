"""Law 8: a student equal to its teacher has loss 0 and gradient 0, for every divergence."""

import pytest
import torch
from fused_case import Case
from tiny import tiny_model
from training import change, losses, trainer_of
from variants import ALL, IDS, VARIANTS, logits, softmax_gradient

from gkd.loss import make_divergence
from gkd.loss.signals import DenseSignal, Head


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_equal_models_give_no_loss_and_no_gradient(tmp_path, beta):
    trainer = trainer_of(tmp_path, student=tiny_model(seed=3), teacher=tiny_model(seed=3), beta=beta, lmbda=0.5)
    assert change(trainer).abs().max() < 1e-6
    assert abs(losses(trainer)[0]) < 1e-6


def test_student_equal_to_teacher_learns_nothing():
    for name, parameters in ALL:
        for k in (None, 4):
            case = Case(dtype=torch.float32)
            case.signal = DenseSignal(case.hidden.detach(), Head(case.weight.detach(), case.bias.detach()))
            output = case.fused(name, parameters, teacher_top_k=k)
            tolerance = 0 if k is None else 1e-6  # two roads to the tail's mass: log-probabilities and their sum
            assert float(output.divergence.abs().max()) <= tolerance, name
            for gradient in torch.autograd.grad(output.loss, case.leaves()):
                assert float(gradient.abs().max()) <= 5 * tolerance, name
            assert bool((output.agreement == 1).all())


@pytest.mark.parametrize(("name", "parameters"), VARIANTS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_student_equal_to_teacher_has_exactly_no_loss_and_no_gradient(name, parameters, dtype):
    divergence = make_divergence(name, **parameters)
    for scale in (0.0, 1.0, 30.0):
        a = logits(4, 700, seed=5, scale=scale, dtype=dtype).log_softmax(-1)
        p = a.exp()
        value, slope = divergence.value_and_slope(a.clone(), a.clone(), p, p.clone())
        assert torch.equal(value, torch.zeros_like(value))
        assert torch.equal(softmax_gradient(slope, p), torch.zeros_like(p))
        assert torch.equal(divergence(a, a.clone()), torch.zeros_like(value))
