"""The parts of a distillation, put together: who scores, who writes, what the loss is, what a sound answer is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from gkd.assembly.checks import check_lengths, check_views
from gkd.assembly.materials import Materials, loading_options
from gkd.assembly.models import tokenizer_of_teacher
from gkd.assembly.rollouts import Writer, make_rollout
from gkd.assembly.scores import evaluation_sets
from gkd.assembly.servers import connect
from gkd.assembly.teacher import make_teacher, shared_base, warn_of_one_model
from gkd.config.settings import hygiene, loss_settings
from gkd.data.end_map import check_end_map
from gkd.data.vocabulary import check_ids_in_use, readable_pad_id, shared_vocabulary, stop_token_ids, unreadable_ids
from gkd.loss.settings import LossSettings
from gkd.models.facts import head_size, vocabulary_rows
from gkd.models.loading import generation_config_of
from gkd.rollouts.hygiene import Hygiene
from gkd.rollouts.routed import routed
from gkd.servers.checks import Server
from gkd.teachers.absent import as_absent
from gkd.teachers.base import Teacher


@dataclass(frozen=True)
class LoadedStudent:
    """The student of a training: the unwrapped model, and what gives the one that writes (the wrapped one)."""

    model: nn.Module
    writer: Callable[[], nn.Module]


@dataclass(frozen=True)
class Parts:
    """What works in a distillation.

    `teacher` scores (a `Teacher`; None where it is on a server that only writes); `teacher_model` is what it was made
    from. `rollouts` write, by source ("student" is there when the student is loaded). `servers` are None where a model
    is in this process. `pad_id` can be read by both models. `end_map` is the token that ends a turn for the student,
    and the one for the teacher, where they are not the same.
    """

    teacher: Any
    teacher_model: Any
    teacher_tokenizer: PreTrainedTokenizerBase | None
    servers: dict[str, Server | None]
    rollouts: dict[str, Any]
    loss_settings: LossSettings
    stop_ids: dict[str, tuple[int, ...]]
    hygiene: Hygiene
    pad_id: int
    end_map: tuple[int, int] | None = None


def assemble(
    ready: Materials,
    accelerator: Accelerator,
    student: LoadedStudent | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Parts:
    """The parts, from the materials. All ranks call this.

    Args:
        ready: the materials.
        accelerator: where the models run, and how they are sharded.
        student: placed already; None where only its name is known and it does not write (`gkd precompute`).
        teacher_tokenizer: to compare token maps with; None loads it by the teacher's name where it has one.

    Raises:
        ValueError: models, rows and servers that do not go together.
    """
    args, known = ready.args, ready.student if student is None else student.model
    teacher_model = ready.teacher
    if student is not None:
        teacher_model = shared_base(args, teacher_model, student.model)
        warn_of_one_model(args, student.model, ready.train)
        check_lengths(args, {"student": student.model, "teacher": teacher_model}, ready.train)
    teacher_tokenizer = teacher_tokenizer or ready.teacher_tokenizer
    if teacher_tokenizer is None:
        teacher_tokenizer = tokenizer_of_teacher(teacher_model, known, args)
    servers = connect(args, ready.tokenizer, ("student", "teacher") if student is not None else ("teacher",))
    check_views(args, ready.train, evaluation_sets(ready.evaluation), teacher_model, servers["teacher"])
    heads = _heads(ready, student, teacher_model)
    ids = _shared_ids(ready, heads, known, teacher_model, teacher_tokenizer, servers["teacher"])
    check_end_map(ready.end_map, ids.shared or min(heads.values()))
    teacher: Teacher | None = None
    if student is not None or servers["teacher"] is None:
        loaded = None if student is None else student.model
        teacher = make_teacher(args, teacher_model, loaded, accelerator, servers["teacher"])
    models: dict[str, list[Callable[[], Any]]] = {} if student is None else {"student": [student.writer]}
    models["teacher"] = [lambda: None] if teacher is None else teacher.models()
    rollouts: dict[str, Any] = {}
    for source, of_source in models.items():
        writer = Writer(
            source,
            of_source[0],
            stop_ids=ids.stop[source],
            pad_id=ids.pad,
            foreign_ids=ids.unread[source],
            server=servers[source],
            vocabulary=heads["student"],
            absent=as_absent(teacher_model),
        )
        rollouts[source] = routed(make_rollout(args, replace(writer, get_model=get), accelerator) for get in of_source)
    return Parts(
        teacher=teacher,
        teacher_model=teacher_model,
        teacher_tokenizer=teacher_tokenizer,
        servers=servers,
        rollouts=rollouts,
        loss_settings=loss_settings(args, ids.shared),
        stop_ids=ids.stop,
        hygiene=hygiene(args, ids.stop, ready.end_map),
        pad_id=ids.pad,
        end_map=ready.end_map,
    )


@dataclass(frozen=True)
class SharedIds:
    """Token ids of two models.

    `shared` is how many of them are compared; None: all. `pad` can be read by both. By source: which ids `stop` a
    completion, and which are never written, since the other model would leave them `unread`.
    """

    shared: int | None
    pad: int
    stop: dict[str, tuple[int, ...]]
    unread: dict[str, range]


def _shared_ids(
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
    evaluated = ready.evaluation if isinstance(ready.evaluation, dict) else {"eval": ready.evaluation}
    check_ids_in_use({**evaluated, "train": ready.train}, stop["student"], tokenizer, heads, shared)
    unread = {source: range(0) if shared is None else range(shared, rows) for source, rows in heads.items()}
    if server is None:
        unread["teacher"] = unreadable_ids(heads["teacher"], shared, tokenizer, teacher_tokenizer)
    return SharedIds(shared, pad, stop, unread)


def _heads(ready: Materials, student: LoadedStudent | None, teacher_model: Any) -> dict[str, int]:
    """Rows of both output heads; of a teacher that is elsewhere, the student's."""
    if student is not None:
        own = head_size(student.model)
    else:
        chosen = loading_options(ready.args)
        own = vocabulary_rows(
            ready.student, trust_remote_code=chosen["trust_remote_code"], revision=chosen.get("revision")
        )
    return {"student": own, "teacher": own if teacher_model is None else head_size(teacher_model)}
