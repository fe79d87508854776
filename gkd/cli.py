"""The console script `gkd`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from rich.console import Console

from gkd._version import __version__
from gkd.recipe import capture, execute_recipe, mistakes_in_one_line

EXAMPLE = """example:
  gkd new my_recipe --data rows.jsonl --student Qwen/Qwen2-0.5B-Instruct --teacher Qwen/Qwen2-1.5B-Instruct
  gkd doctor recipes/my_recipe.py
  gkd run recipes/my_recipe.py --learning_rate 2e-4 --output_dir out
  accelerate launch --num_processes 8 recipes/gkd_qwen2.py --config my.yaml
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gkd",
        description="On-policy knowledge distillation of language models.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gkd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_new(commands)
    _add_doctor(commands)
    _add_evaluate(commands)
    _add_precompute(commands)
    _add_plan(commands)
    return parser


def _command(commands: Any, name: str, summary: str, description: str, example: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 79),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return command


def _add_run(commands: Any) -> None:
    run = _command(
        commands,
        "run",
        "run a recipe in this process",
        "Run a recipe file in this process; everything after it goes to the recipe (its --help lists it).",
        "gkd run recipes/gkd_glass.py --max_steps 20",
    )
    run.add_argument("recipe", type=Path, help="the recipe's file")
    run.add_argument("flags", nargs=argparse.REMAINDER, help="the recipe's flags")


def _add_precompute(commands: Any) -> None:
    precompute = _command(
        commands,
        "precompute",
        "let the teacher answer a recipe's prompts beforehand",
        "Let the teacher answer a recipe's training prompts, once each, into the cache that training with --seq_kd "
        "reads (teacher_cache_dir); optionally as a data set of its own. Can be stopped and started again.",
        "gkd precompute recipes/gkd_glass.py --teacher_temperature 0 --precompute_output answers",
    )
    precompute.add_argument("recipe", type=Path, help="the recipe's file")
    precompute.add_argument(
        "--precompute_output", metavar="DIR", help="write the answers as a data set into this folder"
    )
    precompute.add_argument("--precompute_push_to_hub", metavar="ID", help="push that data set to this repository")


def _add_doctor(commands: Any) -> None:
    doctor = _command(
        commands,
        "doctor",
        "check a recipe before it costs a GPU-day",
        "Load what a recipe needs and print a checklist: tokens, templates, stop ids, rows (three of them in colour), "
        "perplexities, eight rollouts, versions. Further flags go to the recipe. Exit code 1 on an error.",
        "gkd doctor recipes/gkd_glass.py --max_new_tokens 20",
    )
    doctor.add_argument("recipe", type=Path, help="the recipe's file")
    doctor.add_argument("--json", action="store_true", help="print JSON instead")


def _add_evaluate(commands: Any) -> None:
    evaluate = _command(
        commands,
        "evaluate",
        "measure a recipe's student and teacher, without training",
        "Measure the student, an adapter of it, and the teacher on a recipe's held-out prompts. Further flags go to "
        "the recipe (--num_eval_prompts 256; --eval_strategy steps for the perplexity of the eval answers).",
        "gkd evaluate recipes/gkd_glass.py --adapter outputs/gkd_glass",
    )
    evaluate.add_argument("recipe", type=Path, help="the recipe's file")
    evaluate.add_argument("--adapter", metavar="DIR", help="a trained adapter, beside the student as it is")
    evaluate.add_argument("--json", action="store_true", help="print JSON instead")


def _add_new(commands: Any) -> None:
    new = _command(
        commands,
        "new",
        "write a recipe for your data",
        "Look at the data and write a recipe that runs. Rows: messages, conversations, prompt and completion, "
        "instruction, text; or any two columns, named by --prompt_column and --completion_column.",
        "gkd new mine --data rows.jsonl --student my/student --teacher my/teacher",
    )
    new.add_argument("name", help="the recipe's name")
    new.add_argument("--data", required=True, help="a .jsonl, .json, .csv or .parquet file, or a Hub data set")
    new.add_argument("--student", required=True, help="name or folder")
    new.add_argument("--teacher", required=True, help="name or folder")
    new.add_argument("--output", metavar="FILE", help="recipes/NAME.py without it")
    new.add_argument("--prompt_column", metavar="NAME", help="the column with the question")
    new.add_argument("--completion_column", metavar="NAME", help="the column with the answer")
    new.add_argument("--force", action="store_true", help="overwrite the file")


