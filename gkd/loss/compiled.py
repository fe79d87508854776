"""The rows of `gkd.loss.eager` as one pure function for `torch.compile`: for accelerators, where traffic is the cost.

Shapes: C rows of a chunk, V vocabulary.

Done step by step, the elementwise work reads and writes a [C, V] buffer some thirty times, which on a GPU takes longer
than the matrix products around it. As one traced function it becomes a few kernels that read the logits and write the
gradient, in the logits' own dtype, with nothing of size [C, V] between them. The eager path remains the reference; a
test holds the two together.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from gkd.loss.divergence import Divergence, Integrand
from gkd.loss.settings import LossSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spec:
    """All that is constant during a run, and therefore compiled in.

    Attributes:
        divergence: with `phi_a`; nothing in it may depend on values (a data-dependent branch cannot be traced).
        temperature, teacher_temperature: of the two softmaxes.
        scale, softcap: the student's, as in `Head`. teacher_scale, teacher_softcap: the teacher's.
        gradient, cross_entropy, kls: what is asked for.
    """

    divergence: Divergence
    temperature: float
    teacher_temperature: float
    scale: float
    softcap: float | None
    teacher_scale: float
    teacher_softcap: float | None
    gradient: bool
    cross_entropy: bool
    kls: bool


# Why nothing can be compiled here, once that is known; None until then.
_failure: str | None = None


class CannotCompileError(Exception):
    """This machine cannot compile, and nobody asked for it by name: use the eager rows."""


def _pays(device: torch.device) -> bool:
    return device.type == "cuda" and bool(has_triton())


def can_compile(settings: LossSettings, device: torch.device, vocab: int) -> bool:
    """Whether the compiled rows serve these settings: all of the vocabulary, a divergence that can be traced."""
    wanted = settings.compiled if settings.compiled is not None else _pays(device) and _failure is None
    whole = settings.teacher_top_k is None or settings.teacher_top_k >= vocab
    return wanted and whole and settings.divergence.phi_a is not None and settings.divergence.traceable


def _logits(raw: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Scaled and capped logits in fp32 (fp64 for fp64), shifted so that each row's largest is 0; the cap's slope."""
    z = raw.to(torch.promote_types(raw.dtype, torch.float32)) * scale
    slope = None
    if softcap is not None:
        capped = torch.tanh(z / softcap)
        z, slope = capped * softcap, 1 - capped * capped
    return z - z.amax(dim=-1, keepdim=True), slope


