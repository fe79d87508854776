"""`gkd recipes`: those that come with the package, listed, and copied to be changed."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gkd.recipe.shipped import LAUNCH_FILES, built_in, launch_files, recipe_file, what_it_is


def show_recipes(console: Console) -> None:
    """A line for each.

    Raises:
        ValueError: none came with the package.
    """
    known = built_in()
    if not known:
        raise ValueError("no recipes came with this installation: install the package from a wheel, or from its clone")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, path in known.items():
        table.add_row(name, what_it_is(path))
    console.print(table)
    console.print("\ngkd run NAME starts one; gkd recipes copy NAME puts it here, to be changed")


def copy_recipe(name: str, launch: str | None, folder: Path) -> list[Path]:
    """Put a recipe, and a launch file, where they can be changed.

    Args:
        name: of the recipe. launch: of a launch file ("zero2"); None for none. folder: where to.

    Returns:
        The files written.

    Raises:
        ValueError: there is none of that name, or a file is in the way.
    """
    sources = [(recipe_file(name), folder / "recipes")]
    if launch is not None:
        known = launch_files()
        if launch not in known:
            raise ValueError(f"--launch_file {launch} is unknown: there are {', '.join(known)}")
        sources.append((known[launch], folder / LAUNCH_FILES))
    targets = [into / source.name for source, into in sources]
    if there := [str(target) for target in targets if target.exists()]:
        raise ValueError(f"{' and '.join(there)} is there already: move it away, or name another folder with --to")
    for (source, into), target in zip(sources, targets, strict=True):
        into.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return targets
