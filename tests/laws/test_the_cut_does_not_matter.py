"""Law 1: loss and gradient of a step do not depend on how it is cut into micro-batches, ranks or chunks.

Chunks of the fused pass are cut in the file of law 2, which compares each with the definition; ranks in
tests/distributed/test_ddp.py, where two processes train as one does.
"""

import pytest
import torch
from datasets import Dataset
from tiny import tiny_rows
from training import Remember, change, dense_loss, losses, trainer_of


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize(("lmbda", "seq_kd"), [(0.0, False), (0.5, False), (0.5, True), (1.0, False)])
def test_the_cut_into_micro_batches_does_not_matter(tmp_path, lmbda, seq_kd, reduction):
    results = []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        trainer = trainer_of(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            lmbda=lmbda,
            seq_kd=seq_kd,
            loss_reduction=reduction,
            loss_chunk_size=7 * batch,
            teacher_cache_dir="off",  # the teacher writes in every cut, not in the first one only
        )
        results.append((change(trainer), losses(trainer)[0]))
    for gradient, loss in results[1:]:
        torch.testing.assert_close(gradient, results[0][0], rtol=1e-5, atol=1e-5 * results[0][0].abs().max().item())
        assert loss == pytest.approx(results[0][1], rel=1e-5)


def test_a_last_window_that_is_shorter_is_still_a_token_mean(tmp_path, monkeypatch):
    memory = Remember(monkeypatch)
    trainer = trainer_of(
        tmp_path, Dataset.from_list(tiny_rows(6)), per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_steps=-1, num_train_epochs=1, learning_rate=0.0, lmbda=0.0,
    )  # fmt: skip
    trainer.train()
    assert [len(window) for window in memory.windows] == [4, 2]
    for loss, window in zip(losses(trainer), memory.windows, strict=True):
        assert loss == pytest.approx(dense_loss(trainer.model, trainer.teacher_model, window).item(), rel=1e-4)


def test_denominator_is_the_number_of_generated_tokens(tmp_path):
    """Data answers of 3 tokens and of 300 give the same on-policy loss and gradient."""
    results = []
    for words in ("ok.", "x" * 299):
        rows = [{"prompt": f"say {i} ", "completion": words} for i in range(4)]
        trainer = trainer_of(tmp_path, Dataset.from_list(rows), lmbda=1.0, max_length=512)
        results.append((change(trainer), losses(trainer)[0]))
    assert results[0][1] == results[1][1] > 0
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("cache", ["", "off", None])
def test_the_cut_does_not_matter_with_the_cache_and_without(tmp_path, cache):
    results = []
    for i, (batch, accumulation) in enumerate(((8, 1), (2, 4), (1, 8))):
        trainer = trainer_of(
            tmp_path / str(i), seq_kd=True, lmbda=0.5, teacher_cache_dir=cache,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        results.append((change(trainer), losses(trainer)[0]))
        assert (tmp_path / str(i) / "_teacher_sequences").exists() == (cache is None)
    for gradient, loss in results[1:]:
        torch.testing.assert_close(gradient, results[0][0], rtol=1e-5, atol=1e-5 * results[0][0].abs().max().item())
        assert loss == pytest.approx(results[0][1], rel=1e-5)
