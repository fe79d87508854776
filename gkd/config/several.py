"""The field `teachers`: several teachers of any kind, each of which is a run's one teacher for its own rows.

So an entry is nothing but the fields of that teacher, and the checks of a run's one teacher are the checks of it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gkd.common.ranges import whole, within
from gkd.common.redact import redact_value
from gkd.config.field_types import describe
from gkd.config.servers import check_one_server
from gkd.config.settings import loss_settings
from gkd.config.teacher import check_teacher

if TYPE_CHECKING:
    from gkd.config.fields import GKDConfig

# What an entry may say, and the field of a run with one teacher that says it.
FIELDS = {
    "model": "teacher_model_name_or_path",
    "adapter": "teacher_adapter_name_or_path",
    "server": "teacher_server_url",
    "placement": "teacher_placement",
    "model_init_kwargs": "teacher_model_init_kwargs",
    "top_k": "teacher_top_k",
    "template": "teacher_template",
}
OTHERS = ("quantization", "weight")
_TEXTS = ("model", "adapter", "server", "placement", "template")
_BITS = {4: "load_in_4bit", 8: "load_in_8bit", "4bit": "load_in_4bit", "8bit": "load_in_8bit"}
_EXAMPLE = 'for example {"math": {"model": "org/math", "placement": "cpu_offload"}, "chat": {"adapter": "org/chat"}}'
_NAME = re.compile(r"[\w.-]+")


@contextmanager
def of_entry(name: str | None) -> Iterator[None]:
    """What is refused inside is told of that teacher, by the names that its entry has for the fields; None is a run's
    one teacher."""
    try:
        yield
    except ValueError as error:
        if name is None:
            raise
        text = str(error)
        for own, field in FIELDS.items():
            text = re.sub(rf"\b(args\.)?{field}\b", own, text)
        entry = f"teachers[{name!r}]"
        raise ValueError(text if text.startswith(entry) else f"{entry}: {text}") from error


def entry_of(config: Any, name: str) -> dict[str, Any]:
    """What `teachers` says of one of them."""
    assert isinstance(config.teachers, dict)
    return dict(config.teachers[name] or {})


def stands_on_base(entry: Mapping[str, Any]) -> bool:
    """Whether it is, or is an adapter on, the model that the run's own fields name."""
    return entry.get("model") is None and entry.get("server") is None


def config_of(config: GKDConfig, name: str) -> GKDConfig:
    """The fields of a run that has this one of `teachers` for its only teacher."""
    entry, one = entry_of(config, name), copy.copy(config)
    one.teachers = None
    for own in ("adapter", "server"):
        setattr(one, FIELDS[own], entry.get(own))
    for own in ("top_k", "template"):
        if entry.get(own) is not None:
            setattr(one, FIELDS[own], entry[own])
    if one.teacher_template == "student":
        one.teacher_end_of_turn = None  # it is about those that have their own
    if entry.get("server") is not None:  # what the run's own fields say is said of models
        one.teacher_model_name_or_path, one.teacher_model_init_kwargs = None, None
        one.share_base_model, one.teacher_placement, one.teacher_scores_dir = False, "same", None
    elif entry.get("model") is not None:
        one.share_base_model, one.teacher_model_name_or_path = False, entry["model"]
        one.teacher_placement = entry.get("placement") or config.teacher_placement
        given = config.teacher_model_init_kwargs or {}
        assert not isinstance(given, str)  # TrainingArguments has parsed it
        kwargs = {**given, **(entry.get("model_init_kwargs") or {}), **_quantized(entry)}
        one.teacher_model_init_kwargs = kwargs or None
    return one


def weight_of(config: Any, name: str) -> float:
    """What its divergence is multiplied by."""
    return float(entry_of(config, name).get("weight") or 1.0)


