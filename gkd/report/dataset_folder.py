"""A data set as a folder that `load_dataset` and the Hub read: Parquet, a README and a record of how it was made.

The recipe's held-out rows stand beside it in `held_out/`, which `load_dataset` does not look at: they have columns of
their own. So a run on the data set measures on the very prompts that were held out when it was made.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, load_dataset
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from gkd.common.text import shorten
from gkd.data.files import read_rows
from gkd.report.markdown import fenced, markdown_table
from gkd.report.repo import Repo

DATA_FILE = "data/train-00000-of-00001.parquet"
RECORD = "provenance.json"
HELD_OUT = "held_out"  # a folder: eval.parquet, prompts.parquet, held_out_text.json, as far as there are any
COLUMNS = {"input_ids", "labels", "prompt_length", "source_row"}  # by which such rows are known on the Hub


def check_folder(folder: str | Path) -> Path:
    """The folder, if it is new, empty, or one that `write_folder` wrote.

    Raises:
        ValueError: it holds something else, which is not overwritten.
    """
    path = Path(folder).expanduser()
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / RECORD).is_file()):
        raise ValueError(f"{str(folder)!r} holds something else: name a new folder for the data set")
    return path


def is_precomputed_folder(name: str) -> bool:
    """Whether this local folder was written by `write_folder`."""
    return (Path(name).expanduser() / RECORD).is_file()


def is_precomputed(rows: Any) -> bool:
    """Whether a loaded split is one that `write_folder` wrote."""
    return isinstance(rows, Dataset) and set(rows.column_names) >= COLUMNS


def precomputed_data(name: str) -> dict[str, Any]:
    """The rows of a folder or repository that `write_folder` filled as `train`, and the held-out ones beside them."""
    path = Path(name).expanduser()
    if not path.is_dir():
        path = Path(snapshot_download(name, repo_type="dataset"))
    data: dict[str, Any] = {"train": load_dataset(str(path), split="train")}
    for file in sorted((path / HELD_OUT).glob("*.parquet")):
        data[file.stem] = read_rows(file)
    for file in (path / HELD_OUT).glob("*.json"):
        data[file.stem] = json.loads(file.read_text(encoding="utf-8"))
    return data


def write_folder(
    rows: Dataset, folder: str | Path, record: Mapping[str, Any], held_out: Mapping[str, Any] | None = None
) -> None:
    """Write rows, README and record; each file is replaced whole, so a stop in between leaves the old or the new one.

    Args:
        rows: the split `train`.
        record: how the rows were made; the README shows `teacher` or `student`, its revision, `key` and `date` of it.
        held_out: the recipe's `eval`, `prompts` and `held_out_text`.

    Raises:
        ValueError: as `check_folder`.
    """
    path = check_folder(folder)
    (path / DATA_FILE).parent.mkdir(parents=True, exist_ok=True)
    _replace(path / RECORD, lambda to: to.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8"))
    _replace(path / DATA_FILE, lambda to: rows.to_parquet(str(to)))
    _write_held_out(path / HELD_OUT, held_out or {})
    _replace(path / "README.md", lambda to: to.write_text(_readme(rows, record), encoding="utf-8"))


def _write_held_out(folder: Path, parts: Mapping[str, Any]) -> None:
    """Replace what is there; what an earlier data set held out goes."""
    for name in ("eval.parquet", "prompts.parquet", "held_out_text.json"):
        part = parts.get(name.partition(".")[0])
        if part is None:
            (folder / name).unlink(missing_ok=True)
            continue
        folder.mkdir(exist_ok=True)
        if isinstance(part, Dataset):
            _replace(folder / name, functools.partial(_to_parquet, part))
        else:
            _replace(folder / name, functools.partial(_to_json, list(part)))


def _to_parquet(rows: Dataset, path: Path) -> None:
    rows.to_parquet(str(path))


def _to_json(values: list[str], path: Path) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def push_folder(folder: str | Path, repo_id: str, token: str | None = None, private: bool = False) -> str:
    """Upload the folder to a data set repository, which is made if need be; returns its address.

    Raises:
        ValueError: the Hub refuses (no such user, no token, not reachable); with its reason.
    """
    api = HfApi(token=token)
    try:
        address = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=str(folder), ignore_patterns=["*.tmp"])
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(f"pushing the data set to {repo_id!r} failed; it is kept in {folder}: {error}") from error
    return str(address)


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def _readme(rows: Dataset, record: Mapping[str, Any]) -> str:
    # No `configs`: the file's name says the split, and with them `load_dataset` keys its cache by the folder's last
    # name alone, so that it would give the rows of another folder, or those from before the folder was rewritten.
    metadata = {
        "tags": ["gkd", "knowledge-distillation", "synthetic"],
        "task_categories": ["text-generation"],
    }
    who = "student" if "student" in record else "teacher"
    writer = Repo(str(record[who]), record.get(f"{who}_revision"))
    facts = [
        ("rows", f"{len(rows):,}"),
        (who, writer.display_name),
        ("revision", writer.revision),
        ("date", record["date"]),
        *((name, shorten(str(value), 80)) for name, value in record["key"]["sampling"].items()),
        ("seed", record["key"]["seed"]),
    ]
    columns = [
        ("prompt, completion", "text, special tokens included"),
        ("input_ids", "token ids of prompt and completion: what was read and written"),
        ("labels", "the same, -100 on the prompt"),
        ("prompt_length", "tokens of the prompt"),
        ("truncated, repetitive", "cut off at max_new_tokens; a loop"),
        ("source_row", "row number in the data set of the prompts"),
    ]
    return "\n\n".join(
        [
            f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
            f"# Completions of {writer.display_name}",
            "Written by a language model, token by token as sampled, for sequence-level knowledge distillation (Kim & "
            "Rush, 2016). Training on `input_ids` and `labels` needs no tokenizer and loses no token:",
            fenced("gkd run RECIPE --dataset_name THIS_DATA_SET --seq_kd false --lmbda 0", "bash"),
            markdown_table(("", ""), facts),
            markdown_table(("column", "holds"), columns),
            f"`{RECORD}` has the versions, the command and the fingerprint of these weights.\n",
        ]
    )
