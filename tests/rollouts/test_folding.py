"""The model that writes is the model that trains, also where weights are bf16 and an adapter is folded into them.

The student here is tiny, and what matters of a real one is kept: its weights lie on bf16's grid, as those of any
checkpoint that was saved in bf16; activations have a common direction; and the adapter was trained, so that its many
small contributions all point the same way. Rounding each weight to the nearest then loses most of the update.
"""

import copy
import math
from functools import cache

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from gkd.evaluation.harness import Evaluator
from gkd.evaluation.subject import Conditions, LocalSubject
from gkd.loss.divergences import forward_kl
from gkd.loss.settings import LossSettings
from gkd.models.adapters import merged
from gkd.models.rounding import generator_for, stochastically_rounded
from gkd.rollouts import folding as adapter_module
from gkd.rollouts.base import SamplingSettings
from gkd.rollouts.folding import castable, foldable, folded
from gkd.rollouts.hf import HFRollout

DRAW = torch.Generator().manual_seed(3)
PROMPTS = torch.randint(0, 250, (16, 10), generator=DRAW).tolist()
NEW_TOKENS = 8


def on_the_grid(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


def student(kind="llama", lora=None, **overrides):
    """A model on bf16's grid whose embeddings share a direction, with a LoRA adapter as in the README's first run."""
    model = tiny_model(kind, **({"hidden": 128} | overrides))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.5)
    options = {"r": 64, "lora_alpha": 16, "target_modules": "all-linear"} | (lora or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(on_the_grid(model), LoraConfig(task_type="CAUSAL_LM", **options))


def train(model, steps):
    """AdamW at lr 2e-4 towards a fixed distribution over the next token, whatever the text."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 250, (8, 24), generator=draw)
    target = (3 * torch.randn(259, generator=draw)).log_softmax(-1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        (target.exp() * (target - model(ids).logits.log_softmax(-1))).sum(-1).mean().backward()
        optimizer.step()
    return model


@cache
def trained(steps):
    return train(student(), steps)


def in_bf16(model):
    """The same with its base in bf16; PEFT keeps the adapter in fp32."""
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    return twin


class Recorder:
    """A logits processor that keeps what the writing model says about each next token."""

    def __init__(self):
        self.ids, self.scores = [], []

    def __call__(self, input_ids, scores):
        self.ids.append(input_ids.clone())
        self.scores.append(scores.clone())
        return scores


@pytest.fixture
def autocast():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def said_while_writing(model, accelerator=None, fold=True, step=0):
    """Token ids and logits [B, NEW_TOKENS, V] of a real rollout."""
    recorder = Recorder()
    settings = SamplingSettings(NEW_TOKENS, extra={"logits_processor": [recorder]})
    HFRollout(lambda: model, accelerator, settings, seed=0, merge_adapter=fold).generate(PROMPTS, step)
    return recorder.ids[-1], torch.stack(recorder.scores, dim=1)


def kl(logits, others):
    p, q = logits.double().log_softmax(-1), others.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def from_the_student(model, ids, logits):
    """KL(student || what wrote `ids`); the student is the fp32 model with its adapter apart."""
    with torch.no_grad():
        return kl(model(ids).logits[:, -NEW_TOKENS:], logits)


# --------------------------------------------------------------------------------------------------- on-policy


@pytest.mark.parametrize("mode", ["bf16 weights", "autocast"])
@pytest.mark.parametrize("steps", [1, 4, 8, 16])
def test_what_writes_is_as_near_to_the_student_as_its_dtype_allows(autocast, mode, steps):
    model = trained(steps)
    runs, accelerator = (in_bf16(model), None) if mode == "bf16 weights" else (model, autocast)
    floor = from_the_student(model, *said_while_writing(runs, accelerator, fold=False))
    writes = from_the_student(model, *said_while_writing(runs, accelerator, step=steps))
    assert writes < 2 * floor
    if steps == 8:
        with model.disable_adapter():
            base = said_while_writing(model)
        assert from_the_student(model, *base) > 50 * floor, "there is something to lose"


def test_the_check_has_teeth(monkeypatch):
    """Rounded to the nearest, the model that writes is far from the student."""
    model = trained(8)
    floor = from_the_student(model, *said_while_writing(in_bf16(model), fold=False))
    monkeypatch.setattr(adapter_module, "stochastically_rounded", lambda values, dtype, _: values.to(dtype))
    assert from_the_student(model, *said_while_writing(in_bf16(model))) > 10 * floor


KINDS = {
    "rslora": ("llama", {"use_rslora": True}, {}),
    "dora": ("llama", {"use_dora": True}, {}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, {}),
    "tied head": ("llama", {"target_modules": ["q_proj", "up_proj"]}, {"tie_word_embeddings": True}),
    "conv1d, transposed": ("gpt2", {"fan_in_fan_out": True}, {}),
    "convolution": (
        "lfm2",
        {"r": 32, "target_modules": r".*(conv\.conv|q_proj|w1)"},
        {"hidden": 32, "layer_types": ["conv", "full_attention"]},
    ),
    "experts": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter(autocast, kind):
    name, lora, overrides = KINDS[kind]
    model = train(student(name, lora={"r": 8, **lora}, **overrides), 4)
    assert foldable(model.get_base_model()) or kind == "dora"
    for runs, accelerator in ((in_bf16(model), None), (model, autocast)):
        before = {name: parameter.clone() for name, parameter in runs.named_parameters()}
        floor = from_the_student(model, *said_while_writing(runs, accelerator, fold=False))
        assert from_the_student(model, *said_while_writing(runs, accelerator)) < 2 * floor
        for name, parameter in runs.named_parameters():
            assert parameter.dtype == before[name].dtype
            assert torch.equal(parameter, before[name]), name


def test_ranks_fold_alike_and_steps_differ():
    model = in_bf16(trained(8))
    layers = foldable(model.get_base_model())

    def weights(seed, step):
        torch.manual_seed(step)  # the global stream is another one on each rank, and must not matter
        with folded(layers, seed, step):
            return torch.cat([layer.get_base_layer().weight.flatten() for layer in layers])

    first = weights(5, 3)
    assert torch.equal(first, weights(5, 3))
    assert not torch.equal(first, weights(5, 4))
    assert not torch.equal(first, weights(6, 3))


def test_a_trained_base_weight_keeps_its_dtype_for_its_gradient(autocast):
    model = trained(4)
    layers = foldable(model.get_base_model())
    layers[0].get_base_layer().weight.requires_grad_(True)
    with autocast.autocast(), folded(layers, others=castable(model)):
        weights = [layer.get_base_layer().weight for layer in layers]
        assert [weight.dtype for weight in weights] == [torch.float32, *[torch.bfloat16] * (len(layers) - 1)]
        assert torch.equal(weights[0], weights[0].bfloat16().float()), "on the grid, so that autocast changes nothing"
    layers[0].get_base_layer().weight.requires_grad_(False)


class Casts(TorchDispatchMode):
    """Counts the elements that are cast from fp32 to bf16 in tensors of a weight's size."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32 and args[0].numel() >= 128 * 64:
            self.elements += args[0].numel()
        return out


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_under_autocast_no_layer_is_cast_for_every_token(autocast, targets):
    def cast(new_tokens):
        settings = SamplingSettings(new_tokens)
        with Casts() as casts:
            HFRollout(lambda: model, autocast, settings, seed=0).generate(PROMPTS[:2], 0)
        return casts.elements

    model = student(lora={"target_modules": targets}, tie_word_embeddings=True)
    assert cast(12) - cast(10) == 2 * model.get_base_model().lm_head.weight.numel(), "the tied head alone"


# ------------------------------------------------------------------------------------- evaluation, merged teachers


def test_evaluation_folds_as_the_training_does(monkeypatch):
    seen = []
    monkeypatch.setattr("gkd.rollouts.hf.folded", lambda layers, *rest: seen.append(len(layers)) or folded([]))
    model = student(hidden=32)
    for fold in (True, False):
        harness = Evaluator(
            None,
            tiny_tokenizer(),
            PROMPTS[:2],
            [],
            SamplingSettings(9),
            LossSettings(forward_kl()),
            conditions=Conditions(fold_adapter=fold),
        )
        harness.measure(LocalSubject(model), "student")
    assert seen[0] > 0
    assert seen[-1] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_teacher_is_the_adapted_one(kind):
    name, lora, overrides = KINDS[kind]
    if kind == "tied head":
        lora = {"target_modules": ["lm_head", "q_proj"]}
    model = train(student(name, lora={"r": 8, **lora}, **overrides), 4)
    ids = torch.tensor(PROMPTS)
    with torch.no_grad():
        reference = model(ids).logits
        floor = kl(reference, in_bf16(model)(ids).logits)
        low = in_bf16(model)
        whole = merged(low)
        if kind != "convolution":  # in groups, which PEFT does not merge: it stays apart
            assert not any("lora" in name for name, _ in whole.named_parameters())
            assert {p.dtype for p in whole.parameters()} == {torch.bfloat16}
        assert kl(reference, whole(ids).logits) < 2 * floor
        again = merged(in_bf16(model))
        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))
        exact = merged(copy.deepcopy(model))
        assert (exact(ids).logits - reference).abs().max() < 1e-3


