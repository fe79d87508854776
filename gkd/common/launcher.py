"""Ranks do not outlive the launcher that started them: without one nobody would end them, and a job that is started
again would meet them in its folder."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from pathlib import Path

logger = logging.getLogger(__name__)

_LAUNCHERS = ("accelerate", "torchrun", "torch.distributed.run", "torch.distributed.launch", "deepspeed")
_PR_SET_PDEATHSIG = 1


def started_by_a_launcher() -> bool:
    """Whether the parent process is a launcher of ranks. A shell is none: it may end before what it has started."""
    if "LOCAL_RANK" not in os.environ and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return False
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    if "-c" in words[:2]:  # a shell's, or Python's
        return False
    return any(name in Path(word).name for word in words[:4] for name in _LAUNCHERS)


def end_with_the_launcher() -> None:
    """Ask the kernel for a SIGTERM when the launcher ends, however it ends: the step is finished and saved (Linux)."""
    if not sys.platform.startswith("linux") or not started_by_a_launcher():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        logger.warning("this rank would outlive its launcher: %s", os.strerror(ctypes.get_errno()))
