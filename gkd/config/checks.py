"""Ranges and choices of fields, which fields go together, and values that would be ignored or fail much later."""

from __future__ import annotations

import inspect
import json
import math
import re
from typing import Any

from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from gkd.common.redact import redact_value
from gkd.config.field_types import shown
from gkd.data.sources import MIXINGS
from gkd.rollouts.base import BACKENDS

_OVERLONG_PROMPT = ("drop", "keep_start", "keep_end")
_OVERLONG_ROW = ("cut", "drop")
_TURNS = ("last", "all")
_UNANSWERED = ("cut", "drop")
_REDUCTIONS = ("token", "sequence")
_SEQ_KD_LOSSES = ("divergence", "nll")
_TAILS = ("bucket", "renormalize", "renormalize_both", "ignore")

# SFTConfig fields that have no effect here: (field, the value that is fine, what to do instead).
_INEFFECTIVE = (
    ("packing", False, "rows are sorted by length and trimmed per micro-batch instead"),
    ("padding_free", False, "rows are sorted by length and trimmed per micro-batch instead"),
    ("eval_packing", None, "leave it out"),
    ("packing_strategy", "bfd", "leave it out"),
    ("dataset_text_field", "text", "rename the column to `text`"),
    ("assistant_only_loss", False, "use assistant_turns='all' to train on every assistant turn"),
    ("loss_type", "nll", "name the divergence with `divergence`, mix in cross-entropy with `ce_weight`"),
    ("label_smoothing_factor", 0.0, "use loss_temperature or a divergence instead"),
    ("truncation_mode", "keep_start", "use overlong_prompt and overlong_row"),
    ("average_tokens_across_devices", True, "the loss is always the mean over the targets of all ranks"),
)

_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_FORM = """'{"name": "value"}'"""
_DICTS = (
    "teacher_model_init_kwargs",
    "model_init_kwargs",
    "generation_kwargs",
    "teacher_adapters",
    "lr_scheduler_kwargs",
    "dataset_kwargs",
)
# What the Trainer itself passes to a schedule.
_OF_THE_TRAINER = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")


def check_dicts(config: Any) -> None:
    """Refuse a field for a dictionary that holds something else, before the base class reads its JSON.

    Raises:
        ValueError: naming the field, the value and the form.
    """
    for name in _DICTS:
        value = getattr(config, name, None)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{name}={redact_value(repr(value))} is no JSON ({error}): write for example {_FORM}"
                ) from error
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{name}={shown(value)} is no dictionary: write for example {_FORM}")
        if value is not None and not all(isinstance(key, str) for key in value):
            raise ValueError(f"{name}={shown(value)}: its keys should be texts, for example {_FORM}")
        if isinstance(getattr(config, name, None), str):
            setattr(config, name, None if value is None else json.dumps(value))  # without spaces around it


def check_counts(config: Any) -> None:
    """Refuse sizes of batches below one.

    Raises:
        ValueError: naming the field and the value.
    """
    for name in _AT_LEAST_ONE:
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"{name}={value} should be 1 or more")
    if config.max_steps <= 0 and config.num_train_epochs <= 0:
        raise ValueError(f"num_train_epochs={config.num_train_epochs} should be above 0, or set max_steps")


def check_values(config: Any) -> None:
    """Refuse a value out of range, an unknown choice, and an option that this trainer cannot honour.

    Raises:
        ValueError: naming the field, the value and the remedy.
    """
    _check_ranges(config)
    _check_choices(config)
    _check_ineffective(config)
    _check_schedule(config)


def _check_ranges(config: Any) -> None:
    _within("lmbda", config.lmbda, 0, 1, "0 trains on the data only, 1 on rollouts only")
    _within("ce_weight", config.ce_weight, 0, 1, "0 is the divergence only, 1 is cross-entropy only")
    _within("top_p", config.top_p, 0, 1, "1 turns it off", low_open=True)
    _within("temperature", config.temperature, 0, math.inf, "0 is greedy, the paper samples at 1")
    _within("loss_temperature", config.loss_temperature, 0, math.inf, "1 is the plain softmax", low_open=True)
    if config.teacher_loss_temperature is not None:
        _within("teacher_loss_temperature", config.teacher_loss_temperature, 0, math.inf, "1", low_open=True)
    _within("repetition_penalty", config.repetition_penalty, 0, math.inf, "1 turns it off", low_open=True)
    if config.teacher_temperature is not None:
        _within("teacher_temperature", config.teacher_temperature, 0, math.inf, "0 is greedy, None is temperature")
    _within("repetition_threshold", config.repetition_threshold, 0, 1, "1 calls nothing repetitive")
    if config.min_p is not None:
        _within("min_p", config.min_p, 0, 1, "None turns it off")
    _whole("max_new_tokens", config.max_new_tokens, 1)
    _whole("top_k", config.top_k, 0)
    _whole("max_nonfinite_steps", config.max_nonfinite_steps, 0)
    for name in ("teacher_top_k", "loss_chunk_size", "rollout_batch_size", "max_prompt_length", "max_length"):
        if getattr(config, name) is not None:
            _whole(name, getattr(config, name), 1)