def _add_plan(commands: Any) -> None:
    plan = _command(
        commands,
        "plan",
        "the memory that a recipe's run needs on each GPU",
        "Print what a recipe's run needs on each GPU, part by part, from the models' configs alone, and the smallest "
        "change that makes it fit. Exit code 1 when it does not fit. Other flags go to the recipe.",
        "gkd plan recipes/gkd_qwen2.py --gpus 8 --gpu_memory 24GB --zero_stage 2",
    )
    plan.add_argument("recipe", type=Path, help="the recipe's file")
    plan.add_argument("--gpus", type=int, default=1, help="GPUs of the run (default 1)")
    plan.add_argument("--gpu_memory", default="80GB", help="memory of each, for example 24GB or 80GB (the default)")
    plan.add_argument("--zero_stage", type=int, default=0, help="DeepSpeed ZeRO stage, 0 is DDP (the default)")
    plan.add_argument("--offload", action="store_true", help="optimizer (and ZeRO-3 weights) in CPU memory")
    plan.add_argument("--json", action="store_true", help="print JSON")


def _plan(arguments: argparse.Namespace, flags: list[str]) -> int:
    with _stdout_for_json(arguments.json):
        from gkd.plan import plan

        recipe = capture(arguments.recipe, flags)
    return plan(
        recipe,
        gpus=arguments.gpus,
        gpu_memory=arguments.gpu_memory,
        zero_stage=arguments.zero_stage,
        offload=arguments.offload,
        as_json=arguments.json,
    )


def _precompute(recipe: Path, flags: list[str], output: str | None, push_to: str | None) -> None:
    from gkd.precompute import precompute

    precompute(capture(recipe, [*flags, "--seq_kd", "true"]), output, push_to)


@contextmanager
def _stdout_for_json(wanted: bool) -> Iterator[None]:
    """What libraries print goes to stderr, so that stdout holds the JSON and nothing else."""
    with redirect_stdout(sys.stderr) if wanted else nullcontext():
        yield


def _doctor(recipe: Path, flags: list[str], as_json: bool) -> int:
    with _stdout_for_json(as_json):
        from gkd.doctor import examine
        from gkd.doctor_view import show

        logging.disable(logging.WARNING)  # the checklist says it
        try:
            diagnosis = examine(capture(recipe, flags))
        finally:
            logging.disable(logging.NOTSET)
    if as_json:
        print(json.dumps(diagnosis.as_json(), indent=2, ensure_ascii=False))
    else:
        show(diagnosis, Console())
    return 0 if diagnosis.passed else 1


def _evaluate(recipe: Path, flags: list[str], adapter: str | None, as_json: bool) -> None:
    with _stdout_for_json(as_json):
        from gkd import evaluate_recipe

        columns = evaluate_recipe.evaluate_recipe(capture(recipe, flags), adapter)
    if int(os.environ.get("RANK", 0)) != 0:
        return
    if as_json:
        print(json.dumps(evaluate_recipe.as_json(columns), indent=2, ensure_ascii=False))
    else:
        Console().print(evaluate_recipe.results_table(columns))


def _new(arguments: argparse.Namespace) -> None:
    from gkd.new_recipe import write_recipe

    columns = None
    if arguments.prompt_column is not None:
        columns = (arguments.prompt_column, arguments.completion_column)
    elif arguments.completion_column is not None:
        raise ValueError("--completion_column needs --prompt_column beside it")
    path = write_recipe(
        arguments.name,
        arguments.data,
        arguments.student,
        arguments.teacher,
        output=arguments.output,
        columns=columns,
        force=arguments.force,
    )
    print(f"wrote {path}; next: gkd doctor {path}")


def _run(recipe: Path, flags: list[str]) -> int:
    if not recipe.is_file():
        print(
            f"error: there is no recipe {str(recipe)!r}: name a file, for example recipes/gkd_glass.py",
            file=sys.stderr,
        )
        return 2
    execute_recipe(recipe, flags)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code (0 done, 1 the doctor found an error, 2 the user's mistake, 130 Ctrl-C)."""
    parser = _parser()
    arguments, flags = parser.parse_known_args(argv)
    if arguments.command == "precompute":
        with mistakes_in_one_line():
            _precompute(arguments.recipe, flags, arguments.precompute_output, arguments.precompute_push_to_hub)
        return 0
    if arguments.command == "doctor":
        with mistakes_in_one_line():
            return _doctor(arguments.recipe, flags, arguments.json)
    if arguments.command == "evaluate":
        with mistakes_in_one_line():
            _evaluate(arguments.recipe, flags, arguments.adapter, arguments.json)
        return 0
    if arguments.command == "plan":
        with mistakes_in_one_line():
            return _plan(arguments, flags)
    if flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    if arguments.command == "new":
        with mistakes_in_one_line():
            _new(arguments)
        return 0
    return _run(arguments.recipe, arguments.flags)


if __name__ == "__main__":
    sys.exit(main())
