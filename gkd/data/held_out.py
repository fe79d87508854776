"""Held-out rows whose prompts are not trained on, and a count of those that are.

Rows that share a prompt go to the same side: a prompt that was trained on is no held-out prompt, whatever its answer.
Before the tokenizer is known, a prompt is what `gkd.data.formats` reads as one; prepared rows are compared by token
ids.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from datasets import Dataset

from gkd.data.formats import ChatRow, canonical_row
from gkd.data.row_values import RowPlace
from gkd.data.token_rows import TokenRow

logger = logging.getLogger(__name__)

HELD_OUT = 64  # rows that are taken out of a data set without a test split


def with_held_out(
    data: dict[str, Any], rows: int = HELD_OUT, as_row: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """`data` with `eval` rows: for a data set without a test split, some of its train rows, always the same ones. No
    prompt of theirs stays in `train`.

    Args:
        data: `train` rows, and `eval` rows or None.
        rows: most rows to take out of `train`; never more than a tenth of them, and at least one.
        as_row: makes a row of a known format from one with other columns. It is applied first, to all rows, since
            what is held out are prompts.

    Raises:
        ValueError: there is nothing to share out.
    """
    if as_row is not None:
        data = {name: part.map(as_row) if isinstance(part, Dataset) else part for name, part in data.items()}
    if data.get("eval") is not None:
        return data
    if len(data["train"]) < 2:
        raise ValueError("the data set has one row only: it needs at least one to train on and one to hold out")
    train, held_out = hold_out(data["train"], max(1, min(rows, len(data["train"]) // 10)))
    return {**data, "train": train, "eval": held_out}


def hold_out(rows: Dataset, size: int, seed: int = 0) -> tuple[Dataset, Dataset]:
    """(rows to train on, about `size` held-out rows), drawn at random, always the same ones.

    Rows with one prompt stay together, so a few rows less may be held out; or more, where the rarest prompt has more.
    """
    numbers: dict[str, list[int]] = {}
    keys = [prompt_key(row, number) for number, row in enumerate(rows)]
    for number, key in enumerate(keys):
        numbers.setdefault(key, []).append(number)
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    if len(numbers) == 1:
        logger.warning("all %s rows have the same prompt: the held-out rows have it, too", f"{len(rows):,}")
        return rows.select(order[size:]), rows.select(order[:size])
    chosen: dict[int, None] = {}  # in the order of the draw
    for number in order:
        together = numbers[keys[number]]
        if number not in chosen and len(chosen) + len(together) <= size:
            chosen.update(dict.fromkeys(together))
        if len(chosen) == size:
            break
    if not chosen:
        rarest = min((keys[number] for number in order), key=lambda key: len(numbers[key]))
        chosen = dict.fromkeys(numbers[rarest])
    return rows.select([number for number in order if number not in chosen]), rows.select(list(chosen))


def prompt_key(row: Mapping[str, Any], number: int = 0) -> str:
    """Equal for rows with the same prompt: what `gkd.data.formats` makes of it, without white space around its texts;
    the whole row where that knows no format (or finds a fault, which is reported when the row is prepared)."""
    try:
        known = canonical_row(row, RowPlace("train", number), True)
    except ValueError:
        return json.dumps(dict(row), default=str, sort_keys=True)
    prompt: Any
    if isinstance(known, ChatRow):
        prompt = [known.messages[: known.answer], known.tools, known.template_kwargs]
    elif isinstance(known, TokenRow):
        prompt = known.input_ids[: known.prompt_length] or known.input_ids
    else:
        prompt = known.prompt or known.completion
    return json.dumps(_stripped(prompt), default=str, sort_keys=True)


def _stripped(value: Any) -> Any:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, Mapping):
        return {key: _stripped(item) for key, item in value.items()}
    return [_stripped(item) for item in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------------------- prepared rows


@dataclass(frozen=True)
class Overlap:
    """Of prepared rows: `repeated` train rows are wholly equal to an earlier one; `shared` of `held_out` held-out
    prompts are among those trained on."""

    rows: int
    repeated: int
    held_out: int
    shared: int


def overlap(train: Dataset, held_out: Iterable[list[int]]) -> Overlap:
    """How often rows repeat each other, and held-out prompts those of the train rows
    (`gkd.data.prepare.prepare_dataset`)."""
    wanted = [np.asarray(prompt, dtype=np.int64).tobytes() for prompt in held_out]
    asked, trained, rows = set(wanted), set(), set()
    for prompt, whole in _bytes_of(train):
        if prompt in asked:
            trained.add(prompt)
        rows.add(hash(whole))
    return Overlap(len(train), len(train) - len(rows), len(wanted), sum(prompt in trained for prompt in wanted))


def warn_of_overlap(train: Dataset, held_out: Iterable[list[int]]) -> None:
    """Say so when held-out prompts are trained on."""
    found = overlap(train, held_out)
    if found.shared:
        logger.warning(
            "%d of %d held-out prompts are also trained on, so the table shows in part what was memorised: keep them "
            "apart with gkd.run.with_held_out or gkd.run.hold_out",
            found.shared,
            found.held_out,
        )


def _bytes_of(rows: Dataset) -> Iterator[tuple[bytes, bytes]]:
    """(prompt, prompt and answer) of each prepared row as the bytes of their ids; running text is its own prompt."""
    columns = rows.select_columns(["input_ids", "prompt_length", "prompt_ids"]).with_format("arrow")
    for table in columns.iter(batch_size=1000):
        lengths = table["prompt_length"].to_pylist()
        ids, served = (_split(table[name].combine_chunks()) for name in ("input_ids", "prompt_ids"))
        for row, own, length in zip(ids, served, lengths, strict=True):
            yield (own if len(own) else row[: length or None]).tobytes(), row.tobytes()


def _split(column: Any) -> list[np.ndarray]:
    """The arrays of an Arrow list column."""
    offsets = column.offsets.to_numpy()
    values = column.values.to_numpy()
    return [values[start:end] for start, end in pairwise(offsets)]
