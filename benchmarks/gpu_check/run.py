"""Everything that only a GPU can show, in one run: `make gpu-check`. No network, no model hub; about eight minutes.

    python benchmarks/gpu_check/run.py                 # one GPU, Qwen2.5-0.5B and 1.5B shapes, random weights, bf16
    python benchmarks/gpu_check/run.py --tiny          # the same on a CPU with tiny models: to see that it runs
    python benchmarks/gpu_check/run.py --only loss waits

Each part runs in a process of its own, so that one that fails leaves the others alone. What was right, how fast and
with how much memory goes into benchmarks/results/gpu_check_<device>.json. Exit code 1 when anything is not right.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
MARK = "GPU_CHECK_RESULT "
SPEED = ("steps", "loss speed", "rollout speed")


def parts(device: str, tiny: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name -> what is to be done."""
    sys.path.insert(0, str(HERE))
    import correctness
    import speed

    ways = {name: partial(correctness.way, device, tiny, name) for name in correctness.WAYS}
    if device == "cpu":  # neither is there
        ways = {name: run for name, run in ways.items() if not any(w in name for w in ("flash", "4 bits"))}
    plain = partial(run_apart, "LoRA in bf16", tiny, 150.0)
    return {
        "loss": partial(correctness.loss, device, tiny),
        "waits": partial(correctness.waits, device, tiny),
        **ways,
        **{f"ZeRO-{n}, one rank": partial(correctness.zero, device, tiny, n, plain) for n in (2, 3)},
        "steps": partial(speed.steps, device, tiny),
        "loss speed": partial(speed.other_benchmark, device, tiny, "loss"),
        "rollout speed": partial(speed.other_benchmark, device, tiny, "rollout"),
    }


def run_apart(name: str, tiny: bool, limit: float) -> dict[str, Any]:
    """A part in a process of its own: what it found, or the last line of what went wrong."""
    flags = ["--part", name, *(["--tiny"] if tiny else [])]
    try:
        done = subprocess.run(
            [sys.executable, __file__, *flags], capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"right": False, "failed": f"no result after {limit:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return dict(json.loads(line.removeprefix(MARK)))
    return {"right": False, "failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}


def main() -> int:
    """Run the parts and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models, also on a CPU")
    parser.add_argument("--only", nargs="+", help="parts by name")
    parser.add_argument("--limit", type=float, default=150, help="seconds of a part")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        parser.error("there is no GPU: --tiny runs the same with tiny models on the CPU")
    known = parts(device, args.tiny)
    if args.part:
        print(MARK + json.dumps(known[args.part]()))
        return 0
    if unknown := set(args.only or ()) - set(known):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    found: dict[str, Any] = {}
    for name in args.only or known:
        start = time.perf_counter()
        found[name] = run_apart(name, args.tiny, args.limit)
        verdict = {True: "right", False: "NOT RIGHT", None: "skipped"}[found[name].get("right", True)]
        print(
            f"{name:32s} {verdict:10s} {time.perf_counter() - start:5.0f} s  {json.dumps(found[name])[:300]}",
            flush=True,
        )
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, tiny models"
    record = {"device": name, "torch": torch.__version__, "parts": found}
    path = args.output or RESULTS / f"gpu_check_{name.split()[-1] if device == 'cuda' else 'cpu'}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path}")
    return 0 if all(part.get("right", "failed" not in part) is not False for part in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
