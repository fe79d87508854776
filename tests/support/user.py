"""What a user has: a folder with models and rows, and the flags of a small run on them."""

import json

from tiny import save_tiny, tiny_rows


def user_folder(path):
    """A student, a teacher and a data file as a user has them."""
    save_tiny(path / "student", seed=1)
    save_tiny(path / "teacher", seed=2, hidden=48, layers=3)
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(16)))
    return path


def flags(folder, output, **changes):
    values = {
        "model_name_or_path": folder / "student",
        "teacher_model_name_or_path": folder / "teacher",
        "dataset_name": folder / "rows.jsonl",
        "output_dir": output,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_new_tokens": 6,
        "num_eval_prompts": 3,
        "logging_steps": 1,
        "report_to": "none",
        **changes,
    }
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]
