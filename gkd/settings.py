"""Everything that a run is told: the command line over YAML over a recipe's defaults, and data sets by name.

One config object goes from the command line to the trainer: `GKDConfig` is parsed once, and nothing is copied field by
field. Precedence: command-line flag, then `--config` YAML, then the recipe's defaults, then the fields' own defaults.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from trl import ModelConfig, ScriptArguments, get_quantization_config

from gkd.command_line import Parser, arguments, read_config, refuse_unknown
from gkd.config import GKDConfig
from gkd.data import check_kind
from gkd.dataset_folder import is_precomputed, is_precomputed_folder, precomputed_data
from gkd.field_types import check_types
from gkd.files import DATA_ENDINGS, read_rows
from gkd.public_tasks import check_installed
from gkd.set_aside import flag_values, set_aside


@dataclass
class RunArguments:
    """What a run does around the training itself."""

    evaluate_before_and_after: bool = field(
        default=True, metadata={"help": "Measure student before, student after and teacher in one harness."}
    )
    num_eval_prompts: int = field(default=32, metadata={"help": "Held-out prompts for that evaluation."})
    lm_eval_tasks: str | None = field(
        default=None,
        metadata={"help": "Public tasks for it through lm-eval, comma separated (hellaswag,arc_easy) or .yaml files."},
    )
    lm_eval_limit: int | None = field(
        default=None, metadata={"help": "Most items of each of these tasks; None = all."}
    )

    def __post_init__(self) -> None:
        check_types(self)
        if self.num_eval_prompts < 1:
            raise ValueError(
                f"num_eval_prompts={self.num_eval_prompts} should be 1 or more; to leave the evaluation out set "
                "evaluate_before_and_after=False"
            )
        if self.lm_eval_tasks is not None:
            check_installed()
        if self.lm_eval_limit is not None and (self.lm_eval_limit < 1 or self.lm_eval_tasks is None):
            raise ValueError(
                f"lm_eval_limit={self.lm_eval_limit} should be 1 or more, and name the tasks by lm_eval_tasks: or "
                "leave it out"
            )


@dataclass
class Settings:
    """Everything that was parsed; handed to a recipe's `load_data`."""

    script: ScriptArguments
    training: GKDConfig
    model: ModelConfig
    run: RunArguments
    remarks: list[str] = field(default_factory=list)  # the recipe's values that were set aside


_PARSED = (ScriptArguments, GKDConfig, ModelConfig, RunArguments)
LoadData = Callable[[Settings], dict[str, Any]]
_DATA_SETS = ("train", "eval", "prompts")


def parse(defaults: dict[str, Any], argv: list[str] | None = None, description: str = "") -> Settings:
    """Parse the command line (and `--config` YAML) over a recipe's defaults.

    Args:
        defaults: field values by name; a callable is called when neither flag nor YAML gives the field.
        argv: the arguments, `sys.argv[1:]` when None.
        description: for `--help`.

    Raises:
        ValueError: an unknown flag, key in the YAML file or name in `defaults`, or a value that a field refuses.
        SystemExit: `--help`.
    """
    parser = Parser(
        _PARSED,
        usage="%(prog)s [--config FILE.yaml] [--FIELD VALUE ...]; --help lists the fields",
        description=description,
        allow_abbrev=False,
    )
    known = [action.dest for action in parser._actions if action.dest != "help"]
    refuse_unknown(defaults, known, "the recipe's defaults")
    argv = arguments(argv)
    given = read_config(argv)
    refuse_unknown(given, [*known, "env"], "the --config file")
    own = {action.dest: action.default for action in parser._actions}
    kept, remarks = set_aside(defaults, own, {**given, **flag_values(argv)})
    parser.set_defaults_with_config(**parser.fitting(kept, "the recipe's defaults"))
    parser.fitting(given, "the --config file")
    parser.call_defaults(argv, given)
    script, training, model, around, unused = parser.parse_args_and_config(argv, return_remaining_strings=True)
    if unused:
        refuse_unknown([unused[0].partition("=")[0]], known, "the command line", "--")
    return Settings(script, training, model, around, remarks)


class _Precomputed(BaseException):
    """Ends a `load_data` that has loaded what `gkd precompute` wrote, which is trained on as it is. A BaseException,
    so that no `except Exception` there is in the way."""


