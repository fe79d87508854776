"""Building a config joins no process group."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = Path(__file__).resolve().parents[2] / "gkd" / "config"
BUILD = """
import sys, torch
from gkd.config import GKDConfig
config = GKDConfig(output_dir=sys.argv[1], report_to=[], deepspeed=sys.argv[2])
assert not torch.distributed.is_initialized(), "building a config joined a process group"
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
assert is_deepspeed_zero3_enabled(), "a model that is loaded now would not be split up"
from gkd.models.zero import join_ranks_on_cpu
if not torch.accelerator.is_available():
    join_ranks_on_cpu()
    assert torch.distributed.is_initialized()
"""


@pytest.mark.slow
@pytest.mark.usefixtures("operators")
def test_a_config_with_deepspeed_joins_no_process_group(tmp_path):
    """One process, as a launcher of ranks describes it; accelerate, which joins several while `TrainingArguments` sets
    up its device, has nothing to join here."""
    plan = tmp_path / "zero3.json"
    sizes = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "auto")
    plan.write_text(json.dumps({**sizes, "zero_optimization": {"stage": 3}}))
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    subprocess.run([sys.executable, "-c", BUILD, tmp_path, plan], check=True, env={**os.environ, **ranks})


def test_no_file_of_the_config_joins_ranks():
    for path in CONFIG.glob("*.py"):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & {"init_distributed", "init_process_group"}, path.name
