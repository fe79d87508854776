"""`--help` of a recipe: grouped, the project's own fields first; each flag once."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Mapping

_NOT_HERE = " If `datasets` is provided, this will be ignored."  # of TRL's; here both together are refused


def grouped_help(
    actions: Iterable[argparse.Action],
    groups: Mapping[str, Collection[str]],
    *,
    prog: str,
    usage: str | None,
    description: str | None,
) -> str:
    """The help of fields in these groups and in this order.

    Args:
        actions: of the parser that reads them.
        groups: title -> names of fields; those in none are not shown.
        prog, usage, description: of that parser.
    """
    by_name: dict[str, argparse.Action] = {}
    for action in actions:
        by_name.setdefault(action.dest, action)  # the first of a name, not its --no_name
    shown = argparse.ArgumentParser(
        prog=prog,
        usage=usage,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    for title, names in groups.items():
        section = shown.add_argument_group(title)
        for name in names:
            if name in by_name:
                action = by_name[name]
                section.add_argument(f"--{name}", metavar="VALUE", default=action.default, help=_text(action))
    return shown.format_help()


def _text(action: argparse.Action) -> str:
    text = (action.help or "").replace(_NOT_HERE, "")
    choices = ", ".join(map(str, action.choices or ()))
    return f"{text} One of {choices}." if choices else text
