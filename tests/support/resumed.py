"""A training that is stopped at step 5 of 10 and gone on from, and what is compared of it."""

from datasets import Dataset
from peft import LoraConfig
from tiny import tiny_rows
from training import trainer_of
from views import viewed_rows

STEPS, STOP = 10, 5


def build(folder, rows=14, lora_dropout=None, views=False, **values):
    lora = None
    if lora_dropout is not None:
        lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=lora_dropout, target_modules=["q_proj", "down_proj"])
    defaults = {
        "max_steps": STEPS, "optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "cosine",
        "warmup_steps": 3, "max_grad_norm": 1.0, "save_strategy": "steps", "save_steps": STOP, "max_new_tokens": 5,
    }  # fmt: skip
    made = viewed_rows(rows) if views else tiny_rows(rows)
    return trainer_of(folder, Dataset.from_list(made), peft_config=lora, **{**defaults, **values})


def history(trainer):
    """What was logged, without what a clock says and the summary at the end."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{k: v for k, v in entry.items() if not k.startswith("time/")} for entry in entries]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
