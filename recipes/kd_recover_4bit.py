"""A 4-bit model recovers: an adapter takes back what rounding its weights has cost; about two minutes on two cores.

Teacher: glassllm as it is. Student: the same model in 4 bits (NF4), LoRA on all linear layers, which learns the whole
model's distribution on running text. Serve the adapter on the 4-bit base, whose errors it has learnt.

    python recipes/kd_recover_4bit.py
    python recipes/kd_recover_4bit.py --model_name_or_path my/model --teacher_model_name_or_path my/model
"""

from typing import Any

from datasets import Dataset

from gkd.demo import glass_teacher, translation_sentences
from gkd.run import Settings, hold_out, run

DEFAULTS: dict[str, Any] = {
    "model_name_or_path": glass_teacher,
    "teacher_model_name_or_path": glass_teacher,
    "output_dir": "outputs/kd_recover_4bit",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "lmbda": 0.0,
    "divergence": "forward_kl",
    "temperature": 1.0,
    "max_new_tokens": 40,
    "max_length": 96,
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": ["all-linear"],
    "learning_rate": 1e-3,
    "warmup_steps": 10,
    "max_steps": 40,
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
