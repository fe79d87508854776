"""`FaultGuard`: a step that must not be made is left out: no target anywhere, or a loss or gradient not finite.

A window without a single target, on any rank, is not stepped on: nothing would be learnt, but the optimizer's momentum
and weight decay would move the weights. It is warned of, and left out of the logged mean of the loss.

A step whose loss or gradient is not finite is skipped: no weight and no optimizer state moves. All ranks decide
alike without communicating: a loss that is not finite makes its gradients NaN (`nan_unless_finite`), and the ranks'
gradients are summed. The step still counts as one: its rows are passed over, and the learning rate goes on, so that
it stays a function of the step's number.
"""

from __future__ import annotations

import logging
import signal
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from gkd.common.errors import NotFiniteError, TrainingStopped
from gkd.common.ranks import sum_over_ranks
from gkd.training.record import Record
from gkd.training.stop_request import StopRequest

logger = logging.getLogger(__name__)


class EvaluationLeft(Exception):  # noqa: N818 - nothing went wrong
    """A signal asked for a stop in the middle of an evaluation; all ranks leave it at the same batch."""


def nan_unless_finite(loss: Tensor) -> Tensor:
    """The loss, bit for bit; when it is not finite, its gradients are all NaN."""
    return loss * (1 + 0 * loss.detach())


