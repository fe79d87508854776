"""The settings of a run: the command line over YAML over a recipe's defaults.

One config object goes from the command line to the trainer: `GKDConfig` is parsed once, and nothing is copied field by
field. Precedence: command-line flag, then `--config` YAML, then the recipe's defaults, then the fields' own defaults.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any

from transformers import TrainingArguments
from trl import ModelConfig, ScriptArguments, SFTConfig

from gkd.common.ranges import one_of, whole
from gkd.config.field_types import check_types
from gkd.config.fields import GKDConfig
from gkd.config.values import INEFFECTIVE
from gkd.evaluation.public_tasks import check_installed
from gkd.recipe.command_line import Parser, arguments, read_config, refuse_unknown
from gkd.recipe.ineffective import check_effective
from gkd.recipe.mixture import entries_of
from gkd.recipe.objective import OBJECTIVES, fields_of
from gkd.recipe.set_aside import flag_values, set_aside
from gkd.report.dataset_folder import is_precomputed_folder, precomputed_data


@dataclass
class DataArguments(ScriptArguments):
    """Which rows: TRL's fields of one data set, or several of them."""

    datasets: list[dict[str, Any]] | str | None = field(
        default=None,
        metadata={
            "help": "A mixture, in YAML or JSON: a list of {path, name, split, test_split, weight, teacher, columns}, "
            "in the place of dataset_name."
        },
    )

    def __post_init__(self) -> None:
        if self.datasets is None:
            return
        entries_of(self.datasets)  # told before anything is loaded
        if self.dataset_name is not None:
            raise ValueError(
                f"datasets does not go with dataset_name={self.dataset_name!r}: make it an entry of datasets, or "
                "leave one of them out"
            )

    @property
    def names(self) -> list[str]:
        """Of all data sets."""
        if self.datasets is not None:
            return list(dict.fromkeys(entry.path for entry in entries_of(self.datasets)))
        return [] if self.dataset_name is None else [self.dataset_name]


@dataclass
class RunArguments:
    """What a run does around the training itself."""

    evaluate_before_and_after: bool = field(
        default=True, metadata={"help": "Measure student before, student after and teacher in one harness."}
    )
    objective: str = field(
        default="distill",
        metadata={
            "help": "sft: train on the data's answers without a teacher (lmbda=0, ce_weight=1), before a distill."
        },
    )
    num_eval_prompts: int = field(default=32, metadata={"help": "Held-out prompts for that evaluation."})
    lm_eval_tasks: str | None = field(
        default=None,
        metadata={"help": "Public tasks for it through lm-eval, comma separated (hellaswag,arc_easy) or .yaml files."},
    )
    lm_eval_limit: int | None = field(
        default=None, metadata={"help": "Most items of each of these tasks; None = all."}
    )

    draft_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Measure the student as a draft model that proposes so many tokens a block (acceptance, speed-up)."
        },
    )

    def __post_init__(self) -> None:
        check_types(self)
        if self.draft_tokens is not None:
            whole("draft_tokens", self.draft_tokens, 1)
        one_of("objective", self.objective, OBJECTIVES)
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

    script: DataArguments
    training: GKDConfig
    model: ModelConfig
    run: RunArguments
    remarks: list[str] = field(default_factory=list)  # the recipe's values that were set aside


_PARSED = (DataArguments, GKDConfig, ModelConfig, RunArguments)
LoadData = Callable[[Settings], dict[str, Any]]
_DATA_SETS = ("train", "eval", "prompts")


def _groups() -> dict[str, list[str]]:
    """The fields for `--help`: ours, then those of the libraries, without those that have no effect here."""
    trl, transformers = _names(SFTConfig), _names(TrainingArguments)
    return {
        "distillation, of gkd (docs/fields.md)": _names(GKDConfig, but=trl),
        "measured before and after, of gkd": _names(RunArguments),
        "rows, of TRL; datasets of gkd": _names(DataArguments, but={"ignore_bias_buffers"}),
        "the student and its adapter, of TRL": _names(ModelConfig),
        "training, of TRL": _names(SFTConfig, but={*transformers, *INEFFECTIVE}),
        "training, of transformers": _names(TrainingArguments, but=INEFFECTIVE),
    }


def _names(kind: type, but: Collection[str] = ()) -> list[str]:
    return [one.name for one in fields(kind) if one.name not in but]


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
        groups=_groups(),
        allow_abbrev=False,
    )
    known = [action.dest for action in parser._actions if action.dest != "help"]
    refuse_unknown(defaults, known, "the recipe's defaults")
    argv = arguments(argv)
    given = read_config(argv)
    refuse_unknown(given, [*known, "env"], "the --config file")
    own = {action.dest: action.default for action in parser._actions}
    said = {**given, **flag_values(argv)}
    meant = fields_of(said.get("objective", defaults.get("objective")), said)
    kept, remarks = set_aside(defaults, own, {**said, **meant})
    kept |= {name: value for name, value in meant.items() if name not in said}
    parser.set_defaults_with_config(**parser.fitting(kept, "the recipe's defaults"))
    parser.fitting(given, "the --config file")
    parser.call_defaults(argv, given)
    script, training, model, around, unused = parser.parse_args_and_config(argv, return_remaining_strings=True)
    if unused:
        refuse_unknown([unused[0].partition("=")[0]], known, "the command line", "--")
    check_effective(said, model)
    return Settings(script, training, model, around, remarks)


class _Precomputed(BaseException):
    """Ends a `load_data` that has loaded what `gkd precompute` wrote, which is trained on as it is. A BaseException,
    so that no `except Exception` there is in the way."""


_in_load_data: ContextVar[bool] = ContextVar("in_load_data", default=False)


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


class _Watched(DataArguments):
    """Notes which of its fields are read."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("dataset"):
            self.__dict__.setdefault(_READ, set()).add(name)
        return super().__getattribute__(name)


def _check_read(script: DataArguments, read: Collection[str]) -> None:
    """Refuse what names other data than those that were loaded.

    Raises:
        ValueError: a field about the data set that has no effect.
    """
    for one in fields(DataArguments):
        value = getattr(script, one.name)
        if one.name.startswith("dataset") and one.name not in read and value != one.default:
            raise ValueError(
                f"{one.name}={value!r} has no effect: this recipe's load_data brings its own data and does not read "
                f"settings.script.{one.name}. Leave it out, or let load_data call gkd.run.dataset_by_name(settings)"
            )
