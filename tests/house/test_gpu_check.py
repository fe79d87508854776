"""`make gpu-check` is for a GPU; that its parts run and tell right from wrong is seen with tiny models on the CPU."""

import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check"


@pytest.fixture
def correctness(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("models", "correctness"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import correctness

    yield correctness
    for name in ("models", "correctness"):
        sys.modules.pop(name, None)


def test_the_loss_is_right_and_a_wrong_one_is_not(correctness, monkeypatch):
    assert correctness.loss("cpu", tiny=True)["right"]
    monkeypatch.setattr(correctness, "definition", lambda name, p, q: 1.01 * (p.exp() * (p - q)).sum(-1))
    assert not correctness.loss("cpu", tiny=True)["right"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the script itself runs there")
def test_a_way_to_train(correctness):
    assert correctness.way("cpu", True, "LoRA, checkpointing")["right"]
