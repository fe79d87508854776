"""Fields about what a token, or a whole completion, counts: weights of tokens, and the reward term."""

from __future__ import annotations

from typing import Any

from gkd.common.ranges import one_of, whole, within
from gkd.loss.token_weights import TOKEN_WEIGHTS

BASELINES = ("leave_one_out", "running")
# What makes the student sample from something else than its own distribution: field, and the value that does not.
_OWN = (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0), ("min_p", None), ("repetition_penalty", 1.0))


def check_weights(config: Any) -> None:
    """Refuse a weight that is out of range, does not go with another field, or would have no effect.

    Raises:
        ValueError: naming the field, the value and the remedy.
    """
    whole("skip_first_tokens", config.skip_first_tokens, 0)
    if config.token_weights is not None:
        one_of("token_weights", config.token_weights, tuple(TOKEN_WEIGHTS))
    if config.log_top_k_overlap is not None:
        whole("log_top_k_overlap", config.log_top_k_overlap, 1)
    within("reward_weight", config.reward_weight, 0, 1, "0 is distillation alone, 1 is the reward alone")
    one_of("reward_baseline", config.reward_baseline, BASELINES)
    for wrong, text in (*_of_tokens(config), *_of_reward(config)):
        if wrong:
            raise ValueError(text)


def _of_tokens(config: Any) -> list[tuple[bool, str]]:
    rule, k, skipped, folder = (
        f"token_weights={config.token_weights!r}",
        config.log_top_k_overlap,
        config.skip_first_tokens,
        config.teacher_scores_dir,
    )
    return [
        (
            config.token_weights is not None and not config.student_writes,
            f"{rule} has no effect with lmbda=0: it weighs the tokens that the student writes; raise lmbda, or leave "
            "it out",
        ),
        (
            k is not None and config.trains_on_nll_alone,
            f"log_top_k_overlap={k} has no effect where the teacher is not asked ({config.nll_because}): leave it out",
        ),
        (
            k is not None and bool(config.teacher_names),
            f"log_top_k_overlap={k} does not go with several teachers: leave it out",
        ),
        (
            skipped > 0 and folder is not None,
            f"skip_first_tokens={skipped} does not go with teacher_scores_dir, which keeps scores of whole answers: "
            "leave one of them out",
        ),
    ]


def _of_reward(config: Any) -> list[tuple[bool, str]]:
    weight, baseline = config.reward_weight, config.reward_baseline
    if weight == 0:
        text = f"reward_baseline={baseline!r} has no effect with reward_weight=0: raise that, or leave it out"
        return [(baseline != "leave_one_out", text)]
    given = f"reward_weight={weight}"
    other = [f"{name}={getattr(config, name)!r}" for name, own in _OWN if getattr(config, name) != own]
    other += [f"generation_kwargs={config.generation_kwargs!r}"] if config.generation_kwargs else []
    return [
        (
            not config.student_writes,
            f"{given} has no effect with lmbda=0, where the student writes nothing to be rewarded: raise lmbda",
        ),
        (
            bool(other),
            f"{given} needs completions from the student's own distribution, whose gradient is taken: set temperature "
            f"to 1 and leave the rest out ({', '.join(other)})",
        ),
        (
            config.token_weights is not None,
            f"{given} does not go with token_weights={config.token_weights!r}, a reward is the whole completion's: "
            "leave one of them out",
        ),
    ]
