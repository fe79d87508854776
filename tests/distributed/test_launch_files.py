"""Every file of deepspeed_configs/ trains, on two processes without a GPU; so does the recipe, from start to end."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from cases import RANKS, Case
from launch import ROOT, execute, launch
from results import read
from tiny import tiny_rows

from gkd.cli import main
from gkd.servers.own import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("operators")]

FILES = sorted((ROOT / "deepspeed_configs").glob("*.yaml"))
ENGINES = {
    "ddp": "ddp",
    "zero1": "zero-1",
    "zero2": "zero-2",
    "zero2_offload": "zero-2",
    "zero3": "zero-3 partly",  # so small a model stays whole
    "zero3_offload": "zero-3 partly",
    "two_machines": "zero-2",
}
ARGS = {"max_steps": 2, "bf16": None}  # bf16 is what the file says


def parsed(path: Path) -> tuple[Any, dict[str, str]]:
    """What `accelerate launch` makes of a file: its arguments, and the variables that it gives to the ranks."""
    port = str(free_port())
    args = launch_command_parser().parse_args(["--config_file", str(path), "--main_process_port", port, "recipe.py"])
    args, defaults, _ = _validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join([*defaults.deepspeed_config, "mixed_precision"])
        variables = prepare_deepspeed_cmd_env(args)[1]
    else:
        variables = prepare_multi_gpu_env(args)
    return args, {name: value for name, value in variables.items() if name.startswith("ACCELERATE_")}


def test_every_file_is_here():
    assert {path.stem for path in FILES} == set(ENGINES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_it(path):
    args, variables = parsed(path)
    values = yaml.safe_load(path.read_text())
    assert args.num_processes == values["num_processes"] == 8 * values["num_machines"]
    assert variables["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert ("ACCELERATE_USE_DEEPSPEED" in variables) == ENGINES[path.stem].startswith("zero")
    assert path.read_text().startswith("# "), "says when to choose it"
    if "deepspeed_config" in values:
        assert variables["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == ENGINES[path.stem][5]
        offloads = variables["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] == "cpu"
        assert offloads == ("offload" in path.stem)


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    """One launch for all files: each case runs under the variables that `accelerate launch` makes of its file."""
    out = tmp_path_factory.mktemp("files")
    # LoRA in half of them, the whole model in the other half
    cases = [
        Case(path.stem, ARGS, parsed(path)[1], ENGINES[path.stem], lora=path.stem.startswith("zero2"))
        for path in FILES
        if path.stem not in ("ddp", "two_machines")
    ]
    options = ["--config_file", str(ROOT / "deepspeed_configs" / "zero2.yaml")]
    launch(cases, models, out, options, TORCH_DISTRIBUTED_DEBUG="DETAIL")
    launch(
        [Case("ddp", ARGS, {}, "ddp")], models, out, ["--config_file", str(ROOT / "deepspeed_configs" / "ddp.yaml")]
    )
    return out


@pytest.mark.parametrize("name", sorted(set(ENGINES) - {"two_machines"}))
def test_it_trains(name, trained):
    result = read(trained / name)
    assert len(result.steps) == 2
    assert all(0 < step["loss"] < 1 and step["grad_norm"] > 0 for step in result.steps)
    assert {str(path) for path in (trained / name).glob("windows-*")} == {
        str(trained / name / f"windows-{rank}.json") for rank in range(RANKS)
    }


def test_two_machines(models, tmp_path):
    """The two launchers of two machines, both here, with one process each."""
    case = Case("two_machines", ARGS, engine="zero-2")
    port = str(free_port())
    options = ["--config_file", str(ROOT / "deepspeed_configs" / "two_machines.yaml")]

    (tmp_path / "0").mkdir()
    (tmp_path / "1").symlink_to(tmp_path / "0")  # the folder that machines share

    def machine(rank: int) -> str:
        place = ["--machine_rank", str(rank), "--main_process_port", port]
        return launch([case], models, tmp_path / str(rank), options, machines=place)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(machine, range(2)))
    folder = tmp_path / "0" / "two_machines"
    rows = [json.loads((folder / f"windows-{rank}.json").read_text()) for rank in range(2)]
    assert not {s[0] for step in rows[0] for s in step} & {s[0] for step in rows[1] for s in step}
    assert (folder / "result.json").exists()


# ------------------------------------------------------------------------------------------------- the recipe


@pytest.fixture(scope="module")
def recipe(models, tmp_path_factory) -> list[str]:
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(16)))
    flags = {
        "model_name_or_path": models / "untied",
        "teacher_model_name_or_path": models / "teacher",
        "dataset_name": rows,
        "lora_r": 4,
        "lora_dropout": 0.0,  # drawn by each rank for itself
        "max_steps": 2,
        "max_length": 128,
        "max_new_tokens": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_eval_prompts": 3,
        "logging_steps": 1,
        "report_to": "none",
    }
    return [str(ROOT / "recipes" / "gkd_qwen2.py"), *(f"--{name}={value}" for name, value in flags.items())]


def measured(folder: Path) -> dict[str, float]:
    """The numbers of a run's evaluation.json: of the student before and after, and of the teacher."""
    rows = json.loads((folder / "evaluation.json").read_text())["rows"]
    return {
        f"{row['key']}/{column}": row[column]["value"]
        for row in rows
        for column in ("before", "after", "teacher")
        if row[column] is not None
    }


def test_the_recipe_runs_from_start_to_end_and_measures_what_one_process_does(recipe, tmp_path):
    """As documented, `accelerate launch --config_file deepspeed_configs/zero3.yaml recipes/gkd_qwen2.py`."""
    config, folder = str(ROOT / "deepspeed_configs" / "zero3.yaml"), tmp_path / "zero3"
    command = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--main_process_port", "0"]
    output = execute(
        [*command, *recipe, f"--output_dir={folder}", "--dtype=float32"], TORCH_DISTRIBUTED_DEBUG="DETAIL"
    )
    assert f"saved to {folder}" in output.replace("\n", "")
    for name in ("adapter_model.safetensors", "adapter_config.json", "evaluation.json", "README.md"):
        assert (folder / name).exists(), name
    alone = [f"--output_dir={tmp_path / 'alone'}", "--dtype=float32", "--per_device_train_batch_size=4"]
    assert main(["run", *recipe, *alone]) == 0
    numbers, expected = measured(folder), measured(tmp_path / "alone")
    assert len(expected) > 10
    assert numbers == pytest.approx(expected, rel=1e-4, abs=1e-6)
