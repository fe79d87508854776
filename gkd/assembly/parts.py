"""The parts of a distillation, put together: who scores, who writes, what the loss is, what a sound answer is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gkd.assembly.checks import check_lengths, check_views
from gkd.assembly.materials import Materials, loading_options
from gkd.assembly.models import tokenizer_of_teacher
from gkd.assembly.own_servers import own_rollout_servers
from gkd.assembly.rollouts import Writer, make_rollout
from gkd.assembly.scores import evaluation_sets, rows_of_teacher
from gkd.assembly.servers import connect, connect_chat
from gkd.assembly.several import lends_base
from gkd.assembly.teacher import TeacherOrder, make_teacher, shared_base, warn_of_one_model
from gkd.assembly.token_ids import SharedIds, ids_apart, in_common, shared_ids
from gkd.config.fields import GKDConfig
from gkd.config.settings import hygiene, loss_settings
from gkd.config.several import of_entry
from gkd.data.aligned_view import Alignment
from gkd.data.common_tokens import common_tokens
from gkd.data.end_map import check_end_map, end_pair
from gkd.data.joined_tokens import joined_tokens
from gkd.data.message_bytes import text_of
from gkd.data.respelling import Respelling
from gkd.data.rewritten import Rewriting, end_of_answers, text_by
from gkd.data.vocabulary import configured_stop_ids
from gkd.loss.settings import LossSettings
from gkd.models.facts import head_size, position_limit, vocabulary_rows
from gkd.models.loading import generation_config_of
from gkd.rollouts.base import Rollout
from gkd.rollouts.hygiene import Hygiene
from gkd.rollouts.routed import routed
from gkd.servers.chat import ChatServer
from gkd.servers.checks import Server
from gkd.teachers.absent import as_absent
from gkd.teachers.base import Teacher
from gkd.teachers.routed import Compared, RoutedTeacher
from gkd.teachers.writer import WriterTeacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedStudent:
    """The student of a training: the unwrapped model, and what gives the one that writes (the wrapped one)."""

    model: nn.Module
    writer: Callable[[], nn.Module]


@dataclass(frozen=True)
class Side:
    """One teacher, put together: all that a run with it alone would have of it.

    `args` are the fields of such a run. `model` is what the `teacher` was made from, which is None where it is on a
    server that only writes. `heads` are rows of both output heads, `ids` what the token ids have in common; with
    other tokens, `rewriting` puts what it writes into the student's, and `alignment` what both read side by side.
    """

    args: GKDConfig
    model: Any
    tokenizer: PreTrainedTokenizerBase | None
    server: Server | ChatServer | None
    heads: dict[str, int]
    ids: SharedIds
    teacher: Teacher | None
    rollout: Rollout
    rewriting: Rewriting | None = None
    alignment: Alignment | None = None


@dataclass(frozen=True)
class Parts:
    """What works in a distillation.

    `teacher` scores (a `Teacher`; None where it is on a server that only writes). `sides` are the teachers by name,
    under None the one of a run that has one. `rollouts` write, by source ("student" is there when the student is
    loaded). `loss_settings`, `stop_ids` and `hygiene` hold for all teachers. `pad_id` can be read by all models.
    `end_map` is the token that ends a turn for the student, and the one for the teacher, where they are not the same.
    `alignment` is how a teacher with other tokens is compared.
    """

    teacher: Any
    sides: dict[str | None, Side]
    rollouts: dict[str, Any]
    loss_settings: LossSettings
    stop_ids: dict[str, tuple[int, ...]]
    hygiene: Hygiene
    pad_id: int
    end_map: tuple[int, int] | None = None
    alignment: Alignment | None = None


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
    args, order = ready.args, SideOrder(ready, accelerator, student, teacher_tokenizer)
    sides: dict[str | None, Side] = {}
    for name, one in args.each_teacher.items():
        with of_entry(name):
            sides[name] = _side(order, name, one)
    every = list(sides.values())
    ids = in_common([side.ids for side in every])
    rollouts: dict[str, Any] = {} if student is None else {"student": _student_rollout(order, every, ids)}
    rollouts["teacher"] = routed(side.rollout for side in every)
    if student is not None and args.teachers is None:
        warn_of_one_model(args, student.model, ready.train)
    of_all, of_each = _loss_settings(args, every, ids)
    teacher = every[0].teacher
    if args.teachers is not None:
        compared = [Compared(*how) for how in zip(of_each, args.teacher_weights, strict=True)]
        scoring = {str(n): side.teacher for n, side in sides.items() if side.teacher is not None}
        teacher = RoutedTeacher(scoring, compared) if len(scoring) == len(sides) else None
    return Parts(
        teacher=teacher,
        sides=sides,
        rollouts=rollouts,
        loss_settings=of_all,
        stop_ids=ids.stop,
        hygiene=replace(
            hygiene(args, ids.stop, ready.end_map),
            rewriting=every[0].rewriting,
            aligned=every[0].alignment is not None,
        ),
        pad_id=ids.pad,
        end_map=ready.end_map,
        alignment=every[0].alignment,
    )


@dataclass(frozen=True)
class SideOrder:
    """The arguments of `assemble`."""

    ready: Materials
    accelerator: Accelerator
    student: LoadedStudent | None
    teacher_tokenizer: PreTrainedTokenizerBase | None

    @property
    def loaded(self) -> nn.Module | None:
        """The student's model."""
        return None if self.student is None else self.student.model

    @property
    def known(self) -> Any:
        """The same, or the student's name."""
        return self.ready.student if self.student is None else self.student.model