class FaultGuard(TrainerCallback):
    """Skips steps that are not finite, and stops training for a signal or for too many of them.

    Args:
        accelerator: to agree with the other ranks.
        record: its ledger is of the steps that were made, a skipped one is none; and skipped steps are counted.
        max_nonfinite_steps: so many skipped steps in a row end the training; 0 skips on for ever.
    """

    def __init__(self, accelerator: Accelerator, record: Record, max_nonfinite_steps: int) -> None:
        self.accelerator = accelerator
        self.record = record
        self.max_nonfinite_steps = max_nonfinite_steps
        self.request = StopRequest()
        self.stopped_by: int | None = None  # a signal that all ranks have agreed on
        self.is_training = False
        self._in_a_row = 0
        self._counts: Tensor | None = None
        self._losses: list[tuple[Tensor, Tensor]] = []
        self._skipped = False
        self._lost: list[Tensor] = []  # the losses of a step that had one that is not finite, on any rank
        self.is_empty = False  # the present window: no rank has a target in it
        self._since_log = self._in_training = (0, 0)  # steps, and those of them without a target or a finite loss

    # ------------------------------------------------------------------------------ called by the trainer

    def start(self) -> None:
        """A training begins."""
        self.stopped_by, self._in_a_row, self._losses, self.is_training = None, 0, [], True
        self.is_empty, self._since_log, self._in_training = False, (0, 0), (0, 0)

    def open_window(self, counts: Tensor) -> None:
        """A step begins; `counts` [2, 3] goes into the ledger once it has been made."""
        self._counts, self._losses, self._skipped = counts, [], False
        self.is_empty = int(counts[1].sum()) == 0

    def step_loss(self, loss: Tensor, hidden: Tensor) -> Tensor:
        """A training loss whose gradients are NaN where the engine must leave the step out; `hidden` led to it."""
        if self.is_empty and self._skips_by_itself:
            return loss + hidden.float().sum() * float("nan")  # of no target the loss itself has no gradient
        return loss

    def logged_loss(self, mean: float) -> float | None:
        """The mean over the steps of a logging period that had a finite loss, from that over all; None without any."""
        (steps, without), self._since_log = self._since_log, (0, 0)
        return None if without >= steps > 0 else mean * steps / max(steps - without, 1)

    def mean_loss(self, mean: float) -> float:
        """The same over the whole training; 0 without any."""
        steps, without = self._in_training
        return mean * steps / max(steps - without, 1)

    def counted(self, loss: Tensor) -> Tensor:
        """What a micro-batch's loss adds to the logged mean: nothing where it is not finite."""
        return torch.where(torch.isfinite(loss), loss, 0.0)

    def lost_loss(self) -> Tensor | None:
        """What the step that has just ended added to the logged mean, of which it is to be no part; None otherwise."""
        losses, self._lost = self._lost, []
        return torch.stack([self.counted(loss) for loss in losses]).sum() if losses else None

    def watch(self, loss: Tensor, rows: Tensor) -> None:
        """A micro-batch's loss, and its row numbers. Nothing waits for the device here."""
        if not self.is_empty:
            self._losses.append((loss.detach(), rows))

    # --------------------------------------------------------------------------------- what the Trainer calls

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An optimizer leaves a parameter without gradient alone, state included: a skipped step has none."""
        if self._skips_by_itself:
            return
        parameters = [p for group in kwargs["optimizer"].param_groups for p in group["params"]]
        if self.is_empty:
            for parameter in parameters:
                parameter.grad = None
            return
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not torch.isfinite(norm):
            self._skipped = True
            for parameter in parameters:
                parameter.grad = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        bad_rows = self._bad_rows()
        term, interrupt, lost = self._agreed(bad_rows is not None)
        skipped = self._skipped or self.accelerator.optimizer_step_was_skipped
        if self.accelerator.mixed_precision == "fp16":  # overflowing is how its loss scale is found
            skipped = lost
        self._since_log, self._in_training = (
            (steps + 1, without + (self.is_empty or lost)) for steps, without in (self._since_log, self._in_training)
        )
        self._lost = [loss for loss, _ in self._losses] if lost else []
        assert self._counts is not None
        if not skipped and not self.accelerator.optimizer_step_was_skipped:
            self.record.ledger.add(self._counts)
        if self.is_empty:
            self._count_empty(state.global_step)
        elif skipped:
            self._count(state.global_step, bad_rows, lost)
        if skipped or self.is_empty:
            if self.accelerator.optimizer_step_was_skipped and isinstance(kwargs["lr_scheduler"], LambdaLR):
                kwargs["lr_scheduler"].step()  # the Trainer has not: DeepSpeed reported the skip
        else:
            self._in_a_row = 0  # an empty step is no finite one: it says nothing
        if term or interrupt:
            self.stopped_by = signal.SIGTERM if term else signal.SIGINT
        if self.is_stopping:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # a scheduler does not wait for long

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A scheduler does not wait for an evaluation: it is left, and what was trained is saved."""
        if not self.is_training:
            return
        term, interrupt, _ = self._agreed(False)
        if term or interrupt:
            self.stopped_by = signal.SIGTERM if term else signal.SIGINT
            raise EvaluationLeft

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_stopping:
            control.should_save = control.should_evaluate = False  # it has been saved

    # ------------------------------------------------------------------------------------------------ the end

    @property
    def is_stopping(self) -> bool:
        """Whether training ends before its last step."""
        return self.stopped_by is not None or self._too_many

    @property
    def _too_many(self) -> bool:
        return 0 < self.max_nonfinite_steps <= self._in_a_row

    def raise_if_stopped(self, state: Any, checkpoint: str) -> None:
        """After a training.

        Raises:
            TrainingStopped: a signal has stopped it.
            NotFiniteError: too many steps in a row were not finite.
        """
        if self.stopped_by is not None:
            name = signal.Signals(self.stopped_by).name
            if state.is_world_process_zero:
                text = f"stopped by {name} after step {state.global_step} of {state.max_steps}, saved {checkpoint}: "
                self.request.write_line(text + "go on with resume_from_checkpoint=true\n")
            raise TrainingStopped(128 + self.stopped_by)
        if self._too_many:
            raise NotFiniteError(
                f"the loss or gradient of {self._in_a_row} steps in a row was not finite (max_nonfinite_steps="
                f"{self.max_nonfinite_steps}), up to step {state.global_step}. The weights are those before them, "
                f"saved in {checkpoint}. Look at the rows in the warnings; lower learning_rate or max_grad_norm, "
                "train in bf16 or fp32 rather than fp16, or raise max_nonfinite_steps"
            )
        if self.request.signum is not None:  # it came too late to stop anything: as if training had not caught it
            signal.raise_signal(self.request.signum)

    # ------------------------------------------------------------------------------------------------- inside

    @property
    def _skips_by_itself(self) -> bool:
        """Whether the engine leaves out a step with NaN gradients: DeepSpeed, and fp16's loss scaler."""
        accelerator = self.accelerator
        return accelerator.distributed_type == DistributedType.DEEPSPEED or accelerator.scaler is not None

    def _count_empty(self, step: int) -> None:
        if self.record.empty_steps == 0:
            logger.warning(
                "step %d has nothing to train on and is left out, as are others like it (empty_steps): no row of it "
                "has a target. mask_truncated_completions and drop_repetitive_completions leave out rollouts; raise "
                "max_new_tokens, or warm the student up on data (lmbda=0)",
                step,
            )
        self.record.empty_steps += 1

    def _bad_rows(self) -> list[int] | None:
        """Rows of the micro-batches on this rank whose loss was not finite; None when all were."""
        if not self._losses:
            return None
        finite = torch.isfinite(torch.stack([loss.float() for loss, _ in self._losses])).tolist()
        bad = [rows for is_finite, (_, rows) in zip(finite, self._losses, strict=True) if not is_finite]
        return torch.cat(bad).tolist() if bad else None

    def _agreed(self, lost: bool) -> list[bool]:
        """Whether any rank has had a SIGTERM, a SIGINT, a loss that was not finite."""
        flags = [self.request.signum == signal.SIGTERM, self.request.signum == signal.SIGINT, lost]
        if self.accelerator.num_processes == 1:
            return flags
        return [n > 0 for n in sum_over_ranks(self.accelerator, torch.tensor(flags, dtype=torch.int32)).tolist()]

    def _count(self, step: int, bad_rows: list[int] | None, lost: bool) -> None:
        self.record.nonfinite_steps += 1
        self._in_a_row += 1
        if bad_rows is None and lost:
            return  # the rank whose loss it was warns
        what = "gradient" if bad_rows is None else "loss"
        rows = torch.cat([rows for _, rows in self._losses]).tolist() if bad_rows is None else bad_rows
        logger.warning("step %d is skipped: its %s is not finite; rows %s", step, what, sorted(rows))
