"""The doctor's look at the rows: formats, what is dropped or cut, where an answer begins and whether it stops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase

from gkd.assembly.rows import row_options, train_options
from gkd.commands.doctor.alignment import alignment_of, examine_groups, groups_in_pieces
from gkd.commands.doctor.view import Diagnosis, Reader, RowView, view
from gkd.config.fields import GKDConfig
from gkd.data.aligned_view import Alignment
from gkd.data.formats import ChatRow, Row, canonical_row
from gkd.data.held_out import overlap
from gkd.data.message_bytes import MessageBytes
from gkd.data.prepare import prepare_dataset
from gkd.data.row_report import DataReport
from gkd.data.row_values import RowPlace
from gkd.data.sequences import prompt_of, sequence_of
from gkd.data.targets import IGNORE
from gkd.data.teacher_rows import TeacherReading
from gkd.data.token_rows import TokenRow
from gkd.data.vocabulary import stop_token_ids

ROWS_SHOWN = 3
_LOOKED_AT = 10_000  # rows whose format and last token are looked at
_MANY = 0.01  # a share of dropped rows that calls for a warning


def examine_rows(
    out: Diagnosis, train: Dataset, tokenizer: PreTrainedTokenizerBase, args: GKDConfig, encoding: dict[str, Any]
) -> Dataset:
    """The train rows as the trainer will prepare them; findings go to `out`. `encoding`: of
    `gkd.assembly.rollouts.encoding_options`.

    Raises:
        ValueError: what `gkd.data.prepare.prepare_dataset` refuses.
    """
    prepared, report = prepare_dataset(
        train,
        tokenizer,
        **row_options(args),
        **train_options(args),
        **encoding,
    )
    stops = stop_token_ids(tokenizer, GenerationConfig(eos_token_id=list(encoding["stop_ids"])))
    reading, aligned = encoding["reading"], None
    if args.teacher_tokenizer_alignment is not None and reading.foreign:
        aligned = alignment_of(tokenizer, reading.template(0), encoding["stop_ids"], args.teacher_end_of_turn)
    _formats(out, train, bool(tokenizer.chat_template), args.assistant_turns)
    _counts(out, report)
    _stops(out, prepared, report, stops)
    if aligned is not None:
        examine_groups(out, prepared, aligned)
    out.add_rows(_shown(prepared, report, Reader(tokenizer, stops), reading, aligned))
    return prepared


def _shown(
    prepared: Dataset, report: DataReport, student: Reader, reading: TeacherReading, aligned: Alignment | None
) -> list[RowView]:
    """The first rows, of those that the teacher reads otherwise if there are any; with their groups where it has other
    tokens and is compared."""
    own = reading.template(0)
    teacher = student
    if own is not None:
        stops = own.stop_ids if own.tokenizer is None else (*own.stop_ids, *stop_token_ids(own.tokenizer, None))
        teacher = Reader(own.tokenizer or MessageBytes(), {*stops}, own.foreign)
    viewed = (i for i, context in enumerate(prepared["teacher_context"]) if context) if report.views else iter(())
    numbers = list(islice(viewed, ROWS_SHOWN)) or list(range(min(ROWS_SHOWN, len(prepared))))
    chosen = prepared.select(numbers)
    views = [view(row, student, teacher, reading.end_map) for row in chosen]
    if aligned is None:
        return views
    groups = [groups_in_pieces(sequence_of(row), aligned) for row in chosen]
    return [replace(shown, groups=found) for shown, found in zip(views, groups, strict=True)]


def examine_held_out(
    out: Diagnosis,
    data: Mapping[str, Any],
    prepared: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: GKDConfig,
    encoding: dict[str, Any],
) -> None:
    """Rows that repeat each other, and held-out prompts that are trained on.

    Args:
        data: what `load_data` gave.
        prepared: its train rows, from `examine_rows`.
    """
    sets = {name: data[name] for name in ("eval", "prompts") if data.get(name) is not None}
    prompts: dict[tuple[int, ...], None] = {}
    for name, rows in sets.items():
        ready, _ = prepare_dataset(
            rows,
            tokenizer,
            max_length=None,
            max_prompt_length=args.prompt_limit,
            overlong_prompt=args.overlong_prompt,
            assistant_turns=args.assistant_turns,
            prompt_only_ok=True,
            prompts_needed=False,
            name=name,
            num_proc=args.dataset_num_proc,
            **encoding,
        )
        prompts |= dict.fromkeys(tuple(prompt_of(row) or row["input_ids"]) for row in ready)
    found = overlap(prepared, map(list, prompts))
    repeated = f"{found.repeated:,} duplicates among {found.rows:,} train rows"
    if not sets:
        message = f"{repeated}; no rows are held out, so the table is measured on rows that are trained on"
        out.add("Held out", "warning", message, "let load_data return gkd.run.with_held_out(data)")
        return
    message = f"{repeated}; {found.shared:,} of {found.held_out:,} held-out prompts are in train"
    remedy = "take them apart by prompt: gkd.run.with_held_out, gkd.run.hold_out" if found.shared else ""
    if not remedy and found.repeated > _MANY * found.rows:
        remedy = "leave the duplicates out, unless they should count several times"
    out.add("Held out", "warning" if remedy else "ok", message, remedy)


def _formats(out: Diagnosis, train: Dataset, has_template: bool, assistant_turns: str) -> None:
    looked_at = train.select(range(min(_LOOKED_AT, len(train))))
    kinds = [canonical_row(row, RowPlace("train", number), has_template) for number, row in enumerate(looked_at)]
    formats = Counter(map(_format, kinds))
    listed = ", ".join(f"{number:,} {name}" for name, number in formats.most_common())
    if has_template and {"pairs of texts", "plain prompts"} & formats.keys():
        remedy = "give `prompt` as a list of turns if the models were trained on chats"
        out.add("Formats", "warning", f"{listed}, although the student has a chat template", remedy)
    else:
        out.add("Formats", "ok", listed)
    several = sum(_earlier_turns(kind) > 0 for kind in kinds)
    if several and assistant_turns == "last":
        message = f"{several:,} of {len(kinds):,} rows have earlier assistant turns, which are context only"
        out.add("Turns", "ok", message, "assistant_turns=all trains on them, too")


def _earlier_turns(row: Row) -> int:
    """Assistant turns that could be trained on beside the last."""
    if not isinstance(row, ChatRow) or row.answer is None:
        return 0
    earlier = enumerate(row.messages[: row.answer])
    return sum(turn["role"] == "assistant" and number not in row.untrained for number, turn in earlier)


def _format(kind: Row) -> str:
    if isinstance(kind, TokenRow):
        return "rows of token ids"
    if isinstance(kind, ChatRow):
        return "chats" if kind.answer is not None else "chats without an answer"
    if not kind.prompt:
        return "running texts"
    return "plain prompts" if kind.completion is None else "pairs of texts"


def _counts(out: Diagnosis, report: DataReport) -> None:
    share = report.dropped / max(report.rows, 1)
    remedy = "raise max_length or max_prompt_length, or see overlong_prompt and overlong_row"
    out.add(
        "Rows",
        "warning" if share > _MANY else "ok",
        f"{report.kept:,} of {report.rows:,} kept; {report.target_tokens:,} target tokens, longest prompt "
        f"{report.longest_prompt:,}, longest row {report.longest_row:,}",
        remedy if share > _MANY else "",
    )
    if report.views:
        out.add(
            "Teacher's prompts",
            "ok",
            f"in {report.views:,} of {report.kept:,} rows the teacher reads a prompt of its own",
        )
    for remark in report.remarks():
        out.add("Rows", "warning", remark)
    if "prompt_not_prefix" not in report.rows_with:
        out.add("Prompts", "ok", "each prompt's tokens are a prefix of its row's")


def _stops(out: Diagnosis, prepared: Dataset, report: DataReport, stops: tuple[int, ...]) -> None:
    cut = set(report.rows_with.get("row_cut", ()))
    looked_at = prepared.select(range(min(_LOOKED_AT, len(prepared))))
    answered = [row for row in looked_at if row["labels"][-1] != IGNORE and row["row"] not in cut]
    open_ended = [row["row"] for row in answered if row["labels"][-1] not in stops]
    if open_ended:
        message = f"{len(open_ended):,} answers do not end with a stop token, the first in row {open_ended[0]}"
        out.add("Stop tokens", "warning", message, "end them with the eos, or the student does not learn to stop")
    elif answered:
        out.add("Stop tokens", "ok", f"all {len(answered):,} whole answers end with a stop token, which is trained")
