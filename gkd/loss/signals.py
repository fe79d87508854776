"""What the teacher says about the N target tokens, and the output head that turns hidden states into logits.

Shapes: N target tokens, V vocabulary, D hidden size (Dt the teacher's), K top-k; of a teacher with another tokenizer
M target tokens of its own, and S tokens that both spell alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Head:
    """An output head: logits = softcap tanh(scale (h W^T + bias) / softcap), without the cap when it is None.

    Attributes:
        weight: [V, D]. bias: [V] or None.
        logit_scale: multiplies the logits before the cap (Cohere; for Granite 1 / logits_scaling).
        softcap: bound of the logits (Gemma-2 and later), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D], all at once: for tests and for a few tokens."""
        out = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return out if self.softcap is None else torch.tanh(out / self.softcap) * self.softcap


@dataclass(frozen=True, eq=False)
class DenseSignal:
    """The teacher in the same process: its last hidden states [N, Dt] at the targets, and its head.

    `exchanged` are pairs of ids whose logits change places before they are compared: where the teacher ends its turns
    with another token than the student, the one stands for the other.
    """

    hidden: Tensor
    head: Head
    exchanged: tuple[tuple[int, int], ...] = ()

    @property
    def device(self) -> torch.device:
        """Where it stands."""
        return self.hidden.device

    def exchanging(self, pair: tuple[int, int]) -> DenseSignal:
        """The same with two tokens in each other's place."""
        return replace(self, exchanged=(*self.exchanged, pair))

    def at(self, places: Tensor) -> DenseSignal:
        """The same of some of the targets: `places` [n], numbers of them."""
        return replace(self, hidden=self.hidden.index_select(0, places.to(self.hidden.device)))


@dataclass(frozen=True, eq=False)
class TopKSignal:
    """The teacher's K most likely tokens per target: ids [N, K] and their log-probabilities [N, K] fp32.

    The log-probabilities are normalised over the full vocabulary at temperature 1, so 1 - sum(exp) is the tail's mass.
    `own` [N] are those of the tokens that stand there in the teacher's view, among the K or not; None where they are
    not known.
    """

    ids: Tensor
    log_probs: Tensor
    own: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where it stands."""
        return self.ids.device

    def exchanging(self, pair: tuple[int, int]) -> TopKSignal:
        """The same with two tokens in each other's place."""
        first, second = pair
        ids = torch.where(self.ids == first, second, torch.where(self.ids == second, first, self.ids))
        return replace(self, ids=ids)

    def at(self, places: Tensor) -> TopKSignal:
        """The same of some of the targets: `places` [n], numbers of them."""
        places = places.to(self.ids.device)
        ids, log_probs = self.ids.index_select(0, places), self.log_probs.index_select(0, places)
        return TopKSignal(ids, log_probs, None if self.own is None else self.own.index_select(0, places))


TeacherSignal = DenseSignal | TopKSignal

# How a target of the student is compared with a teacher of another tokenizer: not at all, over all common tokens at
# its place, or as part of a longer text.
NOT_COMPARED, IN_FULL, IN_TEXT = 0, 1, 2


@dataclass(frozen=True, eq=False)
class AlignedSignal:
    """A teacher with another tokenizer: what it says at its own M targets, and where they meet the student's N.

    The tokens of a completion on both sides are spans of the same bytes. A group is as few of them as begin and end
    at the same bytes: n tokens of the student against m of the teacher. How a group is compared, `gkd.loss.aligned`
    says. The last four tensors are small and decide shapes: left on the CPU, nothing waits for the device.

    Attributes:
        teacher: what it says at the places that predict its targets: its hidden states and its head, or its K most
            likely tokens there with the log-probabilities of its targets (`TopKSignal.own`).
        targets: [M] the teacher's own ids.
        student_ids: [S] the common tokens, quickest in ascending order. teacher_ids: [S] the same tokens in the
            teacher's vocabulary. Each id once.
        border: [N] for a group's first token of the student: the row of `teacher` that predicts the teacher's first
            token of the group; -1 for every other token.
        group: [N] the number of the token's group, from 0; -1 for a token that is not compared.
        teacher_group: [M] the same of the teacher's tokens. Every number that is in one of the two is in the other.
        student_joined: [2, F] ids of the student and which of the S common tokens each is counted with, or None: "12"
            with "1", where the teacher writes "1", "2". teacher_joined: the same the other way round.
        size: how many ids the teacher has tokens for, where its head is not here to tell.
    """

    teacher: TeacherSignal
    targets: Tensor
    student_ids: Tensor
    teacher_ids: Tensor
    border: Tensor
    group: Tensor
    teacher_group: Tensor
    student_joined: Tensor | None = None
    teacher_joined: Tensor | None = None
    size: int | None = None

    @property
    def teacher_size(self) -> int:
        """Ids of the teacher's vocabulary."""
        if isinstance(self.teacher, DenseSignal):
            return self.teacher.head.weight.shape[0]
        assert self.size is not None, "a top-k signal does not tell how many ids there are"
        return self.size

    def exchanging(self, pair: tuple[int, int]) -> AlignedSignal:
        """The same: its tokens that end a turn are a pair of common tokens already."""
        return self

    def at(self, places: Tensor) -> AlignedSignal:
        """The same of some of the student's targets: `places` [n], numbers of them in ascending order, each group's
        all or none."""
        places = places.to(self.group.device)
        group = self.group.index_select(0, places)
        kept, number = torch.unique(group[group >= 0], return_inverse=True)
        own_group = group.clone()
        own_group[group >= 0] = number
        rows = torch.isin(self.teacher_group, kept).nonzero()[:, 0]
        new_row = torch.full((self.teacher_group.shape[0] + 1,), -1)  # the last one is for "no row", -1
        new_row[rows] = torch.arange(len(rows))
        there = rows.to(self.targets.device)
        return replace(
            self,
            teacher=self.teacher.at(rows),
            targets=self.targets.index_select(0, there),
            border=new_row[self.border.index_select(0, places)],
            group=own_group,
            teacher_group=torch.searchsorted(kept, self.teacher_group[rows]),
        )
