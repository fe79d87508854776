"""`gkd precompute` on two processes under ZeRO-3: the same answers as one process gives, and one fingerprint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset
from launch import execute
from tiny import save_tiny, tiny_rows

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("operators")]

PLAN = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
LAUNCHER = ["-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no", "--num_machines", "1"]
LAUNCHER += ["--main_process_port", "0", "--num_processes", "2", "--dynamo_backend", "no"]


def test_sharded_ranks_share_the_work_and_write_what_one_process_writes(tmp_path: Path) -> None:
    save_tiny(tmp_path / "student", seed=1)
    save_tiny(tmp_path / "teacher", seed=2, hidden=48, layers=3)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(9)))
    (tmp_path / "zero3.json").write_text(json.dumps(PLAN))
    values = {
        "model_name_or_path": tmp_path / "student",
        "teacher_model_name_or_path": tmp_path / "teacher",
        "dataset_name": tmp_path / "rows.jsonl",
        "max_new_tokens": 6,
        "rollout_batch_size": 4,  # 9 prompts, 8 at a time: the second rank has none in the last call
    }
    command = ["-m", "gkd.cli", "precompute", "recipes/gkd_qwen2.py"]
    command += [part for name, value in values.items() for part in (f"--{name}", str(value))]
    environment = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero3.json"),
        "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
    }
    tables, stores = [], []
    for name, launcher, variables in (("two", LAUNCHER, environment), ("one", [], {})):
        folder = tmp_path / name
        execute(
            [*launcher, *command, "--output_dir", str(folder), "--precompute_output", str(folder / "data")],
            **variables,
        )
        tables.append(Dataset.from_parquet(str(folder / "data" / "data" / "train-00000-of-00001.parquet")).to_list())
        stores.append({path.parent.name: 0 for path in folder.glob("_teacher_sequences/*/about.json")})
        for path in folder.glob("_teacher_sequences/*/*.jsonl"):
            stores[-1][path.parent.name] += len(path.read_text().splitlines())
    assert tables[0] == tables[1]
    assert len(tables[0]) == 9
    assert stores[0] == stores[1]  # one folder of the same name: the sharded teacher has the whole one's fingerprint
    assert list(stores[0].values()) == [9]
