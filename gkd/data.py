"""Data sets: rows of any format become ids and labels, with a report of every row that could not be used as it is.

Masks come from lengths, never from ids, so pad == eos changes nothing. Nothing of a prompt is a target; the stop token
that ends an answer is. See `gkd.rows` for the formats and `gkd.encode` for the tokenization.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jinja2
import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Sequence, Value
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from gkd import batch as batches
from gkd._version import __version__
from gkd.encode import Encoded, Limits, RowEncoder
from gkd.files import read_rows
from gkd.rows import Place, Row, TextRow, canonical_row

__all__ = ["DataReport", "PaddingCollator", "prepare_dataset", "read_rows"]

logger = logging.getLogger(__name__)

DROPPED = {
    "prompt_too_long": "dropped: the prompt is longer than max_prompt_length={max_prompt_length}",
    "row_too_long": "dropped: the row is longer than max_length={max_length}",
    "no_room": "dropped: the prompt alone fills max_length={max_length}",
    "empty_answer": "dropped: the answer is empty",
    "untrained": "dropped: flags say that no answer of it is to be trained on",
}
NOTES = {
    "prompt_cut": "cut: the prompt was longer than max_prompt_length={max_prompt_length} ({overlong_prompt})",
    "row_cut": "cut: the end of the answer, the row was longer than max_length={max_length}",
    "prompt_not_prefix": "note: the prompt is not a prefix of the row, whose targets begin where the two part",
    "turn_not_found": "note: an earlier assistant turn is not trained on, the chat template does not show where it is",
    "prompt_repeated": "note: the completion repeats the prompt, which was left out of it",
    "prompt_twice": "note: the completion begins with the prompt, which stands in the row twice",
    "flag_not_honoured": "note: flagged as to be trained on, but not trained on: a turn of a user, or in `prompt`",
    "eos_appended": "note: the chat template does not end answers with a stop token; one was appended",
    "tools_left_out": "note: the chat template leaves out: tools",
    "calls_left_out": "note: the chat template leaves out: tool_calls",
    "thought_left_out": "note: the chat template leaves out: the answer's reasoning_content or thinking",
    "content_left_out": "note: the chat template leaves out: the content of a turn",
    "options_left_out": "note: the chat template does not know: something in chat_template_kwargs",
    "answer_shortened": "note: the chat template leaves out a part of the answer, which is not trained on (a thought? "
    "Give it as reasoning_content, or take another template with chat_template_path)",
    "empty_thought": "note: the chat template puts an empty thought before the answer, which is trained on (give "
    "chat_template_kwargs {{'enable_thinking': false}} if it knows that)",
}
# What tokenizers and chat templates raise over a single row; our own ValueErrors name it already.
_STUMBLES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    UnicodeError,
)
_NAMED = 10  # row numbers named per line of a report


@dataclass
class DataReport:
    """What became of a data set's rows. `rows_with` maps each key of DROPPED and NOTES to row numbers (all of them);
    token counts are of the kept rows."""

    name: str
    limits: Limits
    rows: int = 0
    kept: int = 0
    prompt_only: int = 0
    prompt_tokens: int = 0
    target_tokens: int = 0
    longest_prompt: int = 0
    longest_row: int = 0
    rows_with: dict[str, list[int]] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        return self.rows - self.kept

    def __str__(self) -> str:
        lines = [
            f"{self.name} data set: {self.kept:,} of {self.rows:,} rows kept"
            + (f", {self.prompt_only:,} of them prompts only" if self.prompt_only else ""),
            f"  {self.target_tokens:,} target tokens, {self.prompt_tokens:,} prompt tokens; longest prompt "
            f"{self.longest_prompt:,}, longest row {self.longest_row:,}",
        ]
        return "\n".join(lines + [f"  {line}" for line in self.remarks()])

    def remarks(self) -> list[str]:
        """One line per reason, with the number of rows and the first of their row numbers."""
        return [
            f"{len(rows):,} {text.format(**vars(self.limits))}: {_row_numbers(rows)}"
            for key, text in {**DROPPED, **NOTES}.items()
            if (rows := self.rows_with.get(key))
        ]


def _row_numbers(rows: list[int]) -> str:
    more = f" and {len(rows) - _NAMED:,} more" if len(rows) > _NAMED else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:_NAMED]))}{more}"


_COLUMNS = Features(
    {
        "input_ids": Sequence(Value("int64")),
        "labels": Sequence(Value("int64")),
        "prompt_length": Value("int64"),
        "prompt_ids": Sequence(Value("int64")),
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
    prompt_only_ok: bool = False,
    prompts_needed: bool = True,
    name: str = "train",
    num_proc: int | None = None,
    formatting_func: Callable[[dict[str, Any]], str | Mapping[str, Any]] | None = None,
    teachers: Collection[str] = (),
    stop_ids: Collection[int] = (),
    today: str | None = None,
) -> tuple[Dataset, DataReport]:
    """Tokenizes a data set once, before training.

    Args:
        dataset: rows of any format of `gkd.rows`.
        max_length: most tokens of a data row, prompt and answer together; None = no limit. Rows without an answer are
            only held to `max_prompt_length`.
        max_prompt_length: most tokens of a prompt; None = no limit.
        overlong_prompt: "drop" the row, or cut its prompt and keep its tokens from the start ("keep_start") or at the
            end ("keep_end": the question and the generation prompt survive, and so does a BOS).
        overlong_row: "cut" the end of the answer, or "drop" the row.
        assistant_turns: targets of a data row: its "last" assistant turn, or "all" of them.
        prompt_only_ok: rows without an answer are welcome, since no completion is taken from the data.
        prompts_needed: completions will be generated, so a row needs a prompt. False (lmbda=0 without seq_kd) also
            admits running text: a `text` column, all of it target.
        name: what messages call this data set.
        num_proc: processes of `datasets.map`.
        formatting_func: row -> another row of a known format, as a dict, or -> running text, as in `SFTTrainer`.
        teachers: names that the column `teacher` may hold, when there are several teachers.
        stop_ids: at which the model stops beside the tokenizer's eos (`gkd.vocab.configured_stop_ids`).
        today: what a chat template writes as today's date, as YYYY-MM-DD; None = the clock's day.

    Returns:
        The data set with `input_ids`, `labels` (-100 off target; all of them -100 for a prompt-only row),
        `prompt_length`, `prompt_ids` (what a rollout starts from where `input_ids[:prompt_length]` is not that, else
        empty: `gkd.batch.prompt_of`), `row` (number in `dataset`) and, with `teachers`, `teacher` (number in their
        order), and the report.

    Raises:
        ValueError: no data set with rows of known length; a malformed row (number and column are named); rows without
            an answer or a prompt where one is needed, or of no known teacher; no row left.
    """
    check_kind(dataset, name)
    limits = Limits(max_length, max_prompt_length, overlong_prompt, overlong_row)
    encoded = dataset.map(
        _encode_batch,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=Features({**_COLUMNS, "teacher": Value("int64")}) if teachers else _COLUMNS,
        num_proc=num_proc,
        desc=f"Tokenizing {name} data set",
        fn_kwargs={
            "tokenizer": tokenizer,
            "assistant_turns": assistant_turns,
            "limits": limits,
            "name": name,
            "prompts_needed": prompts_needed,
            "formatting_func": formatting_func,
            "teachers": list(teachers),
            "stop_ids": sorted(stop_ids),
            "today": today,
            "version": __version__,
        },
    )
    kept, prompt_only, report = _read_notes(encoded, DataReport(name, limits, rows=len(dataset)))
    logger.log(logging.WARNING if report.rows_with else logging.INFO, "%s", report)
    if not kept:
        raise ValueError(f"no usable row is left.\n{report}")
    if prompt_only and not prompt_only_ok:
        raise ValueError(
            f"{len(prompt_only):,} of the {len(dataset):,} rows of the {name} data set have a prompt but no answer "
            f"({_row_numbers(prompt_only)}). Set lmbda=1 or seq_kd=True, so that every completion is generated, or "
            f"give these rows an answer (`completion`, or a last assistant turn); evaluation always needs answers"
        )
    if report.dropped:
        encoded = encoded.select(kept)
    return encoded.remove_columns(["notes", "targets", "length", "served"]), report


def check_kind(dataset: Any, name: str) -> None:
    """Refuse what is no data set with rows of known number.

    Raises:
        ValueError: with the remedy.
    """
    if isinstance(dataset, (DatasetDict, IterableDatasetDict, dict)):
        raise ValueError(f"the {name} data set is a dict of splits ({', '.join(dataset)}): pass one of them")
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"the {name} data set is streamed, but its rows must be counted and numbered before training: load it "
            f"without streaming, or take rows of it, Dataset.from_list(list(stream.take(n)))"
        )
    if not isinstance(dataset, Dataset):
        kind = type(dataset).__name__
        raise ValueError(f"the {name} data set should be a datasets.Dataset, got {kind}: use Dataset.from_list(rows)")
    if len(dataset) == 0:
        raise ValueError(f"the {name} data set is empty: it has no rows")


def _encode_batch(
    columns: Mapping[str, list[Any]],
    numbers: list[int],
    tokenizer: PreTrainedTokenizerBase,
    assistant_turns: str,
    limits: Limits,
    name: str,
    prompts_needed: bool,
    formatting_func: Callable[[dict[str, Any]], Any] | None,
    teachers: list[str],
    stop_ids: list[int],
    today: str | None,
    version: str,  # only there for the key of the cache of datasets.map: another version may tokenize otherwise
) -> dict[str, list[Any]]:
    encoder = RowEncoder(tokenizer, assistant_turns, stop_ids, today)
    rows, teacher_numbers = [], []
    for i, number in enumerate(numbers):
        place = Place(name, number)
        raw: Mapping[str, Any] = {column: values[i] for column, values in columns.items()}
        if teachers:
            teacher_numbers.append(_teacher_number(raw.get("teacher"), teachers, place))
        if formatting_func is not None:
            raw = _formatted(formatting_func(dict(raw)), place)
        row = canonical_row(raw, place, bool(tokenizer.chat_template))
        if prompts_needed and isinstance(row, TextRow) and not row.prompt:
            place.bad(
                "text",
                "running text has no prompt to continue: give rows a `prompt` and a `completion` (a formatting_func "
                "may return such a row, as a dict), or train on the data only with lmbda=0",
            )
        encoded = _encoded(encoder, row, place)
        if prompts_needed and encoded.prompt_length == 0:
            place.bad("input_ids", "has no prompt: its first id is a target already")
        encoded = replace(encoded, notes=(*getattr(row, "notes", ()), *encoded.notes))
        rows.append(encoded if "empty_answer" in encoded.notes else limits.fit(encoded, tokenizer.bos_token_id))
    return {
        "input_ids": [row.input_ids for row in rows],
        "labels": [row.labels for row in rows],
        "prompt_length": [row.prompt_length for row in rows],
        "prompt_ids": [row.prompt_ids for row in rows],
        "row": list(numbers),
        "notes": [list(row.notes) for row in rows],
        "targets": [sum(label != batches.IGNORE for label in row.labels[1:]) for row in rows],
        "length": [len(row.input_ids) for row in rows],
        "served": [len(row.prompt) for row in rows],
        **({"teacher": teacher_numbers} if teachers else {}),
    }


def _teacher_number(name: Any, teachers: list[str], place: Place) -> int:
    if name not in teachers:
        found = "is missing" if name is None else f"is {name!r}, which no teacher is called"
        place.bad("teacher", f"{found}: every row names one of {', '.join(teachers)} (teacher_adapters)")
    return teachers.index(name)


def _encoded(encoder: RowEncoder, row: Row, place: Place) -> Encoded:
    """The row's ids; where a tokenizer or its chat template stumbles over a row, the row is named."""
    try:
        return encoder.encode(row, place)
    except _STUMBLES as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{place.dataset} data set, row {place.number}: cannot be tokenized ({what})") from error


