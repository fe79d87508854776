"""About ten minutes on two CPU cores: SmolLM2-135M-Instruct teaches glassllm, which has another tokenizer; no hub.

Teacher: SmolLM2-135M-Instruct, 49,152 tokens. Student: glassllm, 852,608 parameters, trained on Lewis Carroll's books,
1,024 tokens. The two are compared where their tokens stand for the same bytes (docs/teachers/other_tokenizer.md).
Prompts: the first words of everyday English sentences; a completion is the rest of the sentence.

    python recipes/gkd_other_tokenizer.py
    python recipes/gkd_other_tokenizer.py --lmbda 1 --output_dir outputs/other-on-policy
"""

from typing import Any

from datasets import Dataset

from gkd.demo import glass_teacher, sentence_starts, smollm2_teacher
from gkd.run import Settings, hold_out, run

DEFAULTS: dict[str, Any] = {
    "model_name_or_path": glass_teacher,
    "teacher_model_name_or_path": smollm2_teacher,
    "output_dir": "outputs/gkd_other_tokenizer",
    "teacher_tokenizer_alignment": "bytes",
    # Several of the student's tokens end its answers; this one stands for the end of the teacher's turn.
    "teacher_end_of_turn": "<eos>=<|im_end|>",
    "lmbda": 0.5,
    "seq_kd": True,
    "divergence": "forward_kl",
    "ce_weight": 0.5,  # of the teacher's text: better than comparing alone (studies/other_tokenizer)
    "temperature": 1.0,
    "max_new_tokens": 32,
    "max_length": 96,
    "learning_rate": 1e-3,
    "warmup_steps": 10,
    "max_steps": 100,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "num_eval_prompts": 64,
}


def load_data(settings: Settings) -> dict[str, Any]:
    """Sentences of six words and more, cut after the fourth."""
    train, held_out = hold_out(Dataset.from_list(sentence_starts()), 256)
    return {"train": train, "eval": held_out, "held_out_text": [row["prompt"] + row["completion"] for row in held_out]}


if __name__ == "__main__":
    run(load_data, defaults=DEFAULTS, description=__doc__.splitlines()[0])