def _check_choices(config: Any) -> None:
    choices: dict[str, tuple[str, ...]] = {
        "mixing": MIXINGS,
        "loss_reduction": _REDUCTIONS,
        "seq_kd_loss": _SEQ_KD_LOSSES,
        "top_k_tail": _TAILS,
        "rollout_backend": tuple(BACKENDS),
        "overlong_prompt": _OVERLONG_PROMPT,
        "overlong_row": _OVERLONG_ROW,
        "unanswered_rows": _UNANSWERED,
        "assistant_turns": _TURNS,
    }
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name}={getattr(config, name)!r} is unknown: use one of {', '.join(known)}")


def _check_ineffective(config: Any) -> None:
    for name, fine, remedy in _INEFFECTIVE:
        value = getattr(config, name, fine)
        # transformers itself turns average_tokens_across_devices off when there is one process
        if value != fine and not (name == "average_tokens_across_devices" and config.world_size == 1):
            raise ValueError(f"{name}={value!r} has no effect in GKDTrainer: {remedy}")

    if config.completion_only_loss is False:
        raise ValueError(
            "completion_only_loss=False is not supported: only completions are trained on; leave it out, or, to train "
            "on whole texts, pass rows of `text`"
        )
    if others := sorted(set(config.dataset_kwargs or ()) - {"skip_prepare_dataset"}):
        raise ValueError(
            f"dataset_kwargs: {', '.join(others)} has no effect in GKDTrainer, which prepares all rows itself: "
            "leave it out, and change the rows before they are passed, or in a formatting_func"
        )
    if config.teacher_top_k is None and config.top_k_tail != "bucket":
        raise ValueError(
            f"top_k_tail={config.top_k_tail!r} has no effect without teacher_top_k: set that, or leave it out"
        )
    if config.ce_weight == 0 and config.ce_on_student_tokens:
        raise ValueError("ce_on_student_tokens=True has no effect with ce_weight=0: raise ce_weight, or leave it out")
    for name, fine in (("teacher_temperature", None), ("seq_kd_loss", "divergence")):
        if not config.seq_kd and getattr(config, name) != fine:
            raise ValueError(
                f"{name}={getattr(config, name)!r} has no effect with seq_kd=False, where the teacher writes no "
                f"sequences: set seq_kd=True, or leave it out"
            )


def _check_schedule(config: Any) -> None:
    """Arguments that the chosen schedule does not take; the Trainer would stop at them, or never look at them."""
    given = config.lr_scheduler_kwargs or {}
    name = SchedulerType(config.lr_scheduler_type)
    takes = set(inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters) - set(_OF_THE_TRAINER)
    if name in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP):
        takes = set()  # the Trainer passes nothing on
    for argument in given:
        if argument not in takes:
            known = f"it takes {', '.join(sorted(takes))}" if takes else "it takes none"
            raise ValueError(
                f"lr_scheduler_kwargs={shown(given)}: {argument!r} has no effect with "
                f"lr_scheduler_type={name.value!r}: {known}"
            )


def _within(name: str, value: float, low: float, high: float, hint: str, low_open: bool = False) -> None:
    inside = (low < value if low_open else low <= value) and value <= high and not math.isnan(value)
    if not inside or math.isinf(value):
        bracket = "(" if low_open else "["
        raise ValueError(f"{name}={value} is out of range {bracket}{low}, {high}]: {hint}")


