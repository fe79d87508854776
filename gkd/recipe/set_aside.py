"""A recipe's values that only go with another one of its values go when that one is changed.

A recipe says `log_completions` and how often, or `divergence` and its `beta`, or a scheduler and its arguments.
Whoever switches the first off, or takes another one, on the command line or in YAML, does not mean the second any
longer: as a default it should not stand in the way. A value that the user gives is never set aside; it is refused
where it has no effect.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gkd.data.sources import SOURCES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rule:
    """When `leader` is changed, the `followers` go.

    Attributes:
        to: what it is changed to: "any" other value, "on", "off" (no, none, 0), or a number ("1"). "given": it need
            not even differ from what it was.
        unless: fields of which one that is on gives the followers another reason to stay.
    """

    leader: str
    followers: tuple[str, ...]
    to: str = "any"
    unless: tuple[str, ...] = ()


_OTHER_TEACHERS = ("teacher_model_name_or_path", "teacher_model_init_kwargs", "teacher_placement")
_SERVED = ("teacher_server_url", "teacher_chat_url", "teachers")
_OF_TEACHERS = (
    "teachers",
    "teacher_adapters",
    "teacher_adapter_name_or_path",
    "teacher_server_url",
    "teacher_server",
    "teacher_chat_url",
    "teacher_chat_model",
    "share_base_model",
    "self_teacher",
    "self_teacher_decay",
    "teacher_template",
    "teacher_end_of_turn",
    "teacher_tokenizer_alignment",
    "teacher_scores_dir",
    "teacher_cache_dir",
    "teacher_temperature",
    "teacher_top_k",
    "top_k_tail",
)
_OF_DISTILLATION = (
    "seq_kd_loss",
    "ce_on_student_tokens",
    "reward_weight",
    "reward_baseline",
    "token_weights",
    "log_top_k_overlap",
    "draft_tokens",
    *(f"{kind}_{source}" for kind in ("divergence", "beta", "teacher_top_k") for source in SOURCES),
)
_OWN = ("rollout_server_memory", "vllm_python", "vllm_args")
_SERVER = (
    *("rollout_server_url", "rollout_adapter_dir", "rollout_staleness", "rollout_logprob_tolerance"),
    *("rollout_server", "rollout_server_sharing", *_OWN),
)

RULES = (
    Rule("log_completions", ("log_completions_steps", "num_completions_to_print")),
    Rule("seq_kd", ("teacher_temperature", "seq_kd_loss")),
    Rule("divergence", ("beta", "skew_lambda", "ab_alpha", "ab_beta", "akl_mu", "symmetric_kl_weight")),
    Rule("ce_weight", ("ce_on_student_tokens",), "off"),
    Rule("teacher_top_k", ("top_k_tail",), "off"),
    Rule("evaluate_before_and_after", ("lm_eval_tasks", "lm_eval_limit", "draft_tokens")),
    Rule("lm_eval_tasks", ("lm_eval_limit",), "off"),
    # arguments of what another one replaces
    Rule("lr_scheduler_type", ("lr_scheduler_kwargs",)),
    Rule("optim", ("optim_args",)),
    Rule("gradient_checkpointing", ("gradient_checkpointing_kwargs",), "off"),
    Rule("model_name_or_path", ("model_revision",)),
    Rule("dataset_name", ("dataset_config", "dataset_train_split", "dataset_test_split", "datasets")),
    Rule("datasets", ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split"), "on"),
    # max_steps decides wherever it is set
    Rule("num_train_epochs", ("max_steps",), "given"),
    Rule("eval_strategy", ("load_best_model_at_end",), "off"),
    Rule("save_strategy", ("load_best_model_at_end",), "off"),
    # nothing but the data
    Rule("objective", (*_OTHER_TEACHERS, *_OF_TEACHERS, *_OF_DISTILLATION), "sft"),
    # who writes, and where
    Rule("lmbda", ("rollout_backend", *_SERVER), "off"),
    Rule("lmbda", ("rollout_every",), "off", unless=("seq_kd",)),
    Rule("lmbda", ("num_completions",)),
    Rule("lmbda", ("collapse_guard", "collapse_window", "collapse_threshold"), "off"),
    Rule("collapse_guard", ("collapse_window", "collapse_threshold"), "off"),
    Rule("lmbda", ("rollout_server_timeout", "server_proxy"), "off", unless=_SERVED),
    Rule("lmbda", ("teacher_scores_dir",), "1", unless=("eval_strategy",)),
    Rule("rollout_backend", _SERVER),
    Rule("rollout_backend", ("rollout_server_timeout", "server_proxy"), unless=_SERVED),
    Rule("rollout_server_url", ("rollout_server", *_OWN), "on"),
    Rule("rollout_server", ("rollout_server_url",), "on"),
    Rule("teacher_server", ("teacher_server_url", "teacher_chat_url", "teachers", "self_teacher"), "on"),
    Rule("teacher_server_url", ("teacher_server",), "on"),
    # one teacher in place of another
    Rule("teacher_server_url", (*_OTHER_TEACHERS, "teacher_adapter_name_or_path", "teacher_scores_dir"), "on"),
    Rule("teacher_server_url", ("teacher_adapters", "share_base_model"), "on"),
    Rule("teacher_server_url", ("rollout_server_timeout", "server_proxy"), "off", unless=("rollout_server_url",)),
    Rule("teacher_chat_url", (*_OTHER_TEACHERS, "teacher_adapter_name_or_path", "teacher_scores_dir"), "on"),
    Rule("teacher_chat_url", ("teacher_adapters", "share_base_model", "teachers", "teacher_server_url"), "on"),
    Rule("teacher_chat_url", ("self_teacher", "self_teacher_decay", "teacher_template", "teacher_top_k"), "on"),
    Rule("teacher_chat_url", ("rollout_server_timeout", "server_proxy"), "off", unless=("rollout_server_url",)),
    Rule("teacher_chat_url", ("teacher_chat_model",), "off"),
    Rule("share_base_model", (*_OTHER_TEACHERS, "teacher_server_url"), "on"),
    Rule("self_teacher", (*_OTHER_TEACHERS, "teacher_server_url", "teacher_adapter_name_or_path"), "on"),
    Rule("self_teacher", ("teacher_adapters", "teachers", "share_base_model"), "on"),
    Rule("self_teacher", ("self_teacher_decay",)),
    Rule("teachers", ("teacher_server_url", "teacher_adapters", "teacher_adapter_name_or_path"), "on"),
    Rule("teachers", ("self_teacher", "self_teacher_decay"), "on"),
    Rule("teacher_template", ("teacher_end_of_turn",)),
    Rule("teacher_model_name_or_path", ("teacher_server_url", "self_teacher", "self_teacher_decay"), "on"),
    Rule("teacher_model_name_or_path", ("teacher_chat_url", "teacher_chat_model"), "on"),
)
_WHO_WRITES = ("lmbda", "seq_kd", "rollout_backend", "teacher_server_url", "teacher_chat_url")
_WRITTEN_HERE = ("rollout_batch_size", "fold_adapter")  # of generation in this process
_YES, _NO = ("yes", "true", "t", "y"), ("no", "false", "f", "n")  # as the parser reads a switch


def set_aside(
    defaults: Mapping[str, Any], own: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The recipe's defaults without those that go with a value which was changed.

    Args:
        defaults: of the recipe.
        own: the fields' own defaults.
        given: what flags and YAML give, as texts or as values.

    Returns:
        What is left of the defaults, and a line for each one that is not.
    """
    kept, remarks = dict(defaults), []
    for rule in RULES:
        if rule.leader not in given or not _concerns(rule, given[rule.leader], defaults, own):
            continue
        values = {**own, **kept, **given}
        if any(plain(values.get(name)) not in (0, None) for name in rule.unless):
            continue
        remarks += _drop(kept, given, rule.leader, rule.followers)
    changed = [name for name in _WHO_WRITES if name in given]
    if changed and not _writes_here({**own, **kept, **given}):
        remarks += _drop(kept, given, changed[0], _WRITTEN_HERE)
    for remark in remarks:
        logger.info("%s", remark)
    return kept, remarks


