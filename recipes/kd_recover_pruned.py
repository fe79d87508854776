"""A pruned model recovers: the whole model's distribution on running text, about a minute on two CPU cores.

Teacher: glassllm (4 layers). Student: the same without two of them, LoRA on all linear layers. `gkd shrink` makes such
a student of any model: name its folder as the student, and the whole model as the teacher.

    python recipes/kd_recover_pruned.py
    gkd shrink my/model --layers 24 --rows rows.jsonl --output outputs/small
    python recipes/kd_recover_pruned.py --model_name_or_path outputs/small --teacher_model_name_or_path my/model
"""

from typing import Any

from datasets import Dataset

from gkd.demo import glass_student, glass_teacher, translation_sentences
from gkd.run import Settings, hold_out, run

DEFAULTS: dict[str, Any] = {
    "model_name_or_path": glass_student,
    "teacher_model_name_or_path": glass_teacher,
    "output_dir": "outputs/kd_recover_pruned",
    # Sound text, all of it: what a damaged model needs first is the teacher's distribution there.
    "lmbda": 0.0,
    "divergence": "forward_kl",
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
    "save_strategy": "no",
    "report_to": "none",
    "num_eval_prompts": 128,
}
PROMPT_WORDS = 4


def load_data(settings: Settings) -> dict[str, Any]:
    """Whole sentences. Those held out are read whole, and their first words are gone on from."""
    sentences = [sentence for sentence in translation_sentences() if len(sentence.split()) >= 6]
    train, held_out = hold_out(Dataset.from_dict({"text": sentences}), 256)
    starts = [" ".join(text.split()[:PROMPT_WORDS]) for text in held_out["text"]]
    return {"train": train, "prompts": Dataset.from_dict({"prompt": starts}), "held_out_text": list(held_out["text"])}


if __name__ == "__main__":
    run(load_data, defaults=DEFAULTS, description=__doc__.splitlines()[0])
