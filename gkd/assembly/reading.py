"""How teachers read the rows: a recipe's function, and the template of a teacher's own (`teacher_template`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from gkd.assembly.servers import client_of
from gkd.config.fields import GKDConfig
from gkd.config.several import of_entry
from gkd.data.end_map import find_end_map
from gkd.data.message_bytes import END
from gkd.data.teacher_rows import OwnTemplate, TeacherReading, View
from gkd.data.vocabulary import check_token_maps, configured_stop_ids, same_token_maps
from gkd.models.facts import model_name
from gkd.models.loading import base_name, generation_config_of, load_tokenizer
from gkd.servers.checks import served_model

logger = logging.getLogger(__name__)


def reading_of_teachers(
    args: GKDConfig,
    tokenizer: PreTrainedTokenizerBase,
    student: Any,
    teachers: Mapping[str | None, Any],
    *,
    view: View | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> TeacherReading:
    """How the rows are read for every teacher; `teachers` are models by their names, and the rest is as in
    `teacher_reading`.

    Raises:
        ValueError: what `teacher_reading` refuses, told of the teacher; or teachers that end their turns differently.
    """
    found = {}
    for name, one in args.each_teacher.items():
        with of_entry(name):
            found[name] = teacher_reading(
                one, tokenizer, student, teachers[name], view=view, teacher_tokenizer=teacher_tokenizer
            )
    if args.teachers is None:
        return found[None]
    for name, reading in found.items():
        if reading.foreign:
            raise ValueError(
                f"teachers[{name!r}] has another tokenizer than the student, and of several teachers none may: train "
                "on what it writes in a run of its own, or take teachers of the student's family"
            )
    ends = {name: reading.end_map for name, reading in found.items()}
    first, *others = ends
    for name in others:
        if ends[name] != ends[first]:
            raise ValueError(
                f"teachers {first!r} and {name!r} end their turns with different tokens "
                f"({_in_words(ends[first], tokenizer)}; {_in_words(ends[name], tokenizer)}), and a run can exchange "
                "them for all of its teachers or for none: leave template='own' out, and give what they read in a "
                "column teacher_prompt"
            )
    return TeacherReading(view, tuple(reading.template(0) for reading in found.values()))


def _in_words(end_map: tuple[int, int] | None, tokenizer: PreTrainedTokenizerBase) -> str:
    if end_map is None:
        return "the student's"
    student, teacher = tokenizer.convert_ids_to_tokens(list(end_map))
    return f"{teacher!r} for {student!r}"


def teacher_reading(
    args: GKDConfig,
    tokenizer: PreTrainedTokenizerBase,
    student: Any,
    teacher: Any,
    *,
    view: View | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> TeacherReading:
    """How the rows are read for the teacher.

    Args:
        args: the fields.
        tokenizer: the student's. student: the model, or its name.
        teacher: the model, one that is not loaded, or its name; None when it is elsewhere or over the student's base.
        view: a recipe's `teacher_view`.
        teacher_tokenizer: with `teacher_template="own"`, whose template is meant; None loads it by the teacher's name.

    Raises:
        ValueError: the teacher has no tokenizer or no template of its own, or one with other tokens, or the token
            that ends its turns would be a guess.
    """
    if args.teacher_chat_url is not None:
        return TeacherReading(view, (OwnTemplate(None, (END,), foreign=True),))
    other = _other_tokenizer(args, tokenizer, student, teacher, teacher_tokenizer)
    if other is not None:
        return TeacherReading(view, (other,) * max(1, len(args.teacher_names)))
    if args.teacher_template == "student":
        return TeacherReading(view)
    name = _name(args, student, teacher)
    own = _own_tokenizer(args, name) if teacher_tokenizer is None else teacher_tokenizer
    if not own.chat_template:
        raise ValueError(
            "teacher_template='own' has no effect: the teacher's tokenizer has no chat template. Leave it out, or "
            "give what the teacher reads in a column teacher_prompt"
        )
    check_token_maps(tokenizer, own)
    known = name if teacher is None else teacher
    stop_ids = configured_stop_ids(generation_config_of(known))
    options = {"trust_remote_code": args.trust_remote_code, **_kwargs(args.model_init_kwargs)}
    of_student = configured_stop_ids(generation_config_of(student, options))
    end_map = find_end_map(tokenizer, own, of_student, stop_ids, args.teacher_end_of_turn)
    if own.chat_template == tokenizer.chat_template and end_map is None:
        logger.info("teacher_template='own' changes nothing: student and teacher have the same chat template")
    else:
        logger.info("the teacher reads chats in its own template (teacher_template='own')")
    return TeacherReading(view, (OwnTemplate(own, stop_ids, end_map),) * max(1, len(args.teacher_names)))


def _other_tokenizer(
    args: GKDConfig,
    tokenizer: PreTrainedTokenizerBase,
    student: Any,
    teacher: Any,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> OwnTemplate | None:
    """What a teacher reads in other tokens than the student's, which only writes or is aligned; None for any other."""
    asked = args.teacher_template == "own" or teacher_tokenizer is not None
    aligns = args.teacher_tokenizer_alignment is not None
    if (
        not (args.trains_on_nll_alone or aligns)
        or args.shares_weights
        or (args.teacher_server_url is not None and not (asked or aligns))
    ):
        return None
    name = _name(args, student, teacher)
    own = teacher_tokenizer
    if own is None and (name is not None or args.teacher_template == "own"):
        try:
            own = _own_tokenizer(args, name)
        except ValueError as error:
            if args.teacher_template == "own":
                raise
            logger.warning("the teacher's token map cannot be compared with the student's: %s", error)
    if aligns:
        _check_apart(args, tokenizer, own)
    if own is None or same_token_maps(tokenizer, own):
        return None
    if args.teacher_end_of_turn is not None and not aligns:
        raise ValueError(
            f"teacher_end_of_turn={args.teacher_end_of_turn!r} has no effect: the teacher has another tokenizer and "
            "only writes, and where it ends an answer the student's ends: leave it out"
        )
    logger.info(
        "the teacher has another tokenizer: it %s prompts in its own%s, and its text is trained on in the student's "
        "tokens",
        "reads and writes from" if aligns else "writes from",
        " template" if own.chat_template else "",
    )
    known = name if teacher is None else teacher
    return OwnTemplate(own, configured_stop_ids(generation_config_of(known)), foreign=True)


