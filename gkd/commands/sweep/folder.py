"""The sweep's folder: taken for a new sweep, or for the same one with more values, arms or seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gkd.commands.sweep.grid import Arm, Axis, Cell, cells_of
from gkd.commands.sweep.plan import Order
from gkd.common.disk import write_whole
from gkd.training.output_folder import LOCK_FILE

PLAN_FILE = "sweep.json"


def claim(order: Order, cells: Sequence[Cell]) -> dict[str, str]:
    """Take it. The folder is locked by the caller.

    Returns:
        The folder of each cell in it, by the cell's name. One that was there before keeps its own.

    Raises:
        ValueError: something else is there, or a sweep that this one does not hold.
    """
    path = order.folder / PLAN_FILE
    identity, folders = order.identity, {}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        _check_goes_on(order, before, identity)
        folders = _folders(before)
    elif others := sorted(one.name for one in order.folder.iterdir() if one.name != LOCK_FILE):
        raise ValueError(
            f"--output_dir {order.folder} holds something else ({', '.join(others[:3])}): name another folder"
        )
    for cell in cells:
        folders.setdefault(cell.name, cell.numbered(len(folders)))
    text = json.dumps({**identity, "folders": folders}, indent=1)
    write_whole(path, text.encode(), "the sweep's plan", "Make room")
    return folders


def _folders(before: dict[str, Any]) -> dict[str, str]:
    """As they were written down, or as they were before they were."""
    if "folders" in before:
        return dict(before["folders"])
    axes = [Axis(name, tuple(values)) for name, values in before["grid"].items()]
    arms = [Arm(name, tuple(values.items())) for name, values in before.get("arms", {}).items()]
    return {cell.name: cell.folder for cell in cells_of(axes, arms)}


def _check_goes_on(order: Order, before: dict[str, Any], now: dict[str, Any]) -> None:
    names = [name for name in dict.fromkeys([*now, *before]) if name != "folders"]
    changed = [name for name in names if not _holds(name, before.get(name), now.get(name))]
    if changed:
        adding = {"grid", "arms"} & set(changed)
        hint = " (values, arms and seeds can be added, none left out)" if adding else ""
        raise ValueError(
            f"--output_dir {order.folder} holds another sweep (another {', another '.join(changed)}): "
            f"name another folder, or delete it{hint}"
        )


def _holds(name: str, before: Any, now: Any) -> bool:
    """Whether what was there is in what is wanted now."""
    if name == "grid":  # fields in another order would be other cells
        return list(before) == list(now) and all(set(before[field]) <= set(now[field]) for field in before)
    if name == "arms" and before and now:
        return all(now.get(arm) == values for arm, values in before.items())
    return bool(before == now)
