"""DeepSpeed's C++ operators for the CPU: they take minutes to build, so all test runs share one folder of them."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "torch_extensions"
_BUILD = (
    "from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, ShareMemCommBuilder\n"
    "ShareMemCommBuilder().load(); CPUAdamBuilder().load()"
)


def share_folder() -> None:
    """Of this process and those that it starts, unless the variable says another."""
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_FOLDER))


def build() -> None:
    """Where they are not built yet.

    A build that was killed leaves a file named lock behind, for which the next one would wait for ever. The lock that
    we hold here ends with its process, so whatever lock file there is while we hold it is such a leftover.
    """
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("DeepSpeed compiles its CPU operators: there is no C++ compiler")
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # DeepSpeed wants ninja
    with (folder / "tests.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for leftover in folder.glob("*/lock"):
            leftover.unlink()
        done = subprocess.run(
            [sys.executable, "-c", _BUILD],
            env={**os.environ, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    assert done.returncode == 0, done.stdout[-12000:]
