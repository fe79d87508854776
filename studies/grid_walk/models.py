"""The models of the study: a teacher that knows the best moves wherever it is put, and students that are trained a
little on shortest walks.

    python studies/grid_walk/models.py        # what the recipe needs, some minutes of one core
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from small_models import END, PAD, Batch, Letters, fit
from walk import LETTERS, SIDE, STEPS, Task, arrives, best_moves, moved, on_board, shortest_walk, split_tasks

ALPHABET = Letters(LETTERS)
MODELS = Path("outputs/grid_walk_models")
TRAIN, _ = split_tasks()
LONGEST = 24  # moves of the teacher's training
ENOUGH = 0.4  # of a student's greedy answers arrive
SEEDS = range(41, 47)  # the tuning's, and the sweep's


def walks_anywhere(draw: random.Random, rows: int) -> Batch:
    """Walks from anywhere, behind each token any of the best next moves, at the goal the end."""
    ids = torch.full((rows, 6 + LONGEST), ALPHABET.ids[PAD])
    target = torch.zeros(rows, 6 + LONGEST, len(ALPHABET.tokens))
    for row in range(rows):
        task = Task(*((draw.randrange(SIDE), draw.randrange(SIDE)) for _ in range(2)))
        place, walk = task.start, task.prompt
        wild = draw.choice([0.0, 0.1, 0.3, 1.0])  # the share of moves that do not look at the goal
        while True:
            best = best_moves(place, task.goal)
            for token in best or [END]:
                target[row, len(walk) - 1, ALPHABET.ids[token]] = 1 / max(1, len(best))
            if len(walk) == 6 + LONGEST:
                break
            legal = [move for move in STEPS if on_board(moved(place, move))]
            move = draw.choice(legal if not best or draw.random() < wild else best)
            walk, place = walk + move, moved(place, move)
        ids[row] = torch.tensor([ALPHABET.ids[letter] for letter in walk])
    return ids, target


def success(model: LlamaForCausalLM, prompts: list[str], *, greedy: bool) -> float:
    """The share of answers that arrive."""
    written = ALPHABET.answers(model, prompts, greedy=greedy)
    return sum(map(arrives, prompts, written)) / len(prompts)


def train_teacher() -> LlamaForCausalLM:
    """On walks from anywhere."""
    model, draw = ALPHABET.model(96, 3, 0), random.Random("teacher")
    fit(model, lambda: walks_anywhere(draw, 96), 1300, 3e-3, falls=True)
    return model


def train_student(seed: int) -> LlamaForCausalLM:
    """On shortest walks, until enough arrive, of 256 tasks that it was drawn for."""
    model, draw = ALPHABET.model(32, 2, seed), random.Random(f"student {seed}")
    prompts = [draw.choice(TRAIN).prompt for _ in range(256)]

    def gold() -> Batch:
        tasks = [draw.choice(TRAIN) for _ in range(64)]
        return ALPHABET.texts([(task.prompt, shortest_walk(draw, task)) for task in tasks])

    steps = fit(model, gold, 1500, 3e-3, enough=lambda model: success(model, prompts, greedy=True) >= ENOUGH)
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
