"""Heads of real (tiny) models: what `head_of` reads gives the model's own logits, or it raises."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_rows
from torch import nn
from training import trainer_of
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gkd.loss import make_divergence
from gkd.loss.dense import generalized_jsd_loss
from gkd.loss.fused import fused_divergence
from gkd.loss.settings import LossSettings
from gkd.loss.signals import DenseSignal, Head
from gkd.models.head import check_head, head_of, output_layer
from gkd.models.hidden import instead_of_logits
from gkd.models.precision import mixed_precision

KINDS = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "gpt2": {},
    "phi": {},  # a head with a bias
    "mixtral": {"num_local_experts": 2},
}


def run(model, input_ids):
    """Last hidden states and logits, as the model itself computes them."""
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    logits = model(input_ids=input_ids).logits
    handle.remove()
    return seen[0], logits


@pytest.mark.parametrize("kind", KINDS)
def test_fused_is_the_models_own_logits(kind):
    student, teacher = tiny_model(kind, seed=1, **KINDS[kind]), tiny_model(kind, hidden=48, seed=2, **KINDS[kind])
    if kind == "phi":
        nn.init.normal_(student.lm_head.bias, generator=torch.Generator().manual_seed(0))
    input_ids = torch.randint(0, 259, (2, 9), generator=torch.Generator().manual_seed(3))
    labels = input_ids.clone()
    labels[0, :4] = labels[1, :6] = -100
    mask = labels[:, 1:] != -100

    hidden, logits = run(student, input_ids)
    with torch.no_grad():
        teacher_hidden, teacher_logits = run(teacher, input_ids)
    dense = generalized_jsd_loss(logits[:, :-1], teacher_logits[:, :-1], labels[:, 1:])
    names = [name for name, _ in student.named_parameters()]
    expected = torch.autograd.grad(dense, list(student.parameters()), retain_graph=True)

    head = head_of(student)
    assert head.weight is student.get_output_embeddings().weight
    number = int(mask.sum())
    output = fused_divergence(
        hidden[:, :-1][mask],
        head,
        DenseSignal(teacher_hidden[:, :-1][mask], head_of(teacher)),
        labels[:, 1:][mask],
        torch.full((number,), 1 / number),
        LossSettings(make_divergence("jsd"), chunk_size=4),
    )
    torch.testing.assert_close(output.loss, dense, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(output.loss, list(student.parameters()))
    for name, gradient, wanted in zip(names, gradients, expected, strict=True):
        torch.testing.assert_close(
            gradient, wanted, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    check_head(student, head)


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_check_head_sees_a_forgotten_quirk(kind):
    model = tiny_model(kind, **KINDS[kind])
    head = head_of(model)
    with pytest.raises(ValueError, match="does something to its logits"):
        check_head(model, Head(head.weight, head.bias))


def test_check_head_leaves_the_model_as_it_was():
    model = tiny_model("llama", attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    before = torch.random.get_rng_state()
    check_head(model, head_of(model))
    assert model.training
    assert not model.model.layers[0].training
    assert not model.lm_head._forward_pre_hooks
    assert torch.equal(before, torch.random.get_rng_state())


def test_check_head_in_bf16():
    model = tiny_model("gemma2", final_logit_softcapping=3.0).bfloat16()
    check_head(model, head_of(model))


def adapted(**options):
    return get_peft_model(tiny_model("qwen2"), LoraConfig(task_type="CAUSAL_LM", r=2, **options))


def test_lora_leaves_the_head_frozen():
    model = adapted(target_modules=["q_proj", "v_proj"])
    head = head_of(model)
    assert not head.weight.requires_grad
    check_head(model, head)


def test_lora_on_the_head_is_refused():
    model = adapted(target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="take 'lm_head' out"):
        head_of(model)


def test_a_fully_trained_head_beside_lora_is_the_one_that_runs():
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    head = head_of(model)
    assert head.weight.requires_grad
    nn.init.normal_(head.weight)
    check_head(model, head)


def test_models_without_a_usable_head_are_refused():
    class Headless(nn.Module):
        def get_output_embeddings(self):
            return None

    with pytest.raises(ValueError, match="Headless has no output embeddings"):
        head_of(Headless())
    with pytest.raises(ValueError, match="Linear has no output embeddings"):
        head_of(nn.Linear(2, 2))


def test_a_quantised_head_is_refused():
    model = tiny_model("llama")
    model.lm_head.weight = nn.Parameter(torch.zeros(259, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        head_of(model)


def test_minicpm3_scales_before_its_head():
    values = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    model = tiny_model("minicpm3", hidden=64, dim_model_base=16, num_key_value_heads=2, **values)
    assert model.config.logits_scaling == 4
    check_head(model, head_of(model))


def test_hyperclovax_multiplies_where_granite_divides():
    assert head_of(tiny_model("granite", logits_scaling=4.0)).logit_scale == 0.25
    model = tiny_model("granite", logits_scaling=4.0)
    model.config.model_type = "hyperclovax"
    assert head_of(model).logit_scale == 4.0
    model.config.logit_scale = "inv_sqrt_d_model"
    with pytest.raises(ValueError, match="not a number"):
        head_of(model)


def test_a_cut_head_is_refused():
    model = tiny_model("llama")
    model.config.unpadded_vocab_size = 200
    with pytest.raises(ValueError, match="unpadded_vocab_size=200"):
        head_of(model)


# ------------------------------------------------------------------------------- the check in reduced precision

# What a model may do to its logits that no config field tells.
QUIRKS = {
    "x 0.6": lambda logits: logits * 0.6,
    "x 1.05": lambda logits: logits * 1.05,
    "x 1.3": lambda logits: logits * 1.3,
    "capped": lambda logits: 5 * torch.tanh(logits / 5),
    "+ 0.3": lambda logits: logits + 0.3,
}


def with_quirk(model, quirk):
    """The model with something done to its logits behind the head."""
    forward = model.forward

    def changed(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = QUIRKS[quirk](outputs.logits)
        return outputs

    model.forward = changed
    return model


def modes(model):
    """The model in each of the precisions that training uses, and the context for it."""
    yield copy.deepcopy(model), nullcontext()
    yield copy.deepcopy(model), torch.autocast("cpu", torch.bfloat16)
    yield copy.deepcopy(model).bfloat16(), nullcontext()
    yield copy.deepcopy(model).half(), nullcontext()


@pytest.mark.parametrize("kind", KINDS)
def test_check_head_passes_in_every_precision(kind):
    model = tiny_model(kind, hidden=64, **KINDS[kind])
    if kind == "phi":
        nn.init.normal_(model.lm_head.bias, generator=torch.Generator().manual_seed(0))
    for runs, precision in modes(model):
        with precision:
            check_head(runs, head_of(runs))


@pytest.mark.parametrize("quirk", QUIRKS)
def test_check_head_has_power_in_every_precision(quirk):
    for runs, precision in modes(tiny_model("llama", hidden=64)):
        with precision, pytest.raises(ValueError, match="does something to its logits"):
            check_head(with_quirk(runs, quirk), head_of(runs))


def first_value(hidden):
    return hidden[..., 0].float().sum()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "phi"])
def test_the_check_inside_a_forward_pass(kind):
    """For models that run in their engine only: the loss is the same, and a quirk is seen."""
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 4, 5]])}
    for model, precision in modes(tiny_model(kind, hidden=64, **KINDS[kind])):
        head, layer = head_of(model), output_layer(model)
        with precision:
            plain, _ = instead_of_logits(model, layer, inputs, first_value)
            loss, outputs = instead_of_logits(model, layer, inputs, first_value, head)
            assert torch.equal(loss, plain)
            assert outputs.logits.shape == (1, 4, 259)
            for parameter in model.parameters():
                parameter.grad = None
            (outputs.logits.sum() * 0 + loss).backward()  # the graph still hangs on the outputs
            assert model.get_input_embeddings().weight.grad.abs().sum() > 0
            with pytest.raises(ValueError, match="does something to its logits"):
                instead_of_logits(with_quirk(model, "x 1.05"), layer, inputs, first_value, head)


def test_a_large_head_is_compared_in_blocks(monkeypatch):
    model = tiny_model("llama", hidden=64)
    monkeypatch.setattr("gkd.models.head._BLOCK", 100)
    check_head(model, head_of(model))


# -------------------------------------------------------------------------------------- kernels that take no fp32


def halves_only(module, query, key, value, mask, **kwargs):
    """Attention with FlashAttention's rule; as in transformers, autocast's dtype is taken where there is one."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (states.to(torch.get_autocast_dtype("cpu")) for states in (query, key, value))
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)


