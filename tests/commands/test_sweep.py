"""`gkd sweep`: its arithmetic against values by hand, its mistakes, and real sweeps, one of them killed on its way."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import load_dataset
from rich.console import Console
from user import flags, user_folder

from gkd.cli import main
from gkd.commands.sweep.board import Board
from gkd.commands.sweep.budget import common_budget, curve_of, value_at
from gkd.commands.sweep.comparison import compare
from gkd.commands.sweep.grid import Arm, Axis, cells_of, flags_of, parse_arms, parse_axes, split_values
from gkd.commands.sweep.plan import Run, launch_words
from gkd.commands.sweep.report import estimate
from gkd.commands.sweep.statistics import Stat, mean_of, paired
from gkd.commands.sweep.tuning import best, tuning_seed

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
from gkd.run import dataset_by_name, run, with_held_out

if __name__ == "__main__":
    run(lambda settings: with_held_out(dataset_by_name(settings), 4), defaults={"use_peft": False})
"""
# What a run leaves, in no time: numbers by a formula of its flags. Captured in this process it is like any recipe.
QUICK = """
import json, os, sys, time
from pathlib import Path

if os.environ.get("QUICK_RUNS"):
    values = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    lmbda, seed, rate = float(values["--lmbda"]), int(values["--seed"]), float(values.get("--learning_rate", 2e-4))
    if lmbda == float(os.environ.get("FAILS_AT", "nan")):
        print("first line", "hf_" + "a" * 30, "why it failed", sep="\\n")
        sys.exit(3)
    out = Path(values["--output_dir"])
    out.mkdir(parents=True)
    if lmbda == float(os.environ.get("SLEEPS_AT", "nan")) and seed == 43:
        (out / "asleep").touch()
        time.sleep(600)
    (out.parent / "times_run").open("a").write("x")
    value = 1 + lmbda + lmbda * (seed - 42) / 10 + (rate * 1e4 - 2) ** 2
    row = {"key": "perplexity", "label": "Perplexity", "unit": "", "goal": "lower", "teacher": None}
    rows = [{**row, "before": {"value": 9.0}, "after": {"value": value}}]
    (out / "evaluation.json").write_text(json.dumps({"rows": rows}))
    times = {s: 10 * s * (1 + lmbda) + s for s in (1, 2)}
    log = [{"eval_loss": 5.0 - s, "eval_runtime": 1.0, "eval_time/run": times[s], "step": s} for s in times]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in log))
else:
    from gkd.run import run
    run(lambda settings: {}, defaults={"learning_rate": 2e-4, "eval_strategy": "steps"})
"""


