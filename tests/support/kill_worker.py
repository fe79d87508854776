"""Started by test_kill.py: one training, killed again and again, by the clock and at every kind of moment.

Writes what happened to a JSON file; what must never happen is an assertion here.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

from datasets import Dataset  # noqa: E402
from forked import Child  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from training import trainer_of  # noqa: E402
from views import viewed_rows  # noqa: E402

from gkd.rollouts.store import SequenceStore  # noqa: E402
from gkd.training.checkpoint_files import find, step_of  # noqa: E402

STEPS, KILLS = 40, 24
FATAL = ("save", "any", "clock", "student's rollout", "save", "clock", "step", "any")
MOST = {"save": 100, "any": 130, "student's rollout": 12, "step": 20}  # moments of about three steps
SEED = int(os.environ.get("GKD_KILL_SEED", "20"))
VALUES: dict[str, Any] = {
    "max_steps": STEPS,
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "max_grad_norm": 1.0,
    "lmbda": 0.5,
    "seq_kd": True,
    "max_new_tokens": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "rollout_every": 3,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
}


def build(folder: Path) -> Any:
    """The teacher reads prompts of its own."""
    return trainer_of(folder, Dataset.from_list(viewed_rows(29)), **VALUES)


class Moments:
    """Counts what happens in this process, and ends it without a word at the n-th moment of a phase ("any": of all).

    Moments are: a file of the output folder is opened for writing, renamed, removed, a folder is made or removed; a
    forward pass in a rollout or a step; an optimizer step.
    """

    def __init__(self, folder: Path, fatal: str, number: int) -> None:
        self.folder, self.fatal, self.left, self.phase = str(folder), fatal, number, "step"
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            concerns = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        else:
            concerns = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
        if concerns and str(args[0]).startswith(self.folder):
            self.happens("save" if "checkpoint-" in str(args[0]) else "cache")

    def happens(self, phase: str) -> None:
        self.left -= self.fatal in (phase, "any")
        if self.left == 0 and self.fatal in (phase, "any"):
            (Path(self.folder).parent / "phase").write_text(phase)
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, trainer: Any) -> None:
        for source, rollout in trainer.rollouts.items():
            original = rollout.generate

            def generate(*args: Any, original: Any = original, source: str = source) -> Any:
                self.phase = f"{source}'s rollout"
                result = original(*args)
                self.phase = "step"
                return result

            rollout.generate = generate
        for model in (trainer.model, trainer.teacher_model):
            model.register_forward_pre_hook(lambda *a, **k: self.happens(self.phase))


def train(folder: Path, say: Any, fatal: str = "never", number: int = 0) -> None:
    """One incarnation."""
    moments = Moments(folder, fatal, number)
    trainer = build(folder)
    moments.watch(trainer)
    resumed = find(folder)
    say(f"resumed {-1 if resumed is None else step_of(resumed)}")
    save = trainer._save_checkpoint

    def _save_checkpoint(*args: Any) -> None:
        save(*args)
        say(f"saved {trainer.state.global_step}")

    trainer._save_checkpoint = _save_checkpoint
    trainer.train(resume_from_checkpoint=resumed is not None)


def is_whole(checkpoint: Path) -> bool:
    """Everything that a resume reads can be read: another test than the one that the package makes."""
    try:
        load_file(checkpoint / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(checkpoint / name, weights_only=True)
        torch.load(checkpoint / "rng_state.pth", weights_only=False)
        state = json.loads((checkpoint / "trainer_state.json").read_text())
    except Exception:  # noqa: BLE001 - whatever it is, it is not whole
        return False
    return f"checkpoint-{state['global_step']}" == checkpoint.name


def check_cache(folder: Path) -> int:
    """Every record of the cache that a new process finds can be read; how many there are."""
    found = 0
    for path in (folder / "_teacher_sequences").glob("*"):
        if path.is_dir():
            store = SequenceStore(path, "")
            for name, offset in store._places.values():
                with open(path / name, "rb") as file:
                    file.seek(offset)
                    assert json.loads(file.readline())["ids"] is not None
            found += len(store)
    return found


def main(work: Path) -> None:
    logging.disable(logging.INFO)
    build(work / "warm")  # imports what is imported late
    shutil.rmtree(work / "warm", ignore_errors=True)
    draw, folder = random.Random(SEED), work / "killed"
    kills: list[dict[str, Any]] = []
    saved, cut_off, span = -1, 0, 0.5
    while len(kills) < KILLS:
        (work / "phase").unlink(missing_ok=True)
        fatal = FATAL[len(kills) % len(FATAL)]
        by_clock, number = fatal == "clock", draw.randint(1, MOST.get(fatal, 1))
        child = Child(lambda say, f=fatal, n=number: train(folder, say, f, n), work / f"child-{len(kills)}.txt")
        resumed = None
        line = child.wait_for("resumed")
        if line is not None:
            resumed = int(line.split()[1])
            assert resumed >= saved, f"resumed from {resumed}, but {saved} had been saved"
            assert resumed < 0 or is_whole(folder / f"checkpoint-{resumed}"), f"checkpoint-{resumed} is broken"
        if by_clock and line is not None:
            time.sleep(draw.uniform(0, span))
            child.send(signal.SIGKILL)
        code = child.join()
        said = child.said()
        if code == 0:  # all steps done: a shorter life, and from the beginning
            span, saved = span / 2, -1
            shutil.rmtree(folder)
            continue
        assert code == 137, f"a child ended by itself with {code}:\n{said[-3000:]}"
        saved = max([saved, *(int(line.split()[1]) for line in child.lines if line.startswith("saved"))])
        broken = [path.name for path in folder.glob("checkpoint-*") if not is_whole(path)]
        cut_off += bool(broken)
        phase = (work / "phase").read_text() if (work / "phase").exists() else "clock"
        sequences = check_cache(folder)
        kills.append({"phase": phase, "resumed": resumed, "saved": saved, "broken": broken, "cached": sequences})
    last = Child(lambda say: train(folder, say), work / "last.txt")
    assert last.join() == 0, last.said()[-3000:]
    never = Child(lambda say: train(work / "never", say), work / "never.txt")
    assert never.join() == 0, never.said()[-3000:]
    warned = sum("is left out" in path.read_text() for path in work.glob("*.txt"))
    result = {"kills": kills, "cut_off": cut_off, "warned": warned}
    (work / "result.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
