"""The trainer's model card: what it knows of itself, handed to `gkd.report.card`."""

from __future__ import annotations

import sys
from typing import Any

from peft import PeftModel

from gkd.common.environment import describe_hardware, installed_versions
from gkd.models.facts import model_name as name_of
from gkd.models.facts import revision_of
from gkd.report.card import CardInfo, write_card
from gkd.report.repo import Repo
from gkd.teachers.base import Teacher
from gkd.training.card_settings import shown_settings


class CardMixin:
    """Adds `create_model_card` to the trainer.

    `card_extras` holds what only a run knows (data set, evaluation, plots, wall time): fields of `CardInfo` by name.
    """

    card_extras: dict[str, Any]

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write `README.md` into the output folder (main process only)."""
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return
        extras = dict(getattr(self, "card_extras", {}))
        if dataset_name is not None:
            extras["datasets"] = [Repo(dataset_name)]
        if tags is not None:
            extras["tags"] = [tags] if isinstance(tags, str) else list(tags)
        write_card(self._card_info(model_name, extras), self.args.output_dir)  # type: ignore[attr-defined]

    def _card_info(self, model_name: str | None, extras: dict[str, Any]) -> CardInfo:
        args: Any = self.args  # type: ignore[attr-defined]
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        student = accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        lora = None
        if isinstance(student, PeftModel):
            config = student.active_peft_config
            names = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
            lora = {name: getattr(config, name) for name in names if hasattr(config, name)}
            lora = {name: sorted(value) if isinstance(value, set) else value for name, value in lora.items()}
        values = {
            "model_name": model_name or args.output_dir.rstrip("/").split("/")[-1],
            "student": Repo(name_of(student) or "in memory", revision_of(student, args.model_init_kwargs)),
            "teacher": _teacher(self.teacher, args.teacher_model_init_kwargs),  # type: ignore[attr-defined]
            "settings": shown_settings(args),
            "lora": lora,
            "ledger": self.record.ledger.as_dict(),  # type: ignore[attr-defined]
            "hardware": describe_hardware(),
            "versions": installed_versions(),
            "command": list(sys.argv),
            "commands": [(part["step"], part["command"]) for part in getattr(self, "commands", ())],
            "chat": bool(self.processing_class.chat_template),  # type: ignore[attr-defined]
            "steps": self.state.global_step,  # type: ignore[attr-defined]
            "num_processes": accelerator.num_processes,
            "hub_model_id": getattr(self, "hub_model_id", None) or args.hub_model_id,  # the first with its owner
            "notes": [*_about_teacher(args), *extras.pop("notes", ())],
        }
        if self._is_saving:  # type: ignore[attr-defined]
            values |= self._at_a_checkpoint(values)
        return CardInfo(**{**values, **extras})

    def _at_a_checkpoint(self, values: dict[str, Any]) -> dict[str, Any]:
        """A card that is written while the run goes on: the weights are in the checkpoint, not beside the card."""
        state = self.state  # type: ignore[attr-defined]
        folder = f"{self.args.output_dir.rstrip('/').split('/')[-1]}/checkpoint-{state.global_step}"  # type: ignore[attr-defined]
        note = f"The run had not ended: these are the weights after step {state.global_step:,} of {state.max_steps:,}."
        return {"weights_in": folder, "notes": [note, *values["notes"]]}


def _about_teacher(args: Any) -> list[str]:
    """What the teacher's name does not say: whose weights it has, and its adapters."""
    about = []
    if args.share_base_model:
        about.append("The teacher is the student's base model, without the student's adapter.")
    if args.teacher_adapter_name_or_path is not None:
        about.append(f"The teacher carries the adapter `{Repo(args.teacher_adapter_name_or_path).shown}`.")
    if args.teacher_adapters:
        names = {name: Repo(path).shown if path else "no adapter" for name, path in args.teacher_adapters.items()}
        listed = ", ".join(f"{name} (`{path}`)" for name, path in names.items())
        about.append(f"Several teachers, each an adapter on that model; every row has its own: {listed}.")
    return about


def _teacher(teacher: Teacher, kwargs: Any) -> Repo:
    name, revision = teacher.repo(kwargs)
    return Repo(name or "in memory", revision)
