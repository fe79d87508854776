"""A run's data: local files, data sets by name, or what a recipe's `load_data` gives; an error names what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from gkd.common.sign_of_life import SignOfLife
from gkd.data.files import DATA_ENDINGS, read_rows
from gkd.data.folders import folder_files, rows_of_files
from gkd.data.kinds import check_kind
from gkd.recipe.mixture import Entry, entries_of, mixture
from gkd.recipe.settings import _DATA_SETS, LoadData, Settings, _check_read, _in_load_data, _loaded, _Precomputed
from gkd.report.dataset_folder import is_precomputed


def load_rows(name: str, config: str | None = None, split: str | None = None) -> Any:
    """A data set by name, a local file (`gkd.data.files.DATA_ENDINGS`), or a folder that `save_to_disk` wrote.

    Raises:
        ValueError: a local file that is missing or broken (with its line number), or a name that cannot be loaded.
    """
    loaded = _load(name, config, split)
    if _in_load_data.get() and is_precomputed(loaded if split else loaded.get("train")):
        raise _Precomputed
    return loaded


def _load(name: str, config: str | None, split: str | None, what: str = "dataset_name") -> Any:
    path = Path(name).expanduser()
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    if config is not None and (saved or path.is_file()):
        field = "dataset_config" if what == "dataset_name" else "name"
        raise ValueError(f"{field}={config!r} has no effect with the local data {name!r}: leave it out")
    if name.lower().endswith(DATA_ENDINGS) or path.is_file():
        rows = read_rows(path)
        return rows if split else {"train": rows}
    try:
        if saved:
            found = load_from_disk(str(path))
            splits = found if isinstance(found, dict) else {"train": found}
            return splits[split] if split else splits
        files = folder_files(path, config) if path.is_dir() else None
        if files is None or split not in (None, *files):
            return load_dataset(str(path) if path.is_dir() else name, name=config, split=split)
    except (FileNotFoundError, ConnectionError, DatasetsError, ValueError) as error:
        why = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"{what}={name!r} is neither a local file nor a data set that can be loaded: {why}"
        ) from error
    return rows_of_files({split: files[split]})[split] if split else rows_of_files(files)


def dataset_by_name(settings: Settings) -> dict[str, Any]:
    """The `load_data` of a recipe whose data set is simply `--dataset_name`, with its train and test splits; or the
    mixture of `datasets`.

    Raises:
        ValueError: no name, or no such split.
    """
    script = settings.script
    if script.dataset_streaming:
        raise ValueError(
            "dataset_streaming=True is not supported: rows are counted and numbered before training. Leave it out: "
            "they stay on disk, so a data set may be larger than the memory"
        )
    if script.datasets is not None:
        return _mixture(settings)
    if not script.dataset_name:
        raise ValueError(
            "dataset_name is missing: pass --dataset_name, a Hub name or a local .jsonl file, or give datasets"
        )
    splits = load_rows(script.dataset_name, script.dataset_config)
    if script.dataset_train_split not in splits:
        raise ValueError(
            f"dataset_train_split={script.dataset_train_split!r} is not in {script.dataset_name!r}: it has "
            f"{', '.join(splits)}"
        )
    if script.dataset_test_split not in splits and script.dataset_test_split != "test":
        raise ValueError(
            f"dataset_test_split={script.dataset_test_split!r} is not in {script.dataset_name!r}: it has "
            f"{', '.join(splits)}"
        )
    return {"train": splits[script.dataset_train_split], "eval": splits.get(script.dataset_test_split)}


def _mixture(settings: Settings) -> dict[str, Any]:
    entries, names = entries_of(settings.script.datasets), settings.training.teacher_names
    for entry in entries:
        if entry.teacher is not None and entry.teacher not in names:
            known = f"the teachers are {', '.join(names)}" if names else "there are not several teachers: leave it out"
            raise ValueError(f"{entry.label}: teacher={entry.teacher!r}: {known}")
    return mixture(entries, _splits_of, int(settings.training.data_seed or 0))


def _splits_of(entry: Entry) -> Any:
    try:
        return _load(entry.path, entry.name, None, "path")
    except ValueError as error:
        raise ValueError(f"{entry.label}: {error}") from error


def recipe_data(load_data: LoadData, settings: Settings) -> dict[str, Any]:
    """What a recipe's `load_data` gives, when it is what `gkd.run.run` asks for.

    Raises:
        ValueError: it is not, or a data set was named and `load_data` did not look at its name; or what `load_data`
            raises.
    """
    # The others find in the cache of `datasets` what the first has read.
    with SignOfLife("reading the rows"), settings.training.main_process_first(desc="reading the rows"):
        data, read = _loaded(load_data, settings)
    known = (*_DATA_SETS, "held_out_text")
    if not isinstance(data, dict) or data.get("train") is None:
        found = f"a dict with {', '.join(map(repr, data))}" if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"load_data returned {found}: it should return a dict with the rows to train on as 'train'")
    unknown = [key for key in data if key not in known]
    if unknown:
        raise ValueError(f"load_data returned {unknown[0]!r}, which has no effect: the keys are {', '.join(known)}")
    for name in _DATA_SETS:
        if data.get(name) is not None:
            check_kind(data[name], name)
    texts = data.get("held_out_text")
    if texts is not None and (isinstance(texts, str) or not all(isinstance(text, str) for text in texts)):
        raise ValueError("load_data returned a held_out_text that is no list of texts")
    _check_read(settings.script, read)
    return data