@pytest.fixture
def quick(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUICK_RUNS", "")
    (tmp_path / "quick.py").write_text(QUICK)
    return tmp_path / "quick.py"


@pytest.fixture
def runs_quickly(monkeypatch):
    """Runs see the variable, this process, which builds the configs, does not."""
    from gkd.commands.sweep import sweep as module

    original = module.Sweep.__init__
    monkeypatch.setattr(
        module.Sweep,
        "__init__",
        lambda self, plan, environment, console: original(self, plan, {**environment, "QUICK_RUNS": "1"}, console),
    )


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_axes_and_cells():
    axes = parse_axes(["lmbda=0, 1", "divergence=jsd,forward_kl"], "--grid")
    assert axes == [Axis("lmbda", ("0", "1")), Axis("divergence", ("jsd", "forward_kl"))]
    cells = cells_of(axes)
    assert [cell.name for cell in cells] == [
        "lmbda=0, divergence=jsd",
        "lmbda=0, divergence=forward_kl",
        "lmbda=1, divergence=jsd",
        "lmbda=1, divergence=forward_kl",
    ]
    assert flags_of(cells[1].values) == ["--lmbda", "0", "--divergence", "forward_kl"]
    assert len({cell.folder for cell in cells}) == 4
    assert split_values('{"a": [1, 2]},"x,y",3') == ['{"a": [1, 2]}', '"x,y"', "3"]
    hard = cells_of([Axis("model_name_or_path", ("/a/b", "_a_b", "é" * 300))])
    assert len({cell.folder for cell in hard}) == 3
    assert all("/" not in cell.folder and len(os.fsencode(cell.folder)) < 200 for cell in hard)


def test_arms_are_cells_of_several_fields():
    arms = parse_arms(["SFT: lmbda=0 --ce-weight=1.0", "own text: lmbda=1 generation_kwargs='{\"min_p\": 0.1}'"])
    assert arms[0] == Arm("SFT", (("lmbda", "0"), ("ce_weight", "1.0")))
    assert dict(arms[1].values)["generation_kwargs"] == '{"min_p": 0.1}'
    cells = cells_of(parse_axes(["beta=0,1"], "--grid"), arms)
    assert [cell.name for cell in cells] == [f"{arm.name}, beta={beta}" for arm in arms for beta in "01"]
    assert cells[2].all_values == (*arms[1].values, ("beta", "0"))
    assert len({cell.folder for cell in cells}) == 4
    assert [cell.name for cell in cells_of([], arms)] == ["SFT", "own text"]


def test_statistics_by_hand():
    assert mean_of([1.0, 2.0, 6.0]) == Stat(3.0, math.sqrt((4 + 1 + 9) / 2 / 3), 3)
    assert mean_of([2.0]) == Stat(2.0, None, 1)
    assert mean_of([]) is None
    assert mean_of([1.0, math.nan]) is None
    # Differences 1, 2, 3: far less noise than the values have. Seeds that only one has are left out.
    difference = paired({1: 101.0, 2: 52.0, 3: 13.0, 4: 0.0}, {1: 100.0, 2: 50.0, 3: 10.0, 5: 0.0})
    assert (difference.mean, difference.count) == (2.0, 3)
    assert difference.error == pytest.approx(1 / math.sqrt(3))
    assert Stat(0.0, 2.0, 3).half_width == pytest.approx(8.606)  # t of 2 degrees of freedom is 4.303
    assert Stat(0.0, None, 1).half_width is None
    assert estimate(Stat(0.12345, 0.0042, 5)) == "0.1235 ± 0.0042"
    assert estimate(Stat(123.4, 21.0, 5), signed=True) == "+123 ± 21"


def test_the_common_budget_and_values_at_it():
    def log(step, run, loss):
        times = {"eval_time/run": run, "eval_runtime": 2.0, "eval_samples_per_second": 1.0}
        return {"step": step, "eval_loss": loss, **times}

    fast = curve_of([{"loss": 1.0, "step": 5, "time/run": 5.0}, log(10, 12.0, 3.0), log(20, 24.0, 1.0)])
    assert fast == [  # the evaluations' two seconds each are taken off
        {"steps": 10.0, "seconds": 10.0, "eval_loss": 3.0},
        {"steps": 20.0, "seconds": 20.0, "eval_loss": 1.0},
    ]
    slow = curve_of([log(10, 17.0, 2.0), log(20, 34.0, 1.5), {"eval_after/perplexity": 3.0, "step": 20}])
    assert [point["seconds"] for point in slow] == [15.0, 30.0]
    assert common_budget([fast, slow], "steps") == common_budget([fast, slow], "seconds") == 20.0
    assert value_at(fast, "seconds", 20.0, "eval_loss") == 1.0
    assert value_at(slow, "seconds", 20.0, "eval_loss") == pytest.approx(2.0 - 0.5 / 3)
    assert value_at(slow, "seconds", 5.0, "eval_loss") is None
    assert common_budget([fast, []], "steps") is None
    # An evaluation before the first step is where the seconds begin: the set-up is of no cell.
    from_start = curve_of([log(0, 7.0, 4.0), log(10, 19.0, 3.0)])
    assert [point["seconds"] for point in from_start] == [0.0, 10.0]


def test_comparison_is_paired_with_the_first_cell():
    def outcome(cell, seed, value):
        measure = {"label": "Perplexity", "unit": "", "goal": "lower", "before": 9.0, "after": value, "teacher": None}
        return {"cell": cell, "seed": seed, "steps": 2, "measures": {"perplexity": measure}, "curve": []}

    runs = [outcome("a", 1, 10.0), outcome("a", 2, 20.0), outcome("b", 1, 11.0), outcome("b", 2, 23.0)]
    (found,) = compare(["a", "b", "c"], runs, ["steps"])
    assert [line.difference for line in found.lines] == [None, Stat(2.0, 1.0, 2), None]
    assert [line.value for line in found.lines] == [Stat(15.0, 5.0, 2), Stat(17.0, 6.0, 2), None]


def test_a_run_that_was_first_evaluated_after_the_budget_is_told():
    def outcome(cell, *points):
        curve = [{"steps": step, "seconds": seconds, "eval_loss": 2.0} for step, seconds in points]
        return {"cell": cell, "seed": 1, "steps": 2, "measures": {}, "curve": curve}

    runs = [outcome("a", (0, 0.0), (2, 5.0)), outcome("b", (1, 6.0), (2, 12.0))]
    loss, steps = compare(["a", "b"], runs, ["seconds"])
    assert loss.late == steps.late == ("b",)
    assert steps.lines[0].value == Stat(2.0, None, 1)
    assert compare(["a", "b"], runs, ["steps"])[0].late == ()


def test_the_best_of_what_was_tuned():
    def outcome(**after):
        goals = {"score_greedy": "higher", "perplexity": "lower"}
        return {"measures": {name: {"after": value, "goal": goals[name]} for name, value in after.items()}}

    worse, better = outcome(perplexity=3.0, score_greedy=0.1), outcome(perplexity=4.0, score_greedy=0.2)
    assert best([worse, better]) == (better, "score_greedy")
    assert best([outcome(perplexity=3.0), better])[1] == "perplexity"
    assert best([outcome(perplexity=math.nan), better]) is None
    assert best([]) is None
    assert tuning_seed(42) == 41
    assert tuning_seed(0) not in range(1000)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--grid", ""], "--grid '' should be a field and its values"),
        (["--grid", "lmbda="], "--grid 'lmbda=' names no value"),
        (["--grid", "lmbda=0,,1"], "has an empty value"),
        (["--grid", "lmbda=0,0"], "lmbda=0 comes twice"),
        (["--grid", "lmbda=0", "--grid", "lmbda=1"], "lmbda comes twice"),
        (["--grid", "lmda=0,1"], "there is no field '--lmda'; did you mean --lmbda?"),
        (["--grid", "lmbda=0,1.5"], "lmbda=1.5: lmbda"),
        (["--grid", "seed=1,2"], "seed is set by the sweep (--seeds says how many, --first_seed"),
        (["--grid", "lmbda=0,1", "--seed", "3"], "--seed is set by the sweep"),
        (["--grid", "lmbda=0,1", "--lmbda", "1"], "--lmbda is in the grid and among the flags"),
        (["--grid", "lmbda=0,1", "--tune", "lmbda=1"], "--tune: lmbda is in the grid, too"),
        (["--grid", "lmbda=0,1", "--tune", "learning_rate=x"], "lmbda=0, learning_rate=x: --learning_rate 'x'"),
        (["--arm", "lmbda=0"], "--arm 'lmbda=0' should be a name and its fields"),
        (["--arm", "a: lmbda"], "'lmbda' should be a field and its value"),
        (["--arm", "a: lmbda='0"], "No closing quotation"),
        (["--arm", "a: lmbda=0 lmbda=1"], "lmbda comes twice"),
        (["--arm", "a: lmbda=0", "--arm", "a: lmbda=1"], "the name 'a' comes twice"),
        (["--arm", "a: seed=0"], "--arm: seed is set by the sweep"),
        (["--arm", "a: lmbda=0", "--grid", "lmbda=0,1"], "--grid: lmbda is in the arm 'a', too"),
        (["--arm", "a: lmbda=0", "--lmbda", "1"], "--lmbda is in the arm 'a' and among the flags"),
        (["--arm", "a: lmda=0"], "there is no field '--lmda'"),
        ([], "name what to compare"),
        (["--grid", "lmbda=0,1", "--seeds", "0"], "--seeds 0 should be 1 or more"),
        (["--grid", "lmbda=0,1", "--first_seed", "-1"], "--first_seed -1 should be 0 or more"),
        (["--grid", "lmbda=0,1", "--first_seed", "40", "--tune", "beta=0,1"], "seed 41 is the one that values are"),
        (["--grid", "lmbda=0,1", "--at", "hours"], "--at 'hours' should be steps or seconds"),
        (["--grid", "lmbda=0,1", "--at", "seconds", "--eval_strategy", "no"], "needs evaluations along the run"),
        (["--grid", "lmbda=0,1", "--launch", "no_such_program x"], "there is no program 'no_such_program'"),
        (["--grid", "lmbda=0,1", "--push_to_hub", "true"], "the runs of a sweep are not pushed"),
    ],
)
def test_mistakes_end_in_one_line_before_the_first_run(more, said, quick, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(quick), "--output_dir", "out", *more])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in error
    assert len([line for line in error.splitlines() if line.startswith("error: ")]) == 1
    assert not Path("out").exists()


