"""The console script `gkd`."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from gkd._version import __version__

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
    return parser


def _run(recipe: Path, flags: list[str]) -> int:
    if not recipe.is_file():
        print(
            f"error: there is no recipe {str(recipe)!r}: name a file, for example recipes/gkd_glass.py",
            file=sys.stderr,
        )
        return 2
    sys.argv = [str(recipe), *flags]
    runpy.run_path(str(recipe), run_name="__main__")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code (0 done, 2 the user's mistake, 130 Ctrl-C)."""
    arguments = _parser().parse_args(argv)
    return _run(arguments.recipe, arguments.flags)


if __name__ == "__main__":
    sys.exit(main())
