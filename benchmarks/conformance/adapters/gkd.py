"""This package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from conformance.adapters.drop_in import GKDLike
from conformance.loss_cases import LossCall
from conformance.spelling_cases import Text
from gkd._version import __version__
from gkd.config.fields import GKDConfig
from gkd.data.alignment import align
from gkd.data.common_tokens import CommonTokens
from gkd.data.joined_tokens import joined_tokens
from gkd.data.respelling import Respelling
from gkd.loss import AlignedSignal, DenseSignal, Head, LossSettings, fused_divergence, make_divergence
from gkd.training.trainer import GKDTrainer


class Ours(GKDLike):
    trainer_class, config_class = GKDTrainer, GKDConfig
    name, package, sources = "gkd", "gkd-distill", {}

    def version(self) -> str:
        return __version__

    def loss(self, call: LossCall) -> Any:
        """The fused pass, as the trainer calls it: target positions only, weights of 1 / targets."""
        keep = call.labels != -100
        number = int(keep.sum())
        rows = (call.student_head.shape[0], call.teacher_head.shape[0])
        settings = LossSettings(
            make_divergence("jsd", beta=call.beta),
            loss_temperature=call.temperature,
            shared_vocab=None if rows[0] == rows[1] else min(rows),
        )
        output = fused_divergence(
            call.student_hidden[keep],
            Head(call.student_head),
            DenseSignal(call.teacher_hidden[keep], Head(call.teacher_head)),
            call.labels[keep],
            torch.full((number,), 1 / max(number, 1)),
            settings,
        )
        return output.loss

    def ways(self) -> dict[str, Callable[[Text], Any]]:
        return {"": _aligned}

    def groups(self, student: Any, teacher: Any, text: str, student_ids: list[int], teacher_ids: list[int]) -> Any:
        found = Respelling(student, teacher).groups(student_ids, teacher_ids)
        return [
            (range(g.student_first, g.student_last + 1), range(g.teacher_first, g.teacher_last + 1)) for g in found
        ]


def _aligned(text: Text) -> Any:
    """The fused pass for an aligned teacher: logits are hidden states of heads that change nothing."""
    student, teacher = text.student, text.teacher
    number, own = len(student.completion), len(teacher.completion)
    border, group, other = (torch.full((count,), -1) for count in (number, number, own))
    groups = align([student.pieces[i] for i in student.completion], [teacher.pieces[i] for i in teacher.completion])
    for at, one in enumerate(group_ for group_ in groups if group_.compared):
        border[one.student_first] = one.teacher_first
        group[one.student_first : one.student_last + 1] = at
        other[one.teacher_first : one.teacher_last + 1] = at
    pairs = [(i, teacher.pieces.index(piece)) for i, piece in enumerate(student.pieces) if piece in teacher.pieces]
    common = torch.tensor(pairs)
    ours, theirs = (
        logits[side.prompt_length - 1 : -1]
        for side, logits in ((student, text.logits), (teacher, text.teacher_logits))
    )
    eyes = [torch.eye(logits.shape[-1], dtype=logits.dtype) for logits in (ours, theirs)]
    signal = AlignedSignal(
        DenseSignal(theirs, Head(eyes[1])),
        torch.tensor(teacher.completion),
        common[:, 0].contiguous(),
        common[:, 1].contiguous(),
        border,
        group,
        other,
        *_joined(text, common),
    )
    settings = LossSettings(make_divergence("jsd", beta=text.beta))
    weights = torch.full((number,), 1 / number, dtype=ours.dtype)
    return fused_divergence(ours, Head(eyes[0]), signal, torch.tensor(student.completion), weights, settings).loss


def _joined(text: Text, common: Any) -> tuple[Any, Any]:
    """Tokens of one side alone, counted with the common token that the other writes first, where there are
    tokenizers."""
    student, teacher = text.student, text.teacher
    if student.tokenizer is None:
        return None, None
    known = CommonTokens(common[:, 0].contiguous(), common[:, 1].contiguous())
    return joined_tokens(student.tokenizer, teacher.tokenizer, known, len(student.pieces), len(teacher.pieces))


ADAPTER = Ours()
