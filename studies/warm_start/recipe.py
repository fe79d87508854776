"""Walk on a board: a student that a layer was cut out of, and whose text it had better train on first.

    python studies/warm_start/models.py                                          # the student, once
    python studies/warm_start/recipe.py --seq_kd true --lmbda "0@50% 1@50%"      # one run

The rows have prompts alone: what the student does not write, the teacher does.
"""

import random
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

from gkd.run import Settings, run

sys.path.insert(0, str(Path(__file__).parents[1] / "grid_walk"))
from walk import arrives, split_tasks

DEFAULTS: dict[str, Any] = {
    "model_name_or_path": "outputs/warm_start_models/student",
    "teacher_model_name_or_path": "outputs/grid_walk_models/teacher",
    "output_dir": "outputs/warm_start",
    "lmbda": 1.0,
    "beta": 0.0,
    "temperature": 1.0,
    "max_new_tokens": 30,
    "max_length": 48,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "max_steps": 60,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 384,
    "gradient_checkpointing": False,
    "logging_steps": 25,
    "save_strategy": "no",
    "report_to": "none",
    "num_eval_prompts": 192,
}


def load_data(settings: Settings) -> dict[str, Any]:
    """New tasks for every step, drawn by the seed; the test's tasks are the same for all seeds, none is trained on."""
    args = settings.training
    train, test = split_tasks()
    draw = random.Random(args.seed)
    drawn = [draw.choice(train) for _ in range(args.max_steps * args.per_device_train_batch_size)]
    rows = {"train": drawn, "eval": test}
    return {name: Dataset.from_list([{"prompt": task.prompt} for task in tasks]) for name, tasks in rows.items()}


def score(completion: str, row: dict[str, Any]) -> float:
    """1 when it arrives."""
    return float(arrives(row["prompt"], completion))


if __name__ == "__main__":
    run(load_data, defaults=DEFAULTS, score=score, description=__doc__.splitlines()[0])
