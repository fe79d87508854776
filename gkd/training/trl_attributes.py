"""What scripts touch of `trl.experimental.gkd.GKDTrainer` beside its constructor: attributes and one static method.

An attribute that is changed is honoured from the next step on, or refused; none is kept without effect. So is a
subclass that overrides what this trainer does not call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from gkd.loss.dense import generalized_jsd_loss
from gkd.rollouts.base import EXTRA_OPTIONS, SamplingSettings

_OVERRIDES = {
    "generalized_jsd_loss": "the fused loss does not call it: add the divergence to gkd.loss.DIVERGENCES and "
    "name it in the field divergence",
    "generate_on_policy_outputs": "rollouts do not go through it: set the fields of sampling, or write a rollout "
    "backend (gkd.rollouts)",
}
# Of a GenerationConfig: which field of SamplingSettings each decides. The rest are rules of EXTRA_OPTIONS.
_SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class TRLAttributes:
    """Part of `GKDTrainer`."""

    args: Any
    model: Any
    rollouts: dict[str, Any]
    stop_ids: dict[str, tuple[int, ...]]
    hygiene: Any
    loss_settings: Any
    rollout_check: Any
    scheduled: Any
    _pad_id: int
    _generation_config: GenerationConfig | None = None
    _generation_taken: dict[str, Any] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, remedy in _OVERRIDES.items():
            if name in vars(cls):
                raise ValueError(f"{cls.__name__}.{name} has no effect: {remedy}")

    generalized_jsd_loss = staticmethod(generalized_jsd_loss)

    @staticmethod
    def generate_on_policy_outputs(
        model: Any, inputs: Mapping[str, Tensor], generation_config: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, attention mask and labels [B, T] of prompts that a model has continued: for scripts that call it. The
        trainer's own rollouts are `trainer.rollouts`.

        Args:
            model: has `generate`.
            inputs: `prompts` and `prompt_attention_mask` [B, P].
            generation_config: for `generate`; its `eos_token_id` (one, several or None) ends a completion.
        """
        prompts, mask = inputs["prompts"], inputs["prompt_attention_mask"]
        ids: Tensor = model.generate(
            input_ids=prompts,
            attention_mask=mask,
            generation_config=generation_config,
            return_dict_in_generate=True,
        ).sequences
        width = prompts.shape[1]
        completions = ids[:, width:]
        stops = generation_config.eos_token_id
        if stops is None:
            stops = []
        is_stop = torch.isin(completions, torch.as_tensor(stops, dtype=completions.dtype, device=ids.device))
        written = is_stop.int().cumsum(dim=1) - is_stop.int() == 0  # up to the first stop token, itself included
        attention = torch.cat([mask.to(ids.device), written.to(mask.dtype)], dim=1)
        labels = torch.where(attention.bool(), ids, -100)
        labels[:, :width] = -100
        return ids, attention, labels

    # ------------------------------------------------------------------------------------------------ fields

    @property
    def lmbda(self) -> float:
        """As `args.lmbda`, of the present step; setting it changes the share from the next step on."""
        return self.scheduled.now("lmbda")

    @lmbda.setter
    def lmbda(self, value: float) -> None:
        self._change("lmbda", value)
        before = (self.args.student_writes, self.args.teacher_writes, self.args.reads_answers)
        kept, self.args.lmbda = self.args.lmbda, float(value)
        after = (self.args.student_writes, self.args.teacher_writes, self.args.reads_answers)
        if not 0 <= value <= 1 or any(new and not old for old, new in zip(before, after, strict=True)):
            self.args.lmbda = kept
            raise ValueError(
                f"lmbda={value} cannot follow lmbda={kept} in one run: it is between 0 and 1, and models and rows are "
                "prepared for the sources that lmbda and seq_kd name at the start; begin with a value between 0 and 1"
            )

    @property
    def seq_kd(self) -> bool:
        """As `args.seq_kd`; it decides which models are set up, so it cannot change."""
        return bool(self.args.seq_kd)

    @property
    def beta(self) -> float:
        """As `args.beta`, of the present step; setting it changes the divergence from the next micro-batch on."""
        return self.scheduled.now("beta")

    @beta.setter
    def beta(self, value: float) -> None:
        kept, self.args.beta = self.args.beta, value
        try:
            self.scheduled.compare_by(self.args.make_divergence())
        except ValueError:
            self.args.beta = kept
            raise

    @property
    def temperature(self) -> float:
        """Of the student's sampling in the present step, as `args.temperature`; see `generation_config`."""
        return self.scheduled.now("temperature")

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._take(replace(self._sampling, temperature=value))
        self.args.temperature = value
        self._generation_config = None

    # ---------------------------------------------------------------------------------------------- sampling

    @property
    def generation_config(self) -> GenerationConfig:
        """How the student's completions are sampled. What is changed in it is taken over at the next step, or refused
        there by name."""
        if self._generation_config is None:
            self._generation_config = self._described()
            self._generation_taken = self._generation_config.to_dict()
        return self._generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        assert self.generation_config is not None  # what it is compared with
        self._generation_config = value

    @property
    def generation_kwargs(self) -> Mapping[str, Any]:
        """The same as a mapping that cannot be changed."""
        settings = self._sampling
        named = {name: getattr(settings, name) for name in _SAMPLING}
        return MappingProxyType({**named, **settings.extra, "do_sample": not settings.greedy})

    @property
    def _sampling(self) -> SamplingSettings:
        settings: SamplingSettings = self.rollouts["student"].settings
        return settings

    def _described(self) -> GenerationConfig:
        settings, stops = self._sampling, self.stop_ids["student"]
        own = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        same = own is not None and set(stops) == set(own if isinstance(own, (list, tuple)) else [own])
        named = {name: getattr(settings, name) for name in _SAMPLING}
        extra = {name: value for name, value in settings.extra.items() if name != "logits_processor"}
        return GenerationConfig(
            **{**named, **extra},
            do_sample=not settings.greedy,
            pad_token_id=self._pad_id,
            eos_token_id=own if same else list(stops),
        )

    def _take_generation_config(self) -> None:
        """Before a step's rollouts: what user code has changed in `generation_config`.

        Raises:
            ValueError: it cannot be honoured; the message names what was changed.
        """
        config = self._generation_config
        if config is None or config.to_dict() == self._generation_taken:
            return
        before, now = self._generation_taken or {}, config.to_dict()
        unset = {name for name, value in now.items() if value is None}  # of a new config: as it was
        changed = {name: now[name] for name in now if now[name] != before.get(name) and name not in unset}
        settings = self._sampling
        values: dict[str, Any] = {}
        extra = dict(settings.extra)
        for name, value in changed.items():
            if name == "eos_token_id":
                values["stop_ids"] = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            elif name in _SAMPLING:
                values[name] = value
            elif name in EXTRA_OPTIONS:
                extra[name] = value
            elif name not in ("do_sample", "transformers_version", "_from_model_config"):
                raise ValueError(
                    f"generation_config.{name}={value!r} is nothing that rollouts know: use "
                    f"{', '.join((*_SAMPLING, 'do_sample', 'eos_token_id', *sorted(EXTRA_OPTIONS)))}"
                )
        if now.get("do_sample") is False:
            values["temperature"] = 0.0
        elif settings.greedy and "temperature" not in values and now.get("do_sample"):
            values["temperature"] = 1.0
        self._take(replace(settings, **values, extra=extra))
        self._generation_taken = now

    def _take(self, settings: SamplingSettings) -> None:
        self._change("generation_config", settings)
        before, self.rollouts["student"].settings = self._sampling, settings
        for name in ("temperature", "max_new_tokens"):  # one that follows a schedule and is not changed goes on
            if getattr(settings, name) != getattr(before, name):
                setattr(self.args, name, getattr(settings, name))
        self.stop_ids["student"] = settings.stop_ids
        self.hygiene = replace(
            self.hygiene,
            max_new_tokens=self.args.most_new_tokens,
            student_tokens=settings.max_new_tokens,
            stop_ids={**self.hygiene.stop_ids, **self.stop_ids},
        )
        if self.rollout_check is not None:
            self.rollout_check.settings = settings

    def _follow(self, settings: SamplingSettings) -> None:
        """The student's sampling of a step, where a field follows a schedule."""
        self.rollouts["student"].settings = settings
        self.hygiene = replace(self.hygiene, student_tokens=settings.max_new_tokens)
        if self.rollout_check is not None:
            self.rollout_check.settings = settings
        if self._generation_config is not None:
            self._generation_config.max_new_tokens = settings.max_new_tokens
            self._generation_config.temperature = settings.temperature
            self._generation_config.do_sample = not settings.greedy
            self._generation_taken = self._generation_config.to_dict()

    def _change(self, name: str, value: object) -> None:
        """Refuse a change where something was made by the value before."""
        if self.args.rollout_staleness:
            raise ValueError(
                f"{name} cannot change with rollout_staleness=1, where the next step's rollouts are under way: set "
                "rollout_staleness=0"
            )
        if self.args.rollout_every > 1:
            raise ValueError(
                f"{name} cannot change with rollout_every={self.args.rollout_every}, where several steps' rollouts "
                "are written at once: set rollout_every=1"
            )
        if name == "generation_config" and self.args.teacher_writes:
            raise ValueError(
                f"{name} cannot change with seq_kd, where the teacher's sequences are sampled and kept by the fields: "
                "set the fields of GKDConfig (temperature, max_new_tokens, ...) before the trainer is made"
            )
        if name == "generation_config" and not self.args.student_writes:
            raise ValueError(f"{name} has no effect with lmbda=0, where nothing is sampled ({value})")
