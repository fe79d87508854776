"""Everything that a run is told: the command line over YAML over a recipe's defaults, and data sets by name.

One config object goes from the command line to the trainer: `GKDConfig` is parsed once, and nothing is copied field by
field. Precedence: command-line flag, then `--config` YAML, then the recipe's defaults, then the fields' own defaults.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from accelerate import PartialState
from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_quantization_config

from gkd.config import GKDConfig
from gkd.files import read_rows

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


@dataclass
class RunArguments:
    """What a run does around the training itself."""

    evaluate_before_and_after: bool = field(
        default=True, metadata={"help": "Measure student before, student after and teacher in one harness."}
    )
    num_eval_prompts: int = field(default=32, metadata={"help": "Held-out prompts for that evaluation."})


@dataclass
class Settings:
    """Everything that was parsed; handed to a recipe's `load_data`."""

    script: ScriptArguments
    training: GKDConfig
    model: ModelConfig
    run: RunArguments


LoadData = Callable[[Settings], dict[str, Any]]
Score = Callable[[str, dict[str, Any]], float]


def parse(defaults: dict[str, Any], argv: list[str] | None = None, description: str = "") -> Settings:
    """Parse the command line (and `--config` YAML) over a recipe's defaults.

    Args:
        defaults: field values by name; a callable is called when neither flag nor YAML gives the field.
        argv: the arguments, `sys.argv[1:]` when None.
        description: for `--help`.

    Raises:
        ValueError: an unknown key in the YAML file or in `defaults`, or a value that a field refuses.
        SystemExit: an unknown flag, as argparse does.
    """
    parser = TrlParser(
        (ScriptArguments, GKDConfig, ModelConfig, RunArguments), description=description, allow_abbrev=False
    )
    unknown = parser.set_defaults_with_config(**defaults)
    if unknown:
        raise ValueError(f"the recipe's defaults name unknown fields: {' '.join(unknown[::2])}")
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--config" in argv:
        path = argv[argv.index("--config") + 1 :][:1]
        if not path or not os.path.isfile(path[0]):
            raise ValueError(f"--config {' '.join(path)}: there is no such file")
    _call_defaults(parser, argv)
    return Settings(*parser.parse_args_and_config(argv))


def _call_defaults(parser: TrlParser, argv: list[str]) -> None:
    """Replace callable defaults by their value, unless the command line or the YAML file gives one."""
    given = {arg[2:].split("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")}
    if "--config" in argv:
        import yaml

        with open(argv[argv.index("--config") + 1], encoding="utf-8") as file:
            given |= set(yaml.safe_load(file) or {})
    for action in parser._actions:
        if callable(action.default):
            action.default = None if action.dest in given else str(action.default())


def load_rows(name: str, config: str | None = None, split: str | None = None) -> Any:
    """A data set by name, or a local .json, .jsonl, .csv or .parquet file.

    Raises:
        ValueError: a local file that is missing or broken (with its line number), or a name that cannot be loaded.
    """
    if name.endswith(DATA_SUFFIXES):
        rows = read_rows(name)
        return rows if split else {"train": rows}
    try:
        return load_dataset(name, name=config, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"dataset_name={name!r} is neither a local file nor a data set that can be loaded: {error}"
        ) from error


def dataset_by_name(settings: Settings) -> dict[str, Any]:
    """The `load_data` of a recipe whose data set is simply `--dataset_name`, with its train and test splits.

    Raises:
        ValueError: no name, or no such split.
    """
    script = settings.script
    if script.dataset_streaming:
        raise ValueError("dataset_streaming=True is not supported: rows are counted and numbered before training")
    if not script.dataset_name:
        raise ValueError("dataset_name is missing: pass --dataset_name, a Hub name or a local .jsonl file")
    splits = load_rows(script.dataset_name, script.dataset_config)
    if script.dataset_train_split not in splits:
        raise ValueError(
            f"dataset_train_split={script.dataset_train_split!r} is not in {script.dataset_name!r}: it has "
            f"{', '.join(splits)}"
        )
    return {"train": splits[script.dataset_train_split], "eval": splits.get(script.dataset_test_split)}


def student_name(settings: Settings) -> str:
    """The student's name or path.

    Raises:
        ValueError: there is none.
    """
    if settings.model.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: pass --model_name_or_path, the student")
    return str(settings.model.model_name_or_path)


def set_loading_arguments(settings: Settings) -> None:
    """Write into the training arguments how student and teacher are loaded: dtype, attention, quantization."""
    args, model = settings.training, settings.model
    quantization = get_quantization_config(model)
    shared: dict[str, Any] = {
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    args.model_init_kwargs = {**shared, "revision": model.model_revision, **(args.model_init_kwargs or {})}
    if quantization is not None:
        device_map = {"": PartialState().local_process_index}  # quantized weights cannot be moved later
        args.model_init_kwargs |= {"device_map": device_map, "quantization_config": quantization}
    own = args.teacher_model_init_kwargs or {}
    assert not isinstance(own, str)  # TrainingArguments has parsed it
    # float32 is ModelConfig's default, made for a student: a teacher stays as it was saved unless the user says more.
    dtype = "auto" if model.dtype == "float32" else model.dtype
    args.teacher_model_init_kwargs = {**shared, "dtype": dtype, **own}


def with_held_out(data: dict[str, Any], rows: int = 64) -> dict[str, Any]:
    """`data` with `eval` rows: for a data set without a test split, some of its train rows, always the same ones.

    Args:
        data: `train` rows, and `eval` rows or None.
        rows: most rows to take out of `train`; never more than a tenth of them, and at least one.

    Raises:
        ValueError: there is nothing to share out.
    """
    if data.get("eval") is not None:
        return data
    size = max(1, min(rows, len(data["train"]) // 10))
    if len(data["train"]) < 2:
        raise ValueError("the data set has one row only: it needs at least one to train on and one to hold out")
    split = data["train"].train_test_split(test_size=size, seed=0)
    return {**data, "train": split["train"], "eval": split["test"]}