@pytest.fixture
def flash(monkeypatch):
    ALL_ATTENTION_FUNCTIONS.register("halves_only", halves_only)
    ALL_MASK_ATTENTION_FUNCTIONS.register("halves_only", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    yield lambda model: model.set_attn_implementation("halves_only") or model
    AcceleratorState._reset_state(reset_partial_state=True)


def test_fp32_weights_under_bf16_with_flash_attention(flash, tmp_path):
    """TRL's defaults: the student is loaded in fp32, and bf16 comes from autocast."""
    student, teacher = flash(tiny_model(layers=1)), flash(tiny_model(layers=1, seed=2))
    with pytest.raises(RuntimeError, match="FlashAttention"):
        student(torch.tensor([[1, 2]]))
    AcceleratorState._reset_state(reset_partial_state=True)
    rows = Dataset.from_list(tiny_rows(4))
    trainer = trainer_of(
        tmp_path, rows, student=student, teacher=teacher, bf16=True, max_steps=1, lmbda=0.5, max_new_tokens=4
    )
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_under_deepspeed_what_is_in_no_engine_gets_the_runs_precision(monkeypatch):
    """The student that is measured before the first step, a teacher in fp32: accelerate has no autocast there."""

    class Wired:
        device, mixed_precision = torch.device("cpu"), "bf16"

    monkeypatch.setattr("gkd.models.precision.zero_stage", lambda _accelerator: 2)
    model, engine = nn.Linear(2, 2), nn.Linear(2, 2)
    engine.zero_optimization_stage = lambda: 2
    for module, expected in ((model, torch.bfloat16), (engine, torch.float32)):
        with mixed_precision(Wired(), module):
            assert module(torch.ones(1, 2)).dtype == expected
    with mixed_precision(Wired(), nn.Linear(2, 2).bfloat16()):
        assert not torch.is_autocast_enabled("cpu"), "the engine's own arithmetic: no autocast over bf16 weights"
    with mixed_precision(None, model):
        assert model(torch.ones(1, 2)).dtype == torch.float32


def test_a_compiled_model_leaves_the_loss_alone():
    """`torch_compile=True`: traced with the model, the loss would be taken to pieces and compiled in every step."""
    model, traced = tiny_model("llama", layers=1), []

    def use(hidden):
        traced.append(torch.compiler.is_compiling())
        return hidden.sum()

    compiled = torch.compile(model, backend="eager")
    expected = instead_of_logits(model, output_layer(model), {"input_ids": torch.ones(1, 5).long()}, use)[0]
    for _ in range(2):
        loss, _ = instead_of_logits(compiled, output_layer(model), {"input_ids": torch.ones(1, 5).long()}, use)
        torch.testing.assert_close(loss, expected)
    assert traced == [False] * 3
    torch._dynamo.reset()
