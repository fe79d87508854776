"""Weights of single tokens: rules from the literature, from what the fused pass says about each token.

Shapes: N target tokens of a micro-batch, B rows, L the most targets that a row may have.

Every rule looks at one completion at a time, so that how the step is cut into micro-batches changes nothing. A weight
multiplies a token's whole term; the step's denominator stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenView:
    """What is known of the N targets of a micro-batch; numbers without a gradient, in nats.

    Attributes:
        ids: [N] the token to predict.
        rows: [N] row of the micro-batch. places: [N] which target of its row it is, from 1.
        sources: [N] who wrote it: numbers of `gkd.data.sources.SOURCES`.
        row_numbers: [N] row of the data set.
        divergence: [N] at the loss temperature.
        student_log_prob, teacher_log_prob: [N] of the token to predict, at temperature 1.
        student_entropy, teacher_entropy: [N] at temperature 1.
        agreement: [N] 1.0 where both have one most likely token, else 0.0.
        shape: (B, L).

    With a teacher of another tokenizer the tokens of a group (`gkd.loss.aligned`) have one divergence, the mean
    log-probability of a token of theirs for both models, and the teacher's entropy and agreement where the group
    begins; of a token that is not compared, the teacher says what the student says, and is sure.
    """

    ids: Tensor
    rows: Tensor
    places: Tensor
    sources: Tensor
    row_numbers: Tensor
    divergence: Tensor
    student_log_prob: Tensor
    teacher_log_prob: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    shape: tuple[int, int]

    def by_row(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[N] -> [B, L], `fill` where there is no target."""
        table = torch.full(self.shape, fill, dtype=values.dtype, device=values.device)
        return table.index_put((self.rows, self.places - 1), values)

    def of_targets(self, table: Tensor) -> Tensor:
        """[B, L] -> [N]; [B, 1] gives all targets of a row one value."""
        return table.expand(self.shape)[self.rows, self.places - 1]


class TokenGroups:
    """Which of N target tokens are compared together; each of the others is a group by itself.

    Args:
        numbers: [N] of the groups, from 0; -1 for a token without one. On the CPU, nothing waits for the device.
        device: of the work.
    """

    def __init__(self, numbers: Tensor, device: torch.device) -> None:
        known = int(numbers.max()) + 1 if numbers.numel() else 0
        alone = torch.arange(known, known + numbers.numel(), device=numbers.device)
        self._of = torch.where(numbers >= 0, numbers, alone).to(device, non_blocking=True)
        self._count = known + numbers.numel()

    def sum(self, values: Tensor) -> Tensor:
        """[N] -> [N]: of the token's group."""
        return values.new_zeros(self._count).index_add_(0, self._of, values).index_select(0, self._of)

    def mean(self, values: Tensor) -> Tensor:
        """The same of means."""
        return self.sum(values) / self.sum(torch.ones_like(values))


Rule = Callable[[TokenView], Tensor]

GAMMA = 0.5  # of IW-OPD, as in TRL's experimental trainer of that name
KEPT = 0.5  # TIP, section 4: half of the tokens do as well as all
FLOOR = 0.1  # of teacher_entropy: no token is lost


def iw_opd(view: TokenView) -> Tensor:
    """w_t = 1 + gamma (1 - sum_{s<t} |A_s| / sum_s |A_s|), A = log p_teacher - log p_student of the written token:
    less weight behind a prefix that the teacher would not have written (IW-OPD, arXiv 2606.22600)."""
    gaps = (view.teacher_log_prob - view.student_log_prob).abs()
    table = view.by_row(gaps)
    before = view.of_targets(table.cumsum(dim=1) - table)
    whole = view.of_targets(table.sum(dim=1, keepdim=True)).clamp_min(torch.finfo(gaps.dtype).tiny)
    return 1 + GAMMA * (1 - before / whole)


def teacher_entropy(view: TokenView) -> Tensor:
    """w_t = max(0.1, exp(-H_t)), H the teacher's entropy: less weight where the teacher itself is not sure, and a
    floor below which no weight falls. The idea is that of EGRSD's confidence gate (arXiv 2605.13255); this form of
    it, the inverse of the teacher's perplexity at the place, is ours."""
    return (-view.teacher_entropy).exp().clamp_min(FLOOR)


def disagreement(view: TokenView) -> Tensor:
    """1 for the half of each completion's tokens that teaches most, else 0: those where the student is unsure, and
    those where it is sure and far from the teacher (TIP, arXiv 2604.14084, two axes). The two are joined as
    h + d - h d, with the student's entropy h and the divergence d as shares of the completion's largest."""
    shares = []
    for values in (view.student_entropy, view.divergence):
        largest = view.by_row(values).amax(dim=1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
        shares.append(values / view.of_targets(largest))
    h, d = shares
    table = view.by_row(h + d - h * d, fill=-torch.inf)
    rank = table.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    count = view.by_row(torch.ones_like(h)).sum(dim=1, keepdim=True)
    return view.of_targets((rank < (KEPT * count).ceil()).to(h.dtype))


#: Name -> rule; a name is a value of the field `token_weights`.
TOKEN_WEIGHTS: dict[str, Rule] = {
    "iw_opd": iw_opd,
    "teacher_entropy": teacher_entropy,
    "disagreement": disagreement,
}
