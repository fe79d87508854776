"""Fixtures of the tests that start two processes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import Case, run, save_models
from results import Result, read


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(scope="session")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Result]:
    """A case on one process, this one; equal cases run once."""
    folder = tmp_path_factory.mktemp("alone")
    done: dict[str, Result] = {}

    def result(case: Case) -> Result:
        case = case.alone()
        key = json.dumps(dataclasses.asdict(dataclasses.replace(case, name="")), sort_keys=True)
        if key not in done:
            run(case, models, folder)
            done[key] = read(folder / case.name)
        return done[key]

    return result
