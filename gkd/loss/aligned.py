"""The divergence of two models that cut the same text into different tokens.

Shapes: N target tokens of the student, M of the teacher, V vocabulary, S tokens that both spell alike, R tokens of a
block. A group (see `AlignedSignal`) has n tokens of the student and m of the teacher.

Each group weighs as much as its n tokens together, so that the loss stays a mean over the student's targets:

- n = m = 1: the divergence at that place over S + 1 outcomes, the common tokens and one for all others.
- otherwise two terms. The same divergence where both models stand before the group, with the share min(1, n / 2) / n;
  and the divergence over the two outcomes {this text, any other}, with the rest. The log-probability of the text is
  the sum over the group's tokens, each at the place that predicts it, student and teacher with tokens of their own.
- tokens outside all groups count with 0.

Outcomes that are put together can only hide a difference, so each term is a lower bound of the divergence between the
texts that the two would write (data processing) as long as a common token says the same about the text on both sides.
That is exact where no token is the beginning of another. Elsewhere it is the known limit of all token-level methods:
with "1" and "12" in one vocabulary and only "1" in the other, "1" means different things, unless "12" is joined with
it (`student_joined`): both are then the text that begins with "1". ULD (arXiv 2402.12030)
compares sorted probabilities instead, X-Token (2605.21699) projects one vocabulary onto the other, BLD (2604.07466)
goes to bytes; the chunk term is the sequence likelihood that GOLD merges, with the places that predict.

The chunk term is at temperature 1: products of softened probabilities are no probabilities of a text.

Of a teacher's K most likely tokens the outcomes are those that the K count with (`gkd.loss.borders`); a text's
likelihood is exact, since the teacher tells that of its own tokens, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gkd.loss import eager
from gkd.loss.borders import BorderPass
from gkd.loss.chunks import Gradients
from gkd.loss.cross_entropy import log_probs, run_cross_entropy
from gkd.loss.integrand import Divergence
from gkd.loss.projection import Projection
from gkd.loss.settings import FusedOutput, LossSettings, check_plain_temperature
from gkd.loss.signals import IN_FULL, IN_TEXT, NOT_COMPARED, AlignedSignal, DenseSignal, TeacherSignal, TopKSignal


def check_aligned(signal: AlignedSignal, hidden: Tensor, targets: Tensor, settings: LossSettings) -> None:
    """Raise for sizes that do not fit together and settings that mean nothing here.

    Raises:
        ValueError: there are some.
    """
    if settings.shared_vocab is not None:
        raise ValueError(
            f"shared_vocab={settings.shared_vocab} has no effect on a teacher with another tokenizer, which is "
            "compared over the tokens that both spell alike: leave it out"
        )
    if settings.compiled:
        raise ValueError("compiled=True has no effect on a teacher with another tokenizer: leave it out")
    n, m = targets.shape[0], signal.targets.shape[0]
    if not n == hidden.shape[0] == signal.border.shape[0] == signal.group.shape[0]:
        raise ValueError(
            f"{hidden.shape[0]} hidden states, {n} targets, {signal.border.shape[0]} borders and "
            f"{signal.group.shape[0]} groups of the student's"
        )
    rows = _check_teacher(signal.teacher, settings)
    if not m == rows == signal.teacher_group.shape[0]:
        raise ValueError(
            f"{rows} rows of the signal, {m} targets and {signal.teacher_group.shape[0]} groups of the teacher's"
        )
    if signal.student_ids.shape != signal.teacher_ids.shape:
        raise ValueError(
            f"{signal.student_ids.shape[0]} common tokens of the student and {signal.teacher_ids.shape[0]} of the "
            "teacher: they come in pairs"
        )


def _check_teacher(teacher: TeacherSignal, settings: LossSettings) -> int:
    """How many targets of its own it tells about."""
    if isinstance(teacher, DenseSignal):
        if teacher.exchanged:
            raise ValueError(f"the tokens {teacher.exchanged[0]} are a pair of common tokens, nothing to exchange")
        return teacher.hidden.shape[0]
    check_plain_temperature(settings)
    if teacher.own is None:
        raise ValueError(
            "a top-k signal of a teacher with another tokenizer needs the log-probabilities of its own tokens: give "
            "it `own`"
        )
    return teacher.ids.shape[0]


def run_aligned(
    student: Projection,
    teacher: Projection | None,
    *,
    signal: AlignedSignal,
    targets: Tensor,
    weights: Tensor,
    ce_weights: Tensor | None,
    settings: LossSettings,
    gradients: Gradients,
) -> FusedOutput:
    """The loss of `fused_divergence` for an aligned signal; `gradients` is filled.

    The text terms first, by one projection of their tokens: a text term's gradient is that of the cross-entropies of
    its tokens, times a factor that the log-probabilities decide. Then every token of the student passes once, those
    at a border together with the teacher.
    """
    dtype = student.dtype
    groups = _Groups.of(signal, targets.device, dtype)
    weights = weights.to(dtype)
    by_group = groups.sums(weights[groups.tokens], groups.of_tokens)
    ce_total = None if ce_weights is None else ce_weights.to(dtype)
    text = of_teacher = torch.zeros_like(by_group)
    if groups.in_text.numel():
        at, own = groups.in_text, groups.teacher_in_text
        of_student = groups.sums(log_probs(student.rows(at), targets[at], settings), groups.of_text)
        of_teacher = groups.sums(_own_log_probs(signal, teacher, own, settings, dtype), groups.of_teacher_text)
        text, slope = text_divergence(settings.divergence, of_student, of_teacher)
        factors = (by_group * groups.text_share * slope)[groups.of_text]
        ce_total = torch.zeros_like(weights) if ce_total is None else ce_total
        ce_total = ce_total.index_add(0, at, -factors)

    at = groups.at_border
    part = gradients.of_rows(at.numel())
    found = BorderPass(
        student.rows(at),
        None if teacher is None else teacher.rows(groups.teacher_at_border),
        aligned=signal,
        own=signal.targets[groups.teacher_at_border],
        signal=signal.teacher if teacher is not None else signal.teacher.at(groups.teacher_at_border),
        targets=targets[at],
        weights=(by_group * groups.full_share)[groups.of_border],
        ce_weights=None if ce_total is None else ce_total[at],
        settings=settings,
        gradients=part,
    ).run()
    alone = groups.elsewhere
    rest = gradients.of_rows(alone.numel()) if ce_total is not None else Gradients(None, None, None)
    ce_alone = torch.zeros_like(weights[alone]) if ce_total is None else ce_total[alone]
    entropy, cross_entropy = run_cross_entropy(student.rows(alone), targets[alone], ce_alone, settings, rest)
    for rows, of_rows in ((at, part), (alone, rest)):
        if gradients.hidden is not None and of_rows.hidden is not None:
            gradients.hidden.index_copy_(0, rows, of_rows.hidden)

    nothing = {name: torch.nan if name == "top_k_mass" else 0.0 for name in found}
    tokens = {name: torch.full_like(weights, nothing[name]).index_copy_(0, at, said) for name, said in found.items()}
    tokens["student_entropy"].index_copy_(0, alone, entropy)
    first = torch.zeros_like(text).index_copy_(0, groups.of_border, found["divergence"])
    by_text = groups.full_share * first + groups.text_share * text
    loss = (by_group * by_text).sum()
    if ce_weights is None:
        tokens.pop("cross_entropy", None)
    else:
        tokens["cross_entropy"].index_copy_(0, alone, cross_entropy)
        loss = loss + (ce_weights.to(dtype) * tokens["cross_entropy"]).sum()
    kinds = torch.full_like(targets, NOT_COMPARED, dtype=torch.int8)
    kinds.index_fill_(0, groups.tokens, IN_FULL).index_fill_(0, groups.in_text, IN_TEXT)
    tokens["divergence"] = torch.zeros_like(weights).index_copy_(0, groups.tokens, by_text[groups.of_tokens])
    tokens["teacher_log_prob"].index_copy_(0, groups.in_text, (of_teacher / groups.n)[groups.of_text])
    at_border = torch.zeros_like(kinds, dtype=torch.bool).index_fill_(0, at, True)
    return FusedOutput(loss=loss, kinds=kinds, at_border=at_border, **tokens)


def _own_log_probs(
    signal: AlignedSignal, teacher: Projection | None, rows: Tensor, settings: LossSettings, dtype: torch.dtype
) -> Tensor:
    """The teacher's log-probabilities of some of its targets, at temperature 1."""
    if teacher is not None:
        return log_probs(teacher.rows(rows), signal.targets[rows], settings)
    assert isinstance(signal.teacher, TopKSignal)
    assert signal.teacher.own is not None
    return signal.teacher.own[rows].to(dtype)


