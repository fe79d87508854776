"""Output heads, softmax, divergence and gradient in one pass over chunks of target tokens.

Shapes: N target tokens on this rank, V vocabulary, D hidden size (Ds student, Dt teacher), K top-k.

The loss is a weighted sum over tokens whose weights are known in advance, so its gradient is taken in the forward
pass: each head is projected once, a chunk of tokens at a time, and no [N, V] tensor exists. A step costs three matrix
products (student logits, teacher logits, gradient back to the hidden states), and one more only when the student's
head itself is trained. The backward pass multiplies the kept gradients by a scalar; it does not touch the heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gkd.loss.aligned import check_aligned, run_aligned
from gkd.loss.chunks import FusedPass, Gradients, even_cuts
from gkd.loss.cross_entropy import run_cross_entropy
from gkd.loss.projection import Projection
from gkd.loss.settings import FusedOutput, LossSettings, check_plain_temperature
from gkd.loss.signals import AlignedSignal, DenseSignal, Head, TeacherSignal, TopKSignal

_Inputs = tuple[Tensor, Tensor, Tensor | None]
Weigh = Callable[[FusedOutput], Tensor]

__all__ = ["FusedOutput", "LossSettings", "fused_cross_entropy", "fused_divergence"]


def fused_divergence(
    student_hidden: Tensor,
    student_head: Head,
    signal: TeacherSignal | AlignedSignal,
    targets: Tensor,
    weights: Tensor,
    settings: LossSettings,
    *,
    ce_weights: Tensor | None = None,
    check_ids: bool = True,
    weigh: Weigh | None = None,
) -> FusedOutput:
    """sum_n weights[n] D_n + ce_weights[n] CE_n over the target tokens, without building their logits.

    The matrix products take factors of the hidden states' dtype (under autocast: of its dtype) and leave fp32 logits,
    everything else is in fp32. Heads must be whole tensors while this runs (ZeRO-3: gather them around the call); the
    backward pass does not need them.

    Args:
        student_hidden: [N, Ds], what the student's head would project.
        student_head: its weight and bias get gradients if they require them.
        signal: the teacher at the same N targets, or aligned with them; gets no gradient.
        targets: [N] token ids.
        weights: [N], everything that multiplies a token's divergence: mask, 1 / denominator, (1 - ce_weight).
        settings: see `LossSettings`.
        ce_weights: [N] factors of the cross-entropy on the target, or None.
        check_ids: look whether all ids are in the vocabulary, for which the CPU waits for the device; False where
            that is known.
        weigh: gives each token one factor more, [N], from what the pass says about it; no gradient goes through it.
            A trained head costs a second look at the tokens for it, one that is frozen nothing.

    Returns:
        `FusedOutput`. N = 0 gives a loss of zero that still reaches every parameter in the backward pass.

    Raises:
        ValueError: sizes that do not fit together, a target or a top-k id outside the compared vocabulary, a
            temperature other than 1 with a top-k signal, shared_vocab with an aligned one.
    """
    inputs, gradients = wanted_gradients(student_hidden, student_head)

    def run(weights: Tensor, ce_weights: Tensor | None, gradients: Gradients) -> FusedOutput:
        return run_pass(
            student_hidden,
            student_head,
            signal,
            targets,
            weights,
            settings,
            ce_weights=ce_weights,
            check_ids=check_ids,
            gradients=gradients,
        )

    return attached(weighed(run, weights, ce_weights, gradients, weigh), inputs, gradients)


def weighed(
    run: Callable[[Tensor, Tensor | None, Gradients], FusedOutput],
    weights: Tensor,
    ce_weights: Tensor | None,
    gradients: Gradients,
    weigh: Weigh | None,
) -> FusedOutput:
    """`run(weights, ce_weights, gradients)` with one factor more for each token, which is known when it has run.

    A token has one row of the hidden states' gradient, which takes its factor afterwards. A head's gradient is a sum
    over tokens: there the first run only looks.
    """
    if weigh is None:
        return run(weights, ce_weights, gradients)
    known = torch.zeros_like(weights) if ce_weights is None else ce_weights  # with it the tokens' likelihood is told
    if gradients.weight is None and gradients.bias is None:
        output = run(weights, known, gradients)
        assert output.cross_entropy is not None
        factors = weigh(output)
        if gradients.hidden is not None:
            gradients.hidden.mul_(factors[:, None])
        terms = weights * output.divergence + known * output.cross_entropy
        return replace(output, loss=(factors * terms).sum(), token_weights=factors)
    factors = weigh(run(weights, known, Gradients(None, None, None)))
    return replace(run(weights * factors, known * factors, gradients), token_weights=factors)


def run_pass(
    student_hidden: Tensor,
    student_head: Head,
    signal: TeacherSignal | AlignedSignal,
    targets: Tensor,
    weights: Tensor,
    settings: LossSettings,
    *,
    ce_weights: Tensor | None,
    check_ids: bool,
    gradients: Gradients,
) -> FusedOutput:
    """As `fused_divergence`, but the loss has no graph yet: the gradients are added to `gradients`."""
    if isinstance(signal, AlignedSignal):
        return _run_aligned_pass(
            student_hidden,
            student_head,
            signal,
            targets,
            weights,
            settings,
            ce_weights=ce_weights,
            check_ids=check_ids,
            gradients=gradients,
        )
    vocab = _compared_vocabulary(student_hidden, student_head, signal, targets, settings)
    if check_ids:
        ids_in_range("target", targets, vocab)
        if isinstance(signal, TopKSignal):
            ids_in_range("top-k id", signal.ids, vocab)
    dtype = _dtype(student_hidden)
    student = Projection(student_hidden, student_head, vocab, dtype)
    teacher = Projection(signal.hidden, signal.head, vocab, dtype) if isinstance(signal, DenseSignal) else None
    with torch.no_grad(), torch.autocast(student_hidden.device.type, enabled=False):
        work = FusedPass(
            student,
            teacher,
            signal=signal,
            targets=targets,
            weights=weights,
            ce_weights=ce_weights,
            settings=settings,
            gradients=gradients,
        )
        for at in even_cuts(targets.shape[0], work.chunk):
            work.run_chunk(at)
        output = work.output()
    if isinstance(signal, TopKSignal):
        return replace(output, top_k_mass=signal.log_probs.exp().sum(dim=1))
    return output


def _run_aligned_pass(
    student_hidden: Tensor,
    student_head: Head,
    signal: AlignedSignal,
    targets: Tensor,
    weights: Tensor,
    settings: LossSettings,
    *,
    ce_weights: Tensor | None,
    check_ids: bool,
    gradients: Gradients,
) -> FusedOutput:
    check_aligned(signal, student_hidden, targets, settings)
    vocab, teacher_vocab, dense = student_head.weight.shape[0], signal.teacher_size, signal.teacher
    if check_ids:
        for name, ids, size in (
            ("target", targets, vocab),
            ("common token's id", signal.student_ids, vocab),
            ("teacher's target", signal.targets, teacher_vocab),
            ("common token's id of the teacher's", signal.teacher_ids, teacher_vocab),
        ):
            ids_in_range(name, ids, size)
        for name, joined, size in (
            ("joined token", signal.student_joined, vocab),
            ("joined token of the teacher's", signal.teacher_joined, teacher_vocab),
        ):
            if joined is not None:
                ids_in_range(name, joined[0], size)
                ids_in_range("common token's place", joined[1], signal.student_ids.numel())
    dtype = _dtype(student_hidden)
    student = Projection(student_hidden, student_head, vocab, dtype)
    teacher = Projection(dense.hidden, dense.head, teacher_vocab, dtype) if isinstance(dense, DenseSignal) else None
    with torch.no_grad(), torch.autocast(student_hidden.device.type, enabled=False):
        return run_aligned(
            student,
            teacher,
            signal=signal,
            targets=targets,
            weights=weights,
            ce_weights=ce_weights,
            settings=settings,
            gradients=gradients,
        )


def fused_cross_entropy(
    student_hidden: Tensor,
    student_head: Head,
    targets: Tensor,
    ce_weights: Tensor,
    settings: LossSettings,
    *,
    check_ids: bool = True,
) -> FusedOutput:
    """sum_n ce_weights[n] CE_n over the target tokens alone, for steps in which no token has a divergence.

    As `fused_divergence` with weights of zero, at two matrix products instead of three and without a teacher: what
    would be said about it is None in the output.

    Args:
        student_hidden: [N, Ds]. student_head: as in `fused_divergence`.
        targets: [N] token ids. ce_weights: [N].
        settings: its `shared_vocab` and `chunk_size`. check_ids: as in `fused_divergence`.

    Raises:
        ValueError: a target outside the vocabulary.
    """
    vocab = settings.shared_vocab or student_head.weight.shape[0]
    if check_ids:
        ids_in_range("target", targets, vocab)
    inputs, gradients = wanted_gradients(student_hidden, student_head)
    student = Projection(student_hidden, student_head, vocab, _dtype(student_hidden))
    weights = ce_weights.to(student.dtype)
    with torch.no_grad(), torch.autocast(student_hidden.device.type, enabled=False):
        entropy, cross_entropy = run_cross_entropy(student, targets, weights, settings, gradients)
        loss = (weights * cross_entropy).sum()
    output = FusedOutput(loss=loss, student_entropy=entropy, cross_entropy=cross_entropy)
    return attached(output, inputs, gradients)


def _dtype(hidden: Tensor) -> torch.dtype:
    """Of logits, probabilities and gradients."""
    return torch.promote_types(hidden.dtype, torch.float32)


def wanted_gradients(hidden: Tensor, head: Head) -> tuple[_Inputs, Gradients]:
    """What the loss is a function of, and a place for the gradients that are wanted."""
    inputs = (hidden, head.weight, head.bias)
    needs = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs]
    return inputs, Gradients.zeros(inputs, needs, _dtype(hidden))


def attached(output: FusedOutput, inputs: _Inputs, gradients: Gradients) -> FusedOutput:
    """The output, whose loss is a function of `inputs` with these gradients."""
    if not gradients.any:
        return output
    loss = _Attach.apply(output.loss, *inputs, gradients.hidden, gradients.weight, gradients.bias)
    return replace(output, loss=loss)


def ids_in_range(name: str, ids: Tensor, vocab: int) -> None:
    """Refuse ids outside the compared vocabulary. Waits for the device that they are on.

    Raises:
        ValueError: there is one.
    """
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise ValueError(
            f"a {name} is outside the {vocab} compared tokens ({int(ids.min())} to {int(ids.max())} found): "
            "the student's vocabulary and the data's or the teacher's do not match"
        )


def _compared_vocabulary(
    hidden: Tensor, head: Head, signal: TeacherSignal, targets: Tensor, settings: LossSettings
) -> int:
    n = hidden.shape[0]
    vocab = head.weight.shape[0]
    if isinstance(signal, DenseSignal):
        teacher_vocab, signal_size = signal.head.weight.shape[0], signal.hidden.shape[0]
        if settings.shared_vocab is None and vocab != teacher_vocab:
            raise ValueError(
                f"the student's head has {vocab} rows and the teacher's {teacher_vocab}: if their tokenizers agree on "
                "the ids they share, set shared_vocab to the number of shared tokens"
            )
        vocab = min(vocab, teacher_vocab)
    else:
        signal_size = signal.ids.shape[0]
        check_plain_temperature(settings)
    if settings.shared_vocab is not None:
        if settings.shared_vocab > vocab:
            raise ValueError(f"shared_vocab={settings.shared_vocab} is more than the {vocab} rows of the smaller head")
        vocab = settings.shared_vocab
    exchanged = signal.exchanged if isinstance(signal, DenseSignal) else ()
    if outside := [pair for pair in exchanged if not 0 <= min(pair) <= max(pair) < vocab]:
        raise ValueError(
            f"the tokens {outside[0]} cannot stand for each other: not both are among the {vocab} compared tokens"
        )
    if not n == signal_size == targets.shape[0]:
        raise ValueError(f"{n} hidden states, {signal_size} rows of the signal and {targets.shape[0]} targets")
    return vocab


class _Attach(torch.autograd.Function):
    """The loss as a function of hidden states and head, with gradients that are already there."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        grad_hidden: Tensor | None,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = (
            None if grad is None else (grad.mul_(grad_loss) if _graph_is_freed() else grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return None, hidden, weight, bias, None, None, None


def _graph_is_freed() -> bool:
    """Whether this backward pass is the graph's last, so that the kept gradients may be scaled in place.

    Saves a copy of a trained head's gradient (half a gigabyte for a 0.5B model). Unknown counts as no.
    """
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not keeps()