def _formatted(result: Any, place: Place) -> Mapping[str, Any]:
    if isinstance(result, str):
        return {"text": result}
    if isinstance(result, Mapping):
        return result
    raise ValueError(
        f"formatting_func returned {type(result).__name__} for row {place.number} of the {place.dataset} data set; it "
        f"should return a row of a known format (a dict such as {{'prompt': ..., 'completion': ...}}) or one text"
    )


def _read_notes(encoded: Dataset, report: DataReport) -> tuple[list[int], list[int], DataReport]:
    """Fills in the report; also the numbers of the kept rows, and of those among them that have no answer."""
    kept: list[int] = []
    prompt_only: list[int] = []
    for number, row in enumerate(encoded.select_columns(["notes", "targets", "length", "served"])):
        for note in row["notes"]:
            report.rows_with.setdefault(note, []).append(number)
        if DROPPED.keys() & set(row["notes"]):
            continue
        kept.append(number)
        if row["targets"] == 0:
            prompt_only.append(number)
        report.target_tokens += row["targets"]
        report.prompt_tokens += row["served"]
        report.longest_prompt = max(report.longest_prompt, row["served"])
        report.longest_row = max(report.longest_row, row["length"])
    report.kept, report.prompt_only = len(kept), len(prompt_only)
    return kept, prompt_only, report


