"""The trainer's model card: what it knows of itself, handed to `gkd.report.card`."""

from __future__ import annotations

import os
import sys
from typing import Any

from peft import PeftModel

from gkd.common.environment import describe_hardware, installed_versions
from gkd.models.facts import model_name as name_of
from gkd.models.facts import revision_of
from gkd.report.card import CardInfo
from gkd.report.repo import Repo
from gkd.teachers.base import Teacher
from gkd.training.card_settings import settings_for_card
from gkd.training.steering import Steering, in_words


def card_info(
    trainer: Any, model_name: str | None, dataset_name: str | None, tags: str | list[str] | None
) -> CardInfo:
    """What stands on the card of a training, finished or at a checkpoint; the arguments of `create_model_card`, and
    what only a run knows (`trainer.card_extras`), go before what the trainer knows of itself."""
    extras = dict(trainer.card_extras)
    if dataset_name is not None:
        extras["datasets"] = [Repo(dataset_name)]
    if tags is not None:
        extras["tags"] = [tags] if isinstance(tags, str) else list(tags)
    args: Any = trainer.args
    student = trainer.accelerator.unwrap_model(trainer.model)
    values = {
        "model_name": model_name or _folder_name(args.output_dir),
        "student": Repo(name_of(student) or "in memory", revision_of(student, args.model_init_kwargs)),
        "teacher": _teacher(trainer.teacher, args) if args.needs_teacher else None,
        "settings": settings_for_card(args),
        "lora": _lora(student),
        "ledger": trainer.ledger.as_dict(),
        "hardware": describe_hardware(),
        "versions": installed_versions(),
        "command": list(sys.argv),
        "commands": [(part["step"], part["command"]) for part in trainer.checkpoints.going_on.commands],
        "chat": bool(trainer.processing_class.chat_template),
        "steps": trainer.state.global_step,
        "num_processes": trainer.accelerator.num_processes,
        "hub_model_id": getattr(trainer, "hub_model_id", None) or args.hub_model_id,  # the first with its owner
        "notes": [
            *_about_teacher(trainer.teacher, args),
            *_about_several(trainer.teacher, args),
            *_about_collapse(trainer.steering),
            *extras.pop("notes", ()),
        ],
    }
    if trainer.checkpoints.is_saving:
        values |= _at_a_checkpoint(args.output_dir, trainer.state, values["notes"])
    return CardInfo(**{**values, **extras})


def _lora(student: Any) -> dict[str, Any] | None:
    if not isinstance(student, PeftModel):
        return None
    config = student.active_peft_config
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
    lora = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in lora.items()}


def _folder_name(output_dir: str) -> str:
    """Also of the working folder, "."."""
    return os.path.basename(os.path.abspath(output_dir))


def _at_a_checkpoint(output_dir: str, state: Any, notes: list[str]) -> dict[str, Any]:
    """A card that is written while the run goes on: the weights are in the checkpoint, not beside the card."""
    folder = f"{_folder_name(output_dir)}/checkpoint-{state.global_step}"
    note = f"The run had not ended: these are the weights after step {state.global_step:,} of {state.max_steps:,}."
    return {"weights_in": folder, "notes": [note, *notes]}


def _about_teacher(teacher: Teacher, args: Any) -> list[str]:
    """What the teacher's name does not say: whose weights it has, and its adapters."""
    about = []
    if not args.needs_teacher:
        name = None if teacher.missing else _teacher(teacher, args).display_name
        about.append(
            "Trained on the answers of the data alone (`lmbda=0`, `ce_weight=1`); no teacher was asked"
            + (f", and `{name}` is there for comparison." if name else ".")
        )
    if args.self_teacher is not None:
        own = {
            "base": "its base model, without its adapter",
            "live": "its weights as they are at each step",
            "ema": f"a moving average of its adapter (decay {args.self_teacher_decay})",
        }
        about.append(f"The student is its own teacher: {own[args.self_teacher]}.")
    if args.share_base_model:
        about.append("The teacher is the student's base model, without the student's adapter.")
    if args.teacher_adapter_name_or_path is not None:
        about.append(f"The teacher carries the adapter `{Repo(args.teacher_adapter_name_or_path).display_name}`.")
    if args.teacher_adapters:
        names = {
            name: Repo(path).display_name if path else "no adapter" for name, path in args.teacher_adapters.items()
        }
        listed = ", ".join(f"{name} (`{path}`)" for name, path in names.items())
        about.append(f"Several teachers, each an adapter on that model; every row has its own: {listed}.")
    return about


def _about_several(teacher: Teacher, args: Any) -> list[str]:
    """Each of `teachers`, by name."""
    if args.teachers is None:
        return []
    listed = []
    for own, one, weight in zip(teacher.each(), args.each_teacher.items(), args.teacher_weights, strict=True):
        name, fields = one
        repo, revision = own.repo(fields.teacher_model_init_kwargs)
        adapter, top_k = fields.teacher_adapter_name_or_path, fields.teacher_top_k
        parts = [f"`{Repo(repo or 'in memory', revision).display_name}`"]
        parts += [f"with the adapter `{Repo(adapter).display_name}`"] if adapter else []
        parts += ["on a server"] if fields.teacher_server_url is not None else []
        parts += [f"its {top_k} most likely tokens"] if top_k is not None else []
        parts += [f"weight {weight:g}"] if weight != 1 else []
        listed.append(f"{name} ({', '.join(parts)})")
    return [f"Several teachers; every row has its own: {', '.join(listed)}."]


def _about_collapse(steering: Steering) -> list[str]:
    """What the guard against collapse found and did; that it found nothing, too."""
    if not steering.guards:
        return []
    told = [f"- {in_words(event)}" for event in steering.state.events]
    if not told:
        return ["The guard against collapse (`collapse_guard`) found nothing."]
    return ["The guard against collapse (`collapse_guard`) acted:\n\n" + "\n".join(told)]


def _teacher(teacher: Teacher, args: Any) -> Repo:
    name, revision = teacher.repo(args.teacher_model_init_kwargs)
    if name is None and args.teachers is not None:
        return Repo(f"its row's own teacher ({', '.join(args.teacher_names)})", on_hub=False)
    return Repo(name or "in memory", revision)
