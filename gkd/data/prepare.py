"""Data sets: rows of any format become ids and labels, with a report of every row that could not be used as it is.

Masks come from lengths, never from ids, so pad == eos changes nothing. Nothing of a prompt is a target; the stop token
that ends an answer is. See `gkd.data.formats` for the formats and `gkd.data.encode` for the tokenization.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

from datasets import Dataset, Features, Sequence, Value
from transformers import PreTrainedTokenizerBase

from gkd.data.encode import RowEncoder
from gkd.data.encoded import Answers, Limits
from gkd.data.kinds import as_stored, check_kind, transformed
from gkd.data.prepared_row import PREPARED, Preparation, prepared_row, read_row
from gkd.data.row_report import MIXED_FROM, DataReport, read_notes, row_numbers
from gkd.data.row_values import RowPlace
from gkd.data.targets import IGNORE
from gkd.data.teacher_rows import IDS, TeacherReading, TeacherRows

logger = logging.getLogger(__name__)

_COLUMNS = Features(
    {
        "input_ids": Sequence(Value("int64")),
        "labels": Sequence(Value("int64")),
        "prompt_length": Value("int64"),
        "prompt_ids": Sequence(Value("int64")),
        **{name: Sequence(Value("int64")) for name in IDS},
        "row": Value("int64"),
        "notes": Sequence(Value("string")),
        "targets": Value("int64"),
        "length": Value("int64"),
        "served": Value("int64"),
    }
)


def prepare_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    max_prompt_length: int | None,
    overlong_prompt: str = "drop",
    overlong_row: str = "cut",
    assistant_turns: str = "last",
    unanswered_rows: str = "cut",
    prompt_only_ok: bool = False,
    prompts_needed: bool = True,
    name: str = "train",
    num_proc: int | None = None,
    formatting_func: Callable[[dict[str, Any]], str | Mapping[str, Any]] | None = None,
    teachers: Collection[str] = (),
    stop_ids: Collection[int] = (),
    today: str | None = None,
    reading: TeacherReading | None = None,
) -> tuple[Dataset, DataReport]:
    """Tokenizes a data set once, before training.

    Args:
        dataset: rows of any format of `gkd.data.formats`. A format of `set_format` shows columns, a transform is
            applied once.
        max_length: most tokens of a data row, prompt and answer together; None = no limit. Rows without an answer are
            only held to `max_prompt_length`.
        max_prompt_length: most tokens of a prompt; None = no limit.
        overlong_prompt: "drop" the row, or cut its prompt and keep its tokens from the start ("keep_start") or at the
            end ("keep_end": the question and the generation prompt survive, and so does a BOS).
        overlong_row: "cut" the end of the answer, or "drop" the row.
        assistant_turns: targets of a data row: its "last" assistant turn, or "all" of them.
        unanswered_rows: where answers are needed, "cut" a chat that ends with a question behind its last answer, or
            "drop" rows that end without one.
        prompt_only_ok: rows without an answer are welcome, since no completion is taken from the data; and one whose
            answer cannot be used (empty, too long, flagged) is a prompt.
        prompts_needed: completions will be generated, so a row needs a prompt. False (lmbda=0 without seq_kd) also
            admits running text: a `text` column, all of it target.
        name: what messages call this data set.
        num_proc: processes of `datasets.map`.
        formatting_func: row -> another row of a known format, as a dict, or -> running text, as in `SFTTrainer`.
        teachers: names that the column `teacher` may hold, when there are several teachers.
        stop_ids: at which the model stops beside the tokenizer's eos (`gkd.data.vocabulary.configured_stop_ids`).
        today: what a chat template writes as today's date, as YYYY-MM-DD; None = the clock's day.
        reading: how teachers read the rows, beside what the columns `teacher_prompt` and `teacher_system` say of it.

    Returns:
        The data set with `input_ids`, `labels` (-100 off target; all of them -100 for a prompt-only row),
        `prompt_length`, `prompt_ids` (what a rollout starts from where `input_ids[:prompt_length]` is not that, else
        empty: `gkd.data.sequences.prompt_of`), `row` (number in `dataset`) and, with `teachers`, `teacher` (number in
        their order), and the report. Where the teacher reads a prompt of its own in some row, also `teacher_context`
        and `teacher_prompt_ids` (`gkd.data.encoded.Encoded`), empty where it reads the student's; no limit cuts them.

    Raises:
        ValueError: no data set with rows of known length; a malformed row (number and column are named); rows without
            an answer or a prompt where one is needed, or of no known teacher; no row left.
    """
    check_kind(dataset, name)
    plain, transform = as_stored(dataset)
    preparation = Preparation(
        name=name,
        limits=Limits(max_length, max_prompt_length, overlong_prompt, overlong_row),
        answers=Answers(assistant_turns, unanswered_rows),
        prompt_only_ok=prompt_only_ok,
        prompts_needed=prompts_needed,
        formatting_func=formatting_func,
        teachers=tuple(teachers),
        features=None if transform else plain.features,
        transform=transform,
        stop_ids=tuple(sorted(stop_ids)),
        today=today,
        reading=reading or TeacherReading(),
    )
    return _usable(_tokenized(plain, tokenizer, preparation, num_proc), plain, preparation)


def _tokenized(
    plain: Dataset, tokenizer: PreTrainedTokenizerBase, preparation: Preparation, num_proc: int | None
) -> Dataset:
    """Every row in ids, with notes of what became of it; also those that cannot be used."""
    return plain.map(
        _encode_batch,
        batched=True,
        with_indices=True,
        remove_columns=plain.column_names,
        features=Features({**_COLUMNS, "teacher": Value("int64")}) if preparation.teachers else _COLUMNS,
        num_proc=num_proc,
        desc=f"Tokenizing {preparation.name} data set",
        fn_kwargs={"tokenizer": tokenizer, "preparation": preparation},
    )


def _usable(encoded: Dataset, plain: Dataset, preparation: Preparation) -> tuple[Dataset, DataReport]:
    """The rows that can be used, of the `plain` ones, and the report of all."""
    name = preparation.name
    kept, prompt_only, report = read_notes(encoded, DataReport(name, preparation.limits, rows=len(plain)))
    if kept and MIXED_FROM in plain.column_names:
        report.mixed_from = dict(Counter(plain.select_columns([MIXED_FROM]).select(kept)[MIXED_FROM]))
    logger.log(logging.WARNING if report.remarks() else logging.INFO, "%s", report)
    if not kept:
        raise ValueError(f"no usable row is left.\n{report}")
    if prompt_only and not preparation.prompt_only_ok:
        generates = preparation.prompts_needed or name == "train"
        raise ValueError(_without_answers(prompt_only, plain, name, generates=generates))
    if report.dropped:
        encoded = encoded.select(kept)
    views = () if report.views else IDS  # without any, the rows are what they always were
    return encoded.remove_columns(["notes", "targets", "length", "served", *views]), report


def _without_answers(rows: list[int], dataset: Dataset, name: str, generates: bool) -> str:
    answer = "`completion`, or a last assistant turn"
    if "input_ids" in dataset.column_names:
        answer = "`labels` with the id of each trained token, or a `completion_mask`, beside `input_ids`"
    found = f"{len(rows):,} of the {len(dataset):,} rows of the {name} data set have a prompt but no answer"
    if not generates:  # an evaluation
        return (
            f"{found} ({row_numbers(rows)}). eval_loss is measured on the data's own answers, whatever lmbda and "
            f"seq_kd are: give these rows one ({answer}), set unanswered_rows=drop, or leave the eval data set out"
        )
    return (
        f"{found} ({row_numbers(rows)}). Set lmbda=1 or seq_kd=True (and no collapse_guard that lowers lmbda), so "
        f"that every completion is generated, give these rows an answer ({answer}), or set unanswered_rows=drop; "
        "evaluation always needs answers"
    )


def _encode_batch(
    columns: dict[str, list[Any]], numbers: list[int], tokenizer: PreTrainedTokenizerBase, preparation: Preparation
) -> dict[str, list[Any]]:
    encoder = RowEncoder(tokenizer, preparation.answers.assistant_turns, preparation.stop_ids, preparation.today)
    readers = TeacherRows(preparation.reading, encoder, preparation.today)
    batch = transformed(columns, preparation.transform, preparation.name)
    found, teacher_numbers = [], []
    for i, number in enumerate(numbers):
        place = RowPlace(preparation.name, number)
        raw = {column: values[i] for column, values in batch.items()}
        if preparation.teachers:
            teacher_numbers.append(_teacher_number(raw, preparation.teachers, place))
        teacher = teacher_numbers[-1] if teacher_numbers else 0
        found.append(read_row(raw, place, readers, preparation, teacher))
    encoder.foresee(one.row for one in found)
    rows = [prepared_row(one, readers, preparation) for one in found]
    return {
        "input_ids": [row.input_ids for row in rows],
        "labels": [row.labels for row in rows],
        "prompt_length": [row.prompt_length for row in rows],
        "prompt_ids": [row.prompt_ids for row in rows],
        **{name: [getattr(row, name) for row in rows] for name in IDS},
        "row": list(numbers),
        "notes": [list(row.notes) for row in rows],
        "targets": [len(row.labels[1:]) - row.labels[1:].count(IGNORE) for row in rows],
        "length": [len(row.input_ids) for row in rows],
        "served": [len(row.prompt) for row in rows],
        **({"teacher": teacher_numbers} if preparation.teachers else {}),
    }


def _teacher_number(raw: Mapping[str, Any], teachers: tuple[str, ...], place: RowPlace) -> int:
    name = raw.get("teacher")
    if raw.keys() >= PREPARED and isinstance(name, int) and 0 <= name < len(teachers):
        return name  # rows that have been prepared before
    if name not in teachers:
        found = "is missing" if name is None else f"is {name!r}, which no teacher is called"
        place.bad("teacher", f"{found}: every row names one of {', '.join(teachers)} (column `teacher`)")
    return teachers.index(name)
