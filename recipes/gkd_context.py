"""Context distillation in a few minutes on two CPU cores: a system prompt goes into an adapter, with no model hub.

Student and teacher are one model, SmolLM2-135M-Instruct. The teacher, the model with the adapter off, reads a system
prompt in French that the student never sees, and so answers in French. Prompts: everyday English sentences. The score
is the share of answers in French.

    python recipes/gkd_context.py
    python recipes/gkd_context.py --max_steps 80 --output_dir outputs/context-long
"""

import re
from typing import Any

from datasets import Dataset

from gkd.demo import openwebtext_excerpts, smollm2_teacher, translation_sentences
from gkd.run import Settings, hold_out, run

SYSTEM = "Tu es un assistant français. Tu réponds toujours en français, jamais en anglais."
FRENCH = r"\b(le|la|les|un|une|des|du|de|et|est|en|dans|pour|que|qui|sur|avec|par|il|elle|au|aux|ce|cette|sont)\b"
ENGLISH = r"\b(the|of|is|was|and|in|to|a|that|it|for|on|by|are|were|i|you|this|an|as|with|from|or|can|be)\b"
TRAIN_SENTENCES, HELD_OUT_SENTENCES, HELD_OUT_TEXTS = 2000, 64, 24

DEFAULTS: dict[str, Any] = {
    "model_name_or_path": smollm2_teacher,
    "self_teacher": "base",
    "output_dir": "outputs/gkd_context",
    # All answers from the student: it begins in English, and the teacher says of every token what it would write.
    "lmbda": 1.0,
    "divergence": "forward_kl",
    "temperature": 1.0,
    "max_new_tokens": 16,
    "max_length": 96,
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": ["all-linear"],
    "learning_rate": 1e-3,
    "warmup_steps": 3,
    "max_steps": 40,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "gradient_checkpointing": False,
    "logging_steps": 5,
    "log_completions": True,
    "log_completions_steps": 20,
    "num_completions_to_print": 2,
    "save_strategy": "no",
    "report_to": "none",
    "num_eval_prompts": 32,
}


def in_french(text: str) -> bool:
    """More of the commonest French words than of the commonest English ones."""
    text = text.lower()
    return len(re.findall(FRENCH, text)) > len(re.findall(ENGLISH, text))


def score(completion: str, row: dict[str, Any]) -> float:
    """100 for an answer in French, so that the mean is a percentage."""
    return 100.0 * in_french(completion)


def load_data(settings: Settings) -> dict[str, Any]:
    """Sentences to answer; `teacher_system` is what the teacher alone reads in front of them."""
    rows = [
        {"prompt": [{"role": "user", "content": sentence}], "teacher_system": SYSTEM}
        for sentence in translation_sentences()
    ]
    train, prompts = hold_out(Dataset.from_list(rows), HELD_OUT_SENTENCES)
    return {
        "train": train.select(range(min(TRAIN_SENTENCES, len(train)))),
        "prompts": prompts,
        "held_out_text": openwebtext_excerpts()[:HELD_OUT_TEXTS],
    }


if __name__ == "__main__":
    run(load_data, defaults=DEFAULTS, score=score, description=__doc__.splitlines()[0])