def text_divergence(divergence: Divergence, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Divergence [G] over the two outcomes {this text, any other} and its derivative with respect to `student`.

    Args:
        divergence: which. student, teacher: [G] log-probabilities of the texts.
    """
    most = -torch.finfo(student.dtype).eps / 2  # 1 - e^x is known to about one rounding of 1
    a, b = (torch.stack([x.clamp_max(most), eager.log1mexp(x.clamp_max(most))], dim=-1) for x in (student, teacher))
    odds = (a[:, 0] - a[:, 1]).exp()
    value, slope = divergence.value_and_slope(a, b, a.exp(), b.exp())
    return value, slope[:, 0] - odds * slope[:, 1]


@dataclass(frozen=True, eq=False)
class _Groups:
    """Which rows go where. G groups, in the order of their numbers; everything on the device of the work.

    Attributes:
        n: [G] tokens of the student. full_share, text_share: [G] of the group's weight.
        tokens: the student's rows in groups; of_tokens: their groups.
        in_text, of_text: those of them that have a text term. teacher_in_text, of_teacher_text: the teacher's.
        at_border: the student's rows at a border; of_border: their groups; teacher_at_border: the teacher's rows.
        elsewhere: the student's other rows.
    """

    n: Tensor
    full_share: Tensor
    text_share: Tensor
    tokens: Tensor
    of_tokens: Tensor
    in_text: Tensor
    of_text: Tensor
    teacher_in_text: Tensor
    of_teacher_text: Tensor
    at_border: Tensor
    of_border: Tensor
    teacher_at_border: Tensor
    elsewhere: Tensor

    @classmethod
    def of(cls, signal: AlignedSignal, device: torch.device, dtype: torch.dtype) -> _Groups:
        group, other, border = signal.group.cpu(), signal.teacher_group.cpu(), signal.border.cpu()
        tokens, own = _where(group >= 0), _where(other >= 0)
        at_border = _where(border >= 0)
        _check_groups(group, other, border)
        count = int(group.max()) + 1 if tokens.numel() else 0
        n, m = torch.bincount(group[tokens], minlength=count), torch.bincount(other[own], minlength=count)
        longer = (n > 1) | (m > 1)
        in_text, teacher_in_text = tokens[longer[group[tokens]]], own[longer[other[own]]]
        size = n.to(dtype)
        full_share = torch.where(longer, (size / 2).clamp_max(1) / size, 1.0)
        found = (
            size,
            full_share,
            1 - full_share,
            tokens,
            group[tokens],
            in_text,
            group[in_text],
            teacher_in_text,
            other[teacher_in_text],
            at_border,
            group[at_border],
            border[at_border],
            _where(border < 0),
        )
        return cls(*(tensor.to(device, non_blocking=True) for tensor in found))

    def sums(self, values: Tensor, groups: Tensor) -> Tensor:
        """Sums [G] of values by group."""
        return values.new_zeros(self.n.shape[0]).index_add_(0, groups, values)


def _where(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 0]


def _check_groups(group: Tensor, other: Tensor, border: Tensor) -> None:
    count = max(int(ids.max()) + 1 if ids.numel() else 0 for ids in (group, other))
    firsts = []
    for ids in (group, other):
        tokens = _where(ids >= 0)
        first = torch.full((count,), ids.numel()).scatter_reduce_(0, ids[tokens], tokens, "amin")
        if not (first < ids.numel()).all():
            raise ValueError("a group of an aligned signal has tokens of one side only: give those the number -1")
        firsts.append(first)
    if int((border >= 0).sum()) != count or not torch.equal(border[firsts[0]], firsts[1]):
        raise ValueError("the borders of an aligned signal do not lead from each group's first token to its first row")
