"""What each target counts in the loss beside its share of the step: a rule or a function of the user's own, and the
reward of its completion.

B rows, N targets, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gkd.data.sources import SOURCES
from gkd.data.targets import Targets, per_target
from gkd.loss.fused import Weigh
from gkd.loss.settings import FusedOutput, LossSettings
from gkd.loss.signals import Head
from gkd.loss.token_weights import TOKEN_WEIGHTS, TokenGroups, TokenView
from gkd.training.reward import clipped_ratio

Own = Callable[[TokenView], Tensor]


class TokenWeights:
    """Of a training; an evaluation weighs all targets alike.

    Args:
        args: the fields.
        own: a function of the user's, from what is known of the micro-batch's targets to [N] weights.

    Raises:
        ValueError: both a rule and a function, or a function in a training without divergences.
    """

    def __init__(self, args: Any, own: Own | None = None) -> None:
        self._args, self._own = args, own
        if own is not None and args.token_weights is not None:
            raise ValueError(
                f"token_weights={args.token_weights!r} and a function token_weights: leave one of them out"
            )
        if own is not None and (args.trains_on_nll_alone or args.reward_weight):
            beside = "a training on negative log-likelihoods alone" if args.trains_on_nll_alone else "reward_weight"
            raise ValueError(f"a function token_weights does not go with {beside}: leave one of them out")

    def of(
        self, inputs: Mapping[str, Tensor], targets: Targets, sources: Tensor, groups: Tensor | None = None
    ) -> Weigh | None:
        """The weights as a function of what the fused pass says; None where all targets count alike.

        Args:
            inputs: the micro-batch. targets: its. sources: [N] who has written each, numbers of SOURCES.
            groups: [N] numbers of those that are compared together with a teacher of another tokenizer: they have one
                weight, the mean of theirs.
        """
        if self._own is None and self._args.token_weights is None:
            return None
        together = None if groups is None else TokenGroups(groups, targets.ids.device)
        labels, rows = inputs["labels"], inputs.get("rows")
        row_numbers = torch.full_like(targets.rows, -1) if rows is None else per_target(rows, targets)

        def weigh(output: FusedOutput) -> Tensor:
            view = TokenView(
                ids=targets.ids,
                rows=targets.rows,
                places=targets.places,
                sources=sources,
                row_numbers=row_numbers,
                divergence=output.divergence,
                student_entropy=output.student_entropy,
                shape=(labels.shape[0], labels.shape[1]),
                **_of_places(output, together),
            )
            if self._own is not None:
                weights = self._of_the_user(view)
            else:
                weights = TOKEN_WEIGHTS[self._args.token_weights](view)
                weights = torch.where(sources == SOURCES.index("student"), weights, 1.0)
            return weights if together is None else together.mean(weights)

        return weigh

    def _of_the_user(self, view: TokenView) -> Tensor:
        assert self._own is not None
        weights, number = self._own(view), view.ids.shape
        if not isinstance(weights, Tensor) or weights.shape != number:
            got = list(weights.shape) if isinstance(weights, Tensor) else repr(weights)
            raise ValueError(f"token_weights should give [{number[0]}] weights, one for each target, not {got}")
        return weights.detach().to(view.divergence)


def _of_places(output: FusedOutput, together: TokenGroups | None) -> dict[str, Tensor]:
    """What a `TokenView` says of both models at each target's place."""
    assert output.cross_entropy is not None
    said = {name: getattr(output, name) for name in ("teacher_log_prob", "teacher_entropy", "agreement")}
    own = -output.cross_entropy
    if together is None:
        return {**said, "student_log_prob": own}
    assert output.not_compared is not None
    return {
        "student_log_prob": together.mean(own),
        "teacher_log_prob": torch.where(output.not_compared, own, said["teacher_log_prob"]),
        # told where a group begins, and 0 elsewhere
        "teacher_entropy": together.sum(said["teacher_entropy"]),
        "agreement": together.sum(said["agreement"]),
    }


def with_reward(
    inputs: Mapping[str, Tensor],
    targets: Targets,
    weights: Tensor,
    ce_weights: Tensor | None,
    reward_weight: float,
    *,
    hidden: Tensor,
    head: Head,
    settings: LossSettings,
) -> tuple[Tensor, Tensor]:
    """The weights [N] of divergence and cross-entropy with (1 - alpha) of them, and the reward's own (GKD Eq. 5).

    Args:
        inputs: `log_prob_weights` [B] where any completion is rewarded; `server_log_probs` [B, T] where other weights
            may have sampled them.
        weights, ce_weights: without the reward. reward_weight: alpha.
        hidden: [N, D], the student's at the targets. head, settings: for the likelihoods that it has now.
    """
    rest = 1 - reward_weight
    others = torch.zeros_like(weights) if ce_weights is None else ce_weights * rest
    if "log_prob_weights" not in inputs:
        return weights * rest, others
    earned = per_target(inputs["log_prob_weights"].to(weights.dtype), targets)
    if "server_log_probs" in inputs:
        said = inputs["server_log_probs"].flatten().index_select(0, targets.at + 1)
        earned = earned * clipped_ratio(hidden, head, targets.ids, said, earned, settings)
    return weights * rest, others + earned
