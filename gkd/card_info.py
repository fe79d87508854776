"""What a model card can say: the dataclass that trainer and runner fill, and names that may be repositories."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from gkd.files import DATA_ENDINGS

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
    def shown(self) -> str:
        """The id, or for a path its last part only: folders of this machine are nobody's business."""
        is_path = self.hub_id is None and (os.sep in self.name or "\\" in self.name)
        return re.split(r"[/\\]", self.name.rstrip("/\\"))[-1] or self.name if is_path else self.name


@dataclass
class CardInfo:
    """Everything a card can say. All but the first three may be left at their defaults.

    Attributes:
        model_name: the name of the new model (also in the model index).
        student, teacher: the models trained from.
        datasets: training data.
        settings: the method's settings by field name (lmbda, beta, temperature, ...), shown as a table.
        lora: the adapter's settings; not None means that the model is an adapter.
        chat: whether the tokenizer has a chat template, for the quick start.
        ledger: `{"sequences": {source: n}, "targets": {source: n}}`, as `gkd.metrics.Ledger.as_dict`.
        evaluation: the dictionary of `gkd.comparison.as_dict`; None before anything was evaluated.
        plots: (file relative to the card, caption).
        hardware: one line, see `describe_hardware`.
        wall_time_s: seconds of training.
        peak_memory_bytes: of the fullest device.
        versions: package -> version, see `installed_versions`.
        command: the argument vector that started the run; secrets are redacted here.
        commands: those of a run that was stopped and gone on with: (step, shell line), in place of `command`.
        weights_in: the folder that has the weights, where it is not the card's own.
        steps, num_processes: optimizer steps taken; processes used.
        hub_model_id: where the model will live, for the quick start.
        license: the Hub's license id, if known.
        language: ISO codes.
        tags: further tags.
        notes: paragraphs of Markdown, written as they are (warnings, known limits).
    """

    model_name: str
    student: Repo
    teacher: Repo
    datasets: Sequence[Repo] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] | None = None
    chat: bool = True
    ledger: Mapping[str, Mapping[str, int]] | None = None
    evaluation: Mapping[str, Any] | None = None
    plots: Sequence[tuple[str, str]] = ()
    hardware: str | None = None
    wall_time_s: float | None = None
    peak_memory_bytes: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] | None = None
    commands: Sequence[tuple[int, str]] = ()
    weights_in: str | None = None
    steps: int | None = None
    num_processes: int | None = None
    hub_model_id: str | None = None
    license: str | None = None
    language: str | list[str] | None = None
    tags: Sequence[str] = ()
    notes: Sequence[str] = ()
