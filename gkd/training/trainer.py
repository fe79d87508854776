"""`GKDTrainer`: TRL's `SFTTrainer` with sequences from three sources and a teacher's distribution as the target.

What differs from the paper (Agarwal et al., arXiv 2306.13649) by default: the loss is the mean over all target tokens
of the global batch rather than over sequences (`loss_reduction="sequence"` is the paper's Eq. 2), and exactly the
share `lmbda` of every step's sequences is student-written rather than all or none by one coin (`mixing="batch"`).

What differs from `trl.experimental.gkd`: the rollout happens once per optimizer step, before anything is counted, so
the loss is divided by the number of tokens that are trained on; docs/coming_from_trl.md has the list.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import SFTTrainer

from gkd.assembly import student as student_setup
from gkd.assembly.checks import check_not_quantized, check_steps, warn_of_differences
from gkd.assembly.launch_checks import check_wiring
from gkd.assembly.materials import Given, Materials, training_materials
from gkd.assembly.models import disable_dropout
from gkd.assembly.parts import LoadedStudent, assemble
from gkd.assembly.scores import evaluation_sets, load_unless_covered
from gkd.assembly.servers import rollout_check
from gkd.common.ranks import sum_over_ranks
from gkd.common.redact import redact_process_arguments
from gkd.config.fields import GKDConfig
from gkd.data.sequences import PaddingCollator, TokenSequence, cut, without_first
from gkd.data.sources import SOURCES
from gkd.data.tokenizer import template_already_taken
from gkd.models.placement import place_student
from gkd.models.quantized import keep_layout
from gkd.models.zero import zero_stage
from gkd.report.card import write_card
from gkd.training import hub
from gkd.training.card import card_info
from gkd.training.checkpoints import Checkpoints
from gkd.training.completions import completion_log
from gkd.training.eval_loss import EvalLoss
from gkd.training.faults import EvaluationLeft, FaultGuard, nan_unless_finite
from gkd.training.late_rows import LateRows
from gkd.training.log import TrainingLog
from gkd.training.micro_batches import MicroBatches
from gkd.training.optimizer_settings import OptimizerSettings
from gkd.training.position_profile import PositionProfile
from gkd.training.progress import close_bars
from gkd.training.record import Ledger, Record
from gkd.training.reward import Reward, RewardTerm, check_reward
from gkd.training.scheduled import Scheduled
from gkd.training.steering import RollBackError, Steering, check_steering
from gkd.training.stream import WindowStream
from gkd.training.token_weights import Own
from gkd.training.trl_attributes import TRLAttributes
from gkd.training.window import count, measure

logger = logging.getLogger(__name__)


class GKDTrainer(TRLAttributes, SFTTrainer):
    """Generalized knowledge distillation; a drop-in for `trl.experimental.gkd.GKDTrainer`.

    Args:
        model: the student: a model, or the name to load it from.
        teacher_model: the teacher: a model or a name; None takes `args.teacher_model_name_or_path`.
        args: a `GKDConfig`; None takes the defaults. `trainer.args` is a copy of it: what is set later is set there.
        data_collator: None takes the one made for the prepared rows. A foreign one must give `input_ids`,
            `attention_mask` and `labels` (-100 off target); the prompt is then what stands before the first target.
        train_dataset: rows of the forms in docs/recipes.md ("Data").
        eval_dataset: the same; `eval_loss` is the divergence on its own completions.
        processing_class: the tokenizer; None loads the student's.
        compute_metrics, callbacks, optimizers, preprocess_logits_for_metrics: as in `transformers.Trainer`.
        peft_config: a LoRA configuration; None trains the model as it is passed.
        formatting_func: row -> another row of a known format, as a dict; or -> text, as in `SFTTrainer` (all of it is
            trained on, so it has no prompt: with `lmbda=0` only).
        teacher_processing_class: the teacher's tokenizer, to compare token maps with, and whose template the teacher
            reads with `teacher_template="own"`; None loads it by the teacher's name where it has one.
        quantization_config: a `BitsAndBytesConfig` with which to load a student that is given by name.
        teacher_view: row -> the row whose prompt the teacher reads in its place (of any known format, with the columns
            that the row has in the data set); the student sees nothing of it.
        reward: (completion, row) -> a number, higher is better, for `args.reward_weight`.
        token_weights: what is known of a micro-batch's targets -> a weight [N] for each, in place of a rule by name
            (`gkd.loss.token_weights.TokenView`).

    Raises:
        ValueError: a combination that cannot be honoured; the message names the field, the values and the remedy.
    """

    _tag_names = ["trl", "gkd"]  # noqa: RUF012 - as the base class declares it
    _name = "GKD"
    data_collator: Any  # the base class has no types, and this one sets it anew

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        teacher_model: PreTrainedModel | nn.Module | str | None = None,
        args: GKDConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        peft_config: Any = None,
        formatting_func: Callable[..., Any] | None = None,
        teacher_processing_class: Any = None,
        quantization_config: Any = None,
        teacher_view: Callable[[dict[str, Any]], Any] | None = None,
        reward: Reward | None = None,
        token_weights: Own | None = None,
    ) -> None:
        model, teacher_model = (
            os.fspath(one) if isinstance(one, os.PathLike) else one for one in (model, teacher_model)
        )
        given = Given(
            student=model,
            teacher=teacher_model,
            tokenizer=processing_class,
            train=train_dataset,
            evaluation=eval_dataset,
            collator=data_collator,
            formatting_func=formatting_func,
            teacher_view=teacher_view,
            teacher_tokenizer=teacher_processing_class,
        )
        ready = training_materials(args, given, quantization_config)
        args = ready.args
        check_reward(args, reward, train_dataset)
        use_cache = student_setup.use_cache_of(ready.config)
        self.encoding = ready.encoding
        args.remove_unused_columns = False  # the collator needs prompt_length and row
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        student, peft_config = student_setup.with_own_adapter(model, args, peft_config)
        loaded = student_setup.already_loaded(args, student is not model)
        with template_already_taken(args), student_setup.student_named(model), loaded:
            super().__init__(
                student,
                args=args,
                data_collator=ready.collator,
                train_dataset=ready.train,
                eval_dataset=ready.evaluation,
                processing_class=ready.tokenizer,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                peft_config=student_setup.adapt_text_only(peft_config, student, ready.config),
            )
        check_wiring(self.accelerator)
        student_setup.freeze_beside_text(self.model)
        student_setup.check_student(self.model)
        student_setup.check_written_by(train_dataset, self.accelerator.unwrap_model(self.model))
        check_steps(args, ready.train, self.accelerator.split_batches)
        student_setup.keep_use_cache(self.model, args, use_cache)
        check_not_quantized(self.accelerator.unwrap_model(self.model), "student", self.accelerator)
        for name, teacher in ready.teachers.items():
            check_not_quantized(teacher, "teacher" if name is None else f"teacher {name!r}", self.accelerator)
        self.loss_is_scaled_for_ga = True  # the loss is divided by the targets of the whole window, over all ranks
        self.model_accepts_loss_kwargs = True
        self._set_up_models(ready, teacher_processing_class, token_weights)
        self._set_up_helpers(formatting_func)
        self.reward = None if reward is None else RewardTerm(self, reward, train_dataset)

    # ---------------------------------------------------------------------------------------------- set-up

    def _set_up_models(self, ready: Materials, teacher_tokenizer: Any, token_weights: Own | None) -> None:
        args, accelerator = self.args, self.accelerator
        student = accelerator.unwrap_model(self.model)
        student_setup.align_pad_token(student, ready.tokenizer)
        place_student(keep_layout(student), accelerator)
        self.micro_batches = MicroBatches(self, token_weights)
        if args.disable_dropout:
            disable_dropout(self.model)
        parts = assemble(ready, accelerator, LoadedStudent(student, lambda: self.model_wrapped), teacher_tokenizer)
        self._pad_id = parts.pad_id
        if isinstance(self.data_collator, PaddingCollator):
            self.data_collator = replace(self.data_collator, pad_id=self._pad_id, end_map=parts.hygiene.end_map)
        self.teacher, self.rollouts, self.alignment = parts.teacher, parts.rollouts, parts.alignment
        self.loss_settings, self.stop_ids, self.hygiene = parts.loss_settings, parts.stop_ids, parts.hygiene
        self.rollout_check = rollout_check(args, self.rollouts["student"], accelerator)
        asked = [ready.train, *evaluation_sets(ready.evaluation)]
        load_unless_covered(self.teacher, args, asked, self.rollouts["teacher"], self.hygiene, self.alignment)
        if args.teacher_template == "student" and not ready.reading.foreign:
            for name, side in parts.sides.items():
                warn_of_differences(side.ids.stop, ready.tokenizer, side.tokenizer, name)
        logger.info("rollouts: %s", self.rollouts["student"].settings.in_words())
        common = None if self.alignment is None else len(self.alignment.common.student)
        nll = None if args.needs_teacher else "negative log-likelihood of the data's tokens; no teacher is asked"
        logger.info("loss: %s", nll or self.loss_settings.in_words(common))

    def _set_up_helpers(self, formatting_func: Callable[..., Any] | None) -> None:
        """What the trainer holds and calls on its way through a training."""
        args, accelerator = self.args, self.accelerator
        self._makes_optimizer = getattr(self, "optimizer", None) is None
        self.record = Record(PositionProfile(accelerator.device))
        self.guard = FaultGuard(accelerator, self.record, args.max_nonfinite_steps)
        self.scheduled = Scheduled(self)
        self.steering = Steering(self)
        check_steering(self)
        self.late_rows = LateRows(self, formatting_func)
        self.stream = WindowStream(self)
        shown = completion_log(
            args, self.processing_class, lambda: self.hygiene, lambda: self.callback_handler.callbacks
        )
        self.training_log = TrainingLog(args, accelerator, self.record, self.guard, shown)
        self.eval_loss = EvalLoss(args, accelerator, lambda: self.training_log.flush("eval"), self.processing_class)
        self.optimizer_settings = OptimizerSettings(self)
        self.checkpoints = Checkpoints(self)
        self.card_extras: dict[str, Any] = {}  # what only a run knows of itself: fields of `CardInfo` by name
        if args.report_to:
            redact_process_arguments()
        # The teacher's stand behind the guard, which may ask for a checkpoint.
        for callback in (self.guard, self.steering, *self.teacher.callbacks, *self.training_log.callbacks):
            self.add_callback(callback)

    @property
    def training_seconds(self) -> float:
        """Of the whole run, over resumes, up to now."""
        return self.checkpoints.seconds

    @property
    def teacher_model(self) -> nn.Module | None:
        """The frozen teacher, as `trl.experimental.gkd.GKDTrainer` names it; None when it is on a server. One whose
        scores are on disk (`teacher_scores_dir`) is loaded now."""
        return self.teacher.model

    @property
    def ledger(self) -> Ledger:
        """What the model has been trained on so far."""
        return self.record.ledger

    # ------------------------------------------------------------------------------------------------ a training

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kw: Any) -> Any:
        """As in `transformers.Trainer`; True resumes from the complete checkpoint in `output_dir` saved last.

        Raises:
            ValueError: there is no such checkpoint, it is not complete, or ranks see different ones.
            TrainingStopped: SIGTERM or SIGINT; a checkpoint was saved.
            NotFiniteError: `max_nonfinite_steps` steps in a row were skipped; a checkpoint was saved.
            DiskFullError: a checkpoint could not be saved.
            ServerError: a server failed for too long; a checkpoint was saved.
        """
        with (
            self.checkpoints.around(resume_from_checkpoint, trial) as checkpoint,
            self.stream.around(checkpoint),
            self.scheduled.around(),
        ):
            while True:
                try:
                    output = super().train(checkpoint, trial, *args, **kw)
                    break
                except RollBackError as back:
                    self._go_back(back.checkpoint)
                    checkpoint = back.checkpoint
        return output._replace(training_loss=output.metrics["train_loss"])

    def _go_back(self, checkpoint: str) -> None:
        """The guard against collapse wants an earlier checkpoint: what was done since then is given up."""
        close_bars(self.callback_handler.callbacks)
        self.stream.forget()
        self.training_log.flush("train")
        self._metrics["train"].clear()
        self.checkpoints.back_to(checkpoint)
        self.stream.resume(checkpoint)
        if self._makes_optimizer:
            self.optimizer = None

    def asked_checkpoint(self) -> str | bool | None:
        """What the field `resume_from_checkpoint` asks `train` for: a folder, or True for the one in output_dir that
        was saved last; None where there is none yet, so that the same command starts a run and goes on with it.

        Raises:
            ValueError: nothing that is there can be gone on from, though a model was saved.
        """
        return self.checkpoints.going_on.asked()

    def get_train_dataloader(self) -> Any:
        """As in `transformers.Trainer`.

        Raises:
            ValueError: `train_dataset` was set after the constructor, to rows that nobody has prepared.
        """
        self.late_rows.check_train()
        with self.stream.rows_as_sequences():
            return super().get_train_dataloader()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`; warns of weights whose updates would be rounded away, and remembers what the
        settings ask for, before a checkpoint is loaded."""
        student_setup.warn_of_half_precision(self.model, zero_stage(self.accelerator))
        optimizer = super().create_optimizer(*args, **kwargs)
        self.optimizer_settings.remember(optimizer)
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in `transformers.Trainer`, whose optimizer then has the checkpoint's settings: those asked for hold
        instead, which are the same unless they were changed."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.optimizer_settings.restore()

    # ---------------------------------------------------------------------------------------- one optimizer step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | int | None]:
        """One window: choose sources, write completions, sort, cut into micro-batches, count what is trained on."""
        if self.steering.has_ended:
            return [], None
        opened = self.stream.next_window(epoch_iterator, num_batches)
        if opened is None or self.state.global_step >= self.state.max_steps:  # resumed at the very end
            return [], None
        self.checkpoints.begin_window()
        self._take_generation_config()
        self.scheduled.begin(self.stream.sampled_at)
        window = opened[0]
        with self.training_log.meters["train"].phase("rollout"):
            sequences = self.stream.write()
            self.stream.ask_ahead(epoch_iterator)
            if self.args.skip_first_tokens:
                sequences = [without_first(sequence, self.args.skip_first_tokens) for sequence in sequences]
            if self.reward is not None:
                self.reward.weigh(sequences)
        self.micro_batches.respell(sequences)
        verdicts = measure(sequences, self.hygiene, self.training_log.meters["train"])
        number = self._count(sequences, self.steering.counts(window.sequences, sequences, verdicts))
        micro_batches = cut(sequences + window.fillers, window.sizes)
        if self.training_log.completions is not None:
            self.training_log.completions.open(micro_batches)
        return self.micro_batches.collated(micro_batches, device), number.to(device)

    def _count(self, sequences: list[TokenSequence], beside: Tensor) -> Tensor:
        """What a step's loss is divided by: its targets, or sequences, over all ranks. `beside` is added up with them,
        and judged."""
        tokens = torch.tensor([sum(len(sequence.input_ids) for sequence in sequences)])
        totals = sum_over_ranks(self.accelerator, torch.cat([count(sequences).flatten(), tokens, beside]))
        self.steering.judge(totals[7:])
        self.guard.open_window(totals[:6].view(2, len(SOURCES)).cpu())
        self.record.tokens += int(totals[6])
        self._metrics["train"]["num_tokens"] = [self.record.tokens]
        trained = totals[3:6] if self.args.loss_reduction == "token" else totals[:3]
        return trained.sum().clamp(min=1)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base class's step, timed: what is not the teacher's is the student's, forward and backward."""
        with self.training_log.meters["train"].phase("student"):
            loss = super().training_step(*args, **kwargs)
        if self.guard.is_empty:
            loss = torch.zeros_like(loss)  # of nothing: also where a router's loss, or a NaN for the engine, was added
        self.guard.watch(loss, args[1]["rows"])
        return self.guard.counted(loss)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The divergence of this micro-batch: sum over its targets / `num_items_in_batch`, x ranks (DDP's mean).

        `num_items_in_batch` is the number of targets (or sequences, `loss_reduction="sequence"`) of the whole
        optimizer step over all ranks; None (evaluation) takes this micro-batch's own.
        """
        mode, micro_batches = "train" if self.model.training else "eval", self.micro_batches
        if mode == "eval":
            inputs = micro_batches.padded_on_the_right(inputs)
        meter = self.training_log.meters[mode]
        with meter.phase("teacher"):
            signal = micro_batches.signal(inputs)
        found = micro_batches.loss(model, inputs, signal, num_items_in_batch)
        loss, of_window = found.loss, num_items_in_batch is not None
        meter.add_targets(found.output, found.sources, found.teachers)
        if mode == "eval":
            self.eval_loss.add(found.output, inputs["labels"], found.targets)
        else:
            self.stream.compare_rollouts()
            self.steering.observe(found.output, found.sources)
            if signal is not None:
                self.training_log.observe(found.output, found.sources, found.targets.places, self.state)
        if mode == "train" and of_window:
            loss = loss * self.accelerator.num_processes
        if self.aux_loss_enabled:
            loss = micro_batches.with_aux_loss(loss, found.outputs, of_window)
        if mode == "train":
            loss = nan_unless_finite(loss)
        if return_outputs:  # compute_metrics wants logits, which the loss never builds
            with torch.no_grad():
                outputs = model(**micro_batches.model_inputs(inputs), use_cache=False)
            return loss, outputs
        return loss

    # ------------------------------------------------------------------------------------------------- the log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `transformers.Trainer`, with our metrics."""
        if "loss" in logs and self.model.training:
            logs.update(self.scheduled.logged() | self.steering.logged())
        self.training_log.add_to(logs, self.model.training)
        if self.checkpoints.is_training and "train_runtime" not in logs:
            evaluated = any(name.startswith("eval_") for name in logs)  # a name of its own: both may be of one step
            logs["eval_time/run" if evaluated else "time/run"] = round(self.training_seconds, 3)
        super().log(logs, start_time)
        if "train_runtime" in logs:  # the training is over: for the plots and metrics.jsonl, not for loggers
            self.state.log_history[-1]["divergence_by_position"] = self.record.profile.as_dict()
            if self.steering.guards:
                self.state.log_history[-1]["collapse_events"] = self.record.steering.as_dict()["events"]

    # ------------------------------------------------------------------------------------------------- evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in `transformers.Trainer`, for rows of every form that the constructor takes; so `evaluate` is, too."""
        return super().get_eval_dataloader(self.late_rows.for_evaluation(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As in `transformers.Trainer`, for rows of every form; so `predict` is, too."""
        return super().get_test_dataloader(self.late_rows.ready(test_dataset, "test"))

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Data source only, nothing generated, the same normalisation as in training, no random stream moved."""
        with self.eval_loss.measured(), self.scheduled.measured():
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(self.eval_loss.metrics(metric_key_prefix))
        return output

    def _evaluate(self, trial: Any, ignore_keys: Any, skip_scheduler: bool = False) -> dict[str, float]:
        try:
            found: dict[str, float] = super()._evaluate(trial, ignore_keys, skip_scheduler)
            return found
        except EvaluationLeft:
            if not skip_scheduler:
                raise
            return {}  # before the first step: nothing has been trained that could be saved

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As in `transformers.Trainer`, without the loss of a step that was lost; where a signal comes during the
        evaluation, it is left, and the step saved."""
        lost = self.guard.lost_loss()
        if lost is not None:
            args[0].sub_(lost)  # the sum since the last log
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except EvaluationLeft:
            self.control.should_log = self.control.should_evaluate = False
            self.control.should_save = self.control.should_training_stop = True
            super()._maybe_log_save_evaluate(*args, **kwargs)

    # -------------------------------------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.checkpoints.is_saved(trial):
            return
        with self.checkpoints.saved(trial):
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            self._push_from_checkpoint(self.checkpoints.folder(trial))

    def _load_best_model(self) -> None:
        """As in `transformers.Trainer`, once what is loaded has been looked at."""
        self.checkpoints.going_on.check_best_model()
        super()._load_best_model()

    # -------------------------------------------------------------------------------------------- to the Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, or find it there.

        Raises:
            PushError: no connection, no permission, or not a repository's name.
        """
        with hub.repository_made(self.args):
            super().init_hf_repo(token, private)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`: the model is saved into `output_dir` first, then all of it is pushed.

        Raises:
            PushError: the push failed; what was saved is where it was.
        """
        with hub.pushed(self.args, lambda: self.hub_model_id):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.checkpoints.is_saving:
            return  # the Trainer pushes at the end of its own save: here it is pushed once it is complete
        hub.warn_of_failed_pushes(getattr(self, "push_in_progress", None))  # before the base class forgets them
        with hub.pushed_if_possible():
            super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        hub.warn_of_failed_pushes(getattr(self, "push_in_progress", None))

    # ------------------------------------------------------------------------------------------------- the end

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write `README.md` into the output folder (main process only)."""
        if self.is_world_process_zero():
            write_card(card_info(self, model_name, dataset_name, tags), self.args.output_dir)
