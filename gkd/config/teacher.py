"""Fields about the teacher: where it stands, what is kept of it, its adapters, and what goes together."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from gkd.common.ranges import one_of, within
from gkd.config.servers import as_given, with_served_teacher
from gkd.servers.chat import check_chat_url

SELF_TEACHERS = ("base", "live", "ema")
SELF_TEACHER_DECAY = 0.99  # Tarvainen and Valpola, arXiv 1703.01780, while the student learns fast
PLACEMENTS = ("same", "cpu_offload", "zero3", "zero3_offload")
TEMPLATES = ("student", "own")
ALIGNMENTS = ("bytes",)
_REMEDY_OF_NLL = ("set seq_kd_loss='divergence'", "lower ce_weight")


def check_teacher(config: Any) -> None:
    """Refuse a field about the teacher that is out of range, does not go with another, or would have no effect.

    Raises:
        ValueError: naming the fields and the remedy.
    """
    one_of("teacher_placement", config.teacher_placement, PLACEMENTS)
    one_of("teacher_template", config.teacher_template, TEMPLATES)
    if config.teacher_tokenizer_alignment is not None:
        one_of("teacher_tokenizer_alignment", config.teacher_tokenizer_alignment, ALIGNMENTS)
    if config.self_teacher is not None:
        one_of("self_teacher", config.self_teacher, SELF_TEACHERS)
    within("self_teacher_decay", config.self_teacher_decay, 0, 1, "0 is the student as it is")
    given, config = config, with_served_teacher(config)
    of_self, of_template = _of_self_teacher(config), _of_template(config)
    checks = (*of_self, *_of_placement(config), *_of_scores(config), *_of_adapters(config), *of_template)
    checks = (*_of_chat(config), *_of_alignment(config), *checks)
    for wrong, text in checks:
        if wrong:
            raise ValueError(as_given(given, text))


def _of_self_teacher(config: Any) -> list[tuple[bool, str]]:
    kind, decay = config.self_teacher, config.self_teacher_decay
    unused = (
        decay != SELF_TEACHER_DECAY and kind != "ema",
        f"self_teacher_decay={decay} has no effect without self_teacher='ema': set that, or leave it out",
    )
    if kind is None:
        return [unused]
    given = f"self_teacher={kind!r}"
    others = (
        "teacher_model_name_or_path",
        "teacher_model_init_kwargs",
        "teacher_adapter_name_or_path",
        "teacher_adapters",
        "teacher_server_url",
        "share_base_model",
    )
    named = [name for name in others if getattr(config, name) not in (None, False, {})]
    placed, keeps = config.teacher_placement, config.teacher_cache_dir
    follows = kind != "base"
    return [
        unused,
        (decay == 1, "self_teacher_decay=1 is a teacher that never moves: use self_teacher='base', or less than 1"),
        (
            bool(named),
            f"{given} does not go with {' and '.join(named)}: the student is its own teacher, in its own weights; "
            "leave one of them out",
        ),
        (
            placed != "same",
            f"{given} does not go with teacher_placement={placed!r}: the teacher stands where the student does; leave "
            "teacher_placement out",
        ),
        (
            follows and config.teacher_scores_dir is not None,
            f"teacher_scores_dir={config.teacher_scores_dir!r} does not go with {given}, a teacher that changes with "
            "every step: leave it out, or use self_teacher='base'",
        ),
        (
            follows and keeps is not None and keeps.lower() not in ("", "off", "false"),
            f"teacher_cache_dir={keeps!r} does not go with {given}, whose answers change with every step: leave it "
            "out, or use self_teacher='base'",
        ),
    ]


def _of_placement(config: Any) -> list[tuple[bool, str]]:
    placement = config.teacher_placement
    return [
        (
            placement != "same" and config.teacher_server_url is not None,
            f"teacher_placement={placement!r} has no effect with teacher_server_url, where the teacher has memory of "
            "its own: leave it out",
        ),
    ]


def _of_template(config: Any) -> list[tuple[bool, str]]:
    return [
        (
            config.teacher_end_of_turn is not None
            and config.teacher_template != "own"
            and config.teacher_tokenizer_alignment is None,
            f"teacher_end_of_turn={config.teacher_end_of_turn!r} has no effect with teacher_template='student', where "
            "student and teacher end their turns alike: set teacher_template='own', or leave it out",
        ),
    ]


def _of_alignment(config: Any) -> list[tuple[bool, str]]:
    """A teacher with another tokenizer that is compared."""
    if config.teacher_tokenizer_alignment is None:
        return []
    given = f"teacher_tokenizer_alignment={config.teacher_tokenizer_alignment!r}"
    own = [name for name in ("share_base_model", "self_teacher") if getattr(config, name)]
    several = [name for name in ("teachers", "teacher_adapters") if getattr(config, name)]
    return [
        (
            bool(own),
            f"{given} has no effect with {' and '.join(own)}, where the teacher has the student's tokens: leave it "
            "out",
        ),
        (
            config.teacher_chat_url is not None,
            f"{given} does not go with teacher_chat_url, which gives text and no probabilities: take a teacher in "
            "this process or on a vLLM server (teacher_server_url), or leave the field out and let it only write",
        ),
        (
            bool(several),
            f"{given} does not go with {' and '.join(several)}: take one teacher with another tokenizer, or several "
            "with the student's",
        ),
        (
            bool(config.loss_compile),
            f"loss_compile={config.loss_compile} does not go with {given}, of which nothing is compiled: leave it out",
        ),
        (
            config.trains_on_nll_alone and not config.evaluates_along,
            f"{given} has no effect with {config.nll_because}, where nothing is compared with the teacher: "
            f"{_REMEDY_OF_NLL[config.ce_weight == 1]}, or leave it out",
        ),
    ]


def _of_chat(config: Any) -> list[tuple[bool, str]]:
    """A teacher behind an OpenAI-compatible chat address, which writes and does nothing else."""
    model = config.teacher_chat_model
    if config.teacher_chat_url is None:
        text = f"teacher_chat_model={model!r} has no effect without teacher_chat_url: set that, or leave it out"
        return [(model is not None, text)]
    check_chat_url(config.teacher_chat_url)
    others = (
        "teacher_model_name_or_path",
        "teacher_model_init_kwargs",
        "teacher_adapter_name_or_path",
        "teacher_adapters",
        "teachers",
        "teacher_server_url",
        "share_base_model",
        "self_teacher",
        "teacher_scores_dir",
    )
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    named = [name for name in others if getattr(config, name) not in (None, False, {})]
    unread = ("teacher_placement", "teacher_template", "top_k", "min_p", "repetition_penalty", "teacher_top_k")
    changed = [f"{name}={getattr(config, name)!r}" for name in unread if getattr(config, name) != fields[name]]
    changed += [f"generation_kwargs={config.generation_kwargs!r}"] if config.generation_kwargs else []
    return [
        (not (model or "").strip(), "teacher_chat_url needs teacher_chat_model, the model's name there"),
        (
            not (config.trains_on_nll_alone and config.teacher_writes),
            "teacher_chat_url gives text and no probabilities: train on that text alone (lmbda=0, seq_kd=True, "
            "seq_kd_loss='nll'), or take a teacher in this process or on a vLLM server (teacher_server_url)",
        ),
        (
            bool(named),
            f"teacher_chat_url does not go with {' and '.join(named)}: the model behind that address is the teacher; "
            "leave one of them out",
        ),
        (
            bool(changed),
            f"{' and '.join(changed)} has no effect with teacher_chat_url, which takes max_new_tokens, temperature "
            "and top_p: leave it out",
        ),
    ]


def _of_scores(config: Any) -> list[tuple[bool, str]]:
    folder = config.teacher_scores_dir
    if folder is None:
        return []
    given = f"teacher_scores_dir={folder!r}"
    return [
        (not str(folder).strip(), f"{given} names no folder: name one, or leave it out"),
        (
            config.teacher_server_url is not None,
            f"{given} does not go with teacher_server_url, which gives no hidden states: leave one of them out",
        ),
        (
            not (config.teacher_writes or config.reads_answers) and not config.evaluates_along,
            f"{given} has no effect with lmbda=1, where the student writes every sequence and none comes again: lower "
            "lmbda, or leave it out",
        ),
        (
            config.teacher_writes and config.teacher_cache_folder is None and not config.evaluates_along,
            f"{given} has no effect with seq_kd=True and teacher_cache_dir={config.teacher_cache_dir!r}, where the "
            "teacher writes every sequence anew and none comes again: keep its sequences, too, or leave it out",
        ),
        (
            config.trains_on_nll_alone and not config.evaluates_along,
            f"{given} has no effect with {config.nll_because}, where the teacher's scores are not used: "
            f"{_REMEDY_OF_NLL[config.ce_weight == 1]}, or leave it out",
        ),
    ]


def _of_adapters(config: Any) -> list[tuple[bool, str]]:
    one, several, shares = config.teacher_adapter_name_or_path, config.teacher_adapters, config.share_base_model
    given = [
        f"{name}={value!r}"
        for name, value in (
            ("teacher_adapter_name_or_path", one),
            ("teacher_adapters", several),
            ("share_base_model", shares or None),
        )
        if value is not None
    ]
    if not given:
        return []
    shown, lent = " and ".join(given), shares or several is not None
    return [
        (one is not None and several is not None, f"{shown} exclude each other: one teacher has one adapter"),
        *_of_several(several),
        (
            config.teacher_server_url is not None,
            f"{shown} does not go with teacher_server_url: start the server with the adapter merged, or leave it out",
        ),
        (
            config.teacher_placement != "same" and lent,
            f"{shown} does not go with teacher_placement={config.teacher_placement!r}: these weights stand where the "
            "student's or the other teachers' do; leave teacher_placement out",
        ),
        (
            shares and bool(config.teacher_model_init_kwargs),
            f"teacher_model_init_kwargs={config.teacher_model_init_kwargs} has no effect with share_base_model=True: "
            "the weights are loaded once, as model_init_kwargs say; leave it out, or set {}",
        ),
    ]


def _of_several(several: Any) -> list[tuple[bool, str]]:
    """What `teacher_adapters` must be like, where it is given."""
    if several is None:
        return []
    example = 'for example {"math": "adapters/math", "chat": "adapters/chat"}'
    if not isinstance(several, dict) or not several:
        return [(True, f"teacher_adapters={several!r} should be a dict (JSON on the command line), {example}")]
    names = [name for name in several if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name)]
    paths = [path for path in several.values() if path is not None and not (isinstance(path, str) and path)]
    return [
        (bool(names), f"teacher_adapters: {names} are no names; use letters, digits, . _ - ({example})"),
        (bool(paths), f"teacher_adapters: {paths} are no adapters; use folders, names on the Hub or null ({example})"),
    ]