def test_a_merged_teacher_keeps_a_small_coherent_update(monkeypatch):
    model, ids = trained(8), torch.tensor(PROMPTS)
    with torch.no_grad():
        reference = model(ids).logits
        floor = kl(reference, in_bf16(model)(ids).logits)
        assert kl(reference, merged(in_bf16(model))(ids).logits) < 2 * floor
        monkeypatch.setattr("gkd.models.adapters.stochastically_rounded", lambda values, dtype, _: values.to(dtype))
        assert kl(reference, merged(in_bf16(model))(ids).logits) > 10 * floor


# ------------------------------------------------------------------------------------------------ the rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0, 1.0 + 2**-12, -1.3, 3e-5, -7.1e-6, 2e-8, 1234.567, 0.0])
def test_one_of_the_two_neighbours_and_right_on_average(dtype, value):
    count = 20000
    values = torch.full((count,), value)
    exact = float(values[0])
    rounded = stochastically_rounded(values.clone(), dtype, generator_for(0, 0, values.device)).double()
    found = rounded.unique().tolist()
    assert len(found) <= 2
    low, high = min(found), max(found)
    assert low <= exact <= high
    if exact == float(values[0].to(dtype)):
        assert found == [exact]
        return
    assert (
        torch.tensor(low, dtype=dtype).view(torch.int16).sub(torch.tensor(high, dtype=dtype).view(torch.int16)).abs()
        == 1
    )
    share = (exact - low) / (high - low)
    assert abs(float((rounded == high).double().mean()) - share) < 5 * math.sqrt(share * (1 - share) / count) + 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_no_number_stays(dtype):
    strange = torch.tensor([float("nan"), float("inf"), -float("inf")])
    rounded = stochastically_rounded(strange.clone(), dtype, generator_for(0, 0, strange.device))
    assert rounded.isnan().tolist() == [True, False, False]
    assert rounded[1:].tolist() == [float("inf"), -float("inf")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_are_not_rounded(dtype):
    values = torch.randn(9)
    assert torch.equal(
        stochastically_rounded(values.clone(), dtype, generator_for(0, 0, values.device)), values.to(dtype)
    )