def _side(order: SideOrder, name: str | None, args: GKDConfig) -> Side:
    """One teacher, whose fields are `args`."""
    ready, accelerator, alone = order.ready, order.accelerator, name is None
    model = ready.teachers[name]
    if order.loaded is not None:
        model = shared_base(args, model, order.loaded)
        check_lengths(args, {"student": order.loaded, "teacher": model}, ready.train)
    number = 0 if name is None else ready.args.teacher_names.index(name)
    tokenizer = order.teacher_tokenizer or ready.tokenizer_of(number) or tokenizer_of_teacher(model, order.known, args)
    foreign = ready.reading.foreign
    read = tokenizer if foreign and tokenizer is not None else ready.tokenizer
    server = connect(args, read, ("teacher",), name)["teacher"]
    elsewhere = server or connect_chat(args)
    train, evaluation = ready.train, evaluation_sets(ready.evaluation)
    if not alone:
        train, *evaluation = (rows_of_teacher(rows, number) for rows in (train, *evaluation))
    check_views(args, train, evaluation, model, server)
    heads = _heads(ready, order.student, model, tokenizer if foreign else None)
    of_both = ids_apart if foreign else shared_ids
    ids = of_both(ready, heads, order.known, model, tokenizer, server)
    check_end_map(ready.end_map, ids.shared or min(heads.values()))
    teacher: Teacher | None = None
    if foreign and elsewhere is not None and args.teacher_tokenizer_alignment is None:
        teacher = WriterTeacher(name=elsewhere.name)
    elif order.loaded is not None or server is None:
        lent = not alone and name in ready.args.teachers_on_base and lends_base(ready.args)
        teacher = make_teacher(TeacherOrder(args, model, order.loaded, accelerator, server, lent, alone))
        teacher = WriterTeacher(teacher) if foreign and args.teacher_tokenizer_alignment is None else teacher
    writer = Writer(
        "teacher",
        _nowhere,
        stop_ids=ids.stop["teacher"],
        pad_id=ids.pad if ids.teacher_pad is None else ids.teacher_pad,
        foreign_ids=ids.unread["teacher"],
        server=elsewhere,
        vocabulary=None if foreign else heads["student"],
        absent=as_absent(model),
    )
    models = [writer.get_model] if teacher is None else teacher.models()
    rollout = routed(make_rollout(args, replace(writer, get_model=get), accelerator) for get in models)
    rewriting = _rewriting(order, ids, tokenizer) if foreign else None
    aligned = None
    if foreign and args.teacher_tokenizer_alignment is not None:
        assert tokenizer is not None
        aligned = _alignment(order, heads, tokenizer, ids, _room(model, server))
    return Side(args, model, tokenizer, elsewhere, heads, ids, teacher, rollout, rewriting, aligned)


def _nowhere() -> Any:
    """The model of a teacher that is on a server."""
    return None


