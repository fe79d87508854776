"""Fixtures of the tests that start two processes."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import Case, run, save_models
from launch import execute, extensions_folder
from results import Result, read

_BUILD = (
    "from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, ShareMemCommBuilder\n"
    "ShareMemCommBuilder().load(); CPUAdamBuilder().load()"
)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(scope="session")
def operators() -> None:
    """DeepSpeed's C++ operators, built before anything is timed: minutes at first, then they stay where they are.

    A build that was killed leaves a file named lock behind, for which the next one would wait for ever. The lock that
    we hold here ends with its process, so whatever lock file there is while we hold it is such a leftover.
    """
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("DeepSpeed compiles its CPU operators: there is no C++ compiler")
    folder = extensions_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tests.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for leftover in folder.glob("*/lock"):
            leftover.unlink()
        execute(["-c", _BUILD])


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
