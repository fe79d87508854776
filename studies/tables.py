"""The raw results of the studies, and the tables of their pages, which are made from them.

    python studies/tables.py --keep outputs/walk studies/grid_walk/results/steps.json   # of a sweep, what is kept
    python studies/tables.py                                                            # write the tables anew

In a page, a comment says what the table below it holds: the file, then the measures, `%` behind one that is times
100, `.before` or `.teacher` where it is not the one after training.

    <!-- table: studies/grid_walk/results/steps.json | score_greedy % | exposure_gap | score_greedy.before % -->
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gkd.commands.sweep.statistics import Stat, mean_of, paired
from gkd.report.markdown import markdown_table

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs" / "evidence.md", *sorted((ROOT / "studies").glob("*/README.md"))]
DIGITS = 5
LABELS = {
    "score_greedy": "right, greedy",
    "score_sampled": "right, T = 1",
    "exposure_gap": "exposure gap",
    "divergence_own": "own divergence, own text",
    "forward_kl_own": "KL, own text",
    "forward_kl_teacher_text": "KL, teacher's text",
    "agreement_own": "agreement, own text",
    "agreement_teacher_text": "agreement, teacher's text",
    "perplexity": "perplexity",
    "ended": "ended",
    "length": "length",
    "repeated_4grams": "repeated 4-grams",
    "distinct_2": "distinct 2-grams",
    **{f"arrives_{k}_{way}": f"k = {k}, {way}" for k in (0, 2, 4, 8) for way in ("greedy", "sampled")},
    "leaves_0_sampled": "leaves the board, T = 1",
    "different_walks": "different right walks of 16",
    "one_of_16": "one of 16 right",
    "cpu_seconds": "CPU s a run",
}
_WALK, _ONE, _SHARE = "grid_walk/results/", "one_answer/results/steps.json", "share_and_divergence/results/steps.json"
_KD, _OWN = "supervised KD, fresh", "on-policy, beta 0"
SUMMARY = (
    ("many right answers: arrive, greedy, %", _WALK + "steps.json", "score_greedy %", _KD, _OWN),
    ("the same, sampled at T = 1, %", _WALK + "steps.json", "score_sampled %", _KD, _OWN),
    ("after 4 forced random moves, greedy, %", _WALK + "afterwards.json", "arrives_4_greedy %", _KD, _OWN),
    ("the same, sampled at T = 1, %", _WALK + "afterwards.json", "arrives_4_sampled %", _KD, _OWN),
    ("exposure gap, nats a token", _WALK + "steps.json", "exposure_gap", _KD, _OWN),
    ("one right answer: right, greedy, %", _ONE, "score_greedy %", "supervised KD", _OWN),
    ("the same, sampled at T = 1, %", _ONE, "score_sampled %", "supervised KD", _OWN),
    (
        "text, 0.85M teacher: KL on own text, nats a token",
        _SHARE,
        "forward_kl_own",
        "lmbda=0, divergence=forward_kl",
        "lmbda=1, divergence=forward_kl",
    ),
    (
        "the same on the teacher's text",
        _SHARE,
        "forward_kl_teacher_text",
        "lmbda=0, divergence=forward_kl",
        "lmbda=1, divergence=forward_kl",
    ),
    ("cost, many right answers: CPU seconds a run", _WALK + "steps.json", "cpu_seconds", _KD, _OWN),
)
_SUMMARY_MARK = re.compile(r"(<!-- summary -->\n)((?:\|.*\n)*)")
_MARK = re.compile(r"(<!-- table: (.+?) -->\n)((?:\|.*\n)*)")


def rounded(value: float | None) -> float | None:
    """Five digits that count: more than any error leaves."""
    return None if value is None else float(f"{value:.{DIGITS}g}")


def keep(sweep: Path, path: Path) -> None:
    """What is kept of a sweep: every measure of every run, the tuning's too, and what gave them; and its plot."""
    found = json.loads((sweep / "results.json").read_text(encoding="utf-8"))
    first = found["runs"][0]
    about = {name: found[name] for name in ("command", "seeds", "cells", "tuned", "failed")}
    about |= {name: first[name] for name in ("commit", "hardware", "versions")}
    assert all(run[name] == first[name] for run in found["runs"] for name in ("commit", "hardware", "versions"))
    runs = [_kept_run(run) for run in found["runs"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(run, ensure_ascii=False) for run in runs)
    text = json.dumps(about, indent=1, ensure_ascii=False)[:-2] + f',\n "runs": [\n{lines}\n]\n}}\n'
    path.write_text(text, encoding="utf-8")
    if (sweep / "plot.png").is_file():
        shutil.copy(sweep / "plot.png", path.with_suffix(".png"))


def _kept_run(run: dict[str, Any]) -> dict[str, Any]:
    measures = {
        key: {place: rounded(one[place]) for place in ("before", "after", "teacher") if one[place] is not None}
        for key, one in run["measures"].items()
    }
    names = ("cell", "seed", "tuning", "tuned", "steps")
    return {**{name: run[name] for name in names}, "cpu_seconds": run["cpu_seconds"], "measures": measures}


# ---------------------------------------------------------------------------------------------------------- tables


def by_seed(found: dict[str, Any], cell: str, measure: str) -> dict[int, float]:
    """A cell's values of `key`, `key.before` or `key.teacher`, or of a number of the run itself."""
    key, _, place = measure.partition(".")
    values = {}
    for run in found["runs"]:
        if run["cell"] == cell and not run.get("tuning"):
            value = run["measures"][key].get(place or "after") if key in run["measures"] else run.get(key)
            if value is not None:
                values[run["seed"]] = value
    return values


def shown(stat: Stat | None, percent: bool, signed: bool = False) -> str:
    """Mean ± standard error."""
    if stat is None:
        return "–"
    scale, digits = (100, 1) if percent else (1, 2 if abs(stat.mean) >= 10 else 3)
    text = f"{stat.mean * scale:{'+' if signed else ''}.{digits}f}"
    return text if stat.error is None else f"{text} ± {stat.error * scale:.{digits}f}"


def table(path: Path, columns: Sequence[str]) -> str:
    """Every cell with its measures, and the first measure's difference to the first cell, paired by seed."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if "rows" in found:
        return _by_tail(found["rows"], columns[0])
    wanted = [(column.rstrip(" %"), column.endswith("%")) for column in columns]
    base = by_seed(found, found["cells"][0], wanted[0][0])
    rows = []
    for cell in found["cells"]:
        values = [by_seed(found, cell, name) for name, _ in wanted]
        texts = [shown(mean_of(list(one.values())), percent) for one, (_, percent) in zip(values, wanted, strict=True)]
        difference = shown(paired(values[0], base), wanted[0][1], signed=True) if cell != found["cells"][0] else ""
        rows.append([cell, texts[0], difference, *texts[1:]])
    heads = [heading(name, percent) for name, percent in wanted]
    return markdown_table(["", heads[0], "to the first", *heads[1:]], rows, "l" + "r" * (len(heads) + 1))


def _by_tail(rows: Sequence[dict[str, Any]], column: str) -> str:
    """One number of the top-k study: a line for each divergence and k, a column for each tail."""
    tails = list(dict.fromkeys(row["tail"] for row in rows))
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        lines.setdefault((row["divergence"], row["k"]), {"mass": row["teacher's tail"]})[row["tail"]] = row[column]
    texts = [
        [name, str(k), f"{line['mass'] * 100:.0f}", *(f"{line[t]:.2f}" if t in line else "–" for t in tails)]
        for (name, k), line in lines.items()
    ]
    return markdown_table(["divergence", "k", "teacher's tail, %", *tails], texts, "l" + "r" * (len(tails) + 2))


def summary() -> str:
    """What a newcomer reads first: two cells that differ in who writes, and nothing else."""
    rows = []
    for label, file, measure, without, with_ in SUMMARY:
        path = ROOT / "studies" / file
        found = json.loads(path.read_text(encoding="utf-8"))
        name, percent = measure.rstrip(" %"), measure.endswith("%")
        a, b = by_seed(found, without, name), by_seed(found, with_, name)
        texts = [shown(mean_of(list(one.values())), percent) for one in (a, b)]
        rows.append([label, *texts, shown(paired(b, a), percent, signed=True)])
    return markdown_table(["", "others' text", "the student's own", "difference"], rows, "lrrr")


def heading(measure: str, percent: bool) -> str:
    """Of a column."""
    key, _, place = measure.partition(".")
    return LABELS.get(key, key) + (f", {place}" if place else "") + (", %" if percent else "")


def written_anew(page: str) -> str:
    """The page with its tables from the raw results."""

    def anew(match: re.Match[str]) -> str:
        path, *columns = (part.strip() for part in match[2].split("|"))
        return match[1] + table(ROOT / path, columns).rstrip("\n") + "\n"

    with_summary = _SUMMARY_MARK.sub(lambda match: match[1] + summary() + "\n", page)
    return _MARK.sub(anew, with_summary)


def main() -> None:
    """Keep a sweep's results, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", nargs=2, type=Path, metavar=("SWEEP", "FILE"))
    asked = parser.parse_args()
    if asked.keep:
        keep(*asked.keep)
        return
    for path in PAGES:
        path.write_text(written_anew(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
