"""What a checkpoint holds beside the Trainer's own files, and how a run finds it again.

Sources and rollouts need no state: they are functions of (seed, step, row). Only the ledger and the token count are
kept.
"""

from __future__ import annotations

import json
import os
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from gkd.metrics import Ledger

STATE_FILE = "gkd_state.json"


class CheckpointMixin:
    """Saves and restores the ledger with the Trainer's checkpoints, under every DeepSpeed stage alike."""

    args: Any
    state: Any
    ledger: Ledger
    _get_output_dir: Any
    _total_train_tokens: int

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`; True resumes from the newest checkpoint in `output_dir`."""
        path = resume_from_checkpoint
        if path is True:
            path = get_last_checkpoint(self.args.output_dir)
        if isinstance(path, str):
            self._load_state(path)
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        if self.args.should_save:
            folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            with open(os.path.join(folder, STATE_FILE), "w", encoding="utf-8") as file:
                json.dump({"ledger": self.ledger.as_dict(), "num_tokens": self._total_train_tokens}, file)

    def _load_state(self, checkpoint: str) -> None:
        path = os.path.join(checkpoint, STATE_FILE)
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                state = json.load(file)
            self.ledger.load(state["ledger"])
            self._total_train_tokens = state["num_tokens"]
