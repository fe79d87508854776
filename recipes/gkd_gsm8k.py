"""The GKD paper's GSM8K task on Qwen2.5: on-policy forward KL, scored by exact match of the final number.

    python recipes/gkd_gsm8k.py
    python recipes/gkd_gsm8k.py --lmbda 0                         # the paper's supervised KD, its baseline
    python recipes/gkd_gsm8k.py --divergence jsd --beta 0.1       # lmbda x divergence is the grid of its Fig. 7

Rows: `question`, `answer` (with `#### 72` at its end). The score is 1 or 0 per question, greedy and sampled at T = 1;
--num_eval_prompts 1319 takes the whole test split.

From the paper (arXiv 2306.13649): lmbda = 1 and forward KL, the best cell of Fig. 7 (+8.8 points for T5-base from
10.2; supervised KD +4.7), sampling at T = 1, the mean over tokens of each sequence (Eq. 2). The paper used T5 (77M to
800M from a fine-tuned 3B) with 4-shot prompts; models, LoRA, learning rate and lengths here are ours.
"""

import re
from typing import Any

from gkd.run import Settings, dataset_by_name, run, with_held_out

ASK = "\n\nReason step by step, and end with the number alone after '####'."

DEFAULTS: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "teacher_model_name_or_path": "Qwen/Qwen2.5-7B-Instruct",
    "teacher_model_init_kwargs": '{"dtype": "bfloat16"}',
    "dataset_name": "openai/gsm8k",
    "dataset_config": "main",
    "output_dir": "outputs/gkd_gsm8k",
    "lmbda": 1.0,
    "divergence": "forward_kl",
    "temperature": 1.0,
    "loss_reduction": "sequence",
    "max_new_tokens": 400,  # 128, the default, cuts most answers off
    "max_length": 1024,
    "use_peft": True,
    "lora_r": 64,
    "lora_alpha": 64,
    "lora_target_modules": ["all-linear"],
    "learning_rate": 2e-4,
    "warmup_steps": 0.05,  # a share of all steps
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "logging_steps": 10,
    "num_eval_prompts": 256,
}


def as_chat(row: dict[str, str]) -> dict[str, Any]:
    """The question as a turn; the answer without the calculator's <<48/2=24>>."""
    answer = re.sub(r"<<.*?>>", "", row["answer"])
    return {"prompt": [{"role": "user", "content": row["question"] + ASK}], "completion": answer}


def final_number(text: str) -> str | None:
    """The number after the last '####', else the last number; without commas and a trailing '.0'."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text.rpartition("####")[2])
    return re.sub(r"\.0+$", "", numbers[-1].replace(",", "")) if numbers else None


def score(completion: str, row: dict[str, Any]) -> float:
    """1 when the final number is the reference's."""
    return float(final_number(completion) == final_number(row["answer"]))


def load_data(settings: Settings) -> dict[str, Any]:
    """Questions as chats; the column `answer` stays for the score."""
    return with_held_out(dataset_by_name(settings), as_row=as_chat)


if __name__ == "__main__":
    run(load_data, defaults=DEFAULTS, score=score, description=__doc__.splitlines()[0])