def _whole(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {low}")


SERVER_TIMEOUT = 600.0  # seconds
LOGPROB_TOLERANCE = 0.2  # nats per token; reduced precision gives 0.01 to 0.05


def check_servers(config: Any) -> None:
    """Refuse a field about servers that is missing or would have no effect.

    Raises:
        ValueError: naming the fields and the remedy.
    """
    for wrong, text in (*_of_rollouts(config), *_of_teacher(config)):
        if wrong:
            raise ValueError(text)


def _of_rollouts(config: Any) -> list[tuple[bool, str]]:
    on_server = config.rollout_backend == "vllm"
    any_server = on_server or config.teacher_server_url is not None
    teacher_here = config.teacher_writes and config.teacher_server_url is None
    writes_here = (config.student_writes and not on_server) or teacher_here
    timeout = config.rollout_server_timeout
    no_effect = "has no effect without rollout_backend='vllm': set that, or leave it out"
    return [
        (on_server and not config.rollout_server_url, "rollout_backend='vllm' needs rollout_server_url, its address"),
        (
            on_server and not config.student_writes,
            "rollout_backend='vllm' has no effect with lmbda=0, where the student writes nothing: leave it out",
        ),
        (not on_server and config.rollout_server_url is not None, f"rollout_server_url {no_effect}"),
        (not on_server and config.rollout_adapter_dir is not None, f"rollout_adapter_dir {no_effect}"),
        (
            config.rollout_staleness not in (0, 1),
            f"rollout_staleness={config.rollout_staleness} is out of range: 0 samples from the present weights, 1 "
            "from those of one step before",
        ),
        (not on_server and config.rollout_staleness != 0, f"rollout_staleness {no_effect}"),
        (
            not config.fold_adapter and not writes_here,
            "fold_adapter=False has no effect where nothing is generated in this process: leave it out",
        ),
        (
            not 0 < timeout < math.inf,
            f"rollout_server_timeout={timeout} must be a number of seconds above 0: {SERVER_TIMEOUT:.0f}, say",
        ),
        (
            not any_server and timeout != SERVER_TIMEOUT,
            f"rollout_server_timeout={timeout} has no effect without a server: leave it out",
        ),
        (
            not 0 <= config.rollout_logprob_tolerance < math.inf,
            f"rollout_logprob_tolerance={config.rollout_logprob_tolerance} is out of range: nats per token, "
            f"{LOGPROB_TOLERANCE}, say; 0 compares nothing",
        ),
        (
            not on_server and config.rollout_logprob_tolerance != LOGPROB_TOLERANCE,
            f"rollout_logprob_tolerance={config.rollout_logprob_tolerance} {no_effect}",
        ),
        (
            not any_server and config.server_proxy is not None,
            "server_proxy has no effect without a server: leave it out",
        ),
        (
            config.rollout_batch_size is not None and not writes_here,
            f"rollout_batch_size={config.rollout_batch_size} has no effect where nothing is generated in this process "
            "(servers do all sampling, or lmbda=0 without seq_kd): leave it out",
        ),
    ]


def _of_teacher(config: Any) -> list[tuple[bool, str]]:
    if config.teacher_server_url is None:
        return []
    own = 1.0 if config.teacher_loss_temperature is None else config.teacher_loss_temperature
    return [
        (config.teacher_top_k is None, "teacher_server_url needs teacher_top_k: 32, say, within its --max-logprobs"),
        (
            (config.loss_temperature, own) != (1.0, 1.0),
            f"loss_temperature={config.loss_temperature} (teacher_loss_temperature={own}) does not go with "
            "teacher_server_url: a server gives the top k of the distribution at temperature 1; use 1, or a teacher "
            "in this process",
        ),
        (
            config.teacher_model_name_or_path is not None or config.teacher_model_init_kwargs is not None,
            "teacher_server_url does not go with teacher_model_name_or_path or teacher_model_init_kwargs: either the "
            "server is the teacher, or a model in this process is",
        ),
    ]


PLACEMENTS = ("same", "cpu_offload", "zero3", "zero3_offload")


def check_teacher(config: Any) -> None:
    """Refuse a field about the teacher that is out of range, does not go with another, or would have no effect.

    Raises:
        ValueError: naming the fields and the remedy.
    """
    checks = (*_of_placement(config), *_of_scores(config), *_of_adapters(config))
    for wrong, text in checks:
        if wrong:
            raise ValueError(text)


def _of_placement(config: Any) -> list[tuple[bool, str]]:
    placement = config.teacher_placement
    return [
        (
            placement not in PLACEMENTS,
            f"teacher_placement={placement!r} is unknown: use one of {', '.join(PLACEMENTS)}",
        ),
        (
            placement != "same" and config.teacher_server_url is not None,
            f"teacher_placement={placement!r} has no effect with teacher_server_url, where the teacher has memory of "
            "its own: leave it out",
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


COMPLETIONS_TO_PRINT = 4


def check_logging(config: Any) -> None:
    """Refuse a field about sample completions that is out of range or would have no effect.

    Raises:
        ValueError: naming the field, the value and the remedy.
    """
    for name, fine in (("log_completions_steps", None), ("num_completions_to_print", COMPLETIONS_TO_PRINT)):
        value = getattr(config, name)
        if value == fine:
            continue
        if not config.log_completions:
            raise ValueError(
                f"{name}={value!r} has no effect with log_completions=False: set log_completions=True, or leave it out"
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
