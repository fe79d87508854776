"""Ten minutes on two CPU cores: SmolLM2-135M-Instruct distilled into 24 of its 30 layers, with no model hub.

Teacher: SmolLM2-135M-Instruct. Student: the same without layers 12-17, 113M parameters, which answers in broken
sentences that often do not end; LoRA on all linear layers. Prompts: health questions that ask for one short sentence.

    python recipes/gkd_smollm2.py                       # this is `make demo`
    python recipes/gkd_smollm2.py --max_steps 200 --output_dir outputs/smollm2-long
"""

from typing import Any

from datasets import Dataset

from gkd.demo import healthsearchqa_prompts, openwebtext_excerpts, smollm2_student, smollm2_teacher
from gkd.run import Settings, hold_out, run

DEFAULTS: dict[str, Any] = {
    "model_name_or_path": smollm2_student,
    "teacher_model_name_or_path": smollm2_teacher,
    "output_dir": "outputs/gkd_smollm2",
    # Half of the answers from the student, half from the teacher: a student that starts out broken learns little from
    # its own text alone.
    "lmbda": 0.5,
    "seq_kd": True,
    "beta": 0.5,
    "temperature": 1.0,
    "max_new_tokens": 48,
    "max_length": 128,
    "use_peft": True,
    "lora_r": 32,
    "lora_alpha": 64,
    "lora_target_modules": ["all-linear"],
    "learning_rate": 1e-3,
    "warmup_steps": 3,
    "max_steps": 20,
    # 16 sequences a step, written in one go and scored in two halves: that keeps the memory down.
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 16,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "log_completions": True,
    "log_completions_steps": 10,
    "num_completions_to_print": 2,
    "save_strategy": "no",
    "report_to": "none",
    "num_eval_prompts": 32,
}
HELD_OUT_TEXTS = 24


def load_data(settings: Settings) -> dict[str, Any]:
    """Questions without answers: the student and the teacher write those."""
    rows = [
        {"prompt": [{"role": "user", "content": f"{question} Answer in one short sentence."}]}
        for question in healthsearchqa_prompts()
    ]
    train, prompts = hold_out(Dataset.from_list(rows), 64)
    return {
        "train": train,
        "prompts": prompts,
        "held_out_text": openwebtext_excerpts()[:HELD_OUT_TEXTS],
    }


if __name__ == "__main__":
    run(load_data, defaults=DEFAULTS, description=__doc__.splitlines()[0])
