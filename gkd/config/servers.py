"""Fields about servers: what is missing there, and what would have no effect."""

from __future__ import annotations

import copy
import math
from typing import Any

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


def longest_sequences(config: Any) -> dict[str, int | None]:
    """Tokens of the longest sequence that a server of the "student" and one of the "teacher" must take; None where
    that is not known. Scoring samples one token more."""
    written = None if config.prompt_limit is None else config.prompt_limit + config.most_new_tokens
    lengths = [length for length in (written, config.max_length) if length is not None]
    return {"student": written, "teacher": max(lengths) + 1 if lengths else None}


def with_served_teacher(config: Any, url: str = "http://localhost") -> Any:
    """The fields as they are when the server that `teacher_server` asks for is there: a copy, or the config itself
    where it asks for none."""
    if config.teacher_server is None:
        return config
    config = copy.copy(config)
    config.teacher_server, config.teacher_server_url = None, url
    config.teacher_model_name_or_path = config.teacher_model_init_kwargs = None
    return config


def as_given(config: Any, text: str) -> str:
    """A message about a config `with_served_teacher`, in the words of the config that was given."""
    return text if config.teacher_server is None else text.replace("teacher_server_url", "teacher_server")


def _of_rollouts(config: Any) -> list[tuple[bool, str]]:
    on_server = config.rollout_backend == "vllm"
    any_server = on_server or config.asks_teacher_server
    teacher_here = config.teacher_writes and config.has_teacher_here
    writes_here = (config.student_writes and not on_server) or teacher_here
    timeout = config.rollout_server_timeout
    no_effect = "has no effect without rollout_backend='vllm': set that, or leave it out"
    return [
        (
            on_server and not config.rollout_server_url and config.rollout_server is None,
            "rollout_backend='vllm' needs rollout_server_url, its address, or rollout_server='auto', which starts one",
        ),
        (
            on_server and not config.student_writes,
            "rollout_backend='vllm' has no effect with lmbda=0, where the student writes nothing: leave it out",
        ),
        (not on_server and config.rollout_server_url is not None, f"rollout_server_url {no_effect}"),
        (not on_server and config.rollout_adapter_dir is not None, f"rollout_adapter_dir {no_effect}"),
        (not on_server and config.rollout_server is not None, f"rollout_server={config.rollout_server!r} {no_effect}"),
        (not on_server and config.rollout_server_sharing is not None, f"rollout_server_sharing {no_effect}"),
        *_of_own(config),
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


def _of_own(config: Any) -> list[tuple[bool, str]]:
    """A server that the run starts."""
    memory, own = config.rollout_server_memory, config.starts_server
    rollouts = config.rollout_server is not None
    no_effect = "has no effect where the run starts no server: set rollout_server='auto', or leave it out"
    return [
        (
            config.rollout_server is not None and config.rollout_server_url is not None,
            f"rollout_server={config.rollout_server!r} does not go with rollout_server_url: the run starts a server, "
            "or uses the one that is named",
        ),
        (
            config.rollout_server_sharing is not None and config.rollout_staleness != 0,
            f"rollout_server_sharing={config.rollout_server_sharing!r} does not go with rollout_staleness="
            f"{config.rollout_staleness}: a server that sleeps while the step trains cannot write meanwhile",
        ),
        (memory is not None and not rollouts, f"rollout_server_memory={memory} {no_effect}"),
        (
            memory is not None and not 0 < memory < 1,
            f"rollout_server_memory={memory} is out of range: a share of a GPU's memory above 0 and below 1",
        ),
        (config.vllm_python is not None and not own, f"vllm_python={config.vllm_python!r} {no_effect}"),
        (config.vllm_args is not None and not own, f"vllm_args={config.vllm_args!r} {no_effect}"),
    ]


def check_one_server(config: Any) -> None:
    """Refuse a teacher's server that something is missing for, or that does not go with other fields.

    Raises:
        ValueError: naming the fields and the remedy.
    """
    for wrong, text in _of_teacher(config):
        if wrong:
            raise ValueError(text)


def _of_teacher(config: Any) -> list[tuple[bool, str]]:
    if config.teacher_server is not None and config.teacher_server_url is not None:
        return [
            (
                True,
                f"teacher_server={config.teacher_server!r} does not go with teacher_server_url: the run starts a "
                "server, or uses the one that is named",
            )
        ]
    given, config = config, with_served_teacher(config)
    if config.teacher_server_url is None:
        return []
    own = 1.0 if config.teacher_loss_temperature is None else config.teacher_loss_temperature
    found = [
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
    return [(wrong, as_given(given, text)) for wrong, text in found]
