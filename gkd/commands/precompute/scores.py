"""`gkd precompute --scores`: the teacher scores a recipe's training rows beforehand.

What it says goes where training looks for it (`teacher_scores_dir`), so a run with the same settings finds all of it,
and one with `lmbda=0` never loads the teacher. With `seq_kd` the teacher's own sequences are made first, then scored.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from gkd.assembly.scores import as_scored, written
from gkd.commands.precompute.answers import Precomputation, fill, prepare
from gkd.common.sign_of_life import SignOfLife
from gkd.data.sequences import TokenSequence, collate, columns_read, sequence_of
from gkd.data.teacher_view import teacher_view
from gkd.recipe.capture import Recipe
from gkd.teachers.kept import KeptTeacher
from gkd.teachers.store import ROOM, row_key

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unscored:
    """A row that is not scored yet: its number in `SequencesToScore`, its length and its targets."""

    number: int
    length: int
    targets: int


class SequencesToScore:
    """Everything that training will ask the teacher about, by number; the token ids stay in their data sets."""

    def __init__(self, work: Precomputation) -> None:
        answers = work.answers
        writes = [answers is not None, *([False] * len(work.evaluation))]
        sets = [columns_read(rows) for rows in (work.rows, *work.evaluation)]
        self._sets = list(zip(sets, writes, strict=True))
        self._work = work

    def __len__(self) -> int:
        return sum(len(rows) for rows, _ in self._sets)

    def __iter__(self) -> Iterator[TokenSequence | None]:
        for rows, writes in self._sets:
            for row in rows:
                yield self._sequence(row, writes)

    def __getitem__(self, number: int) -> TokenSequence:
        for rows, writes in self._sets:
            if number < len(rows):
                sequence = self._sequence(rows[number], writes)
                assert sequence is not None
                return sequence
            number -= len(rows)
        raise IndexError(number)

    def _sequence(self, row: Any, writes: bool) -> TokenSequence | None:
        """What the teacher is asked about in this row; None without a target."""
        sequence: TokenSequence | None = sequence_of(row, self._work.hygiene.end_map)
        assert sequence is not None
        if writes:
            completion = self._work.rollout.store.get(sequence.teacher_prompt)
            sequence = written(sequence, completion, self._work.hygiene)
        read = None if sequence is None else as_scored(sequence, self._work.alignment)
        return read if read is not None and read.num_targets else None


def precompute_scores(recipe: Recipe) -> None:
    """Fill `teacher_scores_dir` for a recipe's training rows, and those of its evaluation.

    What is there already is not scored again, so a run that was stopped goes on where it was. Several processes
    (`accelerate launch`) share the work.

    Args:
        recipe: from `gkd.recipe.capture.capture`.

    Raises:
        ValueError: no student, teacher or place is named, the teacher is on a server, or the disk has no room.
        DiskFullError: it had, and somebody else took it.
    """
    args = recipe.settings.training
    if not args.has_teacher_here:
        raise ValueError(
            "--scores needs the teacher in this process: a server (teacher_server_url, teacher_chat_url) gives no "
            "hidden states; name teacher_model_name_or_path instead"
        )
    if args.teacher_scores_dir is None:
        raise ValueError("--scores needs a place for the scores: pass --teacher_scores_dir DIR, to the training, too")
    for work in prepare(recipe):
        if work.answers is not None:
            fill(work)
        if work.teacher is None:
            logger.info("%s is on a server, which gives no hidden states: it is asked in the training", work.of_whom)
            continue
        number = fill_scores(work, args.per_device_train_batch_size)
        if work.accelerator.is_main_process:
            print(f"the scores of {number:,} rows are in {work.teacher.store.path}")


def fill_scores(work: Precomputation, batch_size: int) -> int:
    """Let the teacher score what is not scored yet, each sequence once, longest first. All ranks call this.

    Returns:
        The number of rows with a target, all of which are scored now.
    """
    teacher, accelerator = work.teacher, work.accelerator
    store, rows = teacher.store, SequencesToScore(work)
    if not store.writable:
        raise ValueError(f"teacher_scores_dir: {store.path} cannot be written to: name another folder")
    unscored, number = _find_unscored(rows, teacher)
    logger.info("%s of %s rows are scored already", f"{number - len(unscored):,}", f"{number:,}")
    if not unscored:
        return number
    _check_room(rows, unscored, teacher, accelerator)
    size, ranks, rank = batch_size, accelerator.num_processes, accelerator.process_index
    try:
        with SignOfLife("scoring", len(unscored), "row", leave=True) as sign:
            for start in range(0, len(unscored), size * ranks):
                share = unscored[start : start + size * ranks]
                mine = share[rank::ranks]
                if mine or teacher.together:  # a model that is split up runs on all ranks or on none
                    scored = _score(teacher, [rows[row.number] for row in mine or share[:1]])
                    store.add(scored if mine else {})
                sign.tick(len(share))
    finally:
        store.flush()
    accelerator.wait_for_everyone()
    store.refresh()
    return number


def _find_unscored(rows: SequencesToScore, teacher: KeptTeacher) -> tuple[list[Unscored], int]:
    """What is to be scored, longest first, and the number of rows with a target; the main process's view counts,
    since other runs may add to the store meanwhile."""
    found: dict[bytes, Unscored] = {}
    number = 0
    for place, sequence in enumerate(rows):
        if sequence is not None:
            number += 1
            key = row_key(*sequence.teacher_row())
            if key not in teacher.store:
                found.setdefault(key, Unscored(place, len(sequence.teacher_row()[0]), sequence.num_targets))
    unscored = sorted(found.values(), key=lambda row: row.length, reverse=True)
    result: tuple[list[Unscored], int] = broadcast_object_list([(unscored, number)])[0]
    return result


def _score(teacher: KeptTeacher, sequences: list[TokenSequence]) -> dict[bytes, torch.Tensor]:
    read = teacher_view(collate(sequences, 0))
    batch = {name: values.to(teacher.accelerator.device) for name, values in read.items()}
    hidden = teacher.live.score(batch).hidden.split([sequence.num_targets for sequence in sequences])
    keys = [row_key(*sequence.teacher_row()) for sequence in sequences]
    return dict(zip(keys, hidden, strict=True))


def _check_room(rows: SequencesToScore, unscored: list[Unscored], teacher: KeptTeacher, accelerator: Any) -> None:
    """Say how much will be written, from the size of one row, and refuse what does not fit."""
    (row,) = _score(teacher, [rows[unscored[-1].number]]).values()
    tokens, width, item = sum(t.targets for t in unscored), row.shape[1], row.element_size()
    needed = tokens * width * item
    folder = teacher.store.path
    free = broadcast_object_list([shutil.disk_usage(folder).free])[0]
    text = f"{len(unscored):,} rows: {tokens:,} target tokens x {width:,} x {item} bytes = {_bytes(needed)}"
    if accelerator.is_main_process:
        print(f"{text} to write; {_bytes(free)} are free in {folder}", flush=True)
    if needed + ROOM > free:
        raise ValueError(
            f"teacher_scores_dir: {text}, and {_bytes(free)} are free in {folder} ({_bytes(ROOM)} stay "
            "free): make room, name another place, or train on fewer rows"
        )


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"
