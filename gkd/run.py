"""What a recipe calls: from the command line to a trained adapter, its evaluation, plots and model card.

One config object goes from the command line to the trainer: `GKDConfig` is parsed once, and nothing is copied field by
field. Precedence: command-line flag, then `--config` YAML, then the recipe's defaults, then the fields' own defaults.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import load_dataset
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from gkd.config import GKDConfig
from gkd.files import read_rows
from gkd.loading import load_tokenizer
from gkd.progress import ProgressBar
from gkd.report import Report
from gkd.trainer import GKDTrainer

logger = logging.getLogger(__name__)

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


def run(
    load_data: LoadData = dataset_by_name,
    *,
    defaults: dict[str, Any] | None = None,
    score: Score | None = None,
    description: str = "",
    argv: list[str] | None = None,
) -> None:
    """Run a recipe: parse, load, evaluate, train, evaluate, save, write the card, push.

    A user's mistake ends in one line on stderr and exit code 2 (the traceback too when GKD_DEBUG=1).

    Args:
        load_data: settings -> `train` rows, optionally `eval` rows, `prompts` (rows for the before/after evaluation)
            and `held_out_text` (texts for perplexity).
        defaults: the recipe's values for any field of GKDConfig, ModelConfig, ScriptArguments and RunArguments.
        score: (completion, row) -> task score of one prompt row, optional.
        description: what the recipe does, for `--help`.
        argv: instead of `sys.argv[1:]`.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("gkd").setLevel(logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.WARNING)
    try:
        settings = parse(defaults or {}, argv, description)
        _run(settings, load_data, score)
    except (ValueError, TypeError) as error:
        if os.environ.get("GKD_DEBUG") or (isinstance(error, TypeError) and not str(error).startswith("args is")):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None


def _run(settings: Settings, load_data: LoadData, score: Score | None) -> None:
    args = settings.training
    if settings.model.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: pass --model_name_or_path, the student")
    data = load_data(settings)
    trainer = build_trainer(settings, data)
    report = Report(trainer, data, score, settings.run.num_eval_prompts)
    measure = settings.run.evaluate_before_and_after
    if measure:
        report.measure_before()
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=_checkpoint(args))
    seconds = time.perf_counter() - start
    if measure:
        report.measure_after()
    trainer.save_model(args.output_dir)
    if trainer.is_world_process_zero():
        _write_history(trainer, args.output_dir)
        trainer.card_extras = report.finish(args.output_dir, seconds, settings.script.dataset_name)
        trainer.create_model_card()
        report.show(Console())
        print(f"saved to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=settings.script.dataset_name)


def build_trainer(settings: Settings, data: dict[str, Any]) -> GKDTrainer:
    """Tokenizer, models and trainer from the settings."""
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
    args.teacher_model_init_kwargs = {**shared, **own}
    tokenizer = load_tokenizer(
        model.model_name_or_path, trust_remote_code=args.trust_remote_code, revision=model.model_revision
    )
    trainer = GKDTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data.get("eval") if args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model),
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressBar())
    return trainer


def _checkpoint(args: GKDConfig) -> str | bool | None:
    """`--resume_from_checkpoint`: a folder, or "true" for the newest one in output_dir."""
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "none"):
        return None
    if str(wanted).lower() != "true":
        if not os.path.isdir(wanted):
            raise ValueError(f"resume_from_checkpoint={wanted!r}: there is no such folder")
        return wanted
    newest = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    if newest is None:
        logger.warning("resume_from_checkpoint=true, but %s holds no checkpoint: starting anew", args.output_dir)
    return newest


def _write_history(trainer: GKDTrainer, output_dir: str) -> None:
    """Every logged line, for plots of one's own."""
    path = Path(output_dir) / "metrics.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in trainer.state.log_history)
