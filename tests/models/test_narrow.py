"""Fewer inner neurons: those that add least go, and what is left is the large model without them."""

import pytest
import torch
from configs import tiny_config
from configs import tiny_model as of_config
from smaller import assert_writes_with_its_cache_as_without, logits
from tiny import tiny_model, tiny_vision_model
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from gkd.models.narrow import adding_most, inner_of, what_neurons_add, with_neurons

IDS = [[257, 65, 66, 67, 68], [257, 70, 71, 258, 10, 72, 73, 74]]
# What writes the neurons and what reads them in a layer, and the config's name of how many there are.
KINDS = {
    "qwen2": ("mlp.gate_proj", "mlp.down_proj", "intermediate_size"),
    "llama": ("mlp.up_proj", "mlp.down_proj", "intermediate_size"),
    "gemma3_text": ("mlp.up_proj", "mlp.down_proj", "intermediate_size"),
    "phi3": ("mlp.gate_up_proj", "mlp.down_proj", "intermediate_size"),
    "gpt2": ("mlp.c_fc", "mlp.c_proj", "n_inner"),
    "opt": ("fc1", "fc2", "ffn_dim"),
    "gpt_neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "intermediate_size"),
}


def a_model(kind, layers=3):
    # with OPT's own ReLU some neurons never fire on so few tokens
    sizes = (
        {"ffn_dim": 64, "activation_function": "gelu"} if kind == "opt" else {"n_inner": 64} if kind == "gpt2" else {}
    )
    return tiny_model(kind, layers=layers, seed=3, **sizes)


def decoder_layers(model):
    """By hand, not as the code under test finds them."""
    decoder = model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def part(layer, name):
    """A projection's weight as [out, in], whichever way it is kept, and its bias."""
    module = layer.get_submodule(name)
    return module.weight.T if isinstance(module, Conv1D) else module.weight, getattr(module, "bias", None)


@torch.no_grad()
def deaden(model, kind, dead):
    """Neurons that do nothing: half of them are never read, half are never written."""
    writes, reads, _ = KINDS[kind]
    for layer, numbers in zip(decoder_layers(model), dead, strict=True):
        unread, unwritten = numbers[::2], numbers[1::2]
        part(layer, reads)[0][:, unread] = 0.0
        weight, bias = part(layer, writes)
        weight[unwritten] = 0.0  # of fused gate and other branch: the gate's half
        if bias is not None:
            bias[unwritten] = 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_dead_neurons_are_the_ones_that_go_and_nothing_changes(kind, tmp_path):
    """Loaded again by plain transformers; other neurons are dead in every layer."""
    draw = torch.Generator().manual_seed(5)
    dead = [torch.randperm(64, generator=draw)[:20] for _ in range(3)]
    model = a_model(kind)
    deaden(model, kind, dead)
    kept = adding_most(model, IDS, 44)
    assert [layer.tolist() for layer in kept] == [sorted(set(range(64)) - set(d.tolist())) for d in dead]
    smaller = with_neurons(model, kept)
    smaller.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert getattr(again.config, KINDS[kind][2]) == 44
    assert {part(layer, KINDS[kind][1])[0].shape for layer in decoder_layers(again)} == {(32, 44)}
    for ids in IDS:
        torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=1e-5, atol=1e-5)
    assert_writes_with_its_cache_as_without(again, IDS[0])


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_a_neuron_counts_by_what_the_mlp_says_without_it(kind):
    """The definition: each MLP computed again in float64 with one neuron never read."""
    model = a_model(kind, layers=2).double()
    read = {}
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda module, args: read.setdefault(module, []).append(args[0][0]))
        for layer in decoder_layers(model)
    ]
    for ids in IDS:
        logits(model, ids)
    for hook in hooks:
        hook.remove()
    for layer, scores in zip(decoder_layers(model), what_neurons_add(model, IDS), strict=True):
        states = torch.cat(read[layer.mlp])
        with torch.no_grad():
            whole = layer.mlp(states)
            weight, _ = part(layer, KINDS[kind][1])
            for neuron in range(0, 64, 7):
                column = weight[:, neuron].clone()
                weight[:, neuron] = 0.0
                change = (whole - layer.mlp(states)).pow(2).sum(-1).mean().sqrt()
                weight[:, neuron] = column
                torch.testing.assert_close(scores[neuron], change)


def test_the_vision_towers_width_is_not_touched():
    model = tiny_vision_model("gemma3")
    smaller = with_neurons(model, adding_most(model, IDS, 40))
    assert smaller.config.get_text_config().intermediate_size == 40
    assert smaller.config.vision_config.intermediate_size == 16


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "mamba", "bloom"])
def test_what_is_not_one_dense_mlp_a_layer_is_refused(kind):
    with pytest.raises(ValueError, match=r"no dense MLP in every layer .* mixture of experts.*leave --width out"):
        inner_of(of_config(tiny_config(kind)))


def test_a_norm_over_the_neurons_is_refused():
    model = of_config(tiny_config("bitnet"))
    with pytest.raises(ValueError, match="than with the same neurons silenced"):
        with_neurons(model, adding_most(model, IDS, 24))
