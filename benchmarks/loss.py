"""Time and memory of the loss alone: this package, its limit, and its peers, side by side in one run.

    python benchmarks/loss.py                                    # N = 256: a few minutes on a quiet 2-core machine
    python benchmarks/loss.py --sizes 256 1024 4096 --repeats 5  # hours on 2 cores
    python benchmarks/loss.py --only-memory --sizes 1024 4096

Each measurement is forward plus backward, from hidden states to gradients. `limit` is the bare matrix products
(student logits, teacher logits, gradient to the hidden states, and with a trained head the head's gradient) in the
chunks that `gkd` uses: no loss that projects both heads can be faster. Methods take turns within a round, so that a
busy machine slows all of them; the table shows medians. Peak memory is measured in a fresh process per line, beyond
the inputs. On a machine shared with others use `--clock cpu --threads 1`: threads that wait for each other at every
step measure the neighbours.

Results are merged into benchmarks/results/loss_<device>.json, one entry per (N, divergence, head, method).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gkd.loss import DIVERGENCES, make_divergence
from gkd.loss.chunks import default_chunk_size
from gkd.loss.fused import fused_divergence
from gkd.loss.settings import LossSettings
from gkd.loss.signals import DenseSignal, Head

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

BETAS = {"jsd": 0.5, "forward_kl": 0.0, "reverse_kl": 1.0}
METHODS = ("limit", "gkd", "trl_chunked", "trl_dense", "liger")
DENSE_BYTES_PER_LOGIT = 68  # measured for jsd: about seventeen [N, V] fp32 tensors at the peak


class Problem:
    """Random inputs of one size; `step(method, divergence)` returns a function that runs forward and backward once."""

    def __init__(self, n: int, trained: bool, args: argparse.Namespace) -> None:
        self.n, self.trained = n, trained
        self.device = torch.device(args.device)
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        generator = torch.Generator(self.device).manual_seed(0)

        def draw(*shape: int, size: float) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=self.device, dtype=self.dtype).mul_(size)

        # Logits with a standard deviation of about 2.5: entropies of language models, not of noise.
        self.hidden = draw(n, args.student_width, size=1.0).requires_grad_()
        self.weight = draw(args.vocab, args.student_width, size=2.5 / args.student_width**0.5).requires_grad_(trained)
        self.teacher_hidden = draw(n, args.teacher_width, size=1.0)
        self.teacher_weight = draw(args.vocab, args.teacher_width, size=2.5 / args.teacher_width**0.5)
        self.targets = torch.randint(0, args.vocab, (n,), generator=generator, device=self.device)
        self.weights = torch.full((n,), 1 / n, device=self.device)

    def step(self, method: str, divergence: str) -> Callable[[], Any]:
        return getattr(self, f"_{method}")(divergence)

    def _finish(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.hidden.grad = self.weight.grad = None

    def _gkd(self, divergence: str) -> Callable[[], Any]:
        settings = LossSettings(make_divergence(divergence))
        signal = DenseSignal(self.teacher_hidden, Head(self.teacher_weight))

        def run() -> None:
            output = fused_divergence(self.hidden, Head(self.weight), signal, self.targets, self.weights, settings)
            self._finish(output.loss)

        return run

    def _limit(self, divergence: str) -> Callable[[], Any]:
        vocab = self.weight.shape[0]
        chunk = min(default_chunk_size(vocab, 4, self.device.type, self.trained), self.n)

        def run() -> None:
            with torch.no_grad():
                students, teachers = (
                    torch.empty(chunk, vocab, dtype=self.dtype, device=self.device) for _ in range(2)
                )
                gradient = torch.empty_like(self.hidden)
                head = torch.zeros_like(self.weight) if self.trained else None
                for start in range(0, self.n, chunk):
                    rows = slice(start, min(start + chunk, self.n))
                    z, zt = students[: rows.stop - start], teachers[: rows.stop - start]
                    torch.mm(self.hidden[rows], self.weight.t(), out=z)
                    torch.mm(self.teacher_hidden[rows], self.teacher_weight.t(), out=zt)
                    torch.mm(z, self.weight, out=gradient[rows])
                    if head is not None:
                        head.addmm_(z.t(), self.hidden[rows])

        return run

    def _trl_chunked(self, divergence: str) -> Callable[[], Any]:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        def run() -> None:
            per_token, _ = ChunkedDivergenceFunction.apply(
                self.hidden, self.weight, None, self.teacher_hidden, self.teacher_weight, None, BETAS[divergence]
            )
            self._finish(per_token.mean())

        return run

    def _trl_dense(self, divergence: str) -> Callable[[], Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from trl.experimental.gkd import GKDTrainer

        def run() -> None:
            logits = self.hidden @ self.weight.t()
            with torch.no_grad():
                teacher = self.teacher_hidden @ self.teacher_weight.t()
            self._finish(GKDTrainer.generalized_jsd_loss(logits, teacher, beta=BETAS[divergence]))

        return run

    def _liger(self, divergence: str) -> Callable[[], Any]:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[divergence], compiled=False
        )

        def run() -> None:
            self._finish(loss(self.hidden, self.weight, self.teacher_hidden, self.teacher_weight, self.targets))

        return run


def available(method: str, divergence: str, n: int, args: argparse.Namespace) -> str | None:
    """None, or why the method is not run."""
    if divergence not in BETAS and method not in ("limit", "gkd"):
        return f"it has no {divergence}"
    if method == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    if method == "trl_dense" and args.device == "cpu":
        need = n * args.vocab * DENSE_BYTES_PER_LOGIT
        if need > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.8:
            return f"needs about {need / 2**30:.0f} GiB"
    return None


def clock(args: argparse.Namespace) -> float:
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if args.clock == "cpu" else time.perf_counter()


def measure_times(n: int, trained: bool, args: argparse.Namespace) -> list[dict[str, Any]]:
    steps: dict[tuple[str, str], Callable[[], Any]] = {}
    problem = Problem(n, trained, args)
    for divergence in args.divergences:
        for method in args.methods:
            reason = available(method, divergence, n, args)
            if reason is None:
                steps[divergence, method] = problem.step(method, divergence)
            else:
                print(f"# N={n} {divergence} {method}: left out, {reason}", flush=True)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for step in steps.values():
        step()  # warm up
    for _ in range(args.repeats):
        for key, step in steps.items():
            start = clock(args)
            step()
            times[key].append(clock(args) - start)
    head = "trained" if trained else "frozen"
    return [
        {"n": n, "divergence": divergence, "head": head, "method": method, "repeats": args.repeats}
        | {"seconds": statistics.median(values), "fastest": min(values), "slowest": max(values)}
        for (divergence, method), values in times.items()
    ]


def measure_memory(n: int, trained: bool, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for divergence in args.divergences:
        for method in args.methods:
            if available(method, divergence, n, args) is not None:
                continue
            command = [sys.executable, __file__, "--one-memory", method, "--sizes", str(n), "--device", args.device]
            command += ["--divergences", divergence, "--heads", "trained" if trained else "frozen"]
            command += ["--vocab", str(args.vocab), "--threads", str(args.threads)]
            command += ["--student-width", str(args.student_width), "--teacher-width", str(args.teacher_width)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = {"n": n, "divergence": divergence, "head": "trained" if trained else "frozen", "method": method}
            rows.append(row | {"extra_bytes": int(done.stdout.split()[-1])})
    return rows


def one_memory(args: argparse.Namespace) -> None:
    """In a fresh process: the peak of one step beyond what its inputs occupy, in bytes, on stdout."""
    step = Problem(args.sizes[0], args.heads == ["trained"], args).step(args.one_memory, args.divergences[0])
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        print(torch.cuda.max_memory_allocated() - before)
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = _status("VmRSS")
    step()
    print(_status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def merge(rows: list[dict[str, Any]], path: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    keys = ("n", "divergence", "head", "method")
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    table = {tuple(row[key] for key in keys): row for row in known}
    stamp = {"threads": args.threads, "clock": args.clock, "load": round(os.getloadavg()[0], 1)}
    for row in rows:
        key = tuple(row[key] for key in keys)
        table[key] = table.get(key, {}) | row | (stamp if "seconds" in row else {})
    order = sorted(table.values(), key=lambda r: (r["n"], r["head"], r["divergence"], METHODS.index(r["method"])))
    about = {
        "vocab": args.vocab,
        "student_width": args.student_width,
        "teacher_width": args.teacher_width,
        "dtype": "float32" if args.device == "cpu" else "bfloat16",
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, "rows": order}, indent=1) + "\n")
    return order


def print_table(rows: list[dict[str, Any]]) -> None:
    limits = {(r["n"], r["head"], r["divergence"]): r.get("seconds") for r in rows if r["method"] == "limit"}
    print("| N | head | divergence | method | seconds | x limit | extra MB |")
    print("| ---: | --- | --- | --- | ---: | ---: | ---: |")
    for row in rows:
        limit, seconds = limits.get((row["n"], row["head"], row["divergence"])), row.get("seconds")
        cells = [
            f"{seconds:.2f}" if seconds else "",
            f"{seconds / limit:.2f}" if seconds and limit else "",
            f"{row['extra_bytes'] / 1e6:.0f}" if "extra_bytes" in row else "",
        ]
        print(f"| {row['n']} | {row['head']} | {row['divergence']} | {row['method']} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256], help="N, target tokens")
    parser.add_argument("--divergences", nargs="+", default=list(BETAS), choices=list(DIVERGENCES))
    parser.add_argument("--heads", nargs="+", default=["frozen", "trained"], choices=["frozen", "trained"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "cpu"], help="cpu: processor time, on a busy machine"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--student-width", type=int, default=896)
    parser.add_argument("--teacher-width", type=int, default=1_536)
    parser.add_argument("--only-memory", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--one-memory", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one_memory:
        return one_memory(args)
    path = args.output or ROOT / "benchmarks" / "results" / f"loss_{args.device}.json"
    rows: list[dict[str, Any]] = []
    for n in args.sizes:
        for head in args.heads:
            new = [] if args.only_memory else measure_times(n, head == "trained", args)
            new += [] if args.no_memory else measure_memory(n, head == "trained", args)
            rows = merge(new, path, args)
            print_table([row for row in rows if row["n"] == n and row["head"] == head])


if __name__ == "__main__":
    main()