_in_load_data: ContextVar[bool] = ContextVar("in_load_data", default=False)


def load_rows(name: str, config: str | None = None, split: str | None = None) -> Any:
    """A data set by name, a local file (`gkd.files.DATA_ENDINGS`), or a folder that `save_to_disk` wrote.

    Raises:
        ValueError: a local file that is missing or broken (with its line number), or a name that cannot be loaded.
    """
    path = Path(name).expanduser()
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    if config is not None and (saved or path.is_file()):
        raise ValueError(f"dataset_config={config!r} has no effect with the local data {name!r}: leave it out")
    if name.lower().endswith(DATA_ENDINGS) or path.is_file():
        rows = read_rows(path)
        return rows if split else {"train": rows}
    try:
        if saved:
            found = load_from_disk(str(path))
            splits = found if isinstance(found, dict) else {"train": found}
            return splits[split] if split else splits
        loaded = load_dataset(str(path) if path.is_dir() else name, name=config, split=split)
    except (FileNotFoundError, ConnectionError, DatasetsError) as error:
        why = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"dataset_name={name!r} is neither a local file nor a data set that can be loaded: {why}"
        ) from error
    if _in_load_data.get() and is_precomputed(loaded if split else loaded.get("train")):
        raise _Precomputed
    return loaded


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
    if script.dataset_test_split not in splits and script.dataset_test_split != "test":
        raise ValueError(
            f"dataset_test_split={script.dataset_test_split!r} is not in {script.dataset_name!r}: it has "
            f"{', '.join(splits)}"
        )
    return {"train": splits[script.dataset_train_split], "eval": splits.get(script.dataset_test_split)}


def recipe_data(load_data: LoadData, settings: Settings) -> dict[str, Any]:
    """What a recipe's `load_data` gives, when it is what `gkd.run.run` asks for.

    Raises:
        ValueError: it is not, or a data set was named and `load_data` did not look at its name; or what `load_data`
            raises.
    """
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


def _loaded(load_data: LoadData, settings: Settings) -> tuple[Any, Collection[str]]:
    """What `load_data` gives, and which fields about the data set it has read.

    Or what `gkd precompute` wrote, where the data set's name is one of those: such rows are in ids already, so that
    nothing of `load_data` can apply to them, and the held-out rows stand beside them.
    """
    name = settings.script.dataset_name
    if name and is_precomputed_folder(name):
        return precomputed_data(name), {"dataset_name"}
    watched = copy.copy(settings.script)
    watched.__class__ = _Watched
    outside = _in_load_data.set(True)
    try:
        data = load_data(replace(settings, script=watched))
    except _Precomputed:
        assert name
        data = precomputed_data(name)
    finally:
        _in_load_data.reset(outside)
    return data, watched.__dict__.get(_READ, ())


_READ = "_read"


class _Watched(ScriptArguments):
    """Notes which of its fields are read."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("dataset_"):
            self.__dict__.setdefault(_READ, set()).add(name)
        return super().__getattribute__(name)


def _check_read(script: ScriptArguments, read: Collection[str]) -> None:
    """Refuse what names other data than those that were loaded.

    Raises:
        ValueError: a field about the data set that has no effect.
    """
    for one in fields(ScriptArguments):
        value = getattr(script, one.name)
        if one.name.startswith("dataset_") and one.name not in read and value != one.default:
            raise ValueError(
                f"{one.name}={value!r} has no effect: this recipe's load_data brings its own data and does not read "
                f"settings.script.{one.name}. Leave it out, or let load_data call gkd.run.dataset_by_name(settings)"
            )


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
        device_map = {"": str(PartialState().device)}  # quantized weights cannot be moved later
        args.model_init_kwargs |= {"device_map": device_map, "quantization_config": quantization}
    if args.share_base_model:  # the teacher is not loaded
        return
    own = args.teacher_model_init_kwargs or {}
    assert not isinstance(own, str)  # TrainingArguments has parsed it
    # float32 is ModelConfig's default, made for a student: a teacher stays as it was saved unless the user says more.
    dtype = "auto" if model.dtype == "float32" else model.dtype
    args.teacher_model_init_kwargs = {**shared, "dtype": dtype, **own}
