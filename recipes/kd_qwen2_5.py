"""White-box KD of Qwen2.5-0.5B-Instruct from Qwen2.5-7B-Instruct on Alpaca-style rows: KL alone, or CE + KL.

    python recipes/kd_qwen2_5.py --dataset_name data.json                    # 0.5 CE + 0.5 forward KL, all weights
    python recipes/kd_qwen2_5.py --ce_weight 0                               # forward KL alone
    python recipes/kd_qwen2_5.py --divergence reverse_kl
    python recipes/kd_qwen2_5.py --divergence skew_forward_kl --skew_lambda 0.1     # or skew_reverse_kl
    python recipes/kd_qwen2_5.py --use_peft --learning_rate 2e-4             # LoRA
    python recipes/kd_qwen2_5.py --lmbda 0.5                                 # half of the answers from the student
    python recipes/kd_qwen2_5.py --teacher_adapter_name_or_path adapters/teacher    # a teacher tuned with LoRA
    python recipes/kd_qwen2_5.py --resume_from_checkpoint true

Rows: `instruction`, `input`, `output`. The teacher's adapter is merged into its weights when it is loaded. The two
heads have 151,936 and 152,064 rows for the same tokens; both distributions are compared on the common ones.

The values are those of the article that this follows. Its KL is a sum over tokens beside a cross-entropy that is their
mean; here both are means, so that the 0.5 is what it says.
"""

from typing import Any

from gkd.run import Settings, dataset_by_name, run, with_held_out

DEFAULTS: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "teacher_model_name_or_path": "Qwen/Qwen2.5-7B-Instruct",
    "teacher_model_init_kwargs": '{"dtype": "bfloat16"}',
    "dataset_name": "tatsu-lab/alpaca",
    "output_dir": "outputs/kd_qwen2_5",
    "lmbda": 0.0,  # the data's own answers
    "divergence": "forward_kl",
    "loss_temperature": 2.0,
    "ce_weight": 0.5,
    "max_length": 512,
    "max_new_tokens": 128,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 10,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 16,
    "dataloader_num_workers": 8,
    "logging_steps": 10,
    "report_to": "tensorboard",
    "save_strategy": "epoch",
    "save_total_limit": 10,
    # Only with --use_peft.
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_target_modules": ["all-linear"],
}


def load_data(settings: Settings) -> dict[str, Any]:
    """Alpaca-style rows as they are; some are held out for the before/after table."""
    return with_held_out(dataset_by_name(settings))


if __name__ == "__main__":
    run(load_data, defaults=DEFAULTS, description=__doc__.splitlines()[0])
