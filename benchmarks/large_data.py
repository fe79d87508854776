"""A million short rows from a local file: time and memory until they are ids.

    python benchmarks/large_data.py                       # makes the file, with a small model's tokenizer of the demo
    python benchmarks/large_data.py --rows 100000 --processes 1

The caches of `datasets` are made in a folder that is removed afterwards. Memory is the resident peak of the main
process and of the largest worker: with the libraries, and with what the system keeps of the memory-mapped files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import time
from pathlib import Path

WORDS = [
    "the",
    "of",
    "a",
    "river",
    "stone",
    "light",
    "under",
    "every",
    "small",
    "house",
    "answer",
    "before",
    "morning",
    "people",
    "number",
    "think",
    "little",
]


def write_rows(path: Path, number: int) -> None:
    """Rows of a prompt of nine words and a completion of eight, no two alike."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for row in range(number):
            prompt = f"Question {row}: {' '.join(draw.choices(WORDS, k=7))}?"
            completion = f" {' '.join(draw.choices(WORDS, k=8))}."
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def peak() -> str:
    """Of this process and of the largest worker."""
    own, worker = (
        resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return f"{own:.0f} MiB here, {worker:.0f} MiB in the largest worker"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="how many (default 1,000,000)")
    parser.add_argument("--processes", type=int, default=2, help="as dataset_num_proc (default 2)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        from datasets import disable_progress_bars
        from transformers import AutoTokenizer

        from gkd.data.files import read_rows
        from gkd.data.prepare import prepare_dataset
        from gkd.demo.models import smollm2_student

        disable_progress_bars()
        path = Path(folder, "rows.jsonl")
        write_rows(path, arguments.rows)
        tokenizer = AutoTokenizer.from_pretrained(smollm2_student())
        print(f"{arguments.rows:,} rows, {path.stat().st_size / 2**20:.0f} MiB; {os.cpu_count()} cores")
        print(f"libraries loaded: {peak()}")
        began, used = time.perf_counter(), time.process_time()
        rows = read_rows(path)
        print(f"read: {time.perf_counter() - began:.1f} s; {peak()}")
        processes = arguments.processes if arguments.processes > 1 else None
        ready, report = prepare_dataset(rows, tokenizer, max_length=128, max_prompt_length=64, num_proc=processes)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = time.process_time() - used + children.ru_utime + children.ru_stime
        print(f"ready, {len(ready):,} rows: {time.perf_counter() - began:.1f} s, {cpu:.1f} CPU seconds; {peak()}")
        print(report)


if __name__ == "__main__":
    main()
