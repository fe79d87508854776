"""Putting the store of hidden states between the training and its teacher (`teacher_scores_dir`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer

from gkd.assembly.models import loading_of
from gkd.common.environment import installed_versions
from gkd.common.errors import DiskFullError
from gkd.common.ranks import sum_over_ranks
from gkd.config.fields import GKDConfig
from gkd.data.aligned_view import Alignment, as_the_teacher_reads_it
from gkd.data.sequences import TokenSequence, columns_read, join, sequence_of
from gkd.models.facts import model_name, revision_of
from gkd.models.fingerprint import fingerprint
from gkd.models.placement import SHARDED
from gkd.models.zero import gathered, zero_stage
from gkd.rollouts.base import Rollout
from gkd.rollouts.hygiene import Hygiene
from gkd.teachers.absent import AbsentTeacher, as_absent, remember
from gkd.teachers.kept import KeptTeacher
from gkd.teachers.store import ScoreStore, open_scores, row_key

logger = logging.getLogger(__name__)


def with_scores(args: GKDConfig, model: Any, accelerator: Accelerator, make_live: Callable[[Any], Any]) -> KeptTeacher:
    """A teacher whose hidden states are kept in `teacher_scores_dir`. All ranks call this.

    Args:
        args: the fields.
        model: the teacher, or an `AbsentTeacher`, which is then loaded only when it is needed.
        accelerator: of the training.
        make_live: makes a model ready to score.

    Raises:
        ValueError: the folder cannot be made, or the teacher's weights cannot be fingerprinted.
    """
    together = accelerator.num_processes > 1 and (zero_stage(accelerator) == 3 or args.teacher_placement in SHARDED)
    sources = ("data", "teacher") if args.teacher_cache_folder is not None else ("data",)
    absent = as_absent(model)
    if absent is not None:
        head = absent.store.read_head(accelerator.device)
        if int(sum_over_ranks(accelerator, torch.tensor(int(head is None)))) == 0:
            load = partial(_load, absent, make_live)
            return KeptTeacher(
                absent.store, load, head, accelerator, together=together, sources=sources, absent=absent
            )
        model = absent.load()
    live = make_live(model)
    store = _store_of(args, live, accelerator)
    return KeptTeacher(store, lambda: live, None, accelerator, together=together, sources=sources)


def _load(absent: AbsentTeacher, make_live: Callable[[Any], Any]) -> Any:
    logger.warning("the teacher is loaded now, for something that its scores on disk do not tell")
    return make_live(absent.load())


def _store_of(args: GKDConfig, live: Any, accelerator: Accelerator) -> ScoreStore:
    """The live teacher's store, with its output head and the note by which it is known again."""
    teacher: Any = extract_model_from_parallel(live.model)
    mark, name = fingerprint(teacher), model_name(teacher)
    # What a fingerprint of the weights does not show: which adapters act, and what autocast rounds.
    layers = [module for module in teacher.modules() if isinstance(module, BaseTunerLayer)]
    adapters = [[list(layer.active_adapters), bool(layer.disable_adapters)] for layer in layers]
    key = {"model": mark, "adapters": adapters, "mixed_precision": str(accelerator.mixed_precision)}
    notes = {
        "teacher": name,
        "revision": revision_of(teacher, args.teacher_model_init_kwargs),
        "versions": installed_versions(),
    }
    assert args.teacher_scores_dir is not None
    store = open_scores(args.teacher_scores_dir, key, notes)
    with gathered(live.head_parameters()):
        if accelerator.is_main_process and store.writable:
            try:
                if store.read_head() is None:
                    store.write_head(live.head)
                if name is not None and name == args.teacher_model_name_or_path:
                    remember(loading_of(args), name, store, teacher, mark)
            except DiskFullError as error:
                logger.warning("%s. Training goes on; none of the teacher's scores are kept", error)
                store.writable = False
    accelerator.wait_for_everyone()
    return store


