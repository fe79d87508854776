"""The table of docs/models.md, made from the results of the matrix."""

from __future__ import annotations

import json
import textwrap
from itertools import groupby
from pathlib import Path
from typing import Any

from configs import NOT_BUILT
from matrix import verdict

BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"


def write_page(page: Path, results: Path) -> None:
    """Put the table between the page's markers.

    Raises:
        ValueError: the page has no markers.
    """
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} has no lines {BEGIN!r} and {END!r}: add them where the table belongs")
    records = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{table(records)}\n{END}{after}", encoding="utf-8")


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: how many are right, those that are not with what is wrong, the names of those that are."""
    verdicts = {record["name"]: verdict(record) for record in records}
    right = [record for record in records if verdicts[record["name"]] == "ok"]
    wrong = [record for record in records if verdicts[record["name"]] != "ok"]
    lines = [
        f"{len(right)} of {len(records)} cases are right: "
        f"{len({r['model_type'] for r in right})} model types, each with LoRA and with all weights trained.",
        "",
        "Right (in brackets: variants that were run beside the plain one, or what alone was right):",
        "",
        *textwrap.wrap(", ".join(_names(right)), 118, break_long_words=False, break_on_hyphens=False),
        "",
        "| not right or not run | what happens |",
        "| --- | --- |",
    ]
    lines += [f"| {r['name']} | {verdicts[r['name']]} |" for r in wrong]
    lines += [f"| {name} | not built: {why} |" for name, why in sorted(NOT_BUILT.items())]
    return "\n".join(lines)


def _names(records: list[dict[str, Any]]) -> list[str]:
    """`llama`, `cohere (scaled)`: a model type with its variants, and what was trained where only one was right."""
    names = []
    for kind, group in groupby(sorted(records, key=lambda r: r["model_type"]), key=lambda r: r["model_type"]):
        rows = list(group)
        variants = sorted({r["variant"] for r in rows} - {""})
        trained = {r["training"] for r in rows}
        notes = variants + ([f"{trained.pop()} only"] if len(trained) == 1 else [])
        names.append(kind + (f" ({', '.join(notes)})" if notes else ""))
    return names
