"""Does the guard against collapse raise an alarm in sound runs? Four settings of the glass recipe, five seeds.

    python studies/collapse/healthy.py --steps 25

Each run is `recipes/gkd_glass.py` with `--collapse_guard warn`, which changes nothing, in a process of its own. What
is there already is read, so the same command goes on where it was killed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "gkd_glass.py"
SETTINGS: dict[str, list[str]] = {
    "as it is (lmbda 0.5, seq_kd)": [],
    "all by the student": ["--lmbda", "1"],
    "reverse KL": ["--divergence", "reverse_kl"],
    "the data's answers": ["--seq_kd", "false"],
}
SEEDS = range(42, 47)


def alarms(folder: Path, flags: list[str], seed: int, steps: int) -> int:
    """How often the guard has spoken in a run."""
    log = folder / "metrics.jsonl"
    if not log.exists():
        own = ["--collapse_guard", "warn", "--seed", str(seed), "--max_steps", str(steps), "--output_dir", str(folder)]
        quiet = ["--evaluate_before_and_after", "false", "--overwrite_output_dir", "true"]
        subprocess.run([sys.executable, str(RECIPE), *flags, *own, *quiet], check=True, capture_output=True)
    return len(json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["collapse_events"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/collapse"))
    args = parser.parse_args()
    runs = 0
    for seed in SEEDS:
        for number, (name, flags) in enumerate(SETTINGS.items()):
            runs += 1
            found = alarms(args.output_dir / f"{number}-{seed}", flags, seed, args.steps)
            print(f"{runs:2d}: {name}, seed {seed}: {found} alarms", flush=True)


if __name__ == "__main__":
    main()