def _drop(kept: dict[str, Any], given: Mapping[str, Any], leader: str, followers: tuple[str, ...]) -> list[str]:
    remarks = []
    for name in followers:
        if name in kept and name not in given:
            value = kept.pop(name)
            shown = getattr(value, "__name__", value)
            remarks.append(f"{leader}={given[leader]}: the recipe's {name}={shown} is set aside")
    return remarks


def _writes_here(values: Mapping[str, Any]) -> bool:
    """Whether anything is generated in this process (`gkd.config.servers` has the same of a finished config)."""
    lmbda, seq_kd = (plain(values.get(name)) for name in ("lmbda", "seq_kd"))
    server = plain(values.get("teacher_server_url")) or plain(values.get("teacher_chat_url"))
    student = lmbda != 0 and plain(values.get("rollout_backend")) != "vllm"
    return student or (seq_kd == 1 and lmbda != 1 and server is None)


def _concerns(rule: Rule, given: Any, defaults: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether the leader is changed to what the rule is about."""
    value, before = plain(given), plain(defaults.get(rule.leader, own.get(rule.leader)))
    if rule.to == "given":
        return True
    if value == before:
        return False
    off = value in (0, None)
    return {"any": True, "on": not off, "off": off}.get(rule.to, value == plain(rule.to))


def flag_values(argv: list[str]) -> dict[str, str]:
    """`--name value`, `--name=value`, `--name` (yes) and `--no_name` as values by name."""
    values: dict[str, str] = {}
    for i, arg in enumerate(argv):
        if not arg.startswith("--"):
            continue
        name, _, value = arg[2:].partition("=")
        following = argv[i + 1] if i + 1 < len(argv) else "--"
        if "=" not in arg:
            value = "true" if following.startswith("--") else following
        name = name.replace("-", "_")
        values[name] = value
        if name.startswith("no_"):
            values[name.removeprefix("no_")] = "false"
    return values


def plain(value: Any) -> Any:
    """A value as flags, YAML and Python write it: switches and numbers as numbers, nothing as None, else a text."""
    text = str(getattr(value, "value", value)).lower()
    if text in ("none", "null", ""):
        return None
    if text in _YES or text in _NO:
        return float(text in _YES)
    try:
        return float(text)
    except ValueError:
        return text
