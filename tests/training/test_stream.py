"""The rows of a training come as token sequences, or padded by a collator of the user's own: the same training."""

import pytest
import torch
from datasets import Dataset
from tiny import tiny_rows
from training import change, losses, trainer_of

from gkd.data.sequences import PaddingCollator, TokenSequence, collate, unpad

VALUES = {"lmbda": 0.5, "seq_kd": True, "max_steps": 3, "gradient_accumulation_steps": 2, "teacher_cache_dir": "off"}


called = []  # of how many rows


class Counting(PaddingCollator):
    """A collator of the user's own, made of ours."""

    def __call__(self, features):
        called.append(len(features))
        return super().__call__(features)


def padded_by_hand(own):
    """As a foreign one: no prompt lengths, on the left; its rows say nothing of earlier turns."""

    def collator(features):
        batch = {name: own(features)[name] for name in ("input_ids", "attention_mask", "labels", "rows")}
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        for name in ("input_ids", "attention_mask", "labels"):
            rows = zip(batch[name], lengths, strict=True)
            batch[name] = torch.stack([torch.roll(row, len(row) - length) for row, length in rows])
        return batch

    return collator


@pytest.mark.parametrize("kind", ["subclass", "function", "worker"])
def test_a_collator_that_pads_trains_the_same_to_the_bit(tmp_path, kind):
    ours = trainer_of(tmp_path / "ours", **VALUES)
    theirs = trainer_of(tmp_path / "theirs", dataloader_num_workers=1 if kind == "worker" else 0, **VALUES)
    own = theirs.data_collator
    if kind == "subclass":
        theirs.data_collator = Counting(own.pad_id, own.pad_to_multiple_of)
    elif kind == "function":
        theirs.data_collator = padded_by_hand(own)
    called.clear()
    assert torch.equal(change(theirs), change(ours))
    assert losses(theirs) == losses(ours)
    assert theirs.ledger.as_dict() == ours.ledger.as_dict()
    assert (len(called) >= 6) == (kind == "subclass")  # two micro-batches a step, and one is taken ahead


def test_rows_are_padded_once_behind_the_rollout(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, lmbda=0.5, eval_dataset=Dataset.from_list(tiny_rows(2, seed=9)), eval_strategy="no")
    kinds, padded = [], []
    fetch, pad = trainer.stream._fetch, PaddingCollator.__call__

    def watched(*args):
        batches, ended = fetch(*args)
        kinds.extend(type(row) for batch in batches for row in batch)
        return batches, ended

    monkeypatch.setattr(trainer.stream, "_fetch", watched)
    monkeypatch.setattr(PaddingCollator, "__call__", lambda self, rows: padded.append(len(rows)) or pad(self, rows))
    monkeypatch.setattr("gkd.training.stream.as_sequences", lambda batch: batch)
    trainer.train()
    assert kinds == [TokenSequence] * 4
    assert padded == []
    trainer.evaluate()
    assert padded == [2]
    assert type(trainer.data_collator) is PaddingCollator


def test_a_padded_batch_of_the_users_own_has_a_loss(tmp_path):
    """What a data loader gives outside of a training, and what `collate` makes of it, have the same loss."""
    trainer = trainer_of(tmp_path, eval_dataset=Dataset.from_list(tiny_rows(4, seed=9)))
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {
        "input_ids",
        "attention_mask",
        "labels",
        "rows",
        "teachers",
        "prompt_lengths",
        "prompt_ids",
    }
    trainer.model.train()
    number = torch.tensor(100)
    whole = trainer.compute_loss(trainer.model, batch, num_items_in_batch=number)
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    again = collate(unpad(batch), trainer._pad_id)
    for inputs in (plain, again):
        assert trainer.compute_loss(trainer.model, inputs, num_items_in_batch=number).item() == whole.item()
    assert trainer.training_step(trainer.model, batch, number).item() == whole.item()
    trainer.model.eval()
    loss, logits, labels = trainer.prediction_step(trainer.model, batch, prediction_loss_only=False)
    assert (logits.shape[:2], labels.shape) == (batch["input_ids"].shape, batch["labels"].shape)
    own = trainer.compute_loss(trainer.model, plain)
    assert own.item() == loss.item() > 0
