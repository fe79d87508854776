"""KD of Qwen3-0.6B from Qwen3-4B's most likely tokens, on the conversations of openassistant-guanaco.

    python recipes/kd_qwen3.py
    python recipes/kd_qwen3.py --top_k_tail bucket              # the teacher's true mass outside its top K is kept
    python recipes/kd_qwen3.py --lmbda 0.5 --temperature 1.0    # half of the answers from the student

Rows: a `text` column of "### Human: ... ### Assistant: ..."; the first question and its answer are used. Before and
after, the perplexity of student and teacher on 100 whole texts of the test split is measured.

The values are those of the article that this follows: loss = 0.7 T^2 KL + 0.3 cross-entropy with T = 5, 500 rows,
three epochs. It keeps the teacher's top K, moves the rest of the mass onto them (`renormalize`) and leaves K open; 64
is ours. It also trains on the questions; here only answers are targets.
"""

from typing import Any

from gkd.run import Settings, dataset_by_name, run, with_held_out

HUMAN, ASSISTANT = "### Human:", "### Assistant:"
TRAIN_ROWS, HELD_OUT_TEXTS = 500, 100

DEFAULTS: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen3-0.6B",
    "teacher_model_name_or_path": "Qwen/Qwen3-4B",
    "teacher_model_init_kwargs": '{"dtype": "bfloat16"}',
    "dataset_name": "timdettmers/openassistant-guanaco",
    "output_dir": "outputs/kd_qwen3",
    "lmbda": 0.0,
    "divergence": "forward_kl",
    "teacher_top_k": 64,
    "top_k_tail": "renormalize",
    "loss_temperature": 5.0,
    "scale_by_temperature_squared": True,
    "ce_weight": 0.3,  # 1 - alpha
    "max_length": 1024,
    "max_new_tokens": 256,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "constant",
    "num_train_epochs": 3,
    "per_device_train_batch_size": 2,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
}


def split_text(row: dict[str, Any]) -> dict[str, str]:
    """The first question and its answer; an empty answer, whose row is dropped and counted, where there is none."""
    human, _, rest = row["text"].partition(ASSISTANT)
    answer = rest.split(HUMAN)[0].strip()
    return {"prompt": f"{human.strip()}\n{ASSISTANT}", "completion": f" {answer}" if answer else ""}


def load_data(settings: Settings) -> dict[str, Any]:
    """The first rows as question and answer; whole texts for the perplexity."""
    data = with_held_out(dataset_by_name(settings), HELD_OUT_TEXTS, as_row=split_text)
    train = data["train"].select(range(min(TRAIN_ROWS, len(data["train"]))))
    test = data["eval"].select(range(min(HELD_OUT_TEXTS, len(data["eval"]))))
    return {
        "train": train.remove_columns("text"),
        "eval": test.remove_columns("text"),
        "held_out_text": test["text"],
    }


if __name__ == "__main__":
    run(load_data, defaults=DEFAULTS, description=__doc__.splitlines()[0])
