"""The parser of a run's flags and of its `--config` YAML: TRL's; an error names field, value and remedy."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from gkd.config.field_types import fit, kinds, wanted
from gkd.config.schedules import SCHEDULED
from gkd.recipe.help import grouped_help

# Programs that run a notebook's cells: their arguments are the kernel's (`-f connection.json`), not the user's.
_KERNELS = ("ipykernel_launcher.py", "colab_kernel_launcher.py")


# What a field is called, or was called, elsewhere: in older transformers, in TRL's other trainers, in articles.
RENAMED = {
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "max_completion_length": "max_new_tokens",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "warmup_ratio": "warmup_steps",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "no_cuda": "use_cpu",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "group_by_length": "train_sampling_strategy",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "student": "model_name_or_path",
    "teacher": "teacher_model_name_or_path",
    "teacher_model": "teacher_model_name_or_path",
    "dataset": "dataset_name",
    "use_vllm": "rollout_backend",
    "vllm_server_base_url": "rollout_server_url",
    "lambda": "lmbda",
    "kd_temperature": "loss_temperature",
}


class Parser(TrlParser):
    """`TrlParser` for dataclasses whose fields may be given by a recipe, by YAML and by flags.

    Args:
        dataclass_types: whose fields are the flags.
        groups: of these fields in `--help`: title -> names.
    """

    def __init__(
        self, dataclass_types: tuple[type, ...], groups: Mapping[str, Collection[str]] | None = None, **options: Any
    ) -> None:
        super().__init__(dataclass_types, **options)
        self.groups = groups or {}
        self.kinds = kinds(*dataclass_types)
        for action in self._actions:
            if action.dest in SCHEDULED:  # a number or a schedule: the config tells
                action.type = str
            if action.dest == "report_to":  # several loggers, as `report_to: [wandb, tensorboard]` in YAML
                action.nargs = "+"

    def format_help(self) -> str:
        """Grouped."""
        about = {"prog": self.prog, "usage": self.usage, "description": self.description}
        return grouped_help(self._actions, self.groups, **about)

    def error(self, message: str) -> NoReturn:
        """A text that is no value of its field.

        Raises:
            ValueError: always, in one line.
        """
        found = re.fullmatch(r"argument --(\w+)\S*: invalid .*?value: (.*)", message, re.DOTALL)
        if found is not None and found[1] in self.kinds:
            raise ValueError(f"--{found[1]} {_line(found[2])}: it should be {wanted(self.kinds[found[1]])}")
        raise ValueError(_line(re.sub(r"^argument (--\w+)\S*:", r"\1:", message)))

    def fitting(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Values that are no texts, brought to their fields' types: argparse itself looks at texts only.

        Raises:
            ValueError: a value of another kind, or none where there must be one.
        """
        fine = dict(values)
        for name, value in values.items():
            empty = value is None and self.get_default(name) is None
            if name in self.kinds and not (isinstance(value, str) or callable(value) or empty):
                try:
                    fine[name] = fit(name, value, self.kinds[name])
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from error
        return fine

    def call_defaults(self, argv: list[str], given: Mapping[str, Any]) -> None:
        """Replace callable defaults by their value, unless the command line or the YAML file gives one."""
        names = {arg[2:].split("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")} | set(given)
        for action in self._actions:
            if callable(action.default):
                made = None if action.dest in names else action.default()
                action.default = json.dumps(made) if isinstance(made, dict) else None if made is None else str(made)


def arguments(argv: list[str] | None) -> list[str]:
    """The user's arguments: of the command line when `argv` is None, and of nobody in a notebook.

    `--config=file` becomes the two arguments that TRL's parser looks for.
    """
    if argv is None:
        argv = [] if os.path.basename(sys.argv[0]) in _KERNELS else sys.argv[1:]
    return [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]


def refuse_unknown(names: Iterable[str], known: list[str], where: str, dashes: str = "") -> None:
    """One name at a time, with the field that may have been meant.

    Raises:
        ValueError: a name that is no field.
    """
    for name in names:
        plain = name.lstrip("-").replace("-", "_") if dashes else name
        if plain not in known or (dashes and not name.startswith(dashes)):
            near = [RENAMED[plain]] if RENAMED.get(plain) in known else difflib.get_close_matches(plain, known, n=1)
            hint = f"did you mean {dashes}{near[0]}?" if near else "--help lists the fields"
            raise ValueError(f"{where}: there is no field {name!r}; {hint}")


class _TwiceError(Exception):
    pass


class _EachKeyOnce(yaml.SafeLoader):
    """YAML in which a key may not stand twice: of two values, the first would be lost without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            name, line = getattr(key, "value", None), key.start_mark.line + 1
            if isinstance(name, str) and seen.setdefault(name, line) != line and name != "<<":
                raise _TwiceError(f"{name} stands twice, in lines {seen[name]} and {line}: leave one of them out")
        return super().construct_mapping(node, deep)


def read_config(argv: list[str]) -> dict[str, Any]:
    """What the YAML file after `--config` says; {} without one.

    Raises:
        ValueError: there is no such file, or it is no mapping of fields to values.
    """
    if "--config" not in argv:
        return {}
    path = next(iter(argv[argv.index("--config") + 1 :]), None)
    if path is None or not os.path.isfile(path):
        raise ValueError("--config needs a YAML file after it" if path is None else f"--config {path}: no such file")
    try:
        with open(path, encoding="utf-8") as file:
            given = yaml.load(file, _EachKeyOnce)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"--config {path} is no YAML: {_line(str(error))}") from error
    except _TwiceError as error:
        raise ValueError(f"--config {path}: {error}") from error
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise ValueError(f"--config {path} should hold fields and their values, for example `lmbda: 0.5`")
    variables = given.get("env", {})
    if not isinstance(variables, dict) or not all(isinstance(name, str) for name in variables):
        raise ValueError(f"--config {path}: env should hold environment variables and their values")
    return given


def _line(text: str) -> str:
    return " ".join(text.split())
