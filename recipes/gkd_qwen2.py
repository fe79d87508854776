"""GKD of Qwen2-0.5B-Instruct from Qwen2-1.5B-Instruct on chatbot_arena_completions, LoRA r = 64.

    accelerate launch recipes/gkd_qwen2.py \\
        --model_name_or_path Qwen/Qwen2-0.5B-Instruct \\
        --teacher_model_name_or_path Qwen/Qwen2-1.5B-Instruct \\
        --dataset_name trl-lib/chatbot_arena_completions \\
        --learning_rate 2e-4 --per_device_train_batch_size 4 --gradient_accumulation_steps 8 \\
        --output_dir gkd-model --num_train_epochs 1 --push_to_hub --gradient_checkpointing \\
        --use_peft --lora_r 64 --lora_alpha 16

Everything but --push_to_hub is the default below. With --eval_strategy steps --eval_steps 100 the divergence on the
test rows is measured during the training, too. Other models and data: change the names; a local .jsonl file is a
data set too (`--dataset_name rows.jsonl`).
"""

from typing import Any

from gkd.run import Settings, dataset_by_name, run

DEFAULTS: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen2-0.5B-Instruct",
    "teacher_model_name_or_path": "Qwen/Qwen2-1.5B-Instruct",
    "dataset_name": "trl-lib/chatbot_arena_completions",
    "output_dir": "gkd-model",
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "num_train_epochs": 1,
    "gradient_checkpointing": True,
    "use_peft": True,
    "lora_r": 64,
    "lora_alpha": 16,
    # Every linear layer: attention alone is worse at equal parameters (Schulman et al., "LoRA Without Regret", 2025).
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "logging_steps": 10,
    # In place of the article's LogCompletionsCallback: what training has written anyway (recipes/README.md).
    "log_completions": True,
    "log_completions_steps": 50,
}


def load_data(settings: Settings) -> dict[str, Any]:
    """The data set's train rows, and its first test rows for the before/after table."""
    data = dataset_by_name(settings)
    if data["eval"] is not None:
        data["prompts"] = data["eval"].select(range(min(len(data["eval"]), settings.run.num_eval_prompts)))
    return data


if __name__ == "__main__":
    run(load_data, defaults=DEFAULTS, description=__doc__.splitlines()[0])