def test_a_recipe_that_is_not_there(quick, capsys):
    with pytest.raises(SystemExit):
        main(["sweep", "missing.py", "--grid", "lmbda=0,1"])
    assert "error: there is no recipe 'missing.py'" in capsys.readouterr().err


def test_a_failing_cell_is_told_and_the_rest_goes_on(quick, runs_quickly, monkeypatch, capsys):
    monkeypatch.setenv("FAILS_AT", "0.5")
    command = ["sweep", str(quick), "--grid", "lmbda=0,0.5,1", "--seeds", "2", "--output_dir", "out", "--jobs", "2"]
    assert main([*command, "--at", "steps,seconds"]) == 1
    shown = capsys.readouterr().out
    assert "failed: lmbda=0.5, seed 42, exit code 3" in shown
    assert "    why it failed" in shown
    assert "hf_" not in shown
    assert "(6 of 6)" in shown
    found = results(Path("out"))
    assert set(found["failed"]) == {"lmbda=0.5, seed 42", "lmbda=0.5, seed 43"}
    after, *along = found["comparisons"]
    assert [line["value"]["mean"] if line["value"] else None for line in after["lines"]] == [1.0, None, 2.05]
    assert after["lines"][2]["difference"]["error"] == pytest.approx(0.05)
    # 20 seconds are common; at half the speed that is step 1
    (loss,) = [one for one in along if one["key"] == "eval_loss" and one["where"] == "at 20.0 seconds"]
    assert [line["value"]["mean"] if line["value"] else None for line in loss["lines"]] == [3.0, None, 4.0]
    assert loss["late"] == []
    page = Path("out/report.md").read_text()
    for said in (
        "--seeds 2 --at steps,seconds --jobs 2",
        "why it failed",
        "CPU cores",
        "transformers ",
        "+1.050 ± 0.050",
    ):
        assert said in page
    assert Path("out/plot.png").stat().st_size > 1000
    table = load_dataset("parquet", data_files="out/results.parquet", split="train", cache_dir="cache")
    values = [row["value"] for row in table if row["kind"] == "after" and row["lmbda"] == "1"]
    assert values == [2.0, 2.1]

    # Mended and started again: what was finished is read; one more seed is run beside.
    monkeypatch.delenv("FAILS_AT")
    command[command.index("2")] = "3"
    assert main([*command, "--at", "steps,seconds"]) == 0
    found = results(Path("out"))
    assert [line["value"]["count"] for line in found["comparisons"][0]["lines"]] == [3, 3, 3]
    assert {path.read_text() for path in Path("out").rglob("times_run")} == {"x"}

    with pytest.raises(SystemExit):  # another sweep in its folder, for want of one of its values
        main(["sweep", str(quick), "--grid", "lmbda=0,1", "--output_dir", "out", "--at", "steps,seconds"])
    assert "holds another sweep (another grid): name another folder" in capsys.readouterr().err
    Path("other").mkdir()
    Path("other/thesis.tex").touch()
    with pytest.raises(SystemExit):
        main(["sweep", str(quick), "--grid", "lmbda=0,1", "--output_dir", "other"])
    assert "holds something else (thesis.tex)" in capsys.readouterr().err


