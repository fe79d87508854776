"""What a run was made from, beside its weights, so that it can be compared with that later (`gkd chat`)."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkd.models.facts import model_name, revision_of

logger = logging.getLogger(__name__)

FILE = "_gkd_models.json"  # the underscore keeps it, and the paths in it, out of what goes to the Hub


@dataclass(frozen=True)
class Origin:
    """Names and how they were loaded.

    Attributes:
        student: before the training, also an adapter that was gone on with. student_revision: on the Hub.
        quantization: with which the student was loaded, or None.
        teacher: None where there was none, or several, or one on a server. teacher_revision: on the Hub.
        teacher_adapter: on it, or None.
        teacher_template: "own" where it read chats in its own.
        teacher_in_words: why there is none to be loaded; "" where there is one.
    """

    student: str | None = None
    student_revision: str | None = None
    quantization: dict[str, Any] | None = None
    teacher: str | None = None
    teacher_revision: str | None = None
    teacher_adapter: str | None = None
    teacher_template: str = "student"
    teacher_in_words: str = ""


def origin_of(trainer: Any, student_name: str) -> Origin:
    """Of a trainer's run, whose student was loaded by that name."""
    args, student = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    packed: Any = getattr(student.config, "quantization_config", None)
    teacher, why = args.teacher_model_name_or_path, ""
    revision = (args.teacher_model_init_kwargs or {}).get("revision")
    if args.shares_weights and args.teachers is None:
        teacher, revision = model_name(student), revision_of(student, args.model_init_kwargs)
    if args.teacher_names:
        teacher, why = None, "the run had several teachers"
    elif args.teacher_is_elsewhere:
        teacher, why = None, "the teacher was on a server"
    elif trainer.teacher.missing:
        teacher, why = None, "the run had no teacher"
    elif teacher is None:
        why = "the teacher had no name"
    return Origin(
        student=student_name,
        student_revision=revision_of(student, args.model_init_kwargs),
        quantization=packed.to_diff_dict() if hasattr(packed, "to_diff_dict") else None,
        teacher=teacher,
        teacher_revision=revision,
        teacher_adapter=args.teacher_adapter_name_or_path,
        teacher_template=args.teacher_template,
        teacher_in_words=why,
    )


def write_origin(trainer: Any, student_name: str) -> None:
    """Into the output folder; a full disk is the training's matter. The main process calls this."""
    path = Path(trainer.args.output_dir) / FILE
    try:
        text = json.dumps(dataclasses.asdict(origin_of(trainer, student_name)), indent=2, default=str)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        logger.warning("%s cannot be written (%s): gkd chat will ask for the teacher's name", path, error)


def read_origin(run: Path) -> Origin:
    """Of a run's folder, or of one of its checkpoints; an empty one where nothing is known.

    Raises:
        ValueError: the file is broken.
    """
    path = next((folder / FILE for folder in (run, run.resolve().parent) if (folder / FILE).is_file()), None)
    if path is None:
        return Origin()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in dataclasses.fields(Origin)}
        return Origin(**{name: value for name, value in found.items() if name in known})
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error}): delete it, and name the teacher") from error