def _student_rollout(order: SideOrder, sides: list[Side], ids: SharedIds) -> Rollout:
    assert order.student is not None
    args, own = order.ready.args, None
    if args.rollout_server is not None:
        own = own_rollout_servers(args, order.student.model, order.accelerator)
    writer = Writer(
        "student",
        order.student.writer,
        stop_ids=ids.stop["student"],
        pad_id=ids.pad,
        foreign_ids=ids.unread["student"],
        server=connect(args, order.ready.tokenizer, ("student",), own=own)["student"],
        vocabulary=sides[0].heads["student"],
    )
    return make_rollout(args, writer, order.accelerator)


def _loss_settings(
    args: GKDConfig, sides: list[Side], ids: SharedIds
) -> tuple[LossSettings, list[LossSettings | None]]:
    """The loss's settings for all teachers, and for each; None where they are those for all."""
    plain = loss_settings(args)
    each = [replace(plain, teacher_top_k=s.args.teacher_top_k, shared_vocab=s.ids.shared) for s in sides]
    if all(own == each[0] for own in each):
        return each[0], [None] * len(each)
    return replace(plain, shared_vocab=ids.shared), list(each)


def _alignment(
    order: SideOrder,
    heads: dict[str, int],
    teacher_tokenizer: PreTrainedTokenizerBase,
    ids: SharedIds,
    room: int | None,
) -> Alignment:
    """How a teacher with another tokenizer is compared, which can read `room` tokens."""
    ready = order.ready
    own = ready.reading.template(0)
    student_stops = configured_stop_ids(generation_config_of(order.known, loading_options(ready.args)))
    said = ready.args.teacher_end_of_turn
    pair = end_pair(ready.tokenizer, teacher_tokenizer, student_stops, () if own is None else own.stop_ids, said)
    both, rows = (ready.tokenizer, teacher_tokenizer), (heads["student"], heads["teacher"])
    common = common_tokens(*both, *rows, pair)
    of_student, of_teacher = joined_tokens(*both, common, *rows)
    logger.info(
        "the teacher is compared by the bytes that tokens stand for (teacher_tokenizer_alignment='bytes'): both have "
        "%s tokens in common, of %s (student) and %s (teacher); %s and %s count with the one that they begin with",
        *(f"{n:,}" for n in (len(common.student), *map(len, both), *map(_count, (of_student, of_teacher)))),
    )
    assert ids.teacher_pad is not None
    return Alignment(
        Respelling(*both, pair),
        common,
        pair,
        student_joined=of_student,
        teacher_joined=of_teacher,
        pad_id=ids.teacher_pad,
        room=room,
        size=heads["teacher"],
    )


def _room(teacher: Any, server: Server | None) -> int | None:
    """How many tokens a teacher can read; None is any number."""
    if server is not None:
        longest = server.served.max_model_len
        return None if longest is None else longest - 1  # a request has to generate one
    room, binds = position_limit(teacher.config)
    return room if binds else None


def _count(joined: Tensor | None) -> int:
    return 0 if joined is None else joined.shape[1]


def _rewriting(order: SideOrder, ids: SharedIds, teacher_tokenizer: PreTrainedTokenizerBase | None) -> Rewriting:
    """What puts the teacher's completions into the student's tokens."""
    ready = order.ready
    return Rewriting(
        tokenizer=ready.tokenizer,
        text_of=text_of if teacher_tokenizer is None else text_by(teacher_tokenizer),
        stop_ids=ids.stop["teacher"],
        end_id=end_of_answers(ready.tokenizer, ids.stop["student"]),
        most=ready.args.most_new_tokens,
    )


def _heads(
    ready: Materials, student: LoadedStudent | None, teacher_model: Any, other: PreTrainedTokenizerBase | None
) -> dict[str, int]:
    """Rows of both output heads; of a teacher that is elsewhere, the student's, or as many as there are of its `other`
    tokens."""
    if student is not None:
        own = head_size(student.model)
    else:
        chosen = loading_options(ready.args)
        own = vocabulary_rows(
            ready.student, trust_remote_code=chosen["trust_remote_code"], revision=chosen.get("revision")
        )
    if teacher_model is not None:
        return {"student": own, "teacher": head_size(teacher_model)}
    return {"student": own, "teacher": own if other is None else 1 + max(other.get_vocab().values())}
