"""The console script `gkd`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gkd._version import __version__
from gkd.recipe import capture, execute_recipe, mistakes_in_one_line

EXAMPLE = """example:
  gkd run recipes/gkd_qwen2.py --learning_rate 2e-4 --use_peft --output_dir out
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
    run = commands.add_parser(
        "run",
        help="run a recipe in this process",
        description="Run a recipe file in this process; everything after it goes to the recipe (its --help lists it).",
        epilog="example:\n  gkd run recipes/gkd_glass.py --max_steps 20",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    run.add_argument("recipe", type=Path, help="the recipe's file")
    run.add_argument("flags", nargs=argparse.REMAINDER, help="the recipe's flags")
    precompute = commands.add_parser(
        "precompute",
        help="let the teacher answer a recipe's prompts beforehand",
        description="Let the teacher answer a recipe's training prompts, once each, into the cache that training with "
        "--seq_kd reads (teacher_cache_dir); optionally as a data set of its own. Can be stopped and started again.",
        epilog="example:\n  gkd precompute recipes/gkd_glass.py --teacher_temperature 0 --precompute_output answers",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    precompute.add_argument("recipe", type=Path, help="the recipe's file")
    precompute.add_argument(
        "--precompute_output", metavar="DIR", help="write the answers as a data set into this folder"
    )
    precompute.add_argument("--precompute_push_to_hub", metavar="ID", help="push that data set to this repository")
    return parser


def _precompute(recipe: Path, flags: list[str], output: str | None, push_to: str | None) -> None:
    from gkd.precompute import precompute

    precompute(capture(recipe, [*flags, "--seq_kd", "true"]), output, push_to)


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
    """Entry point; returns the exit code (0 done, 2 the user's mistake, 130 Ctrl-C)."""
    parser = _parser()
    arguments, flags = parser.parse_known_args(argv)
    if arguments.command == "precompute":
        with mistakes_in_one_line():
            _precompute(arguments.recipe, flags, arguments.precompute_output, arguments.precompute_push_to_hub)
        return 0
    if flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    return _run(arguments.recipe, arguments.flags)


if __name__ == "__main__":
    sys.exit(main())
