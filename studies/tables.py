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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from gkd.commands.sweep.statistics import Stat, mean_of, paired
from gkd.report.markdown import markdown_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from time_levels import LEVELS, found_in, rows

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs" / "evidence.md", *sorted((ROOT / "studies").glob("*/README.md"))]
DIGITS = 5
LABELS = {
    "score_greedy": "right, greedy",
    "score_sampled": "right, T = 1",
    "kl_gap": "exposure gap",
    "learning_rate": "learning rate",
    "divergence_own": "own divergence, own text",
    "divergence_teacher_text": "own divergence, teacher's text",
    "exposure_gap": "gap in own divergence",
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
    "tail_1": "outside the teacher's first",
    "tail_4": "outside its first 4",
    "tail_16": "outside its first 16",
    "overconfidence": "too sure by",
    "acceptance": "taken, T = 1",
    "acceptance_greedy": "taken, greedy",
    "block_efficiency": "tokens a pass of 4 drafted, T = 1",
    "block_efficiency_greedy": "greedy",
    "cpu_seconds": "CPU s a run",
}
_WALK, _AFTER = "grid_walk/results/steps.json", "grid_walk/results/afterwards.json"
_LONGER, _LONGER_AFTER = "grid_walk/results/longer.json", "grid_walk/results/longer_afterwards.json"
_ONE, _SHARE = "one_answer/results/steps.json", "share_and_divergence/results/steps.json"
_LARGER = "share_and_divergence/results/smollm2.json"
_WARM = "warm_start/results/steps.json"
_WARM_KD, _WARM_OWN = "the teacher's text", "own text from the start"
_KD, _OWN = "supervised KD, fresh", "on-policy, beta 0"
_TEXT_KD, _TEXT_OWN = "lmbda=0, divergence=forward_kl", "lmbda=1, divergence=forward_kl"
SUMMARY = (  # what is compared; file and cell without the student's text, file and cell with it; the measure
    ("Many right answers: arrives, greedy, %", _WALK, _KD, _WALK, _OWN, "score_greedy %"),
    ("– sampled at T = 1, %", _WALK, _KD, _WALK, _OWN, "score_sampled %"),
    ("– after 4 forced random moves, greedy, %", _AFTER, _KD, _AFTER, _OWN, "arrives_4_greedy %"),
    ("– exposure gap, nats a token", _WALK, _KD, _WALK, _OWN, "kl_gap"),
    ("– CPU seconds a run", _WALK, _KD, _WALK, _OWN, "cpu_seconds"),
    ("Against three times the steps: CPU seconds a run", _LONGER, _KD, _WALK, _OWN, "cpu_seconds"),
    ("– arrives, greedy, %", _LONGER, _KD, _WALK, _OWN, "score_greedy %"),
    ("– sampled at T = 1, %", _LONGER, _KD, _WALK, _OWN, "score_sampled %"),
    ("– after 4 forced random moves, greedy, %", _LONGER_AFTER, _KD, _AFTER, _OWN, "arrives_4_greedy %"),
    ("A broken student, many right answers: arrives, greedy, %", _WARM, _WARM_KD, _WARM, _WARM_OWN, "score_greedy %"),
    ("– sampled at T = 1, %", _WARM, _WARM_KD, _WARM, _WARM_OWN, "score_sampled %"),
    ("– KL on own text, nats a token", _WARM, _WARM_KD, _WARM, _WARM_OWN, "forward_kl_own"),
    ("One right answer: right, greedy, %", _ONE, "supervised KD", _ONE, _OWN, "score_greedy %"),
    ("– sampled at T = 1, %", _ONE, "supervised KD", _ONE, _OWN, "score_sampled %"),
    ("Short text: KL on own text, nats a token", _SHARE, _TEXT_KD, _SHARE, _TEXT_OWN, "forward_kl_own"),
    ("– KL on the teacher's text, nats a token", _SHARE, _TEXT_KD, _SHARE, _TEXT_OWN, "forward_kl_teacher_text"),
    ("SmolLM2-135M, 10 steps: KL on own text", _LARGER, "lmbda=0", _LARGER, "lmbda=1", "forward_kl_own"),
    ("– KL on the teacher's text, nats a token", _LARGER, "lmbda=0", _LARGER, "lmbda=1", "forward_kl_teacher_text"),
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
    assert all(run[name] == first[name] for run in found["runs"] for name in ("hardware", "versions"))
    runs = [_kept_run(run, first["commit"]) for run in found["runs"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(run, ensure_ascii=False) for run in runs)
    text = json.dumps(about, indent=1, ensure_ascii=False)[:-2] + f',\n "runs": [\n{lines}\n]\n}}\n'
    path.write_text(text, encoding="utf-8")
    if (sweep / "plot.png").is_file():
        with Image.open(sweep / "plot.png") as plot:
            plot.convert("P", palette=Image.Palette.ADAPTIVE, colors=16).save(path.with_suffix(".png"), optimize=True)


def _kept_run(run: dict[str, Any], commit: str) -> dict[str, Any]:
    """With its commit, where it is not the first run's: a seed that was added later."""
    measures = {
        key: {place: rounded(one[place]) for place in ("before", "after", "teacher") if one[place] is not None}
        for key, one in run["measures"].items()
    }
    names = ("cell", "seed", "tuning", "tuned", "steps")
    later = {"commit": run["commit"]} if run["commit"] != commit else {}
    own = {name: run[name] for name in names} | later
    return {**own, "cpu_seconds": run["cpu_seconds"], "measures": measures}


# ---------------------------------------------------------------------------------------------------------- tables


def by_seed(found: dict[str, Any], cell: str, measure: str) -> dict[int, float]:
    """A cell's values of `key`, `key.before` or `key.teacher`, or of a number of the run itself."""
    key, _, place = measure.partition(".")
    values = {}
    for run in found["runs"]:
        if run["cell"] == cell and not run.get("tuning"):
            value = _value(run, key, place or "after")
            if value is not None:
                values[run["seed"]] = value
    return values


def _value(run: dict[str, Any], key: str, place: str) -> float | None:
    measures = run["measures"]
    if key == "kl_gap":  # the exposure gap, of cells that were trained with different divergences
        return float(measures["forward_kl_own"][place] - measures["forward_kl_teacher_text"][place])
    if key == "learning_rate":
        return float(run["tuned"][key])
    value = measures[key].get(place) if key in measures else run.get(key)
    return None if value is None else float(value)


def shown(stat: Stat | None, percent: bool, signed: bool = False) -> str:
    """Mean ± standard error."""
    if stat is None:
        return "–"
    if stat.mean < 0.02 and not stat.error and not signed:  # a learning rate
        return f"{stat.mean:g}"
    scale, digits = (100, 1) if percent else (1, 1 if abs(stat.mean) >= 10 else 3)
    text = f"{stat.mean * scale:{'+' if signed else ''}.{digits}f}"
    return text if stat.error is None else f"{text} ± {stat.error * scale:.{digits}f}"


def table(path: Path, columns: Sequence[str]) -> str:
    """Every cell with its measures, and the first measure's difference to the first cell, paired by seed."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if "rows" in found:
        return _by_tail(found["rows"], columns[0])
    if "levels" in found:
        return _by_level(found)
    wanted = [(column.rstrip(" %"), column.endswith("%")) for column in columns]
    base = by_seed(found, found["cells"][0], wanted[0][0])
    lines = []
    for cell in found["cells"]:
        values = [by_seed(found, cell, name) for name, _ in wanted]
        texts = [shown(mean_of(list(one.values())), percent) for one, (_, percent) in zip(values, wanted, strict=True)]
        difference = shown(paired(values[0], base), wanted[0][1], signed=True) if cell != found["cells"][0] else ""
        lines.append([cell, texts[0], difference, *texts[1:]])
    heads = [heading(name, percent) for name, percent in wanted]
    return markdown_table(["", heads[0], "to the first", *heads[1:]], lines, "l" + "r" * (len(heads) + 1))


def _by_tail(places: Sequence[dict[str, Any]], column: str) -> str:
    """One number of the top-k study: a line for each divergence and k, a column for each tail."""
    tails = list(dict.fromkeys(row["tail"] for row in places))
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for row in places:
        lines.setdefault((row["divergence"], row["k"]), {"mass": row["teacher's tail"]})[row["tail"]] = row[column]
    texts = [
        [name, str(k), f"{line['mass'] * 100:.0f}", *(f"{line[t]:.2f}" if t in line else "–" for t in tails)]
        for (name, k), line in lines.items()
    ]
    return markdown_table(["divergence", "k", "teacher's tail, %", *tails], texts, "l" + "r" * (len(tails) + 2))


def _by_level(found: dict[str, Any]) -> str:
    """Of the time to quality."""
    heads = ["", "learning rate", *(f"{share * 100:.0f} % of the start" for share in LEVELS)]
    return markdown_table(heads, rows(found["levels"], found_in(found)), "l" + "r" * (len(heads) - 1))


def summary() -> str:
    """What a newcomer reads first: two cells that differ in who writes, and nothing else."""
    lines = []
    for label, first, without, second, with_, measure in SUMMARY:
        name, percent = measure.rstrip(" %"), measure.endswith("%")
        a, b = (
            by_seed(json.loads((ROOT / "studies" / file).read_text(encoding="utf-8")), cell, name)
            for file, cell in ((first, without), (second, with_))
        )
        seeds = sorted(a.keys() & b.keys())
        texts = [shown(mean_of([one[seed] for seed in seeds]), percent) for one in (a, b)]
        lines.append([label, *texts, shown(paired(b, a), percent, signed=True), str(len(seeds))])
    return markdown_table(["", "others' text", "the student's own", "difference", "seeds"], lines, "lrrrr")


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
