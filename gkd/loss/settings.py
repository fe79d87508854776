"""What goes into the fused divergence besides tensors, and what comes out of it.

Shapes: N target tokens on this rank, K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from typing import Any

from torch import Tensor

from gkd.common.ranges import called, one_of, whole, within
from gkd.loss.integrand import Divergence
from gkd.loss.signals import IN_FULL, IN_TEXT, NOT_COMPARED

_TAILS = ("bucket", "renormalize", "renormalize_both", "ignore")


@dataclass(frozen=True)
class LossSettings:
    """How the divergence of a target token is measured.

    Attributes:
        divergence: from `make_divergence`.
        loss_temperature: divides the student's logits, and the teacher's unless teacher_loss_temperature is given.
        scale_by_temperature_squared: multiply the divergence by loss_temperature^2 (Hinton et al., 2015).
        teacher_top_k: compare only the teacher's K most likely tokens and the rest; None = the whole vocabulary.
        top_k_tail: "bucket": all other tokens are one more outcome, with the teacher's true mass. "renormalize": the
            teacher's mass outside its top K is moved onto the top K, so the student is taught to put nothing there.
            "renormalize_both": the student's, too: only what the two say within the top K is compared. "ignore": the
            forward KL's terms of the top K alone, both normalised over the whole vocabulary.
        shared_vocab: compare only the first so many tokens (both renormalised); None = heads of equal size.
        chunk_size: tokens per chunk; None = from a byte budget.
        report_kls: also return the forward and the reverse KL of each token.
        compiled: run the elementwise work through `torch.compile` where it can be; None = on CUDA with Triton.
        names: what the user calls an attribute, where that is another name: for errors only.

    Raises:
        ValueError: a value out of range; a divergence that is infinite with top_k_tail="renormalize" or has no form
            for "ignore"; "renormalize_both" with one token, which is always 0; compiled=True where nothing can be
            compiled.
    """

    divergence: Divergence
    loss_temperature: float = 1.0
    teacher_loss_temperature: float | None = None
    scale_by_temperature_squared: bool = False
    teacher_top_k: int | None = None
    top_k_tail: str = "bucket"
    shared_vocab: int | None = None
    chunk_size: int | None = None
    report_kls: bool = False
    compiled: bool | None = None
    names: InitVar[Mapping[str, str] | None] = None

    def __post_init__(self, names: Mapping[str, str] | None) -> None:
        for name in ("loss_temperature", "teacher_loss_temperature"):
            if getattr(self, name) is not None:
                within(name, getattr(self, name), 0, math.inf, "1 is the plain softmax", above=True)
        for name in ("teacher_top_k", "shared_vocab", "chunk_size"):
            if getattr(self, name) is not None:
                whole(called(name, names), getattr(self, name), 1)
        one_of("top_k_tail", self.top_k_tail, _TAILS)
        traceable = self.divergence.traceable and self.divergence.phi_a is not None
        if self.compiled and (self.teacher_top_k is not None or not traceable):
            raise ValueError(
                f"{called('compiled', names)}=True has no effect with divergence={self.divergence.name} and "
                f"teacher_top_k={self.teacher_top_k}: torch.compile takes divergences with a phi_a that no value "
                "decides about, over the whole vocabulary; leave it out"
            )
        if self.top_k_tail == "renormalize" and self.divergence.needs_teacher_support:
            raise ValueError(
                f"divergence={self.divergence.name} is infinite with top_k_tail='renormalize', where the teacher has "
                "no mass outside its top k: use top_k_tail='bucket' or 'renormalize_both'"
            )
        if self.top_k_tail == "ignore" and self.divergence.name != "forward_kl":
            raise ValueError(
                f"top_k_tail='ignore' is defined for the forward KL only, not for divergence={self.divergence.name}: "
                "set divergence='forward_kl', or another top_k_tail"
            )
        if self.top_k_tail == "renormalize_both" and self.teacher_top_k == 1:
            raise ValueError(
                "top_k_tail='renormalize_both' compares nothing with teacher_top_k=1, where both models are sure of "
                "the one token: raise teacher_top_k"
            )

    def in_words(self, common: int | None = None) -> str:
        """The divergence with all that goes into it, in one line; `common` tokens that two tokenizers have."""
        parts = [f"{self.divergence.name} at T = {self.loss_temperature:g}"]
        if self.teacher_temperature != self.loss_temperature:
            parts.append(f"(teacher {self.teacher_temperature:g})")
        if self.scale_by_temperature_squared:
            parts.append(f"times T² = {self.loss_temperature**2:g}")
        if common is not None:
            which = f"the {common:,} common tokens"
            if self.teacher_top_k is not None:
                which = f"those of {which} that the teacher's {self.teacher_top_k} most likely ones count with"
            rest = "and the rest" if self.top_k_tail == "bucket" else f"({self.top_k_tail})"
            parts.append(f"over {which} {rest}, and over the likelihoods of longer texts")
        elif self.teacher_top_k is not None:
            rest = "and the rest (a lower bound)" if self.top_k_tail == "bucket" else "alone (renormalize)"
            parts.append(f"over the teacher's {self.teacher_top_k} most likely tokens {rest}")
        elif self.shared_vocab is not None:
            parts.append(f"over the {self.shared_vocab:,} common tokens")
        else:
            parts.append("over the whole vocabulary")
        return " ".join(parts)

    @property
    def teacher_temperature(self) -> float:
        return self.loss_temperature if self.teacher_loss_temperature is None else self.teacher_loss_temperature


def check_plain_temperature(settings: LossSettings) -> None:
    """Raises ValueError where a top-k signal would have to be tempered."""
    if settings.loss_temperature != 1 or settings.teacher_temperature != 1:
        raise ValueError(
            f"loss_temperature={settings.loss_temperature} (teacher {settings.teacher_temperature}) needs the "
            "teacher's full distribution, and a top-k signal has its log-probabilities at temperature 1: use 1.0"
        )


@dataclass(frozen=True, eq=False)
class FusedOutput:
    """The loss and what the same pass says about each token; all fp32, and only `loss` carries a gradient.

    Of `fused_cross_entropy`, what needs a teacher is None.

    Attributes:
        loss: scalar, sum_n weights[n] divergence[n] + ce_weights[n] cross_entropy[n].
        divergence: [N] nats, at the loss temperature (with scale_by_temperature_squared: multiplied by its square).
        student_entropy: [N] nats, at temperature 1.
        teacher_entropy: [N] nats, at temperature 1; of the K + 1 outcomes for a top-k signal.
        agreement: [N] 1.0 where student and teacher share a most likely token, else 0.0.
        teacher_log_prob: [N] the teacher's log-probability of the target at temperature 1; for a top-k signal and a
            target outside it, the log of the tail's whole mass (an upper bound).
        cross_entropy: [N] nats, of the student on the target at temperature 1, or None without ce_weights.
        top_k_mass: [N] what the K tokens of a top-k signal hold of the teacher's probability, or None; NaN where the
            teacher does not stand.
        forward_kl: [N] KL(teacher || student) over the compared outcomes, or None. reverse_kl: the other way round.
        kinds: [N] int8, of an aligned signal: NOT_COMPARED, IN_FULL or IN_TEXT (`gkd.loss.signals`). There, every
            token of a group has the group's mean divergence and teacher_log_prob, and what is said of one place
            (teacher_entropy, agreement, both KLs) is 0 where the teacher does not stand.
        token_weights: [N] the factor that each token has had of its own (`weigh`), or None.
        top_k_overlap: [N] share of the most likely tokens that both have; NaN on targets that were not looked at. None
            where it was not asked for.
        at_border: [N] bool, of an aligned signal: where the teacher stands.
    """

    loss: Tensor
    student_entropy: Tensor
    divergence: Any = None  # a tensor wherever there is a teacher
    teacher_entropy: Any = None
    agreement: Any = None
    teacher_log_prob: Any = None
    cross_entropy: Tensor | None = None
    top_k_mass: Tensor | None = None
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    kinds: Tensor | None = None
    token_weights: Tensor | None = None
    top_k_overlap: Tensor | None = None
    at_border: Tensor | None = None

    @property
    def in_full(self) -> Tensor | None:
        """[N] bool: the targets that are compared over all common tokens."""
        return None if self.kinds is None else self.kinds == IN_FULL

    @property
    def in_text(self) -> Tensor | None:
        """[N] bool: those that are compared as part of a longer text."""
        return None if self.kinds is None else self.kinds == IN_TEXT

    @property
    def not_compared(self) -> Tensor | None:
        """[N] bool: those that are not compared."""
        return None if self.kinds is None else self.kinds == NOT_COMPARED
