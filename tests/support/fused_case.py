"""One call of the fused pass beside its definition in float64."""

import oracle
import torch

from gkd.loss import make_divergence
from gkd.loss.fused import fused_divergence
from gkd.loss.settings import LossSettings
from gkd.loss.signals import DenseSignal, Head

N, V, DS, DT = 13, 37, 8, 12


class Case:
    """Random hidden states, heads, targets and weights; leaves require gradients."""

    tolerance = (1e-10, 1e-11)  # relative, absolute

    def __init__(
        self, n=N, vocab=V, teacher_vocab=None, dtype=torch.float64, seed=0, bias=True, scale=1.0, softcap=None
    ):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, size=1.0):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(size).to(dtype)

        self.hidden = draw(n, DS).requires_grad_()
        self.weight = draw(vocab, DS).requires_grad_()
        self.bias = draw(vocab).requires_grad_() if bias else None
        self.head = Head(self.weight, self.bias, scale, softcap)
        teacher_vocab = teacher_vocab or vocab
        self.signal = DenseSignal(draw(n, DT), Head(draw(teacher_vocab, DT, size=0.7), draw(teacher_vocab)))
        self.targets = torch.randint(0, min(vocab, teacher_vocab), (n,), generator=generator)
        self.weights = torch.rand(n, generator=generator, dtype=torch.float64)
        self.weights[::4] = 0  # masked rows
        self.ce_weights = torch.rand(n, generator=generator, dtype=torch.float64) * (torch.arange(n) % 3 > 0)

    def leaves(self):
        return [leaf for leaf in (self.hidden, self.weight, self.bias) if leaf is not None]

    def student_logits(self):
        z = self.hidden.double() @ self.weight.double().t()
        if self.bias is not None:
            z = z + self.bias.double()
        z = z * self.head.logit_scale
        if self.head.softcap is not None:
            z = self.head.softcap * torch.tanh(z / self.head.softcap)
        return z

    def logits(self):
        """Both models' logits in float64, differentiable."""
        teacher = self.signal.head
        order = list(range(teacher.weight.shape[0]))
        for first, second in self.signal.exchanged:
            order[first], order[second] = order[second], order[first]
        zt = self.signal.hidden.double() @ teacher.weight.double().t() + teacher.bias.double()
        return self.student_logits(), zt[:, order]

    def fused(self, name="jsd", parameters=None, ce=False, **options):
        options = LossSettings(make_divergence(name, **(parameters or {})), **options)
        ce_weights = self.ce_weights if ce else None
        return fused_divergence(
            self.hidden, self.head, self.signal, self.targets, self.weights, options, ce_weights=ce_weights
        )

    def expected(
        self,
        name="jsd",
        parameters=None,
        ce=False,
        loss_temperature=1.0,
        teacher_loss_temperature=None,
        scale_by_temperature_squared=False,
        teacher_top_k=None,
        top_k_tail="bucket",
        shared_vocab=None,
        **_,
    ):
        z, zt = self.logits()
        z, zt = z[:, :shared_vocab], zt[:, :shared_vocab]
        s, t = (z / loss_temperature).softmax(-1), (zt / (teacher_loss_temperature or loss_temperature)).softmax(-1)
        if teacher_top_k is not None and teacher_top_k < z.shape[1]:
            s, t = oracle.coarse(s, t, teacher_top_k, top_k_tail)
        per_token = oracle.divergence(name, s, t, **(parameters or {}))
        if scale_by_temperature_squared:
            per_token = per_token * loss_temperature**2
        loss = (self.weights * per_token).sum()
        if ce:
            loss = loss - (self.ce_weights * z.log_softmax(-1).gather(1, self.targets[:, None])[:, 0]).sum()
        return loss, per_token

    def check(self, name="jsd", parameters=None, rtol=None, atol=None, **options):
        """Loss, gradients and every token's divergence beside the definition's; by default to `tolerance`."""
        rtol, atol = (own if given is None else given for given, own in zip((rtol, atol), self.tolerance, strict=True))
        output = self.fused(name, parameters, **options)
        loss, per_token = self.expected(name, parameters, **options)
        torch.testing.assert_close(output.loss.double(), loss, rtol=rtol, atol=atol)
        torch.testing.assert_close(output.divergence.double(), per_token, rtol=rtol, atol=atol)
        leaves = self.leaves()
        ours, theirs = torch.autograd.grad(output.loss, leaves), torch.autograd.grad(loss, leaves)
        for gradient, expected in zip(ours, theirs, strict=True):
            assert gradient.dtype == expected.dtype
            torch.testing.assert_close(gradient, expected, rtol=rtol, atol=atol)
        return output
