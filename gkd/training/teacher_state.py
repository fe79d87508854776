"""What a checkpoint keeps of a teacher that changes with the student (`self_teacher="ema"`)."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gkd.teachers.base import Teacher

FILE = "self_teacher.safetensors"


def write(folder: str, teacher: Teacher) -> None:
    """Into a checkpoint that is being written; nothing of a teacher that does not change."""
    state = teacher.state()
    if state:
        save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, Path(folder) / FILE)


def read(checkpoint: str, teacher: Teacher) -> None:
    """The teacher as it was when the checkpoint was saved.

    Raises:
        ValueError: it is not in there.
    """
    if not teacher.state():
        return
    path = Path(checkpoint) / FILE
    remedy = (
        "go on with the self_teacher that it was saved with, or start anew from its weights (model_name_or_path) and "
        "another output_dir"
    )
    if not path.is_file():
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} has no {FILE}, which self_teacher='ema' goes on from: {remedy}"
        )
    try:
        teacher.load_state(load_file(path))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"resume_from_checkpoint: {path} cannot be gone on from ({error}): {remedy}") from error
