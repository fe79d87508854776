"""Fields about the teacher: where it stands, what is kept of it, its adapters, and what goes together."""

from __future__ import annotations

import re
from typing import Any

from gkd.common.ranges import one_of

PLACEMENTS = ("same", "cpu_offload", "zero3", "zero3_offload")
TEMPLATES = ("student", "own")


def check_teacher(config: Any) -> None:
    """Refuse a field about the teacher that is out of range, does not go with another, or would have no effect.

    Raises:
        ValueError: naming the fields and the remedy.
    """
    one_of("teacher_placement", config.teacher_placement, PLACEMENTS)
    one_of("teacher_template", config.teacher_template, TEMPLATES)
    checks = (*_of_placement(config), *_of_scores(config), *_of_adapters(config), *_of_template(config))
    for wrong, text in checks:
        if wrong:
            raise ValueError(text)


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
            config.teacher_end_of_turn is not None and config.teacher_template != "own",
            f"teacher_end_of_turn={config.teacher_end_of_turn!r} has no effect with teacher_template='student', where "
            "student and teacher end their turns alike: set teacher_template='own', or leave it out",
        ),
    ]


def _of_scores(config: Any) -> list[tuple[bool, str]]:
    folder = config.teacher_scores_dir
    if folder is None:
        return []
    given = f"teacher_scores_dir={folder!r}"
    evaluates = str(getattr(config.eval_strategy, "value", config.eval_strategy)) != "no"
    return [
        (not str(folder).strip(), f"{given} names no folder: name one, or leave it out"),
        (
            config.teacher_server_url is not None,
            f"{given} does not go with teacher_server_url, which gives no hidden states: leave one of them out",
        ),
        (
            not (config.teacher_writes or config.reads_answers) and not evaluates,
            f"{given} has no effect with lmbda=1, where the student writes every sequence and none comes again: lower "
            "lmbda, or leave it out",
        ),
        (
            config.teacher_writes and config.teacher_cache_folder is None and not evaluates,
            f"{given} has no effect with seq_kd=True and teacher_cache_dir={config.teacher_cache_dir!r}, where the "
            "teacher writes every sequence anew and none comes again: keep its sequences, too, or leave it out",
        ),
        (
            config.trains_on_nll_alone and not evaluates,
            f"{given} has no effect with seq_kd_loss='nll' and lmbda=0, where the teacher's scores are not used: set "
            "seq_kd_loss='divergence', or leave it out",
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
            config.teacher_scores_dir is not None and several is not None,
            f"{shown} does not go with teacher_scores_dir, which holds one teacher's scores: leave one of them out",
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
