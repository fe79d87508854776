"""The models of the study: a teacher that reverses whatever stands there already, and students that are trained a
little.

    python studies/one_answer/models.py        # what the recipe needs, two minutes of one core
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from reverse import LENGTH, LETTERS, MARK, draw_word
from small_models import END, PAD, Batch, Letters, fit

ALPHABET = Letters(LETTERS + MARK)
MODELS = Path("outputs/one_answer_models")
ENOUGH = 0.4  # of a student's greedy answers are right
SEEDS = range(41, 47)  # the tuning's, and the sweep's


def right_from_anywhere(draw: random.Random, rows: int) -> Batch:
    """Words with answers that are partly wrong, behind each letter the one that is right at this place."""
    ids = torch.full((rows, 2 * LENGTH + 1), ALPHABET.ids[PAD])
    target = torch.zeros(rows, 2 * LENGTH + 1, len(ALPHABET.tokens))
    for row in range(rows):
        word, wrong = draw_word(draw), draw.choice([0.0, 0.1, 0.3, 1.0])
        right = word[::-1]
        answer = "".join(draw.choice(LETTERS) if draw.random() < wrong else letter for letter in right)
        ids[row] = torch.tensor([ALPHABET.ids[letter] for letter in word + MARK + answer])
        for place, token in enumerate([*right, END]):
            target[row, LENGTH + place, ALPHABET.ids[token]] = 1
    return ids, target


def success(model: LlamaForCausalLM, prompts: list[str], *, greedy: bool) -> float:
    """The share of answers that are right."""
    written = ALPHABET.answers(model, prompts, greedy=greedy, longest=LENGTH + 4)
    return sum(prompt[LENGTH - 1 :: -1] == answer for prompt, answer in zip(prompts, written, strict=True)) / len(
        prompts
    )


def train_teacher() -> LlamaForCausalLM:
    """On answers of all kinds."""
    model, draw = ALPHABET.model(64, 2, 0), random.Random("teacher")
    fit(model, lambda: right_from_anywhere(draw, 96), 800, 3e-3, falls=True)
    return model


def train_student(seed: int) -> LlamaForCausalLM:
    """On right answers, until enough are right, of 256 words."""
    model, draw = ALPHABET.model(32, 2, seed), random.Random(f"student {seed}")
    prompts = [draw_word(draw) + MARK for _ in range(256)]

    def gold() -> Batch:
        words = [draw_word(draw) for _ in range(64)]
        return ALPHABET.texts([(word + MARK, word[::-1]) for word in words])

    steps = fit(model, gold, 2500, 3e-3, enough=lambda model: success(model, prompts, greedy=True) >= ENOUGH)
    print(f"student {seed}: {steps} steps", flush=True)
    return model


def main() -> None:
    """Train and save what is not there yet."""
    torch.set_num_threads(1)
    if not (MODELS / "teacher").is_dir():
        ALPHABET.save(train_teacher(), MODELS / "teacher")
    for seed in SEEDS:
        if not (MODELS / f"student-{seed}").is_dir():
            ALPHABET.save(train_student(seed), MODELS / f"student-{seed}")


if __name__ == "__main__":
    main()
