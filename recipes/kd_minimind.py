"""KD between MiniMind-style small models, dense or with experts, on `conversations`: alpha CE + (1 - alpha) T^2 KL.

    python recipes/kd_minimind.py                        # two minutes of CPU: makes its models and data
    python recipes/kd_minimind.py --model_name_or_path $(python -m gkd.demo.minimind student-moe)
    python recipes/kd_minimind.py --dataset_name sft_data.jsonl \\
        --model_name_or_path my-minimind-512 --teacher_model_name_or_path my-minimind-768
    accelerate launch --num_processes 2 recipes/kd_minimind.py          # DDP
    python recipes/kd_minimind.py --lmbda 0.5            # half of the answers from the student

Rows: `conversations`, a list of {"role", "content"}; every assistant turn is trained on. Models are Hugging Face
folders, Llama-like or with experts; MiniMind's own script converts its .pth files. A model whose config says
`output_router_logits` gets the router's auxiliary loss, with the config's `router_aux_loss_coef`.

The values are those of the article that this follows: alpha = 0.5, T = 1.5, five epochs of batches of 2, gradients
clipped at 1, a cosine from 5e-4 to a tenth of it (its own formula starts at 1.1 times that), all weights trained, from
a fine-tuned student on. The models it makes are smaller than the article's, 512 x 1 and 768 x 2.
"""

from typing import Any

from gkd.demo import minimind_rows, minimind_student, minimind_teacher
from gkd.run import Settings, dataset_by_name, run, with_held_out

DEFAULTS: dict[str, Any] = {
    "model_name_or_path": minimind_student,
    "teacher_model_name_or_path": minimind_teacher,
    "dataset_name": minimind_rows,
    "output_dir": "outputs/kd_minimind",
    "lmbda": 0.0,
    "divergence": "forward_kl",
    "loss_temperature": 1.5,
    "scale_by_temperature_squared": True,
    "ce_weight": 0.5,  # alpha
    "assistant_turns": "all",
    "max_length": 512,
    "max_new_tokens": 48,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}',
    "num_train_epochs": 5,
    "per_device_train_batch_size": 2,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": False,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 50,
    "report_to": "none",
}


def load_data(settings: Settings) -> dict[str, Any]:
    """Conversations as they are; some are held out."""
    return with_held_out(dataset_by_name(settings))


if __name__ == "__main__":
    run(load_data, defaults=DEFAULTS, description=__doc__.splitlines()[0])
