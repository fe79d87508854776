"""From fields to settings objects, which hold the ranges and choices of what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gkd.config.schedules import schedule_of
from gkd.data.encoded import Answers, Limits
from gkd.data.sources import Mixture
from gkd.loss.settings import LossSettings
from gkd.rollouts.base import SamplingSettings
from gkd.rollouts.hygiene import Hygiene

if TYPE_CHECKING:
    from gkd.config.fields import GKDConfig


_NAMES = {"chunk_size": "loss_chunk_size", "compiled": "loss_compile"}


def check_settings(args: GKDConfig) -> None:
    """Build all of them but the loss's, so that a value that one refuses is refused with the config.

    Raises:
        ValueError: naming the field, the value and the remedy.
    """
    for share in args.shares:
        Mixture(share, args.seq_kd, args.mixing)
    for beta in schedule_of("beta", args.beta).values:
        args.make_divergence(beta)
    for name in ("max_new_tokens", "temperature"):
        for value in schedule_of(name, getattr(args, name)).values:
            one: dict[str, Any] = {"max_new_tokens": 1, name: value}
            SamplingSettings(**one)
    Limits(args.max_length, args.max_prompt_length, args.overlong_prompt, args.overlong_row)
    Answers(args.assistant_turns, args.unanswered_rows)
    hygiene(args, {})
    for source in ("student", "teacher"):
        sampling_settings(args, source)


def sampling_settings(
    args: GKDConfig, source: str, stop_ids: tuple[int, ...] = (), pad_id: int = 0, foreign_ids: range = range(0)
) -> SamplingSettings:
    """How the rollouts of a source are sampled, complete.

    `foreign_ids` are rows of this model's head beyond the other model's embeddings: they are never sampled, since the
    other model could not read them. Where a field follows a schedule, it is the most tokens, and the last temperature.
    """
    assert not isinstance(args.generation_kwargs, str)  # TrainingArguments has parsed it
    extra = dict(args.generation_kwargs or {})
    if foreign_ids:
        extra["suppress_tokens"] = sorted({*extra.get("suppress_tokens", ()), *foreign_ids})
    own = args.teacher_temperature if source == "teacher" else None
    return SamplingSettings(
        max_new_tokens=args.most_new_tokens,
        temperature=schedule_of("temperature", args.temperature).values[-1] if own is None else own,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        stop_ids=stop_ids,
        pad_id=pad_id,
        extra=extra,
        names={} if own is None else {"temperature": "teacher_temperature"},
    )


def hygiene(
    args: GKDConfig, stop_ids: Mapping[str, tuple[int, ...]], end_map: tuple[int, int] | None = None
) -> Hygiene:
    """Which completions are counted as unsound, and which of them are trained on."""
    return Hygiene(
        stop_ids=stop_ids,
        max_new_tokens=args.most_new_tokens,
        repetition_threshold=args.repetition_threshold,
        train_truncated=not args.mask_truncated_completions,
        train_repetitive=not args.drop_repetitive_completions,
        end_map=end_map,
    )


def loss_settings(
    args: GKDConfig,
    shared_vocab: int | None = None,
    changed: Mapping[str, Any] | None = None,
    source: str | None = None,
) -> LossSettings:
    """What the fused divergence computes; `changed`: attributes that are otherwise, of one `source`."""
    plain = LossSettings(
        divergence=args.make_divergence(),
        loss_temperature=args.loss_temperature,
        teacher_loss_temperature=args.teacher_loss_temperature,
        scale_by_temperature_squared=args.scale_by_temperature_squared,
        teacher_top_k=args.teacher_top_k,
        top_k_tail=args.top_k_tail,
        shared_vocab=shared_vocab,
        chunk_size=args.loss_chunk_size,
        compiled=args.loss_compile,
        names=_NAMES,
    )
    own = {name: f"{name}_{source}" for name in ("teacher_top_k",) if name in (changed or ())}
    return replace(plain, **changed, names=_NAMES | own) if changed else plain
