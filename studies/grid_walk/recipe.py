"""Walk on a board: students that know only shortest walks, and what another way to train makes of them.

    python studies/grid_walk/models.py                       # teacher and students, once
    python studies/grid_walk/recipe.py --lmbda 1 --beta 0    # one run

`--dataset_name fresh` (the default) draws rows for every step, `fixed` has the same 512 in every epoch. Each seed has
a student of its own, the same for all ways to train it.
"""

import random
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

from gkd.run import Settings, run

sys.path.insert(0, str(Path(__file__).parent))
from walk import TEST, Task, arrives, shortest_walk, split_tasks

MODELS = Path("outputs/grid_walk_models")
FIXED = 512
DEFAULTS: dict[str, Any] = {
    "model_name_or_path": str(MODELS / "student"),  # with the seed behind it
    "teacher_model_name_or_path": str(MODELS / "teacher"),
    "dataset_name": "fresh",
    "output_dir": "outputs/grid_walk",
    "lmbda": 1.0,
    "beta": 0.5,
    "temperature": 1.0,
    "max_new_tokens": 30,
    "max_length": 48,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "max_steps": 100,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 384,
    "gradient_checkpointing": False,
    "logging_steps": 25,
    "save_strategy": "no",
    "report_to": "none",
    "num_eval_prompts": TEST,
}


def rows_of(draw: random.Random, tasks: list[Task], count: int) -> Dataset:
    """Some of the tasks, with one of their shortest walks."""
    drawn = [draw.choice(tasks) for _ in range(count)]
    return Dataset.from_list([{"prompt": task.prompt, "completion": shortest_walk(draw, task)} for task in drawn])


def load_data(settings: Settings) -> dict[str, Any]:
    """Rows of the seed's own; the test's tasks are the same for all seeds, and none is trained on."""
    args = settings.training
    train, test = split_tasks()
    draw = random.Random(args.seed)
    count = {"fixed": FIXED, "fresh": args.max_steps * args.per_device_train_batch_size}[settings.script.dataset_name]
    settings.model.model_name_or_path = f"{settings.model.model_name_or_path}-{args.seed}"
    return {"train": rows_of(draw, train, count), "eval": rows_of(random.Random("test"), test, TEST)}


def score(completion: str, row: dict[str, Any]) -> float:
    """1 when it arrives."""
    return float(arrives(row["prompt"], completion))


if __name__ == "__main__":
    run(load_data, defaults=DEFAULTS, score=score, description=__doc__.splitlines()[0])