def test_a_sweep_goes_on_with_more_values_arms_and_seeds(quick, runs_quickly, capsys):
    """Nothing that was finished is run again, or lost, though the new values stand before and between the old ones."""

    def swept(*axes, seeds, more=()):
        grids = [word for axis in axes for word in ("--grid", axis)]
        assert main(["sweep", str(quick), *grids, "--seeds", str(seeds), "--output_dir", "out", *more]) == 0
        found = results(Path("out"))
        assert not found["failed"]
        assert {path.read_text() for path in Path("out").rglob("times_run")} == {"x"}
        return found, len(list(Path("out").rglob("times_run")))

    _, before = swept("beta=0,1", "lmbda=0,1", seeds=1)
    assert before == 4
    plan = json.loads(Path("out/sweep.json").read_text())
    folders = plan.pop("folders")
    Path("out/sweep.json").write_text(json.dumps(plan))  # as it was before folders were written down
    files = {path: path.read_bytes() for path in Path("out").rglob("run.json")}
    capsys.readouterr()
    found, after = swept("beta=0,1", "lmbda=0.5,0,1", seeds=2)
    assert after == 12
    assert capsys.readouterr().out.count("already done: ") == 4
    assert {path: path.read_bytes() for path in files} == files
    assert found["cells"] == [f"beta={b}, lmbda={a}" for b in "01" for a in ("0.5", "0", "1")]
    for line in found["comparisons"][0]["lines"]:
        lmbda = float(line["cell"].rpartition("=")[2])
        assert line["by_seed"] == {"42": pytest.approx(1 + lmbda), "43": pytest.approx(1 + 1.1 * lmbda)}
    now = json.loads(Path("out/sweep.json").read_text())["folders"]
    assert now.items() >= folders.items()
    assert len(set(now.values())) == 6
    found, after = swept("beta=0,1", "lmbda=0.5,0,1", seeds=1, more=("--first_seed", "43"))
    assert after == 12
    assert found["comparisons"][0]["lines"][2]["by_seed"] == {"43": pytest.approx(2.1)}
    for axes, more, said in (
        (("beta=0,1", "lmbda=0,1"), (), "another grid): name another folder, or delete it (values, arms and"),
        (("lmbda=0.5,0,1", "beta=0,1"), (), "another grid"),
        (("beta=0,1", "lmbda=0.5,0,1"), ("--learning_rate", "3e-4"), "another flags): name another folder, or"),
        (("beta=0,1",), ("--arm", "a: lmbda=0"), "another grid, another arms"),
    ):
        with pytest.raises(SystemExit):
            swept(*axes, seeds=1, more=more)
        assert said in capsys.readouterr().err


