"""What a training wrote down, read again, and what equality of two of them means."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import PROBE, Case
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from views import dense_loss, viewed_rows

from gkd.data.sequences import TokenSequence
from gkd.data.targets import IGNORE


@dataclass
class Result:
    """Attributes:
    folder: of the training.
    steps: logged lines with a loss, in order.
    ranks: by rank and step, the sequences of the window: row, source, ids, number of targets.
    windows: by step, the sequences of all ranks in one order.
    weights: what was saved at the end.
    logits: of the trained model, before it was saved.
    facts: the rest of what cases.py wrote.
    """

    folder: Path
    steps: list[dict[str, float]]
    ranks: list[list[list[Any]]]
    windows: list[list[Any]]
    weights: dict[str, Tensor]
    logits: Tensor
    facts: dict[str, Any]


def read(folder: Path) -> Result:
    facts = json.loads((folder / "result.json").read_text())
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("windows-*.json"))]
    windows = [sorted(sequence for part in parts for sequence in part) for parts in zip(*ranks, strict=True)]
    weights = next(load_file(path) for path in sorted((folder / "final").glob("*.safetensors")))
    head, embedding = weights.get("lm_head.weight"), weights.get("model.embed_tokens.weight")
    if head is not None and embedding is not None and torch.equal(head, embedding):
        del weights["lm_head.weight"]  # one tied matrix: DeepSpeed saves it under both names, transformers under one
    logits = load_file(folder / "logits.safetensors")["logits"]
    return Result(folder, [line for line in facts["logs"] if "loss" in line], ranks, windows, weights, logits, facts)


def assert_equal(one: Result, other: Result) -> None:
    """The same training up to the rounding of fp32 sums in another order: losses, metrics, rollouts, weights."""
    assert one.windows == other.windows, "rows, sources or sampled tokens differ"
    assert one.facts["ledger"] == other.facts["ledger"]
    for source in one.facts["ledger"]["targets"]:
        mine, theirs = (_by_position(result, source) for result in (one, other))
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-9), f"divergence along the position, {source}"
    assert len(one.steps) == len(other.steps)
    for number, (mine, theirs) in enumerate(zip(one.steps, other.steps, strict=True), start=1):
        assert _timeless(mine) == _timeless(theirs)
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6, abs=1e-12), f"step {number}"
        for name in _timeless(mine):
            # Differences of nearly equal numbers: what they are without chance is nothing but rounding.
            small = 1e-5 if name in ("rollout/logprob_gap", "rollout/surprise") else 1e-9
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=small), f"{name} of step {number}"
    assert one.weights.keys() == other.weights.keys()
    for name, weight in one.weights.items():
        torch.testing.assert_close(weight, other.weights[name], rtol=0, atol=1e-5, msg=lambda text, n=name: n + text)


def assert_as_one_process(case: Case, folder: Path, alone: Callable[[Case], Result]) -> None:
    """What two processes wrote into `folder` about this case equals what one process comes to."""
    result, reference = read(folder / case.name), alone(case)
    assert len(result.ranks) == 2
    print(largest_differences(result, reference))
    assert_equal(result, reference)


def assert_as_dense(result: Result, models: Path) -> None:
    """One SGD step (`cases.VIEWS`) over rows whose teacher reads prompts of its own: loss and gradient are of two
    dense forward passes in float64, as far as fp32 weights can show a gradient."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(models / name).double() for name in ("untied", "teacher"))
    (window,) = result.windows
    sequences = [
        TokenSequence(
            ids, [IGNORE] * (len(ids) - targets) + ids[len(ids) - targets :], len(ids) - targets, source, row
        )
        for row, source, ids, targets in window
    ]
    assert {sequence.source for sequence in sequences} == {"student", "teacher"}
    loss = dense_loss(student, teacher, sequences, viewed_rows(20))
    assert result.steps[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    for name, before in student.named_parameters():
        change = before.detach() - result.weights[name].double()
        torch.testing.assert_close(change, before.grad, rtol=1e-5, atol=2e-7, msg=lambda text, n=name: n + text)


def assert_all_saved_whole(case: Case, folder: Path, models: Path) -> None:
    """The model at the end and every checkpoint of the case load, see `assert_saved_whole`."""
    result = read(folder / case.name)
    for saved in (result.folder / "final", *result.folder.glob("checkpoint-*")):
        assert_saved_whole(result, saved, models / case.student)


def _by_position(result: Result, source: str) -> list[float]:
    """Sums and counts by position; over the thirds of the training, since a case may end one early and resume it."""
    profile = result.facts["logs"][-1]["divergence_by_position"]
    return [sum(bucket) for name in ("sums", "counts") for bucket in zip(*profile[name][source], strict=True)]


def _timeless(line: dict[str, float]) -> set[str]:
    return {name for name in line if not name.startswith("time/")}


def largest_differences(one: Result, other: Result) -> str:
    """One line for a table: largest relative difference of loss and gradient norm, largest one of the weights."""

    def relative(name: str) -> float:
        pairs = [(a[name], b[name]) for a, b in zip(one.steps, other.steps, strict=True) if name in a]
        return max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)

    weights = max(float((weight - other.weights[name]).abs().max()) for name, weight in one.weights.items())
    return f"{one.folder.name:24} {relative('loss'):9.1e} {relative('grad_norm'):9.1e} {weights:9.1e}"


def assert_saved_whole(result: Result, folder: Path, student: Path) -> None:
    """What stands in `folder` loads without this package and without DeepSpeed, with no empty tensor.

    The model in `final` must also give the logits of the model that was trained.
    """
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"nothing was saved in {folder}"
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert saved
    assert all(tensor.numel() > 0 for tensor in saved.values()), "an empty tensor was saved"
    if (folder / "adapter_config.json").exists():
        model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model.eval()(input_ids=PROBE).logits
    assert logits.isfinite().all()
    if folder.name == "final":
        torch.testing.assert_close(logits, result.logits, rtol=0, atol=1e-5)
