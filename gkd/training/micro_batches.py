"""A step's micro-batches: made tensors once their completions are written, scored by the teacher, and given a loss at
the student's head.

B rows, T tokens, N targets, D hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gkd.assembly.servers import score_together
from gkd.config.by_source import overrides
from gkd.data.aligned_view import BORDER, GROUP, TEACHER_GROUP, collate_aligned, respell
from gkd.data.sequences import PaddingCollator, TokenSequence, collate, unpad
from gkd.data.targets import Targets, per_target, select_targets, target_weights, targets_of
from gkd.data.teacher_view import teacher_view
from gkd.loss.by_source import split_by_source
from gkd.loss.fused import fused_cross_entropy, fused_divergence, ids_in_range
from gkd.loss.overlap import top_k_overlap
from gkd.loss.parts import SplitSignal, fused_by_part
from gkd.loss.settings import FusedOutput
from gkd.loss.signals import AlignedSignal, TeacherSignal
from gkd.models.facts import head_size
from gkd.models.head import check_head, head_of, output_layer
from gkd.models.hidden import instead_of_logits
from gkd.models.precision import mixed_precision
from gkd.models.zero import zero_stage
from gkd.teachers.base import WINDOW
from gkd.training.token_weights import Own, TokenWeights, with_reward

logger = logging.getLogger(__name__)

Batch = dict[str, Any]  # tensors, and what stays on the CPU
_MEETING = "aligned"


@dataclass(frozen=True, eq=False)
class Meeting:
    """Where student and teacher meet in a batch (`gkd.loss.signals.AlignedSignal`), on the CPU: the Trainer moves
    tensors to the device, and nothing else."""

    border: Tensor
    group: Tensor
    teacher_group: Tensor


@dataclass(frozen=True)
class TargetLosses:
    """What a micro-batch's forward pass has found.

    Attributes:
        loss: scalar, with the student's graph behind it.
        output: the fused pass's values of the N targets.
        targets: where they are. sources, teachers: [N], whose they are; no teachers where there is one.
        outputs: the model's, without logits.
    """

    loss: Tensor
    output: FusedOutput
    targets: Targets
    sources: Tensor
    teachers: Tensor | None
    outputs: Any


class MicroBatches:
    """From sequences to a loss. The student's head is found and compared with what the model does when this is made,
    or in the first forward pass where the model cannot run outside its engine (ZeRO-3).

    Args:
        trainer: its student stands where it is trained; its teacher, log and settings may be set later.
        token_weights: of the user's own, see `TokenWeights`.

    Raises:
        ValueError: the model does something to its logits that its head does not say.
    """

    def __init__(self, trainer: Any, token_weights: Own | None = None) -> None:
        self._trainer, self._args, self._accelerator = trainer, trainer.args, trainer.accelerator
        self._token_weights = TokenWeights(self._args, token_weights)
        student = self._accelerator.unwrap_model(trainer.model)
        self._head, self._module = head_of(student), output_layer(student)
        self._unchecked = zero_stage(self._accelerator) == 3
        self._vocabularies: Any = None  # of an alignment, on the device
        if not self._unchecked:
            with mixed_precision(self._accelerator, student):
                check_head(student, self._head)

    # ------------------------------------------------------------------------------------------------ tensors

    def collated(self, micro_batches: list[list[TokenSequence]], device: torch.device) -> list[Batch]:
        """The sequences of a window as tensors, on the CPU; scored by the teacher where it does so for a whole window.

        Raises:
            ValueError: a target is no id that the models share.
        """
        trainer, args = self._trainer, self._args
        batches = [self._collated(rows, args.pad_to_multiple_of) for rows in micro_batches]
        compared = trainer.loss_settings.shared_vocab or head_size(self._accelerator.unwrap_model(trainer.model))
        for batch in batches:
            ids_in_range("target", batch["target_ids"], compared)
        if trainer.teacher.scores_windows and len(batches) > 1 and not args.trains_on_nll_alone:
            with trainer.training_log.meters["train"].phase("teacher"):
                read = [teacher_view(batch) for batch in batches]
                for batch, kept in zip(batches, trainer.teacher.score_window(read, device), strict=True):
                    batch.update(kept)
        return batches

    def padded_on_the_right(self, inputs: Batch) -> Batch:
        """A batch of an evaluation as the forward pass wants it, which a foreign collator may have padded on the
        left."""
        if isinstance(self._trainer.data_collator, PaddingCollator) and self._trainer.alignment is None:
            return inputs
        batch, device = self._collated(unpad(inputs)), inputs["input_ids"].device
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def respell(self, sequences: list[TokenSequence]) -> None:
        """Put what is trained on into the ids of a teacher with another tokenizer, before the window is cut."""
        trainer = self._trainer
        if trainer.alignment is not None:
            with trainer.training_log.meters["train"].phase("alignment"):
                respell(sequences, trainer.alignment)

    def _collated(self, rows: list[TokenSequence], multiple: int | None = None) -> Batch:
        trainer = self._trainer
        if trainer.alignment is None:
            return {**collate(rows, trainer._pad_id, multiple)}
        with trainer.training_log.meters["train" if trainer.model.training else "eval"].phase("alignment"):
            batch: Batch = {**collate_aligned(rows, trainer.alignment, trainer._pad_id, multiple)}
        batch[_MEETING] = Meeting(*(batch.pop(name) for name in (BORDER, GROUP, TEACHER_GROUP)))
        return batch

    # --------------------------------------------------------------------------------------------- the loss

    def signal(self, inputs: Batch) -> TeacherSignal | AlignedSignal | SplitSignal | None:
        """What the teacher says about the targets, in the student's terms; None where it is not asked, or there is
        none."""
        trainer = self._trainer
        scored: TeacherSignal | SplitSignal
        if WINDOW in inputs:
            scored = trainer.teacher.signal_of(inputs[WINDOW])
        elif trainer.teacher.missing or (trainer.model.training and self._args.trains_on_nll_alone):
            return None
        else:
            kept = {name: value for name, value in inputs.items() if name.startswith(WINDOW)}
            read = teacher_view(inputs)
            scored = score_together(trainer.teacher, {**read, **kept} if kept else read, self._accelerator)
        if _MEETING in inputs:
            assert not isinstance(scored, SplitSignal)
            return self._aligned(scored, inputs)
        return scored if trainer.hygiene.end_map is None else scored.exchanging(trainer.hygiene.end_map)

    def _aligned(self, scored: TeacherSignal, inputs: Batch) -> AlignedSignal:
        """The signal of a teacher with another tokenizer."""
        device, meeting = scored.device, inputs[_MEETING]
        if self._vocabularies is None or self._vocabularies["student_ids"].device != device:
            self._vocabularies = self._trainer.alignment.vocabularies(device)
        return AlignedSignal(
            teacher=scored,
            targets=inputs["teacher_target_ids"],
            border=meeting.border,
            group=meeting.group,
            teacher_group=meeting.teacher_group,
            **self._vocabularies,
        )

    def model_inputs(self, inputs: Batch) -> dict[str, Any]:
        """What the student is called with."""
        own: dict[str, Any] = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return {**own, "output_router_logits": True} if self._trainer.aux_loss_enabled else own

    def loss(
        self,
        model: nn.Module,
        inputs: Batch,
        signal: TeacherSignal | AlignedSignal | SplitSignal | None,
        num_items: Tensor | int | None,
    ) -> TargetLosses:
        """Sum over the micro-batch's targets / `num_items`, taken inside the student's head: no logits are built.

        Args:
            model: the student as the Trainer calls it.
            inputs: as `collate` gives them, or padded on the right by others.
            signal: of these inputs; None trains on the negative log-likelihood alone.
            num_items: targets (or sequences) of the whole step; None takes the micro-batch's own.
        """
        trainer, targets = self._trainer, targets_of(inputs)
        outputs_of_head: list[FusedOutput] = []

        def loss_at_the_head(hidden: Tensor) -> Tensor:
            outputs_of_head.append(self.divergence(hidden, signal, targets, inputs, num_items))
            loss = outputs_of_head[0].loss
            return trainer.guard.step_loss(loss, hidden) if trainer.model.training else loss

        check, self._unchecked = self._head if self._unchecked else None, False
        loss, outputs = instead_of_logits(model, self._module, self.model_inputs(inputs), loss_at_the_head, check)
        teachers = per_target(inputs["teachers"], targets) if self._args.teacher_names else None
        sources = per_target(_sources(inputs), targets)
        return TargetLosses(loss, outputs_of_head[0], targets, sources, teachers, outputs)

    def divergence(
        self,
        hidden: Tensor,
        signal: TeacherSignal | AlignedSignal | SplitSignal | None,
        targets: Targets,
        inputs: Batch,
        num_items: Tensor | int | None,
    ) -> FusedOutput:
        """The fused divergence of the N targets, from the student's [B, T, D] hidden states."""
        trainer, args, settings = self._trainer, self._args, self._trainer.loss_settings
        of_rows = _sources(inputs)
        weights, ce_weights = target_weights(
            inputs["labels"],
            targets,
            of_rows,
            num_items,
            reduction=args.loss_reduction,
            ce_weight=args.ce_weight,
            ce_on_student_tokens=args.ce_on_student_tokens,
            nll_on_teacher_tokens=args.seq_kd_loss == "nll",
        )
        if not trainer.model.training and ce_weights is None:
            ce_weights = torch.zeros_like(weights)  # told, in an evaluation, and of no weight
        selected, check_ids = select_targets(hidden, targets), not trainer.model.training  # else checked on the CPU
        if trainer.rollout_check is not None and "server_log_probs" in inputs:
            said = inputs["server_log_probs"].flatten().index_select(0, targets.at + 1)  # of the token to predict
            trainer.rollout_check.add(selected, self._head, targets.ids, said)
        if signal is None:
            assert ce_weights is not None
            return fused_cross_entropy(selected, self._head, targets.ids, ce_weights, settings, check_ids=check_ids)
        training, sources = trainer.model.training, per_target(of_rows, targets)
        if training and args.reward_weight:
            weights, ce_weights = with_reward(
                inputs, targets, weights, ce_weights, args.reward_weight, hidden=selected, head=self._head,
                settings=settings,
            )  # fmt: skip
        beside: dict[str, Any] = {"ce_weights": ce_weights, "check_ids": check_ids}
        if training:
            groups = inputs[_MEETING].group if _MEETING in inputs else None
            beside["weigh"] = self._token_weights.of(inputs, targets, sources, groups)
        # The student's head is whole here, the teacher has let go of its own (ZeRO-3); parts gather theirs.
        with nullcontext() if isinstance(signal, SplitSignal) else trainer.teacher.head_here():
            overlap = self._overlap(selected, signal) if training else None
            changed = overrides(args, trainer.beta) if training else None
            split = signal if changed is None else split_by_source(signal, sources, settings, changed)
            if isinstance(split, SplitSignal):
                found = fused_by_part(selected, self._head, split, targets.ids, weights, settings, **beside)
            else:
                found = fused_divergence(selected, self._head, split, targets.ids, weights, settings, **beside)
        return found if overlap is None else replace(found, top_k_overlap=overlap)

    def _overlap(self, hidden: Tensor, signal: TeacherSignal | AlignedSignal | SplitSignal) -> Tensor | None:
        """[N] of the [N, D] hidden states at the targets; None where it is not to be logged."""
        k = self._args.log_top_k_overlap
        if k is None:
            return None
        assert not isinstance(signal, SplitSignal), "one teacher"
        return top_k_overlap(hidden, self._head, signal, self._trainer.loss_settings, k)

    def with_aux_loss(self, loss: Tensor, outputs: Any, of_window: bool) -> Tensor:
        """The loss with a mixture of experts' load balancing added, where the model gives one.

        Args:
            loss: of the micro-batch. outputs: the model's.
            of_window: the micro-batch is one of a step's.
        """
        trainer, mode = self._trainer, "train" if self._trainer.model.training else "eval"
        balance = getattr(outputs, "aux_loss", None)
        if balance is None:  # Llama 4 has routers, and a dense Doge a coefficient, but no such loss
            logger.warning(
                "router_aux_loss_coef=%s has no effect: %s gives no auxiliary loss; set it to 0",
                trainer.router_aux_loss_coef,
                type(self._accelerator.unwrap_model(trainer.model)).__name__,
            )
            trainer.aux_loss_enabled = False
            return loss
        # A mean per micro-batch, which DDP averages over ranks: average it over the window, as SFTTrainer does. The
        # number is the Trainer's, which knows it once it trains.
        own = self._args.gradient_accumulation_steps
        steps = getattr(trainer, "current_gradient_accumulation_steps", own) if of_window else 1
        trainer._metrics[mode]["aux_loss"].append(balance.item())
        return loss + trainer.router_aux_loss_coef * balance / steps


def _sources(inputs: Mapping[str, Tensor]) -> Tensor:
    """[B], indices into SOURCES; in the evaluation all rows are from the data."""
    return inputs["sources"] if "sources" in inputs else torch.zeros_like(inputs["labels"][:, 0])
