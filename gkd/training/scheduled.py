"""`Scheduled`: the fields that follow a schedule, as each step has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from gkd.config.schedules import SCHEDULED, of_a_schedule, schedule_of
from gkd.loss.integrand import Divergence
from gkd.rollouts.base import SamplingSettings

_OF_SAMPLING = ("max_new_tokens", "temperature")


class Scheduled:
    """Puts a step's values where they work: into the share of the student, its sampling and the divergence.

    A value is a function of the field, the step and the number of steps. Outside of a training, and in an evaluation,
    the last one holds (of `max_new_tokens` the largest), so that what is measured there can be compared.

    Args:
        trainer: its state tells the step; its rollouts, its hygiene and its loss take the values.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._args = trainer, trainer.args
        self._last_share, self._sampled_at = 0.0, 0  # of the step that was begun last

    def now(self, name: str) -> float:
        """The value of a field in the present step."""
        step = self._trainer.state.global_step
        return self.lmbda(step) if name == "lmbda" else self._at(name, step)

    def lmbda(self, step: int) -> float:
        """The share of the student's rows in a step: what the field says, and what the guard leaves of it."""
        steering = self._trainer.steering
        said = steering.state.auto if self._args.decides_share else self._at("lmbda", step)
        return float(steering.lmbda(said))

    def begin(self, sampled_at: int) -> None:
        """A step begins: its sampling, which is that of an earlier step where that one has written for it, and its
        divergence."""
        step = self._trainer.state.global_step
        self._last_share, self._sampled_at = self.lmbda(step), sampled_at
        if self._samples():
            self._trainer._follow(self._sampling(sampled_at))
        if self._follows("beta"):
            self.compare_by(self._divergence(step))

    def logged(self) -> dict[str, float]:
        """The values of the step that was made last."""
        step = max(self._trainer.state.global_step - 1, 0)
        steps = {name: self._sampled_at if name in _OF_SAMPLING else step for name in SCHEDULED if name != "lmbda"}
        found = {name: float(self._at(name, at)) for name, at in steps.items() if self._follows(name)}
        if self._follows("lmbda") or self._trainer.steering.state.lmbda_factor != 1:
            found["lmbda"] = self._last_share
        return found

    @contextmanager
    def around(self) -> Iterator[None]:
        """A training happens inside."""
        rollout = self._trainer.rollouts["student"]
        before = rollout.settings
        try:
            yield
        finally:
            if self._samples():
                tokens, temperature = before.max_new_tokens, before.temperature
                self._trainer._follow(replace(rollout.settings, max_new_tokens=tokens, temperature=temperature))
            if self._follows("beta"):
                self.compare_by(self._divergence(None))

    @contextmanager
    def sampling_of(self, step: int) -> Iterator[None]:
        """Inside, the student's completions of another step are asked for."""
        rollout = self._trainer.rollouts["student"]
        before = rollout.settings
        if self._samples():
            rollout.settings = self._sampling(step)
        try:
            yield
        finally:
            rollout.settings = before

    @contextmanager
    def measured(self) -> Iterator[None]:
        """An evaluation happens inside: by the last divergence, so that all of a run can be compared."""
        settings = self._trainer.loss_settings.divergence
        if self._follows("beta"):
            self.compare_by(self._divergence(None))
        try:
            yield
        finally:
            if self._follows("beta"):
                self.compare_by(settings)

    def compare_by(self, divergence: Divergence) -> None:
        """Student and teachers are compared by this one from now on."""
        self._trainer.loss_settings = replace(self._trainer.loss_settings, divergence=divergence)
        self._trainer.teacher.compare_by(divergence)

    # ------------------------------------------------------------------------------------------------- inside

    def _follows(self, name: str) -> bool:
        return isinstance(getattr(self._args, name), str)

    def _samples(self) -> bool:
        return any(self._follows(name) for name in _OF_SAMPLING)

    def _at(self, name: str, step: int) -> float:
        return schedule_of(name, getattr(self._args, name)).at(step, self._trainer.state.max_steps)

    def _sampling(self, step: int) -> SamplingSettings:
        settings: SamplingSettings = self._trainer.rollouts["student"].settings
        values: dict[str, Any] = {name: self._at(name, step) for name in _OF_SAMPLING if self._follows(name)}
        return replace(settings, **values)

    def _divergence(self, step: int | None) -> Divergence:
        """That of a step, or the last one."""
        return of_a_schedule(partial(self._args.make_divergence, None if step is None else self._at("beta", step)))
