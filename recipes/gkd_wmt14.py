"""The GKD paper's WMT14 English-German task on Qwen2.5: on-policy JSD(0.1), scored by BLEU.

    pip install -e ".[eval]"                             # in a clone of the repository
    python recipes/gkd_wmt14.py
    python recipes/gkd_wmt14.py --lmbda 0                # the same from the data alone: +0.28 instead of +0.85 there

Rows: `translation`: {"en": ..., "de": ...}. The corpus score is sacreBLEU's corpus BLEU (13a, the number that papers
give), greedy and sampled at T = 1, with a bootstrap standard error; the task score is the mean of sentence BLEU, which
is comparable only with itself.

From the paper (arXiv 2306.13649): lmbda = 1 and JSD(0.1), the best cell of Fig. 6 (+0.85 BLEU for T5-small from 25.6),
sampling at T = 1, the mean over tokens of each sequence (Eq. 2). The schedule is that of its XSum run (Table A.1). The
paper trained all weights of T5 and decoded with beams; models and LoRA are ours.
"""

import sys
from typing import Any

from gkd.run import Settings, dataset_by_name, run, with_held_out

try:
    from sacrebleu.metrics.bleu import BLEU
except ImportError:
    sys.exit("error: BLEU needs the package sacrebleu: pip install -e '.[eval]' in the clone of gkd")

ROWS = 40_000 * 32  # as many as are trained on; the corpus has 4.5 million

DEFAULTS: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "teacher_model_name_or_path": "Qwen/Qwen2.5-7B-Instruct",
    "teacher_model_init_kwargs": '{"dtype": "bfloat16"}',
    "dataset_name": "wmt/wmt14",
    "dataset_config": "de-en",
    "output_dir": "outputs/gkd_wmt14",
    "lmbda": 1.0,
    "divergence": "jsd",
    "beta": 0.1,
    "temperature": 1.0,
    "loss_reduction": "sequence",
    "max_new_tokens": 128,
    "max_length": 384,
    "use_peft": True,
    "lora_r": 64,
    "lora_alpha": 64,
    "lora_target_modules": ["all-linear"],
    "learning_rate": 3e-4,
    "warmup_steps": 2000,
    "max_steps": 40000,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "logging_steps": 10,
    "num_eval_prompts": 256,
}


def as_chat(row: dict[str, dict[str, str]]) -> dict[str, Any]:
    """The English sentence as a turn, the German one as the answer."""
    question = f"Translate into German: {row['translation']['en']}"
    return {"prompt": [{"role": "user", "content": question}], "completion": row["translation"]["de"]}


_BLEU = BLEU(effective_order=True)
_CORPUS_BLEU = BLEU()


def score(completion: str, row: dict[str, Any]) -> float:
    """BLEU of one sentence, 0 to 100."""
    return float(_BLEU.sentence_score(completion.strip(), [row["translation"]["de"]]).score)


def corpus_score(completions: list[str], rows: list[dict[str, Any]]) -> float:
    """Corpus BLEU, 0 to 100; n-gram counts are summed over all sentences."""
    references = [row["translation"]["de"] for row in rows]
    return float(_CORPUS_BLEU.corpus_score([text.strip() for text in completions], [references]).score)


def load_data(settings: Settings) -> dict[str, Any]:
    """Sentence pairs as chats (shuffled: the corpus stands source by source); `translation` stays."""
    data = dataset_by_name(settings)
    train = data["train"].shuffle(seed=0).select(range(min(ROWS, len(data["train"]))))
    return with_held_out({**data, "train": train}, as_row=as_chat)


if __name__ == "__main__":
    about = __doc__.splitlines()[0]
    run(load_data, defaults=DEFAULTS, score=score, corpus_score=corpus_score, description=about)