def test_arms_are_added_and_none_is_changed(quick, runs_quickly, capsys):
    command = ["sweep", str(quick), "--seeds", "1", "--output_dir", "out", "--arm", "low: lmbda=0"]
    assert main(command) == 0
    assert main([*command[:-2], "--arm", "high: lmbda=1", "--arm", "low: lmbda=0"]) == 0
    assert "already done: low, seed 42" in capsys.readouterr().out
    assert [line["value"]["mean"] for line in results(Path("out"))["comparisons"][0]["lines"]] == [2.0, 1.0]
    with pytest.raises(SystemExit):
        main([*command[:-2], "--arm", "high: lmbda=1", "--arm", "low: lmbda=0.5"])
    assert "another arms" in capsys.readouterr().err


def going(text):
    return {Run(cells_of([], [Arm(text, ())])[0], 42, Path("nowhere")): 35.0}


def test_a_log_gets_a_line_after_a_while_and_a_terminal_a_bar_that_moves(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    board = Board(Console(file=(log := io.StringIO()), width=80), 3, 1)
    said = []
    with board.shown():
        for second in range(0, 200):
            clock[0] = float(second)
            if second == 150:
                board.advance("done: low, seed 42", 120.0)
            before = log.getvalue()
            board.look({**going("high"), **going("low")})
            if log.getvalue() != before:
                said.append(second)
    assert said == [10, 30, 70, 130, 160, 180], "10, 20, 40, 60 seconds of silence, which a run's end breaks"
    lines = log.getvalue().splitlines()
    assert lines[0] == "running: high, seed 42 and 1 more, for 35 s (0 of 3 done)"
    assert "done: low, seed 42 (1 of 3, about 4 min left)" in lines
    shown = Console(file=(screen := io.StringIO()), width=80, force_terminal=True, get_time=lambda: clock[0])
    board = Board(shown, 3, 1)
    with board.shown():
        for second in range(0, 4):
            clock[0] = 200.0 + second
            board.look(going("a cell whose name is far longer than a bar has room"))
    drawn = screen.getvalue()
    assert "a cell whose name is far long… " in drawn
    assert all(f"0:00:0{second}" in drawn for second in range(0, 4))
    assert "running:" not in drawn


def test_a_value_is_tuned_for_each_cell_on_a_seed_of_its_own(quick, runs_quickly, monkeypatch):
    command = ["sweep", str(quick), "--grid", "lmbda=0,1", "--seeds", "1", "--output_dir", "out"]
    assert main([*command, "--tune", "learning_rate=1e-4,2e-4,4e-4"]) == 0
    found = results(Path("out"))
    assert set(found["tuned"]) == {"lmbda=0", "lmbda=1"}
    assert found["tuned"]["lmbda=1"] == "learning_rate=2e-4, of 3 tried, by perplexity"
    runs = [(run["seed"], run["tuned"]["learning_rate"]) for run in found["runs"]]
    assert runs[:2] == [(42, "2e-4")] * 2
    assert sorted(runs[2:]) == sorted([(41, "1e-4"), (41, "2e-4"), (41, "4e-4")] * 2)
    assert "| lmbda=1 | learning_rate=2e-4, of 3 tried, by perplexity |" in Path("out/report.md").read_text()


def test_arms_with_different_fields_are_one_table(quick, runs_quickly):
    command = ["sweep", str(quick), "--arm", "low: lmbda=0", "--arm", "high: lmbda=1 learning_rate=3e-4"]
    assert main([*command, "--seeds", "2", "--output_dir", "out"]) == 0
    found = results(Path("out"))
    assert found["cells"] == ["low", "high"]
    assert "--arm 'high: lmbda=1 learning_rate=3e-4'" in found["command"]
    assert [line["value"]["mean"] for line in found["comparisons"][0]["lines"]] == pytest.approx([1.0, 3.05])
    table = load_dataset("parquet", data_files="out/results.parquet", split="train", cache_dir="cache").to_pandas()
    assert set(table[table["cell"] == "high"]["learning_rate"]) == {"3e-4"}
    assert table[table["cell"] == "low"]["learning_rate"].isna().all()


def test_a_launcher_stands_in_front_of_the_recipe():
    assert launch_words(None) == [sys.executable]
    first, *rest = launch_words("accelerate launch --num_processes 2")
    assert Path(first).name == "accelerate"
    assert rest == ["launch", "--num_processes", "2"]


def wait_for(condition, process):
    end = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_real_sweep_that_is_killed_goes_on_and_gives_its_table(tmp_path, monkeypatch):
    user_folder(tmp_path)
    (tmp_path / "recipe.py").write_text(RECIPE)
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    recipe_flags = flags(tmp_path, None, eval_strategy="steps", eval_steps=1, eval_on_start=True, save_strategy="no")
    command = ["sweep", str(tmp_path / "recipe.py"), "--grid", "lmbda=0,1", "--seeds", "2", "--at", "steps,seconds"]
    command += ["--output_dir", str(out), *recipe_flags]
    with (tmp_path / "first.txt").open("wb") as log:
        first = subprocess.Popen([sys.executable, "-m", "gkd.cli", *command], stdout=log, stderr=log)
    places = [out / cell / f"seed_{seed}" for seed in (42, 43) for cell in ("00_lmbda-0", "01_lmbda-1")]
    wait_for(lambda: (places[0] / "run.json").exists() and (places[1] / "output").exists(), first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = (places[0] / "run.json").read_bytes()
    assert not (places[1] / "run.json").exists()

    assert main(command) == 0
    assert (places[0] / "run.json").read_bytes() == kept
    found = results(out)
    assert not found["failed"]
    after = {}
    for place, cell in zip(places, ["lmbda=0", "lmbda=1"] * 2, strict=True):
        rows = json.loads((place / "output" / "evaluation.json").read_text())["rows"]
        after.setdefault(cell, []).append({row["key"]: row["after"]["value"] for row in rows}["divergence_own"])
    (own,) = [one for one in found["comparisons"] if one["key"] == "divergence_own"]
    for line in own["lines"]:
        assert line["value"]["mean"] == pytest.approx(sum(after[line["cell"]]) / 2)
    gains = [b - a for a, b in zip(after["lmbda=0"], after["lmbda=1"], strict=True)]
    assert own["lines"][1]["difference"]["mean"] == pytest.approx(sum(gains) / 2)
    assert own["lines"][1]["difference"]["error"] == pytest.approx(abs(gains[0] - gains[1]) / 2)
    assert after["lmbda=0"][0] != after["lmbda=0"][1]
    assert not any(one["late"] for one in found["comparisons"])
    by_seconds = [one for one in found["comparisons"] if one["where"].endswith("seconds")]
    assert {"eval_loss", "steps"} <= {one["key"] for one in by_seconds}
    assert all(line["value"] for one in by_seconds if one["key"] == "steps" for line in one["lines"])
    assert {run["cpu_seconds"] > 0 and run["steps"] == 2 for run in found["runs"]} == {True}
