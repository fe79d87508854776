"""Time of sampling completions in process: this package, plain `generate`, and transformers' continuous batching.

    python benchmarks/rollout.py                 # about 5 minutes on a quiet 2-core machine
    python benchmarks/rollout.py --cases ragged  # one case

Every contender generates the same number of tokens in every row: the first run of `gkd` draws the lengths (a random
set of stop tokens, so lengths are geometric), the others are stopped at the same lengths. Contenders take turns within
a round, so that a busy machine slows all of them; the table shows the best of the rounds. CPU time counts all threads;
on a shared machine it is the steadier figure. A contender that cannot do a case shows why.

Results are merged into benchmarks/results/rollout_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.generation import ContinuousBatchingConfig

from gkd.rollouts.base import SamplingSettings
from gkd.rollouts.hf import HFRollout

ROOT = Path(__file__).resolve().parent.parent

# name: (rows, rows at once, longest completion, mean length or None for all the longest, top_p, LoRA)
CASES: dict[str, tuple[int, int, int, int | None, float, bool]] = {
    "equal lengths": (16, 16, 64, None, 1.0, False),
    "ragged": (16, 16, 128, 32, 1.0, False),
    "ragged, 2 chunks": (32, 16, 128, 32, 1.0, False),
    "equal, longer": (16, 16, 256, None, 1.0, False),
    "ragged, top_p 0.9": (16, 16, 128, 32, 0.9, False),
    "LoRA, equal lengths": (16, 16, 64, None, 1.0, True),
    "LoRA, ragged": (16, 16, 128, 32, 1.0, True),
}


class StopAtLengths(StoppingCriteria):
    """Row i of a batch is done after `lengths[i]` new tokens."""

    def __init__(self, width: int, lengths: list[int], device: torch.device) -> None:
        self.width, self.lengths = width, torch.tensor(lengths, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] - self.width >= self.lengths


class Problem:
    """One case: a model, prompts, and the length that each row shall have."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.rows, self.at_once, self.longest, mean, self.top_p, self.lora = CASES[name]
        self.device = torch.device(args.device)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=args.vocab,
            hidden_size=args.width,
            intermediate_size=args.width * 8 // 3 // 64 * 64,
            num_hidden_layers=args.layers,
            num_attention_heads=args.width // 64,
            num_key_value_heads=max(1, args.width // 256),
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        model = LlamaForCausalLM(config).to(self.device, dtype).eval()
        self.parameters = sum(p.numel() for p in model.parameters())
        self.bare = model
        if self.lora:
            lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
            model = get_peft_model(model, lora).eval()
        self.model = model
        draw = random.Random(0)
        self.prompts = [[draw.randrange(args.vocab) for _ in range(draw.randint(20, 80))] for _ in range(self.rows)]
        self.stop_ids = tuple(draw.sample(range(args.vocab), args.vocab // mean)) if mean else ()
        self.lengths = [len(completion) for completion in self.ours().generate(self.prompts, 0)]

    def ours(self, merge_adapter: bool = True) -> HFRollout:
        settings = SamplingSettings(self.longest, top_p=self.top_p, stop_ids=self.stop_ids)
        return HFRollout(
            lambda: self.model,
            None,
            settings,
            seed=0,
            source="student",
            batch_size=self.at_once,
            merge_adapter=merge_adapter,
        )

    def contenders(self) -> dict[str, Callable[[], int]]:
        """Functions that generate all rows and return the number of tokens."""
        found: dict[str, Callable[[], int]] = {"gkd": lambda: self.run_ours(True)}
        if self.lora:
            found["gkd, adapter apart"] = lambda: self.run_ours(False)
        found["generate"] = self.run_plain
        if self.top_p == 1.0:
            found["generate_batch"] = self.run_continuous
        return found

    def run_ours(self, merge_adapter: bool) -> int:
        return sum(map(len, self.ours(merge_adapter).generate(self.prompts, 0)))

    def run_plain(self) -> int:
        """Chunks of neighbouring lengths, left padding, KV cache: what a careful user of `generate` writes."""
        order = sorted(range(self.rows), key=lambda i: -len(self.prompts[i]))
        total = 0
        for start in range(0, self.rows, self.at_once):
            chunk = order[start : start + self.at_once]
            width = max(len(self.prompts[i]) for i in chunk)
            pads = [width - len(self.prompts[i]) for i in chunk]
            ids = [[0] * pad + self.prompts[i] for pad, i in zip(pads, chunk, strict=True)]
            mask = [[0] * pad + [1] * (width - pad) for pad in pads]
            lengths = [self.lengths[i] for i in chunk]
            self.model.generate(
                input_ids=torch.tensor(ids, device=self.device),
                attention_mask=torch.tensor(mask, device=self.device),
                generation_config=self.sampling(),
                stopping_criteria=StoppingCriteriaList([StopAtLengths(width, lengths, self.device)]),
            )
            total += sum(lengths)
        return total

    def run_continuous(self) -> int:
        batching = ContinuousBatchingConfig(max_requests_per_batch=self.at_once)
        if self.device.type == "cpu":  # both are inferred from the memory of a GPU
            batching.num_blocks, batching.max_batch_tokens = 64, 512
        total = 0
        with self.bare.continuous_batching_context_manager(self.sampling(), True, 5, batching) as manager:
            for prompt, length in zip(self.prompts, self.lengths, strict=True):
                manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)
            for _ in self.prompts:
                result = manager.get_result(timeout=300)
                if result is None or result.error is not None:
                    raise RuntimeError(f"continuous batching gave {result and result.error}")
                total += len(result.generated_tokens)
        return total

    def sampling(self) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=self.longest, do_sample=True, top_k=0, top_p=self.top_p, pad_token_id=0, use_cache=True
        )


def measure(problem: Problem, rounds: int) -> dict[str, dict[str, Any]]:
    """Best wall and CPU seconds of each contender, or why it has none."""
    results: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for name, run in problem.contenders().items():
            best = results.setdefault(name, {})
            if "failed" in best:
                continue
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                tokens = run()
            except (RuntimeError, NotImplementedError, ValueError) as error:
                best["failed"] = f"{type(error).__name__}: {error}"[:300]
                continue
            if problem.device.type == "cuda":
                torch.cuda.synchronize()
            assert tokens == sum(problem.lengths), f"{name} generated {tokens} tokens, not {sum(problem.lengths)}"
            seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
            for key, value in seconds.items():
                best[key] = round(min(value, best.get(key, value)), 3)
    return results


def main() -> None:
    """Run the cases, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    output: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {args.device}, {args.threads} thread(s)",
        "cases": {},
    }
    print("| case | tokens | contender | CPU s | wall s | gkd is faster by (CPU) |\n|---|---|---|---|---|---|")
    for name in args.cases:
        problem = Problem(name, args)
        output["parameters"] = problem.parameters
        results = measure(problem, args.rounds)
        output["cases"][name] = {"tokens": sum(problem.lengths), "longest": max(problem.lengths), "seconds": results}
        for contender, best in results.items():
            if "failed" in best:
                print(f"| {name} | {sum(problem.lengths)} | {contender} | {best['failed']} | | |", flush=True)
                continue
            best["ratio_cpu"] = round(best["cpu_s"] / results["gkd"]["cpu_s"], 2)
            best["ratio_wall"] = round(best["wall_s"] / results["gkd"]["wall_s"], 2)
            print(
                f"| {name} | {sum(problem.lengths)} | {contender} | {best['cpu_s']:.2f} | {best['wall_s']:.2f} "
                f"| {best['ratio_cpu']:.2f} |",
                flush=True,
            )
    path = ROOT / "benchmarks" / "results" / f"rollout_{args.device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():  # cases that were not run keep their figures
        output["cases"] = json.loads(path.read_text())["cases"] | output["cases"]
    path.write_text(json.dumps(output, indent=1) + "\n")


if __name__ == "__main__":
    main()
