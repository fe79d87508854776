"""Recipe files: executing one, or taking from it what it would run.

Light to import: torch is loaded by the recipe, once it is found.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import runpy
import sys
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gkd.common.redact import harmless
from gkd.common.sign_of_life import SignOfLife
from gkd.recipe.shipped import recipe_file

if TYPE_CHECKING:
    from gkd.data.teacher_rows import View
    from gkd.evaluation.task_score import CorpusScore, Score
    from gkd.recipe.settings import LoadData, Settings
    from gkd.training.token_weights import Own
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclass(frozen=True)
class Recipe:
    """What a recipe file hands to `run`, with its flags parsed."""

    settings: Settings
    load_data: LoadData
    score: Score | None
    corpus_score: CorpusScore | None = None
    teacher_view: View | None = None
    token_weights: Own | None = None

    def __post_init__(self) -> None:
        for name, example in _FUNCTIONS.items():
            function = getattr(self, name)
            try:
                if function is not None:
                    inspect.signature(function).bind(*example[1:-1].split(", "))
            except TypeError as error:
                raise ValueError(f"{name} is called as {name}{example}, and cannot be: {error}") from error


# How `run` calls what a recipe gives it.
_FUNCTIONS = {"load_data": "(settings)", "score": "(completion, row)", "corpus_score": "(completions, rows)"}
_FUNCTIONS |= {"teacher_view": "(row)", "token_weights": "(view)"}


class _Captured(BaseException):
    """Ends a recipe file at its call of `run`; a BaseException, so that no `except Exception` there is in the way."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe


_capturing: ContextVar[bool] = ContextVar("capturing", default=False)
_NEVER_CALLS = "the recipe {!r} does not call gkd.run.run(load_data, defaults=...)"
_calls = 0  # of `run`, in this process


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
    raise ValueError(_NEVER_CALLS.format(str(path)))


def count_call() -> None:
    """`run` has been called."""
    global _calls
    _calls += 1


def run_recipe(path: str | Path, argv: list[str]) -> None:
    """Execute a recipe file, which trains.

    Raises:
        ValueError: there is no such file, or it never calls `run`: then nothing was trained.
    """
    before = _calls
    execute_recipe(path, argv)
    if _calls == before:
        raise ValueError(_NEVER_CALLS.format(str(path)))


def execute_recipe(path: str | Path, argv: list[str]) -> None:
    """Execute a recipe file as `python path argv...` does, in this process.

    Raises:
        ValueError: there is no such file, nor a recipe of that name.
    """
    path = recipe_file(path)
    with SignOfLife("loading the libraries"):
        importlib.import_module("gkd.training.trainer")  # which every recipe needs
    before = sys.argv
    sys.argv = [str(path), *argv]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before


class _HarmlessFormatter(logging.Formatter):
    """A message may hold what a row, a chat template or a server wrote."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))
