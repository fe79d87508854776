"""Fields about how a rollout is used: for how many optimizer steps, and how many completions of a prompt."""

from __future__ import annotations

from typing import Any

from gkd.common.ranges import whole
from gkd.config.collapse import LOWERING
from gkd.config.schedules import schedule_of


def check_rollouts(config: Any) -> None:
    """Refuse a use of rollouts that does not go with another field, or would have no effect.

    Raises:
        ValueError: naming the field, the value and the remedy.
    """
    whole("rollout_every", config.rollout_every, 1)
    whole("num_completions", config.num_completions, 1)
    groups = _of_groups(config) if config.rollout_every > 1 else []
    several = _of_several(config) if config.num_completions > 1 else []
    for wrong, text in (*groups, *several):
        if wrong:
            raise ValueError(text)


def _of_groups(config: Any) -> list[tuple[bool, str]]:
    given = f"rollout_every={config.rollout_every}"
    on_server = config.rollout_backend == "vllm"
    decides = config.decides_share
    changes = "lmbda=auto" if decides else f"collapse_guard={config.collapse_guard!r}"
    return [
        (
            not (config.student_writes or config.teacher_writes),
            f"{given} has no effect with lmbda=0 and without seq_kd, where nothing is written: leave it out",
        ),
        (
            config.rollout_staleness != 0,
            f"{given} does not go with rollout_staleness={config.rollout_staleness}: a server would write ahead from "
            f"weights up to {2 * config.rollout_every - 1} steps old; set rollout_staleness=0, or rollout_every=1",
        ),
        (
            decides or config.collapse_guard in LOWERING,
            f"{given} decides who writes for all of its steps at once, and {changes} changes that between them: set "
            "rollout_every=1",
        ),
        (
            config.reward_weight > 0 and not (on_server and config.rollout_logprob_tolerance > 0),
            f"{given} does not go with reward_weight={config.reward_weight}, which needs the likelihoods that older "
            "completions were sampled with: set rollout_every=1, or let a server sample (rollout_backend='vllm'): it "
            "tells them where rollout_logprob_tolerance is above 0",
        ),
    ]


def _of_several(config: Any) -> list[tuple[bool, str]]:
    given, batch = f"num_completions={config.num_completions}", config.per_device_train_batch_size
    return [
        (
            min(config.shares) < 1,
            f"{given} needs lmbda=1 in every step (lmbda={config.lmbda}, collapse_guard={config.collapse_guard}): an "
            "answer of the data, or of the teacher, would be trained on several times in one step",
        ),
        (
            min(schedule_of("temperature", config.temperature).values) == 0,
            f"{given} does not go with temperature={config.temperature}: greedy completions of one prompt are all the "
            "same; set a temperature above 0",
        ),
        (
            batch % config.num_completions != 0,
            f"{given} does not divide per_device_train_batch_size={batch}, which counts completions: make it a "
            "multiple",
        ),
    ]
