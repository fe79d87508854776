"""Rows whose teacher reads another prompt than the student, and the loss of it from its definition, in float64."""

from __future__ import annotations

import copy
from typing import Any

import oracle
import torch
from tiny import tiny_rows, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SYSTEM = "You know that the answer is among: red, blue, 340."


def viewed_rows(number: int) -> list[dict[str, Any]]:
    """Ragged rows in turn: as the student reads them; with a system turn; with a longer prompt; with a short one."""
    rows = tiny_rows(number)
    for i, row in enumerate(rows):
        row["teacher_system"] = SYSTEM if i % 4 == 1 else None
        known = [{"role": "user", "content": f"Solved: {row['messages'][-1]['content']} Say it again. {'x' * i}"}]
        row["teacher_prompt"] = {2: known, 3: [{"role": "user", "content": "?"}]}.get(i % 4)
    return rows


def own_prompt(row: dict[str, Any]) -> list[int]:
    """What the student reads in front of it."""
    return list(TOKENIZER.apply_chat_template(row["messages"][:-1], add_generation_prompt=True)["input_ids"])


def teacher_prompt(row: dict[str, Any]) -> list[int]:
    """What the teacher reads in front of a completion: the row's turns as its columns change them, rendered."""
    turns = copy.deepcopy(row["teacher_prompt"] or row["messages"][:-1])
    if row["teacher_system"] is not None:
        if turns[0]["role"] == "system":
            turns = turns[1:]
        turns = [{"role": "system", "content": row["teacher_system"]}, *turns]
    return list(TOKENIZER.apply_chat_template(turns, add_generation_prompt=True)["input_ids"])


def dense_loss(
    student: Any,
    teacher: Any,
    sequences: list[Any],
    rows: list[dict[str, Any]],
    name: str = "jsd",
    end_map: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Mean divergence over all targets: two models, each with its own prompt in front of the same completion.

    Args:
        student, teacher: in float64. sequences: as they were trained on. rows: of the data set, by number.
        end_map: the student's and the teacher's end of a turn.
    """
    total, number = torch.zeros((), dtype=torch.float64), 0
    for sequence in sequences:
        if not sequence.num_targets:
            continue
        start = sequence.prompt_length
        answer = sequence.input_ids[start:]
        assert sequence.labels == [-100] * start + answer
        read, context = list(answer), teacher_prompt(rows[sequence.row])
        if end_map is not None and read[-1] == end_map[0]:
            read[-1] = end_map[1]
        p = _probabilities(student, sequence.input_ids, len(answer))
        with torch.no_grad():
            q = _probabilities(teacher, [*context, *read], len(answer))
            if end_map is not None:
                q[:, list(end_map)] = q[:, list(reversed(end_map))]
        total = total + oracle.divergence(name, p, q).sum()
        number += len(answer)
    return total / number


def _probabilities(model: Any, ids: list[int], last: int) -> torch.Tensor:
    """Of each of the last tokens."""
    return model(input_ids=torch.tensor([ids])).logits[0, -last - 1 : -1].softmax(-1)


def gradient(loss: torch.Tensor, model: Any) -> torch.Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Size of the difference beside the size of the right value."""
    return float((found.double() - wanted).norm() / wanted.norm())
