"""`--help` of a recipe: grouped, the project's own fields first; each flag once."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping

_LONG = 40  # characters of choices beside a flag; more stand in the text
_NOT_HERE = " If `datasets` is provided, this will be ignored."  # of TRL's; here both together are refused


class FieldFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """A flag in its first spelling; defaults in its text."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0 or not action.option_strings:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {self._format_args(action, 'VALUE')}"

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str):  # type: ignore[no-untyped-def]
        found = super()._metavar_formatter(action, default_metavar)
        return found if len(str(found(1)[0])) <= _LONG else lambda size: (default_metavar,) * size

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = (super()._get_help_string(action) or "").replace(_NOT_HERE, "")
        choices = ", ".join(map(str, action.choices or ()))
        return text if len(choices) <= _LONG else f"{text} One of {choices}."


def group(parser: argparse.ArgumentParser, groups: Mapping[str, Collection[str]]) -> None:
    """Show a parser's fields in these groups and in this order: title -> names; those in none are not shown."""
    by_name = {action.dest: action for action in reversed(parser._actions)}  # the first of a name, not its --no_name
    for title, names in groups.items():
        section = parser.add_argument_group(title)
        section._group_actions.extend(by_name[name] for name in names if name in by_name)
    for section in parser._action_groups[:2]:  # argparse's own
        section._group_actions = [action for action in section._group_actions if action.dest == "help"]
