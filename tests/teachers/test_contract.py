"""What every teacher owes: the loss and the gradient of the plain local teacher, for every divergence it serves.

A new kind joins with one line in KINDS: the fields that ask for it. The oracle is a model with all of its weights in
memory, an adapter's product added by hand, scored by nothing but its own forward pass.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import save_tiny, tiny_model, tiny_tokenizer
from training import config
from vllm_server.serve import INSTALLED, Server

from gkd.assembly.models import resolve_teacher
from gkd.assembly.servers import connect
from gkd.assembly.teacher import TeacherOrder, make_teacher, shared_base
from gkd.config.fields import GKDConfig
from gkd.data.sequences import TokenSequence, collate
from gkd.data.targets import target_mask
from gkd.data.teacher_view import teacher_view
from gkd.loss import DIVERGENCES, make_divergence
from gkd.loss.fused import fused_divergence
from gkd.loss.settings import LossSettings
from gkd.loss.signals import DenseSignal, Head
from gkd.models.head import head_of

MODEL = {"kind": "qwen3", "hidden": 128, "seed": 2, "initializer_range": 0.05}  # logits as large as trained models'
R, ALPHA, TOP_K = 4, 8, 32
ADAPTER, SCORES, SERVER = "@adapter@", "@scores@", "@server@"  # stand for what exists once the tests run
TEMPERATURES = (1.0, 2.0)


@dataclass(frozen=True)
class Kind:
    """One way to have a teacher.

    Attributes:
        fields: of GKDConfig, which ask for it; None of them is the teacher's name when it is somebody else's weights.
        tuned: the teacher is the base with the adapter.
        bound: largest difference from the plain teacher, relative to the loss and to the gradient's norm.
        jumps: the same for the total variation, whose gradient takes signs: small differences flip some.
        temperatures: that it serves. settings: of the loss, beside divergence and temperature.
        teachers: number of each row's teacher, where there are several.
        needs: why it cannot run here, or "".
    """

    fields: dict[str, Any] = field(default_factory=dict)
    tuned: bool = False
    bound: float = 1e-5
    jumps: float | None = None
    temperatures: tuple[float, ...] = TEMPERATURES
    settings: dict[str, Any] = field(default_factory=dict)
    teachers: int | None = None
    needs: str = ""


NO_BITS = "" if importlib.util.find_spec("bitsandbytes") else "bitsandbytes is not installed"
NO_SERVER = "" if os.environ.get("GKD_TEST_VLLM") and INSTALLED.exists() else "make test-vllm runs this"
SHARED, BITS = {"share_base_model": True}, "teacher_model_init_kwargs"
SEVERAL = {"teacher_adapters": {"tuned": ADAPTER, "base": None}}
ON_SERVER = {"teacher_server_url": SERVER, "teacher_top_k": TOP_K, "max_length": 128}

KINDS: dict[str, Kind] = {
    "local": Kind(),
    "adapter": Kind({"teacher_adapter_name_or_path": ADAPTER}, tuned=True),
    "the student's base": Kind(SHARED),
    "the student itself, new": Kind({"self_teacher": "live"}),
    "the new student's average": Kind({"self_teacher": "ema"}),
    "the student's base, another adapter": Kind({**SHARED, "teacher_adapter_name_or_path": ADAPTER}, tuned=True),
    "several, by row": Kind(SEVERAL, tuned=True, teachers=0),
    "cached": Kind({"teacher_scores_dir": SCORES}),
    "cached, with an adapter": Kind(
        {"teacher_scores_dir": SCORES, "teacher_adapter_name_or_path": ADAPTER}, tuned=True
    ),
    "cpu_offload": Kind({"teacher_placement": "cpu_offload"}),  # zero3, zero3_offload: tests/distributed
    "8 bits": Kind({BITS: {"load_in_8bit": True}}, bound=0.01, jumps=0.1, needs=NO_BITS),
    "4 bits": Kind({BITS: {"load_in_4bit": True}}, bound=0.08, jumps=0.3, needs=NO_BITS),
    "server": Kind(ON_SERVER, bound=1e-3, temperatures=(1.0,), settings={"teacher_top_k": TOP_K}, needs=NO_SERVER),
}
CASES = [
    pytest.param(name, divergence, marks=pytest.mark.skipif(bool(kind.needs), reason=kind.needs))
    for name, kind in KINDS.items()
    for divergence in DIVERGENCES
]


@dataclass
class Place:
    """Models on disk, one student, and the teachers that were made."""

    folder: Path
    base: str
    adapter: str
    start_server: Callable[[], str]

    def teacher(self, name: str) -> Any:
        """The kind's teacher, by the way that a training takes."""
        kind = KINDS[name]
        known = {ADAPTER: self.adapter, SCORES: str(self.folder / f"scores {name}")}
        if SERVER in kind.fields.values():
            known[SERVER] = self.start_server()
        fields = _replaced(kind.fields, known)
        lent = bool({"share_base_model", "self_teacher", "teacher_server_url"} & fields.keys())
        args: GKDConfig = config(self.folder / name, teacher_model_name_or_path=None if lent else self.base, **fields)
        accelerator = Accelerator(cpu=True)
        student = get_peft_model(_model(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        model = shared_base(args, resolve_teacher(student, None, args), student)
        teacher = make_teacher(
            TeacherOrder(args, model, student, accelerator, connect(args, tiny_tokenizer())["teacher"])
        )
        teacher.score(_batch(kind))  # for the cached ones: the second time it comes from the disk
        return teacher


def _replaced(value: Any, known: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _replaced(one, known) for name, one in value.items()}
    return known.get(value, value) if isinstance(value, str) else value


def _model() -> Any:
    values = dict(MODEL)
    return tiny_model(values.pop("kind"), **values)


def _adapter(folder: Path) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        lora = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj", "down_proj"])
        tuned = get_peft_model(_model(), lora)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    tuned.save_pretrained(folder)
    return str(folder)


@functools.cache
def _plain(adapter: str | None) -> Any:
    model = _model()
    for name, down in (load_file(Path(adapter) / "adapter_model.safetensors") if adapter else {}).items():
        if "lora_A" in name:
            weight = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")).weight
            up = load_file(Path(str(adapter)) / "adapter_model.safetensors")[name.replace("lora_A", "lora_B")]
            weight.data = (weight.data.double() + ALPHA / R * up.double() @ down.double()).float()
    return model


VIEWS = ([9] * 22, [], [8, 7], [5], list(range(30)))  # in front of each row's completion; [] is its own prompt


def _batch(kind: Kind, contexts: Any = ((),) * 5) -> dict[str, torch.Tensor]:
    """Rows of 3 to 17 tokens, prompts of 1 to 6, one row without a target, padded on the right; the teacher reads them
    behind `contexts`, or behind the "same" prompts."""
    draw = torch.Generator().manual_seed(0)
    sequences = []
    for i, (length, start) in enumerate(((17, 4), (5, 1), (9, 6), (3, 3), (12, 2))):
        ids = torch.randint(0, 256, (length,), generator=draw).tolist()
        context = ids[:start] if contexts == "same" else list(contexts[i])
        sequences.append(TokenSequence(ids, [-100] * start + ids[start:], start, row=i, teacher_context=context))
    batch = collate(sequences, 256)
    if kind.teachers is not None:
        batch["teachers"] = torch.full((len(sequences),), kind.teachers)
    return batch


def _expected(batch: dict[str, torch.Tensor], adapter: str | None) -> DenseSignal:
    """The plain teacher, one row at a time, without padding."""
    model = _plain(adapter)
    rows = []
    with torch.no_grad():
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            length = int(mask.sum())
            hidden = model.model(input_ids=ids[None, :length]).last_hidden_state[0, :-1]
            rows.append(hidden[labels[1:length] != -100])
    return DenseSignal(torch.cat(rows), head_of(model))


def _loss(signal: Any, batch: dict[str, torch.Tensor], settings: LossSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and its gradient in the hidden states of a student that is drawn at random."""
    labels = batch["labels"]
    targets = labels[:, 1:][target_mask(labels)]
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(len(targets), 24, generator=draw).requires_grad_()
    head = Head(torch.randn(259, 24, generator=draw) * 0.2)
    output = fused_divergence(hidden, head, signal, targets, torch.full((len(targets),), 1 / len(targets)), settings)
    output.loss.backward()
    assert hidden.grad is not None
    return output.loss.detach(), hidden.grad


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("contract")
    servers: list[Server] = []

    def start_server() -> str:
        servers.append(Server(base, folder / "server.log"))
        servers[0].wait()
        return servers[0].url

    base = save_tiny(folder / "base", **MODEL)
    yield Place(folder, base, _adapter(folder / "adapter"), start_server)
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def teacher_of(place: Place) -> Callable[[str], Any]:
    return functools.cache(place.teacher)


@pytest.mark.parametrize(("name", "divergence"), CASES)
def test_same_loss_and_gradient_as_the_plain_teacher(name, divergence, place, teacher_of):
    kind = KINDS[name]
    teacher, batch = teacher_of(name), _batch(kind)
    signal = teacher.score(batch)
    expected = _expected(batch, place.adapter if kind.tuned else None)
    bound = kind.bound if kind.jumps is None or divergence != "total_variation" else kind.jumps
    for temperature in kind.temperatures:
        settings = LossSettings(make_divergence(divergence), loss_temperature=temperature, **kind.settings)
        loss, gradient = _loss(signal, batch, settings)
        plain, plain_gradient = _loss(expected, batch, settings)
        assert float((loss - plain).abs() / plain) < kind.bound
        assert float((gradient - plain_gradient).norm() / plain_gradient.norm()) < bound


EXACT = [name for name, kind in KINDS.items() if not kind.needs]


@pytest.mark.parametrize("name", EXACT)
def test_in_a_view_of_its_own_it_scores_what_the_teacher_reads(name, place, teacher_of):
    kind = KINDS[name]
    teacher, batch, plain = teacher_of(name), _batch(kind, VIEWS), _batch(kind)
    read = teacher_view(batch)
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    assert read["input_ids"].shape[1] > batch["input_ids"].shape[1]
    expected = _expected(read, place.adapter if kind.tuned else None)
    settings = LossSettings(make_divergence("forward_kl"), **kind.settings)
    loss, gradient = _loss(teacher.score(read), batch, settings)
    wanted, wanted_gradient = _loss(expected, batch, settings)
    assert float((loss - wanted).abs() / wanted) < kind.bound
    assert float((gradient - wanted_gradient).norm() / wanted_gradient.norm()) < kind.bound
    as_the_student, _ = _loss(teacher.score(plain), batch, settings)
    assert abs(float(as_the_student - loss)) > 0.02 * float(wanted)


@pytest.mark.parametrize("name", EXACT)
def test_a_view_of_the_same_prompts_is_none_bit_for_bit(name, teacher_of):
    """Also where another row of the batch has one, and the row is scored among the teacher's own."""
    kind = KINDS[name]
    teacher, settings = teacher_of(name), LossSettings(make_divergence("jsd"), **kind.settings)
    plain, same = _batch(kind), _batch(kind, "same")
    assert teacher_view(plain) is plain
    assert "teacher_input_ids" in same
    results = [_loss(teacher.score(teacher_view(batch)), batch, settings) for batch in (plain, same)]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.bound > 1e-3 and not kind.needs])
def test_the_bounds_mean_something(name, place, teacher_of):
    """A quantized teacher is another model, seen well above the exact kinds' bound, and far nearer to its own weights
    than the adapter's are."""
    batch = _batch(KINDS[name])
    settings = LossSettings(make_divergence("forward_kl"))
    _, gradient = _loss(teacher_of(name).score(batch), batch, settings)
    _, plain = _loss(_expected(batch, None), batch, settings)
    _, tuned = _loss(_expected(batch, place.adapter), batch, settings)
    error, apart = (float((other - plain).norm() / plain.norm()) for other in (gradient, tuned))
    assert 1e-4 < error < apart / 2


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.needs])
def test_frozen(name, teacher_of):
    teacher = teacher_of(name)
    models = [one.model for one in teacher.each()]
    for model in (model for model in models if model is not None):
        assert not model.training
        assert not any(parameter.grad is not None for parameter in model.parameters())
        if "student" not in name:
            assert not any(parameter.requires_grad for parameter in model.parameters())