def dense_rows(
    raw: Tensor, raw_teacher: Tensor, targets: Tensor, share: Tensor | None, ce_share: Tensor | None, spec: Spec
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """What `Pass` needs of a chunk.

    Args:
        raw: [C, V] the student's products h W^T. raw_teacher: [C, V] the teacher's.
        targets: [C]. share, ce_share: [C] parts of divergence and cross-entropy in a row's gradient, or None.
        spec: constants.

    Returns:
        The gradient [C, V] with respect to the student's capped logits times the cap's slope, in raw's dtype, or None;
        and the per-token results [C] by name.
    """
    z, slope_of_cap = _logits(raw, spec.scale, spec.softcap)
    zt, _ = _logits(raw_teacher, spec.teacher_scale, spec.teacher_softcap)
    log_p_one, log_q_one = z.log_softmax(dim=-1), zt.log_softmax(dim=-1)
    at = targets[:, None]
    tokens = {
        "agreement": (z + zt).amax(dim=-1).eq(0).to(z.dtype),
        "student_entropy": -(log_p_one * log_p_one.exp()).sum(dim=-1),
        "teacher_entropy": -(log_q_one * log_q_one.exp()).sum(dim=-1),
        "teacher_log_prob": log_q_one.gather(1, at)[:, 0],
    }
    if spec.cross_entropy:
        tokens["cross_entropy"] = -log_p_one.gather(1, at)[:, 0]
    a = log_p_one if spec.temperature == 1 else (z / spec.temperature).log_softmax(dim=-1)
    b = log_q_one if spec.teacher_temperature == 1 else (zt / spec.teacher_temperature).log_softmax(dim=-1)
    tokens["divergence"] = spec.divergence.phi(a, b).sum(dim=-1)
    if spec.kls:
        p, q = a.exp(), b.exp()
        tokens["forward_kl"] = (q * (b - a) + p - q).sum(dim=-1)
        tokens["reverse_kl"] = (p * (a - b) + q - p).sum(dim=-1)
    if not spec.gradient:
        return None, tokens
    phi_a: Integrand | None = spec.divergence.phi_a
    assert phi_a is not None
    slope = phi_a(a, b)
    gradient = slope - a.exp() * slope.sum(dim=-1, keepdim=True)
    if spec.cross_entropy:
        assert share is not None
        assert ce_share is not None
        chosen = torch.arange(z.shape[1], device=z.device)[None] == at
        of_ce = log_p_one.exp() - chosen.to(z.dtype)
        gradient = gradient * share[:, None] + of_ce * ce_share[:, None]
    if slope_of_cap is not None:
        gradient = gradient * slope_of_cap
    return gradient.to(raw.dtype), tokens


def compiled_rows(spec: Spec, optional: bool) -> Callable[..., tuple[Tensor | None, dict[str, Tensor]]]:
    """`dense_rows` compiled for one `Spec`. The vocabulary is compiled in, the number of rows is not.

    Args:
        spec: constants.
        optional: the default, not the user's wish: the first failure to compile is `CannotCompileError`, with one
            warning, and `can_compile` says no from then on. Every rank finds out by itself; the numbers are the same.
    """

    def run(raw: Tensor, raw_teacher: Tensor, *others: Tensor | None) -> tuple[Tensor | None, dict[str, Tensor]]:
        if not optional or spec in _WORKS:
            return _compiled(spec)(raw, raw_teacher, *others)
        if _failure is not None:
            raise CannotCompileError
        try:
            found = _compiled(spec)(raw, raw_teacher, *others)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # the device's trouble, not the compiler's
        except _COMPILER_ERRORS as error:
            _give_up(error)
            raise CannotCompileError from error
        _WORKS.add(spec)
        return found

    return run


# Dynamo's and Inductor's errors are RuntimeErrors, as is Triton's of a missing C compiler; one that runs and fails (no
# Python.h) is a CalledProcessError; a missing library an ImportError or OSError.
_COMPILER_ERRORS = (RuntimeError, subprocess.SubprocessError, ImportError, OSError)
_WORKS: set[Spec] = set()  # specs that have compiled once: what they raise later is no matter of the compiler


def _give_up(error: BaseException) -> None:
    global _failure
    lines = str(error).strip().splitlines() or [type(error).__name__]
    _failure = lines[0]
    logger.warning(
        "the loss cannot be compiled on this machine (%s: %s), so it runs step by step: the same numbers, more time. "
        "torch.compile needs a C compiler and Python's headers; loss_compile=False leaves it out without this warning",
        type(error).__name__,
        _failure,
    )


@lru_cache(maxsize=8)
def _compiled(spec: Spec) -> Callable[..., tuple[Tensor | None, dict[str, Tensor]]]:
    def rows(
        raw: Tensor, raw_teacher: Tensor, targets: Tensor, share: Tensor | None, ce_share: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        return dense_rows(raw, raw_teacher, targets, share, ce_share, spec)

    # Dynamo counts recompilations per code object: with one of its own, a spec does not use up another's allowance.
    own = FunctionType(rows.__code__.replace(), rows.__globals__, closure=rows.__closure__)
    compiled: Callable[..., Any] = torch.compile(own, fullgraph=True)

    def run(raw: Tensor, raw_teacher: Tensor, *others: Tensor | None) -> tuple[Tensor | None, dict[str, Tensor]]:
        for tensor in (raw, raw_teacher, *others):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(raw, raw_teacher, *others)

    return run
