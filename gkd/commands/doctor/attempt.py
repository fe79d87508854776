"""A check of the doctor's that may fail, and one that is told of each of several teachers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from gkd.commands.doctor.view import Diagnosis
from gkd.recipe.mistakes import CODE_ERRORS, mistake
from gkd.servers.client import ServerError

T = TypeVar("T")


@dataclass(frozen=True)
class Named:
    """A diagnosis whose checks carry the name of a teacher."""

    out: Diagnosis
    of: str

    def add(self, name: str, level: str, message: str, remedy: str = "") -> None:
        self.out.add(f"{name}{self.of}", level, message, remedy)


def attempt(out: Diagnosis | Named, name: str, action: Callable[[], T]) -> T | None:
    """The action's result; None and an error line when it raises what a user can mend."""
    try:
        return action()
    except (ValueError, *CODE_ERRORS) as error:
        told = mistake(error)
        if isinstance(error, torch.OutOfMemoryError):
            out.add(name, "error", "out of memory", "see gkd plan for the smallest change that fits")
        elif told is not None or isinstance(error, (ServerError, FloatingPointError)):
            out.add(name, "error", told or str(error))
        else:
            raise
        return None