def _quantized(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for loading it."""
    asked = entry.get("quantization")
    if asked is None:
        return {}
    return {"quantization_config": asked} if isinstance(asked, Mapping) else {_BITS[asked]: True}


def check_entries(config: GKDConfig) -> None:
    """Refuse `teachers` whose entries are none.

    Raises:
        ValueError: naming the teacher, the key, the value and the remedy.
    """
    several: Any = config.teachers
    if several is None:
        return
    if not isinstance(several, dict) or not several:
        raise ValueError(f"teachers={describe(several)} should be a dict (JSON on the command line), {_EXAMPLE}")
    for name, entry in several.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"teachers: {name!r} is no name: use letters, digits, . _ - ({_EXAMPLE})")
        _check_entry(name, {} if entry is None else entry)


def check_several(config: GKDConfig) -> None:
    """Refuse `teachers` that do not go with the other fields; `check_entries` has seen them.

    Raises:
        ValueError: naming the teacher, the fields, the value and the remedy.
    """
    if config.teachers is None:
        return
    _check_beside(config)
    for name in config.teacher_names:
        with of_entry(name):
            one = config_of(config, name)
            check_teacher(one)
            check_one_server(one)
            loss_settings(one)


def _check_entry(name: str, entry: Any) -> None:
    """One of them, by itself."""
    given = f"teachers[{name!r}]"
    if not isinstance(entry, dict):
        raise ValueError(f"{given}={describe(entry)} should be a dict, {_EXAMPLE}")
    known = (*FIELDS, *OTHERS)
    for key, value in entry.items():
        if key not in known:
            raise ValueError(f"{given}: {key!r} is unknown: an entry has {', '.join(known)}")
        if key in _TEXTS and value is not None and not (isinstance(value, str) and value.strip()):
            raise ValueError(f"{given}: {key}={describe(value)} should be a text that is not empty, or be left out")
    if entry.get("weight") is not None:
        value = entry["weight"]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{given}: weight={describe(value)} should be a number; 1 counts as the others do")
        within(f"{given}: weight", value, 0, float("inf"), "1 counts as the others do", above=True)
    if entry.get("top_k") is not None:
        whole(f"{given}: top_k", entry["top_k"], 1)
    kwargs, quantization = entry.get("model_init_kwargs"), entry.get("quantization")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ValueError(f"{given}: model_init_kwargs={describe(kwargs)} should be a dict")
    fine = isinstance(quantization, dict) or (not isinstance(quantization, bool) and quantization in (*_BITS, None))
    if not fine:
        raise ValueError(
            f"{given}: quantization={describe(quantization)} is unknown: use 4, 8, or a dict of BitsAndBytesConfig's "
            "fields"
        )
    _check_kind(given, entry)


def _check_kind(given: str, entry: Mapping[str, Any]) -> None:
    """What of an entry goes with what it is: a server, a model of its own, or something on the run's own model."""
    set_keys = {key for key, value in entry.items() if value is not None}
    if "server" in set_keys:
        for key in ("model", "adapter", "placement", "quantization", "model_init_kwargs"):
            if key in set_keys:
                raise ValueError(
                    f"{given}: {key}={describe(entry[key])} does not go with "
                    f"server={redact_value(entry['server'])!r}, whose model was loaded elsewhere: leave one out"
                )
    elif "model" not in set_keys:
        for key in ("placement", "quantization", "model_init_kwargs"):
            if key in set_keys:
                raise ValueError(
                    f"{given}: {key}={describe(entry[key])} has no effect without model, since it stands on the "
                    "weights of share_base_model or teacher_model_name_or_path: give it a model, or leave that out"
                )


def _check_beside(config: GKDConfig) -> None:
    """The fields of a run's one teacher, beside `teachers`."""
    assert isinstance(config.teachers, dict)
    for field in (
        "teacher_adapters",
        "teacher_server_url",
        "teacher_server",
        "teacher_adapter_name_or_path",
        "self_teacher",
    ):
        value = getattr(config, field)
        if value is not None:
            raise ValueError(
                f"{field}={describe(value)} does not go with teachers, whose entries say all of it: put it into an "
                "entry of its own, or leave it out"
            )
    on_base = [name for name in config.teachers if stands_on_base(entry_of(config, name))]
    for field in ("share_base_model", "teacher_model_name_or_path"):
        if getattr(config, field) and not on_base:
            raise ValueError(
                f"{field}={getattr(config, field)!r} has no effect, since all of teachers have a model or a server of "
                "their own: leave it out, or give one of them only an adapter"
            )
    lent = config.share_base_model or len(on_base) > 1
    if on_base and lent and config.teacher_placement != "same":
        raise ValueError(
            f"teacher_placement={config.teacher_placement!r} does not go with teachers {on_base}: their weights stand "
            "where the student's or the other teachers' do; leave teacher_placement out, and set placement in the "
            "entries that have a model"
        )
    elsewhere = all(entry_of(config, name).get("server") for name in config.teachers)
    for field, fine in (
        ("teacher_placement", "same"),
        ("teacher_scores_dir", None),
        ("teacher_model_init_kwargs", None),
    ):
        if elsewhere and getattr(config, field) != fine:
            raise ValueError(
                f"{field}={describe(getattr(config, field))} has no effect, since all of teachers are on servers: "
                "leave it out"
            )
    if config.trains_on_nll_alone:
        for name in config.teachers:
            if weight_of(config, name) != 1:
                raise ValueError(
                    f"teachers[{name!r}]: weight={weight_of(config, name)} has no effect with "
                    f"{config.nll_because}, where nothing is compared with a teacher: leave it out"
                )