def _check_apart(args: GKDConfig, tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase | None) -> None:
    """Raises ValueError where a teacher's tokens cannot be aligned with the student's, or need not be."""
    given = f"teacher_tokenizer_alignment={args.teacher_tokenizer_alignment!r}"
    if own is None:
        remedy = "name a teacher with one beside its weights"
        if args.teacher_server_url is not None:
            remedy = "serve it under a name, or from a folder, that can be read from here, too"
        raise ValueError(
            f"{given} needs the teacher's tokenizer, and the teacher has none by its name: pass it "
            f"(teacher_processing_class), or {remedy}"
        )
    if same_token_maps(tokenizer, own):
        raise ValueError(
            f"{given} has no effect: student and teacher have the same tokens, and are compared in full: leave it out"
        )


def _kwargs(given: Any) -> dict[str, Any]:
    return given if isinstance(given, dict) else {}


def _name(args: GKDConfig, student: Any, teacher: Any) -> str | None:
    """Under which name the teacher's tokenizer is found."""
    if args.teacher_server_url is not None:
        client = client_of(args, args.teacher_server_url, "teacher_server_url")
        return served_model(client).root
    if args.shares_weights:
        return base_name(student) if isinstance(student, str) else model_name(student)
    return model_name(teacher)


def _own_tokenizer(args: GKDConfig, name: str | None) -> PreTrainedTokenizerBase:
    """An adapter's own where it has one, else its model's."""
    name = args.teacher_adapter_name_or_path or name
    remedy = "pass the teacher's tokenizer (teacher_processing_class), or name a teacher with one beside its weights"
    if name is None:
        raise ValueError(
            f"teacher_template='own' needs the teacher's tokenizer, and the teacher has no name: {remedy}"
        )
    loading = _kwargs(args.model_init_kwargs if args.shares_weights else args.teacher_model_init_kwargs)
    revision = None if args.teacher_adapter_name_or_path else loading.get("revision")
    try:
        return load_tokenizer(name, trust_remote_code=args.trust_remote_code, revision=revision)
    except ValueError as error:
        raise ValueError(f"teacher_template='own' needs the teacher's tokenizer: {error}; or {remedy}") from error
