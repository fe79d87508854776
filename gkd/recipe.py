"""Recipe files: executing one, or taking from it what it would run, and how a user's mistake ends.

Light to import: torch is loaded by the recipe, once it is found.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gkd.errors import DiskFullError
from gkd.vllm_client import ServerError

if TYPE_CHECKING:
    from gkd.settings import LoadData, Score, Settings


@dataclass(frozen=True)
class Recipe:
    """What a recipe file hands to `run`, with its flags parsed."""

    settings: Settings
    load_data: LoadData
    score: Score | None


class _Captured(BaseException):
    """Ends a recipe file at its call of `run`; a BaseException, so that no `except Exception` there is in the way."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe


_capturing: ContextVar[bool] = ContextVar("capturing", default=False)


def is_captured() -> bool:
    """Whether the recipe file is executed by `capture`."""
    return _capturing.get()


def hand_over(recipe: Recipe) -> NoReturn:
    """End the recipe file here and give `capture` what it asked for."""
    raise _Captured(recipe)


def capture(path: str | Path, argv: list[str]) -> Recipe:
    """Execute a recipe file up to its call of `run` and give what would be run: for commands that do something else
    with a recipe than train.

    Raises:
        ValueError: there is no such file, it never calls `run`, or a field refuses its value.
        SystemExit: `--help`, or an unknown flag.
    """
    outside = _capturing.set(True)
    try:
        execute_recipe(path, argv)
    except _Captured as captured:
        return captured.recipe
    finally:
        _capturing.reset(outside)
    raise ValueError(f"the recipe {str(path)!r} does not call gkd.run.run(load_data, defaults=...)")


def execute_recipe(path: str | Path, argv: list[str]) -> None:
    """Execute a recipe file as `python path argv...` does, in this process.

    Raises:
        ValueError: there is no such file.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no recipe {str(path)!r}: name a file, for example recipes/gkd_glass.py")
    before = sys.argv
    sys.argv = [str(path), *argv]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """A user's mistake ends in one line on stderr and exit code 2 (the traceback too when GKD_DEBUG=1).

    A training that had to give up (steps that are not finite, a full disk, a server) ends in one line and exit code 1;
    one that a signal stopped with 128 + the signal's number."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("gkd").setLevel(logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.WARNING)
    try:
        yield
    except (ValueError, TypeError) as error:
        if os.environ.get("GKD_DEBUG") or (isinstance(error, TypeError) and not str(error).startswith("args is")):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (FloatingPointError, DiskFullError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None
