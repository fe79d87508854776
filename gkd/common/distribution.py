"""How this package is installed: under which name, beside what, and with which files of its own beside the code."""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

NAME = "gkd-distill"  # on the package index, where `gkd` is another author's; import name and command are `gkd`
_OTHER = "gkd"
_CLONE = Path(__file__).resolve().parents[2]


def find(name: str) -> Distribution | None:
    """An installed distribution; None when it is not."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _is_clone() -> bool:
    return (_CLONE / "pyproject.toml").is_file()


def check_alone() -> None:
    """Refuse to work beside the other package of this import name, whose files would stand among ours.

    Raises:
        ValueError: it is installed.
    """
    other = find(_OTHER)
    if other is None or not any(file.parts[0] == _OTHER for file in other.files or ()):
        return
    if _is_clone() and Path(str(other.locate_file(""))).resolve() == _CLONE:
        return  # what an installation of this clone has left there when it had that name
    raise ValueError(
        f"the package {_OTHER!r} {other.version} is installed, another program under the same import name: pip "
        f"uninstall {_OTHER}, and install this one ({NAME}) anew, some of whose files it may have replaced"
    )


def shipped_folder(name: str) -> Path | None:
    """A folder that comes with the package, "recipes" or "deepspeed_configs": in a clone its own, else where pip has
    put it; None where it did not come."""
    if _is_clone() and (_CLONE / name).is_dir():
        return _CLONE / name
    installed, below = find(NAME), Path("share", "gkd", name)
    recorded = [file for file in (installed.files if installed else None) or () if file.parts[-3:-1] == ("gkd", name)]
    found = [Path(str(file.locate())).parent for file in recorded[:1]]
    places = (*found, _CLONE / below, Path(sys.prefix) / below)  # the second: pip install --target
    return next((place.resolve() for place in places if place.is_dir()), None)
