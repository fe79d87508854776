"""A word backwards, the negative control: one right answer, exact match; students that are trained a little.

python studies/one_answer/models.py                       # teacher and students, once
python studies/one_answer/recipe.py --lmbda 1 --beta 0    # one run
"""

import random
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

from gkd.run import Settings, run

sys.path.insert(0, str(Path(__file__).parent))
from reverse import MARK, draw_word

MODELS = Path("outputs/one_answer_models")
TEST = 384
DEFAULTS: dict[str, Any] = {
    "model_name_or_path": str(MODELS / "student"),  # with the seed behind it
    "teacher_model_name_or_path": str(MODELS / "teacher"),
    "output_dir": "outputs/one_answer",
    "lmbda": 1.0,
    "beta": 0.5,
    "temperature": 1.0,
    "max_new_tokens": 12,
    "max_length": 32,
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


def load_data(settings: Settings) -> dict[str, Any]:
    """New words for every step, the seed's own; the test's are the same for all seeds, and none is trained on."""
    args = settings.training
    settings.model.model_name_or_path = f"{settings.model.model_name_or_path}-{args.seed}"
    draw = random.Random("test")
    test = list(dict.fromkeys(draw_word(draw) for _ in range(TEST)))
    known, draw, train = set(test), random.Random(args.seed), []
    while len(train) < args.max_steps * args.per_device_train_batch_size:
        word = draw_word(draw)
        train += [word] if word not in known else []
    return {name: as_rows(words) for name, words in (("train", train), ("eval", test))}


def as_rows(words: list[str]) -> Dataset:
    """Each with its answer."""
    return Dataset.from_list([{"prompt": word + MARK, "completion": word[::-1]} for word in words])


def score(completion: str, row: dict[str, Any]) -> float:
    """1 when it is right."""
    return float(completion == row["completion"])


if __name__ == "__main__":
    run(load_data, defaults=DEFAULTS, score=score, description=__doc__.splitlines()[0])