def load_unless_covered(
    teacher: Any,
    args: GKDConfig,
    datasets: list[Any],
    rollout: Any,
    hygiene: Hygiene,
    alignment: Alignment | None = None,
) -> None:
    """Load a teacher that is not loaded yet, unless the store has all that the training will ask it; of several, each
    for its own rows. All ranks call this, and load it or not together.

    Args:
        teacher: any kind; nothing happens when it is loaded.
        args: the fields.
        datasets: the training's rows, then those of the evaluation; foreign ones load the teacher.
        rollout: of the teacher's sequences.
        hygiene: which of these are trained on. alignment: how a teacher with other tokens reads them.
    """
    teachers = teacher.each()
    for number, (one, writer) in enumerate(zip(teachers, rollout.each(), strict=True)):
        own = datasets if len(teachers) == 1 else [rows_of_teacher(rows, number) for rows in datasets]
        if not one.loaded:
            _load_one_unless_covered(one, args, own, writer, hygiene, alignment)


def rows_of_teacher(rows: Any, number: int) -> Any:
    """The prepared rows of one of several teachers."""
    return rows.select(np.flatnonzero(np.asarray(rows["teacher"]) == number)) if isinstance(rows, Dataset) else rows


def _load_one_unless_covered(
    teacher: Any,
    args: GKDConfig,
    datasets: list[Any],
    rollout: Rollout,
    hygiene: Hygiene,
    alignment: Alignment | None,
) -> None:
    missing = int(args.student_writes)  # what the student will write nobody knows
    for number, rows in enumerate(datasets if not missing else ()):
        writes = args.teacher_writes and number == 0
        known = written_keys(rows, rollout, hygiene, alignment) if writes else keys_of(rows, hygiene, alignment)
        missing += sum(key is not None and key not in teacher.store for key in known)
    missing = int(sum_over_ranks(teacher.accelerator, torch.tensor(missing)))
    if missing == 0:
        logger.info("the teacher is not loaded: %s holds all that it has to say", teacher.store.path)
        return
    if not args.student_writes:
        logger.info("the teacher is loaded: %s lacks scores of some rows", teacher.store.path)
    assert teacher.live is not None


def evaluation_sets(rows: Any) -> list[Any]:
    """`eval_dataset` of a trainer, one by one."""
    return [] if rows is None else list(rows.values()) if isinstance(rows, dict) else [rows]


def as_scored(sequence: TokenSequence, alignment: Alignment | None) -> TokenSequence:
    """The row that the teacher is asked about: a teacher with other tokens has one of its own."""
    return sequence if alignment is None else as_the_teacher_reads_it(sequence, alignment)[0]


def _key(sequence: TokenSequence, alignment: Alignment | None) -> bytes | None:
    read = as_scored(sequence, alignment)
    return row_key(*read.teacher_row()) if read.num_targets else None


def keys_of(rows: Any, hygiene: Hygiene, alignment: Alignment | None = None) -> Iterator[bytes | None]:
    """The key of each prepared row, as the teacher reads it; b"" for one that is not known beforehand, None for one
    without a target."""
    if not isinstance(rows, Dataset) or not {"input_ids", "labels", "prompt_length"} <= set(rows.column_names):
        yield b""
        return
    for row in columns_read(rows):
        yield _key(sequence_of(row, hygiene.end_map), alignment)


def written_keys(
    rows: Any, rollout: Rollout, hygiene: Hygiene, alignment: Alignment | None = None
) -> Iterator[bytes | None]:
    """The same of the sequences that the teacher has written for the rows' prompts."""
    if rollout.store is None or not isinstance(rows, Dataset):
        yield b""
        return
    for row in columns_read(rows):
        sequence = sequence_of(row, hygiene.end_map)
        if sequence.teacher_prompt not in rollout.store:
            yield b""
            continue
        found = written(sequence, rollout.store.get(sequence.teacher_prompt), hygiene)
        yield None if found is None else _key(found, alignment)


def written(row: TokenSequence, completion: list[int], hygiene: Hygiene) -> TokenSequence | None:
    """A row with the completion that the teacher has written for it; None when it is not trained on."""
    own, (completion, verdict) = completion, hygiene.received(completion, "teacher")
    if not hygiene.trains(verdict):
        return None
    sequence = join(
        row.prompt,
        completion,
        "teacher",
        row.row,
        truncated=verdict.truncated,
        teacher=row.teacher,
        teacher_prompt=row.teacher_prompt,
        end_map=hygiene.end_map,
    )
    sequence.teacher_ids = own if hygiene.aligned else []
    return sequence if sequence.num_targets else None