@dataclass(frozen=True)
class PaddingCollator:
    """Pads prepared rows on the right to the longest, whatever side the tokenizer pads on.

    Returns int64 tensors: `input_ids`, `attention_mask`, `labels` [B, T]; `prompt_lengths`, `rows`, `teachers` [B];
    `prompt_ids` [B, P], -100 where there are none: the prompts that are no beginnings of their rows.
    """

    pad_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, features: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = [
            batches.Sequence(
                list(row["input_ids"]),
                list(row["labels"]),
                int(row["prompt_length"]),
                row=int(row["row"]),
                teacher=int(row.get("teacher", 0)),
                prompt_ids=list(row.get("prompt_ids") or ()),
            )
            for row in features
        ]
        padded = batches.collate(sequences, self.pad_id, self.pad_to_multiple_of)
        prompt_lengths = torch.tensor([sequence.prompt_length for sequence in sequences])
        names = ("input_ids", "attention_mask", "labels", "rows", "teachers")
        prompt_ids = [torch.tensor(sequence.prompt_ids, dtype=torch.long) for sequence in sequences]
        return {
            **{key: padded[key] for key in names},
            "prompt_lengths": prompt_lengths,
            "prompt_ids": pad_sequence(prompt_ids, batch_first=True, padding_value=batches.IGNORE),
        }
