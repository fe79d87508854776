"""About a minute on two CPU cores: a 0.85M-parameter model distilled into the half of it, with no model hub.

Teacher: glassllm, trained on Lewis Carroll's books. Student: the same model without two of its four layers, LoRA on
all linear layers. Prompts: the first words of everyday English sentences; a completion is the rest of the sentence.

    python recipes/gkd_glass.py
    python recipes/gkd_glass.py --lmbda 1 --beta 1 --output_dir outputs/glass-on-policy
    python recipes/gkd_glass.py --seq_kd false          # half of the completions from the data instead of the teacher
"""

from typing import Any

from datasets import Dataset

from gkd.demo import glass_student, glass_teacher, sentence_starts
from gkd.run import Settings, hold_out, run

DEFAULTS: dict[str, Any] = {
    "model_name_or_path": glass_student,
    "teacher_model_name_or_path": glass_teacher,
    "output_dir": "outputs/gkd_glass",
    # Half of the completions from the student, half from the teacher: the student starts out broken.
    "lmbda": 0.5,
    "seq_kd": True,
    "beta": 0.5,
    "temperature": 1.0,
    "max_new_tokens": 40,
    "max_length": 96,
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": ["all-linear"],
    "learning_rate": 5e-3,
    "warmup_steps": 10,
    "max_steps": 100,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "log_completions": True,
    "log_completions_steps": 50,
    "num_completions_to_print": 2,
    "save_strategy": "no",
    "report_to": "none",
    "num_eval_prompts": 256,
}


def load_data(settings: Settings) -> dict[str, Any]:
    """Sentences of six words and more, cut after the fourth; the first four are plain words."""
    train, held_out = hold_out(Dataset.from_list(sentence_starts(plain=True)), 256)
    sentences = [row["prompt"] + row["completion"] for row in held_out]
    return {"train": train, "eval": held_out, "held_out_text": sentences}


if __name__ == "__main__":
    run(load_data, defaults=DEFAULTS, description=__doc__.splitlines()[0])
