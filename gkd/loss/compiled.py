"""The work of `gkd.loss.eager` as one pure function for `torch.compile`: for accelerators, where traffic is the cost.

Shapes: C tokens of a chunk, V vocabulary.

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

from gkd.loss.integrand import Divergence, Integrand
from gkd.loss.settings import LossSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Constants:
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
    """This machine cannot compile, and nobody asked for it by name: use the eager path."""


def _pays(device: torch.device) -> bool:
    return device.type == "cuda" and bool(has_triton())


def can_compile(settings: LossSettings, device: torch.device, vocab: int) -> bool:
    """Whether the compiled path serves these settings: all of the vocabulary, a divergence that can be traced."""
    wanted = settings.compiled if settings.compiled is not None else _pays(device) and _failure is None
    whole = settings.teacher_top_k is None or settings.teacher_top_k >= vocab
    return wanted and whole and settings.divergence.phi_a is not None and settings.divergence.traceable


def _logits(raw: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Scaled and capped logits in fp32 (fp64 for fp64), shifted so that each token's largest is 0; the cap's slope."""
    z = raw.to(torch.promote_types(raw.dtype, torch.float32)) * scale
    slope = None
    if softcap is not None:
        capped = torch.tanh(z / softcap)
        z, slope = capped * softcap, 1 - capped * capped
    return z - z.amax(dim=-1, keepdim=True), slope


def chunk_results(
    raw: Tensor,
    raw_teacher: Tensor,
    targets: Tensor,
    share: Tensor | None,
    ce_share: Tensor | None,
    constants: Constants,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """What `FusedPass` needs of a chunk.

    Args:
        raw: [C, V] the student's products h W^T. raw_teacher: [C, V] the teacher's.
        targets: [C]. share, ce_share: [C] parts of divergence and cross-entropy in a token's gradient, or None.
        constants: what is compiled in.

    Returns:
        The gradient [C, V] with respect to the student's capped logits times the cap's slope, in raw's dtype, or None;
        and the per-token results [C] by name.
    """
    z, slope_of_cap = _logits(raw, constants.scale, constants.softcap)
    zt, _ = _logits(raw_teacher, constants.teacher_scale, constants.teacher_softcap)
    log_p_one, log_q_one = z.log_softmax(dim=-1), zt.log_softmax(dim=-1)
    at = targets[:, None]
    tokens = {
        "agreement": (z + zt).amax(dim=-1).eq(0).to(z.dtype),
        "student_entropy": -(log_p_one * log_p_one.exp()).sum(dim=-1),
        "teacher_entropy": -(log_q_one * log_q_one.exp()).sum(dim=-1),
        "teacher_log_prob": log_q_one.gather(1, at)[:, 0],
    }
    if constants.cross_entropy:
        tokens["cross_entropy"] = -log_p_one.gather(1, at)[:, 0]
    a = log_p_one if constants.temperature == 1 else (z / constants.temperature).log_softmax(dim=-1)
    b = log_q_one if constants.teacher_temperature == 1 else (zt / constants.teacher_temperature).log_softmax(dim=-1)
    tokens["divergence"] = constants.divergence.phi(a, b).sum(dim=-1)
    if constants.kls:
        p, q = a.exp(), b.exp()
        tokens["forward_kl"] = (q * (b - a) + p - q).sum(dim=-1)
        tokens["reverse_kl"] = (p * (a - b) + q - p).sum(dim=-1)
    if not constants.gradient:
        return None, tokens
    phi_a: Integrand | None = constants.divergence.phi_a
    assert phi_a is not None
    slope = phi_a(a, b)
    gradient = slope - a.exp() * slope.sum(dim=-1, keepdim=True)
    if constants.cross_entropy:
        assert share is not None
        assert ce_share is not None
        chosen = torch.arange(z.shape[1], device=z.device)[None] == at
        of_ce = log_p_one.exp() - chosen.to(z.dtype)
        gradient = gradient * share[:, None] + of_ce * ce_share[:, None]
    if slope_of_cap is not None:
        gradient = gradient * slope_of_cap
    return gradient.to(raw.dtype), tokens


def compiled_chunk(constants: Constants, optional: bool) -> Callable[..., tuple[Tensor | None, dict[str, Tensor]]]:
    """`chunk_results` compiled for one `Constants`. The vocabulary is compiled in, the number of tokens is not.

    Args:
        constants: what is compiled in.
        optional: the default, not the user's wish: the first failure to compile is `CannotCompileError`, with one
            warning, and `can_compile` says no from then on. Every rank finds out by itself; the numbers are the same.
    """

    def run(raw: Tensor, raw_teacher: Tensor, *others: Tensor | None) -> tuple[Tensor | None, dict[str, Tensor]]:
        if not optional or constants in _WORKS:
            return _compiled(constants)(raw, raw_teacher, *others)
        if _failure is not None:
            raise CannotCompileError
        try:
            found = _compiled(constants)(raw, raw_teacher, *others)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # the device's trouble, not the compiler's
        except _COMPILER_ERRORS as error:
            _give_up(error)
            raise CannotCompileError from error
        _WORKS.add(constants)
        return found

    return run


# Dynamo's and Inductor's errors are RuntimeErrors, as is Triton's of a missing C compiler; one that runs and fails (no
# Python.h) is a CalledProcessError; a missing library an ImportError or OSError.
_COMPILER_ERRORS = (RuntimeError, subprocess.SubprocessError, ImportError, OSError)
_WORKS: set[Constants] = set()  # those that have compiled once: what they raise later is no matter of the compiler


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
def _compiled(constants: Constants) -> Callable[..., tuple[Tensor | None, dict[str, Tensor]]]:
    def results(
        raw: Tensor, raw_teacher: Tensor, targets: Tensor, share: Tensor | None, ce_share: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        return chunk_results(raw, raw_teacher, targets, share, ce_share, constants)

    # Dynamo counts recompilations per code object: with one of its own, one set of constants does not use up another's
    # allowance.
    own = FunctionType(results.__code__.replace(), results.__globals__, closure=results.__closure__)
    compiled: Callable[..., Any] = torch.compile(own, fullgraph=True)

    def run(raw: Tensor, raw_teacher: Tensor, *others: Tensor | None) -> tuple[Tensor | None, dict[str, Tensor]]:
        for tensor in (raw, raw_teacher, *others):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(raw, raw_teacher, *others)

    return run
