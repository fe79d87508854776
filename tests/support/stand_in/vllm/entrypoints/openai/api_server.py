"""Started as vLLM's server is, with its flags: a process of its own that answers as one does (`vllm_server.fake`)."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_server.fake import FakeServer

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--max-model-len", type=int, default=256)
parser.add_argument("--max-lora-rank", type=int, default=8)
parser.add_argument("--dies", help="end at once with this word on stderr")
arguments, _ = parser.parse_known_args()
if arguments.dies:
    sys.exit(f"ValueError: {arguments.dies}")

torch.set_num_threads(1)
engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # vLLM's engine is a child, too
model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
options = {
    "root": arguments.model,
    "max_model_len": arguments.max_model_len,
    "max_lora_rank": arguments.max_lora_rank,
    "lora": os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == "1",
    "dev": os.environ.get("VLLM_SERVER_DEV_MODE") == "1",
}
with FakeServer(model, AutoTokenizer.from_pretrained(arguments.model), port=arguments.port, **options) as server:
    print(f"engine {engine.pid}", flush=True)
    while engine.poll() is None:
        time.sleep(0.1)
    sys.exit("the engine died")
