"""What a run ran on: package versions and hardware, for the card and the doctor."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata

from gkd._version import __version__

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "tokenizers")


def installed_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Python's, ours and the installed packages' versions; a package that is not there is left out."""
    versions = {"python": platform.python_version(), "gkd": __version__}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_hardware() -> str:
    """One line: the accelerators of this process's machine, or its processor and cores."""
    import torch

    cores = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    if not torch.cuda.is_available():
        return cores
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) + f", {cores}"
