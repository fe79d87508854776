"""Names that may be repositories of the Hub, told from paths of this machine, which are never shown as such."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import PurePath

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from gkd.data.files import DATA_ENDINGS

_NO_REPO = (*DATA_ENDINGS, ".txt", ".arrow")


def is_repo_id(name: str) -> bool:
    """Whether `name` can be a Hub repository: a valid id, and no path that exists on this machine."""
    if os.path.exists(name) or PurePath(name).is_absolute() or name.startswith((".", "~")):
        return False
    if name.lower().endswith(_NO_REPO):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@dataclass(frozen=True)
class Repo:
    """A model or data set by name. `on_hub` None: decided from the name (a repository id, and no local path).

    Args:
        name: a Hub repository id, a local path, or any name to show.
        revision: commit, branch or tag.
    """

    name: str
    revision: str | None = None
    on_hub: bool | None = None

    @property
    def hub_id(self) -> str | None:
        """The repository id for the metadata, None for anything that is not on the Hub."""
        looks_like_one = is_repo_id(self.name) if self.on_hub is None else self.on_hub
        return self.name if looks_like_one else None

    @property
    def display_name(self) -> str:
        """The id, or for a path its last part only: folders of this machine are nobody's business."""
        is_path = self.hub_id is None and (os.sep in self.name or "\\" in self.name)
        return re.split(r"[/\\]", self.name.rstrip("/\\"))[-1] or self.name if is_path else self.name
