"""Which kind of teacher the fields ask for, made ready to score."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from gkd.config import GKDConfig
from gkd.servers import Server
from gkd.teachers import TEACHERS, Teacher


def make_teacher(
    args: GKDConfig, teacher_model: Any, student: Any, accelerator: Accelerator, server: Server | None
) -> Teacher:
    """The teacher: on its server, or the model in this process.

    Args:
        args: its `teacher_*` fields say which kind.
        teacher_model: the model, as `gkd.setup_checks.resolve_teacher` gave it; None when it is elsewhere.
        student: the unwrapped student, for a teacher that shares something with it.
        accelerator: where the student trains, and how it is sharded.
        server: the teacher's, or None.
    """
    if server is not None:
        return TEACHERS["server"](server.client, server.served, args.teacher_top_k)
    return TEACHERS["local"](teacher_model, accelerator)
