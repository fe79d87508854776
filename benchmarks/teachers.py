"""What each kind of teacher costs: memory, and seconds to score a micro-batch and to take the loss, side by side.

    python benchmarks/teachers.py                # SmolLM2-135M as student and teacher; about four minutes on two cores
    python benchmarks/teachers.py --model glass  # seconds: to see that the script works
    python benchmarks/teachers.py --only "4 bits" local

Student and teacher are the same model, the student with LoRA, so that sharing its base is one of the kinds. Each kind
runs in a process of its own that has loaded the student first. `held` is the tensors that the teacher adds once it is
ready, `peak` what loading, scoring and the loss add at most to the resident memory (on CUDA: to the allocated one).
`score` gives the signal of one micro-batch of running text, `loss` the fused JSD with its gradient; both are medians.

Results are merged, kind by kind, into benchmarks/results/teachers_<device>_<model>.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gkd.assembly.models import resolve_teacher
from gkd.assembly.teacher import TeacherOrder, make_teacher, shared_base
from gkd.config.fields import GKDConfig
from gkd.data.sequences import TokenSequence, collate
from gkd.data.targets import target_mask
from gkd.demo import models as demo
from gkd.demo.texts import openwebtext_excerpts
from gkd.loss import make_divergence
from gkd.loss.fused import fused_divergence
from gkd.loss.settings import LossSettings
from gkd.models.head import head_of

RESULTS = Path(__file__).resolve().parent / "results"
DTYPE = "teacher_model_init_kwargs"
ADAPTER, SCORES = "@adapter@", "@scores@"
KINDS: dict[str, dict[str, Any]] = {
    "local, float32": {DTYPE: {"dtype": "float32"}},
    "local, bfloat16": {DTYPE: {"dtype": "bfloat16"}},
    "8 bits": {DTYPE: {"load_in_8bit": True, "dtype": "float32"}},
    "4 bits": {DTYPE: {"load_in_4bit": True, "dtype": "float32"}},
    "adapter on its base, float32": {DTYPE: {"dtype": "float32"}, "teacher_adapter_name_or_path": ADAPTER},
    "the student's base, float32": {"share_base_model": True},
    "cached, float32": {DTYPE: {"dtype": "float32"}, "teacher_scores_dir": SCORES},
}
ON_ACCELERATORS = {"cpu_offload, bfloat16": {DTYPE: {"dtype": "bfloat16"}, "teacher_placement": "cpu_offload"}}


def kinds() -> dict[str, dict[str, Any]]:
    return {**KINDS, **(ON_ACCELERATORS if torch.cuda.is_available() else {})}


def memory(peak: bool) -> int:
    """Bytes: allocated on CUDA, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def tensors() -> int:
    """Bytes of all tensors that are alive, shared memory once."""
    gc.collect()
    found = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and not one.is_meta]
    storages = [one.untyped_storage() for one in found]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def start_peak() -> int:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    return memory(peak=False)


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def batch_of(tokenizer: Any, rows: int, tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Rows of running text, all but the first 32 tokens trained on."""
    ids = [i for text in openwebtext_excerpts()[:50] for i in tokenizer(text)["input_ids"]]
    assert len(ids) >= rows * tokens, f"{len(ids)} tokens of text"
    parts = [ids[row * tokens : (row + 1) * tokens] for row in range(rows)]
    sequences = [TokenSequence(part, [-100] * 32 + part[32:], 32, row=row) for row, part in enumerate(parts)]
    return {name: value.to(device) for name, value in collate(sequences, int(tokenizer.eos_token_id)).items()}


def one(kind: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One kind in this process; `folder` keeps adapter and scores between two processes."""
    torch.set_num_threads(args.threads)
    name = str(getattr(demo, f"{args.model}_teacher")())
    fields = {
        key: {ADAPTER: str(folder / "a"), SCORES: str(folder / "s")}.get(str(v), v) for key, v in kinds()[kind].items()
    }
    if "share_base_model" not in fields:
        fields["teacher_model_name_or_path"] = name
    config = GKDConfig(str(folder / "out"), report_to=[], bf16=False, **fields)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    student = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(accelerator.device)
    student = get_peft_model(student, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    if ADAPTER in kinds()[kind].values():
        student.save_pretrained(folder / "a")
    batch = batch_of(AutoTokenizer.from_pretrained(name), args.rows, args.tokens, accelerator.device)
    with torch.no_grad():
        student(input_ids=batch["input_ids"][:, :8])  # weights that are mapped from a file come into memory with this
    own, before = tensors(), start_peak()
    model = shared_base(config, resolve_teacher(student, None, config), student)
    teacher = make_teacher(TeacherOrder(config, model, student, accelerator, None))
    del model
    held = tensors() - own
    targets = batch["labels"][:, 1:][target_mask(batch["labels"])]
    head = head_of(student)
    hidden = torch.randn(len(targets), head.weight.shape[1], device=accelerator.device, requires_grad=True)
    weights = torch.full((len(targets),), 1 / len(targets), device=accelerator.device)
    settings = LossSettings(make_divergence("jsd"))
    signal = teacher.score(batch)  # warm up; the cached one keeps what it will read

    def loss() -> None:
        fused_divergence(hidden, head, signal, targets, weights, settings).loss.backward()
        hidden.grad = None

    score_s = median_seconds(lambda: teacher.score(batch), args.repeats)
    loss_s = median_seconds(loss, args.repeats)
    if hasattr(teacher, "flush"):
        teacher.flush()
    found = {"held": held, "peak": memory(peak=True) - before, "score_s": score_s, "loss_s": loss_s}
    return {**found, "rows": args.rows, "tokens": args.tokens, "threads": args.threads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", "glass"), default="smollm2")
    parser.add_argument("--only", nargs="+", choices=list(kinds()), default=list(kinds()))
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", help="run this kind in this process (used by the script itself)")
    parser.add_argument("--folder", type=Path, help="used by the script itself")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args, args.folder)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = RESULTS / f"teachers_{device}_{args.model}.json"
    machine = f"{os.cpu_count()} cores, {platform.machine()}" if device == "cpu" else torch.cuda.get_device_name()
    path.parent.mkdir(exist_ok=True)
    results = json.loads(path.read_text())["kinds"] if path.exists() else {}
    print(f"{'kind':30s} {'held':>9s} {'peak':>9s} {'score':>9s} {'loss':>9s}")
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.only:
            for _ in range(1 + ("teacher_scores_dir" in kinds()[kind])):  # the first process fills the cache
                command = [sys.executable, __file__, "--one", kind, "--folder", folder, "--model", args.model]
                for option in ("rows", "tokens", "repeats", "threads"):
                    command += [f"--{option}", str(getattr(args, option))]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = results[kind] = json.loads(done.stdout.strip().splitlines()[-1])
            sizes = f"{row['held'] / 2**20:6.0f} MiB {row['peak'] / 2**20:6.0f} MiB"
            path.write_text(json.dumps({"machine": machine, "kinds": results}, indent=1) + "\n")
            print(f"{kind:30s} {sizes} {row['score_s']:7.2f} s {row['loss_s']:7.2f} s", flush=True)


if __name__ == "__main__":
    main()
