"""The reward term of GKD (arXiv 2306.13649, Eq. 5): loss = (1 - alpha) D - alpha E[r(y)], y written by the student.

Its gradient is REINFORCE's: every token of completion i has -alpha (r_i - b_i) / S times the gradient of its
log-likelihood, for S sequences in the step. The baseline b_i does not depend on what i says, so it moves no mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from gkd.common.ranges import as_number
from gkd.common.ranks import sum_over_ranks
from gkd.data.sequences import TokenSequence
from gkd.loss.cross_entropy import log_probs
from gkd.loss.projection import Projection
from gkd.loss.settings import LossSettings
from gkd.loss.signals import Head
from gkd.training.going_on import all_ranks

Reward = Callable[[str, dict[str, Any]], float]

MEMORY = 0.9  # of the running mean: a tenth of it is the last step's
CLIP = 0.2  # PPO's (arXiv 1707.06347, Eq. 7)


def check_reward(args: Any, reward: Any, rows: Any) -> None:
    """Refuse a reward that would have no effect, a weight without one, and rows that cannot be looked up.

    Raises:
        ValueError: naming the field and the remedy.
    """
    weight = args.reward_weight
    if weight == 0 and reward is not None:
        raise ValueError("reward has no effect with reward_weight=0: raise reward_weight, or leave it out")
    if weight > 0 and reward is None:
        raise ValueError(
            f"reward_weight={weight} needs a reward, (completion, row) -> number: pass `reward` to GKDTrainer, or "
            "`score` in a recipe"
        )
    if weight > 0 and not (hasattr(rows, "__getitem__") and hasattr(rows, "__len__")):
        raise ValueError(f"reward_weight={weight} needs rows that can be looked up by number: pass a datasets.Dataset")


def advantage(value: float, total: float, number: int, before: float | None, *, running: bool) -> float:
    """r - b of one of a step's completions.

    Args:
        value: its reward. total: of all of them, or of those of its prompt. number: how many there are.
        before: the running mean of earlier steps, None in the first.
        running: b is that mean, else the mean of the others; of a single one, the running mean.
    """
    if running or number == 1:
        return 0.0 if before is None else value - before
    return value - (total - value) / (number - 1)


class RewardTerm:
    """What the student's completions of a step have earned, as factors of their tokens' log-likelihood.

    Args:
        trainer: its record keeps the running mean.
        reward: (completion's text, its row of the data set as it was given) -> a number, higher is better.
        rows: the data set as it was given.
    """

    def __init__(self, trainer: Any, reward: Reward, rows: Any) -> None:
        self._trainer, self._reward, self._rows = trainer, reward, rows
        self._args = trainer.args

    def weigh(self, sequences: Sequence[TokenSequence]) -> None:
        """Set `log_prob_weight` of those that the student has written and that are trained on. A collective.

        Args:
            sequences: of this rank, all of the step.

        Raises:
            ValueError: a reward that is no finite number, on all ranks.
        """
        trainer, record = self._trainer, self._trainer.record
        own = [s for s in sequences if s.source == "student" and s.num_targets]
        values: list[float] = []
        all_ranks(trainer.accelerator, lambda: values.extend(self._value(s) for s in own))
        trained = sum(s.num_targets > 0 for s in sequences)
        found = [sum(values), sum(v * v for v in values), len(values), trained]
        sums = sum_over_ranks(trainer.accelerator, torch.tensor(found, dtype=torch.float64)).tolist()
        total, squares, number, in_step = sums
        if number == 0:
            return
        mean, before = total / number, record.reward_mean
        running = self._args.reward_baseline == "running"
        others = self._others(own, values) if self._args.num_completions > 1 else [(total, int(number))] * len(own)
        for sequence, value, (sum_of, count) in zip(own, values, others, strict=True):
            found_better = advantage(value, sum_of, count, before, running=running)
            sequence.log_prob_weight = self._args.reward_weight * found_better / in_step
        record.reward_mean = mean if before is None else MEMORY * before + (1 - MEMORY) * mean
        spread = math.sqrt(max(0.0, squares / number - mean * mean))
        seen = {"reward/mean": mean, "reward/std": spread, "reward/running_mean": record.reward_mean}
        for name, one in seen.items():
            trainer._metrics["train"][name].append(one)

    def _others(self, own: Sequence[TokenSequence], values: list[float]) -> list[tuple[float, int]]:
        """For each completion the sum of the rewards of its prompt's completions, and their number: all of them are of
        this rank."""
        found: dict[int, list[float]] = {}
        for sequence, value in zip(own, values, strict=True):
            found.setdefault(sequence.row, []).append(value)
        return [(sum(found[sequence.row]), len(found[sequence.row])) for sequence in own]

    def _value(self, sequence: TokenSequence) -> float:
        ids = sequence.input_ids[sequence.prompt_length :]
        text = str(self._trainer.processing_class.decode(ids, skip_special_tokens=True))
        row: Mapping[str, Any] = self._rows[sequence.row]
        with ExitStack() as told:
            told.push(lambda kind, error, trace: _name_row(error, sequence.row))
            value = self._reward(text, dict(row))
        number = as_number(value)
        if number is None or not math.isfinite(number):
            raise ValueError(f"row {sequence.row}: the reward is {value!r}; it should be a finite number")
        return number


def _name_row(error: BaseException | None, row: int) -> None:
    if error is not None:
        error.add_note(f"(the reward of row {row})")


@torch.no_grad()
def clipped_ratio(
    hidden: Tensor, head: Head, ids: Tensor, said: Tensor, weights: Tensor, settings: LossSettings
) -> Tensor:
    """The factor of each token's REINFORCE gradient when other weights have sampled it: the likelihood ratio where it
    is not clipped, else 0 (PPO's clipped surrogate, differentiated).

    Args:
        hidden: [N, D] of the student. head: its head. ids: [N] the tokens.
        said: [N] log-probability of each at the weights that sampled it; NaN where another source has written it.
        weights: [N], whose sign is that of the advantage.
    """
    vocab = settings.shared_vocab or head.weight.shape[0]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    now = log_probs(Projection(hidden, head, vocab, dtype), ids, settings)
    ratio = (now - said).exp().nan_to_num(nan=1.0)
    clipped = ((weights > 0) & (ratio > 1 + CLIP)) | ((weights < 0) & (ratio < 1 - CLIP))
    return torch.where(clipped, 0.0, ratio)
