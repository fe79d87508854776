"""The optimizer's settings: after a checkpoint was loaded, those asked for hold, not those it was saved with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

_NOT_KEPT = ("params", "lr")  # of an optimizer's group: everything else is a setting


class OptimizerSettings:
    """What was asked for.

    Args:
        trainer: whose optimizer it is.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._check()
        self._kind: str | None = None
        self._asked_for: Sequence[dict[str, Any]] = ()  # of the optimizer's groups

    def _check(self) -> None:
        """An optimizer that cannot be made is told now, not when the training begins.

        Raises:
            ValueError: its package is not installed, or `optim_args` are not for it.
        """
        trainer, args = self._trainer, self._trainer.args
        if getattr(trainer, "optimizer", None) is not None:
            return
        name = getattr(args.optim, "value", args.optim)
        try:
            trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
        except (ImportError, ValueError) as error:
            told = f"optim={name!r}" + (f" with optim_args={args.optim_args!r}" if args.optim_args else "")
            raise ValueError(f"{told} cannot be made: {' '.join(str(error).split())}") from error

    @property
    def kind(self) -> str:
        """Of the one that was passed, else the name in the settings; once asked, it stays."""
        if self._kind is None:
            name, given = self._trainer.args.optim, self._trainer.optimizer
            self._kind = str(getattr(name, "value", name)) if given is None else type(given).__name__
        return self._kind

    def remember(self, optimizer: Any) -> None:
        """What a new one was made with, before a checkpoint is loaded."""
        self._asked_for = [
            {
                "initial_lr": group["lr"] * self._factor,
                **{name: value for name, value in group.items() if name not in _NOT_KEPT},
            }
            for group in getattr(optimizer, "param_groups", ())
        ]

    @property
    def _factor(self) -> float:
        """What the guard against collapse has left of the learning rate."""
        return float(self._trainer.record.steering.learning_rate_factor)

    def scale(self) -> None:
        """The learning rate is halved from now on."""
        for settings in self._asked_for:
            settings["initial_lr"] /= 2
        self.restore()

    def restore(self) -> None:
        """After a checkpoint was loaded: the same as were saved, unless they were changed."""
        groups, scheduler = self._trainer.optimizer.param_groups, self._trainer.lr_scheduler
        scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
        if len(groups) != len(self._asked_for) or not isinstance(scheduler, LambdaLR):
            return
        for group, settings in zip(groups, self._asked_for, strict=True):
            group.update(settings)
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        scales = [scale(scheduler.last_epoch) for scale in scheduler.lr_lambdas]
        for group, base, scale in zip(groups, scheduler.base_lrs, scales, strict=True):
            group["lr"] = base * scale
        scheduler._last_lr = [group["lr"] for group in groups]
