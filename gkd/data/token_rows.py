"""Rows that are token ids already: labels or masks, as `gkd precompute`, TRL and other trainers write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any

from gkd.data.row_values import RowPlace, describe, is_empty

# 1 on what is trained: TRL's two, their singular, verl's.
MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask")
READ = {"input_ids", "labels", "attention_mask", "prompt_length", "prompt_ids", "position_ids", "seq_lengths", *MASKS}
READ |= {"teacher_context", "teacher_prompt_ids"}
# The fingerprint of the student that has written a row before its training (`gkd precompute --student`).
WRITTEN_BY = "student_fingerprint"


@dataclass(frozen=True)
class TokenRow:
    """Token ids that come with their labels (-100 off target). A rollout starts from `prompt_ids`, or, where they are
    empty, at `prompt_length`. The last two are as in `gkd.data.encoded.Encoded`."""

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    prompt_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    teacher_context: tuple[int, ...] = ()
    teacher_prompt_ids: tuple[int, ...] = ()


def token_row(row: Mapping[str, Any], place: RowPlace) -> TokenRow:
    """Raises ValueError with row and column: no integers, lengths that differ, packed rows, shifted labels."""
    ids = _integers(row, "input_ids", place)
    columns = {
        name: _integers(row, name, place, masks=name in (*MASKS, "attention_mask"))
        for name in ("labels", *MASKS, "attention_mask")
        if row.get(name) is not None
    }
    for name, values in columns.items():
        if len(values) != len(ids):
            place.bad(name, f"has {len(values)} entries for {len(ids)} input_ids")
    labels = _labels(ids, columns, place)
    real = columns.get("attention_mask", [1] * len(ids))
    _refuse_packed(row, real, place)
    if "0" in "".join(map(str, real)).strip("0"):
        place.bad("attention_mask", "has zeros between ones, which are not padding; nothing here can honour that")
    ids, labels = ([v for v, keep in zip(values, real, strict=True) if keep] for values in (ids, labels))
    if not ids:
        place.bad("input_ids", "is empty")
    targets = [j for j, label in enumerate(labels) if label != -100]
    end = targets[-1] + 1 if targets else len(ids)
    start = end if targets else len(ids)
    while targets and start > 0 and labels[start - 1] != -100:
        start -= 1
    length = row.get("prompt_length")
    if length is None:
        length = start
    elif isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= len(ids):
        place.bad("prompt_length", f"should be a number of input_ids (0 to {len(ids)}), got {describe(length)}")
    prompt, context, teacher_prompt = (
        () if row.get(name) is None else tuple(_integers(row, name, place))
        for name in ("prompt_ids", "teacher_context", "teacher_prompt_ids")
    )
    masked = not targets and any(name in columns for name in MASKS)
    return TokenRow(ids[:end], labels[:end], length, prompt, ("masked",) if masked else (), context, teacher_prompt)


def _labels(ids: list[int], columns: Mapping[str, list[int]], place: RowPlace) -> list[int]:
    """The given labels, or the ids, where every mask is 1; nothing is a target in a row without either."""
    masks = [columns[name] for name in MASKS if name in columns]
    labels = columns.get("labels", ids if masks else [-100] * len(ids))
    if wrong := [j for j, (i, label) in enumerate(zip(ids, labels, strict=True)) if label not in (-100, i)]:
        place.bad(
            "labels", f"entry {wrong[0]} is neither -100 nor the id of input_ids there (do not shift the labels)"
        )
    return [label if all(mask[j] for mask in masks) else -100 for j, label in enumerate(labels)]


def _refuse_packed(row: Mapping[str, Any], real: list[int], place: RowPlace) -> None:
    """Several texts in one row would be read as one."""
    for name in ("position_ids", "seq_lengths"):
        if is_empty(row.get(name)):
            continue
        values = _integers(row, name, place)
        packed = len(values) > 1
        if name == "position_ids":
            values = [value for value, keep in zip(values, real, strict=False) if keep]
            packed = any(after != before + 1 for before, after in pairwise(values))
        if packed:
            place.bad(name, "says that there are several texts in the row: packed rows are not supported, unpack them")


def _integers(row: Mapping[str, Any], column: str, place: RowPlace, masks: bool = False) -> list[int]:
    values = row[column]
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)) or not all(
        isinstance(value, Integral) and (masks or not isinstance(value, bool)) for value in values
    ):
        place.bad(column, f"should be a list of integers, got {describe(values)}")
    numbers = [int(value) for value in values]
    if masks and (wrong := [value for value in numbers if value not in (0, 1)]):
        place.bad(column, f"should hold 0 and 1 only, holds {wrong[0]}")
    return numbers
