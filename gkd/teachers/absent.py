"""A teacher that is not loaded, because what it has to say is on disk already (`teacher_scores_dir`).

Which scores are whose is decided by the weights themselves (`gkd.models.fingerprint.fingerprint`), and to read them
the teacher must be loaded. So a run that has loaded it leaves a note beside the scores: these files, loaded like this,
are the teacher with that fingerprint. A later run that finds its teacher's files unchanged knows as much without
loading.

Unchanged are a folder's files of the same names, sizes and times of modification, of which samples are equal; on the
Hub, the same commit. Anything else and the teacher is loaded, which costs time, never truth. Where a folder has a
teacher's config but no weights (say, on a machine that has been given the scores only), the scores of a teacher with
that config are taken, if there is exactly one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import AutoConfig, GenerationConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from gkd.common.disk import write_whole
from gkd.common.keyed_folder import digest
from gkd.models.fingerprint import comparable
from gkd.teachers.store import REMEDY, WHAT, ScoreStore, open_scores

logger = logging.getLogger(__name__)

_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_OTHERS = (".json", ".py")
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class Loading:
    """How a teacher is loaded by its name, as far as it decides what it says.

    Attributes:
        scores_dir: where scores are kept; None = nowhere.
        kwargs: for `from_pretrained`. trust_remote_code: unless `kwargs` says so.
        mixed_precision: the run's. placement: as the field `teacher_placement`.
        adapted: an adapter is put on it, whose files are not looked at.
    """

    scores_dir: str | None
    kwargs: Mapping[str, Any]
    trust_remote_code: bool
    mixed_precision: str | None
    placement: str
    adapted: bool


@dataclass(frozen=True)
class AbsentTeacher:
    """What can be said of a teacher without loading it.

    Attributes:
        config, generation_config: as the loaded model has them.
        fingerprint: of its weights.
        store: its scores.
        load: loads it, when it is needed after all.
    """

    config: Any
    generation_config: GenerationConfig
    fingerprint: str
    store: ScoreStore
    load: Callable[[], Any]


def as_absent(model: Any) -> AbsentTeacher | None:
    """The teacher where it is not loaded; None for a model, which is no teacher yet, and where there is none."""
    return model if isinstance(model, AbsentTeacher) else None


def find_teacher(how: Loading, name: str, load: Callable[[], Any]) -> AbsentTeacher | None:
    """The teacher of that name, if its scores are known to be in `teacher_scores_dir`. All ranks call this, and get
    the same answer.

    Args:
        how: the teacher is loaded and placed.
        name: a folder or a repository.
        load: loads it.
    """
    if how.scores_dir is None:
        return None
    found = _find(how, name, load)
    if PartialState().num_processes > 1 and not all(gather_object([found is not None])):
        return None
    return found


def _find(how: Loading, name: str, load: Callable[[], Any]) -> AbsentTeacher | None:
    folder = Path(str(how.scores_dir)).expanduser()
    for mark in marks(how, name):
        notes = list(folder.glob(f"*/known-{mark}.json"))
        if len(notes) != 1:  # none, or several teachers that cannot be told apart like this
            continue
        try:
            note = json.loads(notes[0].read_text(encoding="utf-8"))
            key = json.loads((notes[0].parent / "about.json").read_text(encoding="utf-8"))["key"]
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read: %s", notes[0].parent, error)
            continue
        store = open_scores(folder, key)
        if store.path != notes[0].parent:
            logger.warning("%s does not hold what its about.json says: it is left out", notes[0].parent)
            continue
        generation = GenerationConfig.from_dict(note["generation_config"])
        return AbsentTeacher(_config(how, name), generation, note["fingerprint"], store, load)
    return None


def remember(how: Loading, name: str, store: ScoreStore, model: Any, fingerprint: str) -> None:
    """Leave the note by which `find_teacher` will know the loaded `model` again; one process calls this.

    Raises:
        DiskFullError: there is no space left for it.
    """
    generation = model.generation_config.to_dict()
    content = json.dumps({"fingerprint": fingerprint, "generation_config": comparable(generation)}, indent=2).encode()
    for mark in {*marks(how, name), *marks(how, name, without_weights=True)}:
        write_whole(store.path / f"known-{mark}.json", content + b"\n", WHAT, REMEDY)


def marks(how: Loading, name: str, without_weights: bool = False) -> list[str]:
    """A mark of a teacher's files and of how they are loaded; [] when nothing can be said.

    Args:
        how: it is loaded. name: a folder or a repository.
        without_weights: give the mark that the folder will have without them.
    """
    config = _config(how, name)
    if config is None or how.adapted:  # an adapter's files are not looked at
        return []
    loaded = {
        "kwargs": comparable(how.kwargs),
        "mixed_precision": how.mixed_precision,
        "sharded": is_deepspeed_zero3_enabled(),
        "placement": how.placement,
    }
    folder = Path(name)
    if not folder.is_dir():
        commit = _commit(how, name)
        return [] if commit is None else [digest({"repository": name, "commit": commit, **loaded})]
    if without_weights or not any(path.suffix in _WEIGHTS for path in folder.iterdir()):
        return [digest({"config": comparable(config.to_dict()), **loaded})]
    files = sorted(path for path in folder.iterdir() if path.suffix in (*_WEIGHTS, *_OTHERS))
    return [digest({"files": [_mark(path) for path in files], **loaded})]


def _mark(path: Path) -> list[Any]:
    """Name, size and time of a file, and a hash of samples that are spread over it."""
    about, state = path.stat(), hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        for start in range(0, about.st_size, max(_SAMPLE_BYTES, about.st_size // _SAMPLES)):
            file.seek(start)
            state.update(file.read(_SAMPLE_BYTES))
    return [path.name, about.st_size, about.st_mtime_ns, state.hexdigest()]


def _config(how: Loading, name: str) -> Any:
    """The config as it is without the weights; None when there is none, which loading the teacher will tell."""
    kwargs = how.kwargs
    trust = kwargs.get("trust_remote_code", how.trust_remote_code)
    try:
        return AutoConfig.from_pretrained(name, revision=kwargs.get("revision"), trust_remote_code=trust)
    except (OSError, ValueError):
        return None


def _commit(how: Loading, name: str) -> str | None:
    """The commit of a repository that `name` and the revision stand for at present; None when it cannot be told."""
    try:
        return extract_commit_hash(cached_file(name, CONFIG_NAME, revision=how.kwargs.get("revision")), None)
    except OSError:
        return None
