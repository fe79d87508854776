"""`gkd serve`: the vLLM server that a recipe's run needs, started by hand."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from gkd.assembly.own_servers import gpus_of, order_of, teacher_order
from gkd.models.loading import base_name
from gkd.recipe.capture import Recipe
from gkd.servers.engine import EngineOrder
from gkd.servers.own import check_python


def order_of_recipe(recipe: Recipe, *, teacher: bool, port: int, host: str) -> EngineOrder:
    """What the server is started with: the run's own fields, on all GPUs that are visible.

    Args:
        recipe: with its flags. teacher: serve the teacher rather than the student. port, host: where it listens.

    Raises:
        ValueError: no model is named; an adapter that no server takes.
    """
    settings, args = recipe.settings, recipe.settings.training
    devices = tuple(gpus_of(args, None)) if torch.cuda.is_available() and not args.use_cpu else ()
    if teacher:
        if args.teacher_model_name_or_path is None:
            raise ValueError("--teacher: the recipe names no teacher: set teacher_model_name_or_path")
        order = teacher_order(args, args.teacher_model_name_or_path, devices)
    else:
        name: Any = settings.model.model_name_or_path
        rank = settings.model.lora_r if settings.model.use_peft else None
        order = order_of(args, None if name is None else base_name(name), rank, devices)
    if not devices and order.dtype == "auto":
        order = replace(order, dtype="float32")  # what training on a CPU computes in
    return replace(order, port=port, host=host)


def serve(order: EngineOrder, *, shown_only: bool) -> int:
    """Print what starts the server, and start it in the place of this process, unless `shown_only`.

    Raises:
        ValueError: no vLLM in the environment of `order.python`.
    """
    print(order.shown(), flush=True)
    if shown_only:
        return 0
    check_python(order.python)
    command = order.command()
    os.execvpe(command[0], command, os.environ | order.variables())
    return 1
