"""One student from two specialists, one of numbers and one of words: about five minutes of CPU, makes its own models.

Each row names in its column `teacher` who scores it. All three are MiniMind-style models of one size, made from
scratch (gkd/demo/minimind.py): each teacher has seen half of the kinds of questions for long and fails at the others,
the student all of them, but not for long. The score is the share of right answers.

    python recipes/gkd_two_teachers.py
    python recipes/gkd_two_teachers.py --seq_kd true       # half of the answers from each row's own teacher
"""

from typing import Any

from datasets import Dataset

from gkd.demo import minimind_questions, minimind_specialists, minimind_teacher
from gkd.run import Settings, hold_out, run

DEFAULTS: dict[str, Any] = {
    "model_name_or_path": minimind_teacher,
    "teachers": minimind_specialists,
    "output_dir": "outputs/gkd_two_teachers",
    "lmbda": 0.5,
    "divergence": "forward_kl",
    "temperature": 1.0,
    "max_new_tokens": 24,
    "max_length": 96,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "max_steps": 300,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "gradient_checkpointing": False,
    "logging_steps": 20,
    "save_strategy": "no",
    "report_to": "none",
    "num_eval_prompts": 100,
}
HELD_OUT = 100


def score(completion: str, row: dict[str, Any]) -> float:
    """100 for the right answer, so that the mean is a percentage."""
    return 100.0 * (completion.strip() == row["completion"])


def load_data(settings: Settings) -> dict[str, Any]:
    """Questions with answers and who knows them; no held-out question is trained on."""
    train, held_out = hold_out(Dataset.from_list(minimind_questions()), HELD_OUT)
    return {"train": train, "eval": held_out}


if __name__ == "__main__":
    run(load_data, defaults=DEFAULTS, score=score, description=__doc__.splitlines()[0])
