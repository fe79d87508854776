"""Token ids of student and teachers: which are compared, which end a completion, which nobody writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from gkd.assembly.materials import Materials, loading_options
from gkd.data.message_bytes import END
from gkd.data.vocabulary import check_ids_in_use, readable_pad_id, shared_vocabulary, stop_token_ids, unreadable_ids
from gkd.models.loading import generation_config_of
from gkd.servers.checks import Server


@dataclass(frozen=True)
class SharedIds:
    """Token ids of two models.

    `shared` is how many of them are compared; None: all. `pad` can be read by both (by a teacher with other tokens:
    `teacher_pad`). By source: which ids `stop` a completion, and which are never written, since the other model would
    leave them `unread`.
    """

    shared: int | None
    pad: int
    stop: dict[str, tuple[int, ...]]
    unread: dict[str, range]
    teacher_pad: int | None = None


def in_common(sides: Sequence[SharedIds]) -> SharedIds:
    """What student and all teachers have in common."""
    if len(sides) == 1:
        return sides[0]
    known = [ids.shared for ids in sides if ids.shared is not None]
    of_teachers = tuple(sorted({stop for ids in sides for stop in ids.stop["teacher"]}))
    unread = max((ids.unread["student"] for ids in sides), key=len)  # they end with the student's head
    return SharedIds(
        min(known, default=None),
        min(ids.pad for ids in sides),
        {"student": sides[0].stop["student"], "teacher": of_teachers},
        {"student": unread, "teacher": range(0)},
    )


def shared_ids(
    ready: Materials,
    heads: dict[str, int],
    student: Any,
    teacher: Any,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    server: Server | None,
) -> SharedIds:
    """What the models, or their names, have in common; `server` is the teacher's.

    Raises:
        ValueError: vocabularies that cannot be compared, or rows with ids that one of the models does not know.
    """
    tokenizer = ready.tokenizer
    shared = shared_vocabulary(tokenizer, teacher_tokenizer, heads["student"], heads["teacher"])
    pad = readable_pad_id(tokenizer, min(heads.values()))
    stop = {
        "student": stop_token_ids(tokenizer, generation_config_of(student, loading_options(ready.args))),
        "teacher": stop_token_ids(teacher_tokenizer or tokenizer, getattr(teacher, "generation_config", None)),
    }
    if teacher is None and not ready.args.needs_teacher:  # there is none
        stop["teacher"] = stop["student"]
    check_ids_in_use(_all_rows(ready), stop["student"], tokenizer, heads, shared)
    unread = {source: range(0) if shared is None else range(shared, rows) for source, rows in heads.items()}
    if server is None:
        unread["teacher"] = unreadable_ids(heads["teacher"], shared, tokenizer, teacher_tokenizer)
    return SharedIds(shared, pad, stop, unread)


def ids_apart(
    ready: Materials,
    heads: dict[str, int],
    student: Any,
    teacher: Any,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    server: Server | None,
) -> SharedIds:
    """The ids of a teacher with other tokens; arguments as of `shared_ids`.

    Raises:
        ValueError: an evaluation during the training, which compares; or rows with ids that their reader does not
            know.
    """
    args, tokenizer = ready.args, ready.tokenizer
    if args.evaluates_along and args.teacher_tokenizer_alignment is None:
        raise ValueError(
            f"eval_strategy={str(getattr(args.eval_strategy, 'value', args.eval_strategy))!r}: eval_loss is a "
            "divergence, and this teacher has another tokenizer or gives text alone, so it can only write: set "
            "eval_strategy='no'; the student by itself is measured by gkd evaluate. A teacher in this process can be "
            "compared by teacher_tokenizer_alignment='bytes'"
        )
    student_stops = stop_token_ids(tokenizer, generation_config_of(student, loading_options(args)))
    pad, unread, stops = readable_pad_id(tokenizer, heads["student"]), range(0), {*_own_stops(ready)}
    if teacher_tokenizer is None:  # bytes
        heads, teacher_pad = {**heads, "teacher": END + 1}, 0
    else:
        stops |= {*stop_token_ids(teacher_tokenizer, getattr(teacher, "generation_config", None))}
        teacher_pad = readable_pad_id(teacher_tokenizer, heads["teacher"])
        unread = range(0) if server else unreadable_ids(heads["teacher"], None, teacher_tokenizer, None)
    check_ids_in_use(_all_rows(ready), student_stops, tokenizer, heads, heads["student"])
    stop = {"student": student_stops, "teacher": tuple(sorted(stops))}
    return SharedIds(None, pad, stop, {"student": range(0), "teacher": unread}, teacher_pad)


def _all_rows(ready: Materials) -> dict[str, Any]:
    """The rows of the training and of each evaluation, by name."""
    evaluated = ready.evaluation if isinstance(ready.evaluation, dict) else {"eval": ready.evaluation}
    return {**evaluated, "train": ready.train}


def _own_stops(ready: Materials) -> tuple[int, ...]:
    """What the teacher's generation config says, wherever it is."""
    own = ready.reading.template(0)
    return () if own is None else own.stop_ids
