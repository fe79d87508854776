"""What a rollout does to the model while it runs, and that nothing of it is left afterwards."""

import copy
import functools

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tiny import tiny_model
from torch import nn
from transformers import DynamicCache

from gkd.models.generation_mode import generation_mode
from gkd.rollouts.base import SamplingSettings
from gkd.rollouts.folding import foldable, folded
from gkd.rollouts.hf import HFRollout
from gkd.rollouts.kv_cache import keep_rows, places_to_keep, use_growing_layers
from gkd.rollouts.sampling import NOT_A_TOKEN, most_likely, sample

PROMPTS = [[5], [9] * 11, [3, 4, 5, 6, 7], list(range(100, 117))]


def rollout_of(model, accelerator=None, merge_adapter=True, **settings):
    settings = SamplingSettings(**({"max_new_tokens": 12} | settings))
    return HFRollout(lambda: model, accelerator, settings, seed=0, source="student", merge_adapter=merge_adapter)


def lora(model, **options):
    options = {"r": 3, "target_modules": "all-linear", "init_lora_weights": False} | options
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))


class FailingRule:
    """A logits processor that fails at the given step."""

    def __init__(self, step):
        self.left = step

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left < 0:
            raise KeyError("a rule that fails")
        return scores


def state_of(model):
    return {
        name: (
            module.training,
            getattr(module, "gradient_checkpointing", None),
            id(getattr(module, "_gradient_checkpointing_func", None)),
            len(module._forward_hooks),
        )
        for name, module in model.named_modules()
    }


def gradients(model):
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------------- restored


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("with_lora", [False, True])
def test_everything_is_as_before(fails, use_reentrant, with_lora):
    model = tiny_model("llama", attention_dropout=0.0)
    model = lora(model) if with_lora else model
    model.train()
    bare = model.get_base_model() if with_lora else model
    bare.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    bare.enable_input_require_grads()
    bare.model.layers[1].eval()  # a frozen part that its owner keeps in eval mode
    before, weights, expected = state_of(model), copy.deepcopy(model.state_dict()), gradients(model)
    own_config = bare.generation_config
    rollout = rollout_of(model, extra={"logits_processor": [FailingRule(3)]} if fails else {})
    if fails:
        with pytest.raises(KeyError, match="a rule that fails"):
            rollout.generate(PROMPTS, 0)
    else:
        rollout.generate(PROMPTS, 0)
    assert state_of(model) == before
    func = bare.model.layers[0]._gradient_checkpointing_func
    assert isinstance(func, functools.partial)
    assert func.keywords["use_reentrant"] is use_reentrant
    assert bare.generation_config is own_config
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.is_grad_enabled()
    after = gradients(model)
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], expected[name]) for name in expected)


def test_inside_the_model_generates_and_does_not_train():
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable()
    with generation_mode(model, None) as bare:
        assert bare is model
        assert not any(module.training for module in model.modules())
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        assert not torch.is_grad_enabled()
        assert model.generation_config.eos_token_id is None
    assert all(module.training for module in model.modules())


def test_each_step_sees_one_new_token_of_the_running_rows():
    model = tiny_model("llama", seed=4).train()
    model.gradient_checkpointing_enable()
    shapes = []
    model.model.register_forward_hook(
        lambda module, args, kwargs, out: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    stop_ids = tuple(range(0, 256, 5))
    completions = rollout_of(model, stop_ids=stop_ids).generate(PROMPTS * 3, 0)
    lengths = [len(completion) for completion in completions]
    assert len(set(lengths)) > 3
    assert shapes[0] == (4, 17), "the different prompts at once, padded to the longest"
    assert shapes[1:] == [(sum(length > t for length in lengths), 1) for t in range(1, max(lengths))]


def test_unwraps_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        model = lora(tiny_model("llama"))
        expected = rollout_of(model).generate(PROMPTS, 0)
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert rollout_of(wrapped).generate(PROMPTS, 0) == expected
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_autocast_is_the_accelerators(precision):
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        model = lora(tiny_model("llama"))
        seen = []
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        layer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        rollout_of(accelerator.prepare(model), accelerator).generate(PROMPTS, 0)
        assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_prompt_tuning_is_refused():
    model = get_peft_model(tiny_model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"adapter 'default' is of type .*PREFIX_TUNING.*LoRA"):
        rollout_of(model).generate(PROMPTS, 0)


# -------------------------------------------------------------------------------------------------------- adapter


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_folding_changes_nothing_that_is_sampled(kind):
    model = lora(tiny_model(kind, seed=7), fan_in_fan_out=kind == "gpt2")
    bare = model.get_base_model()
    assert len(foldable(bare)) == sum("lora_A" in name for name, _ in model.named_parameters())
    ids = torch.tensor([PROMPTS[3]])
    with torch.no_grad():
        apart = model(ids).logits
        with folded(foldable(bare)):
            assert (model(ids).logits - apart).abs().max() < 1e-4
        with model.disable_adapter():
            assert (model(ids).logits - apart).abs().max() > 0.1
    assert rollout_of(model, merge_adapter=True).generate(PROMPTS, 0) == rollout_of(
        model, merge_adapter=False
    ).generate(PROMPTS, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_base_weights_come_back_bit_for_bit(dtype):
    model = lora(tiny_model("llama").to(dtype))
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    moved = 0
    with folded(foldable(model)):
        moved = sum(p.data_ptr() != before[name][0] for name, p in model.named_parameters())
    assert moved == len(foldable(model)) > 0
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])
    with pytest.raises(KeyError), folded(foldable(model)):
        raise KeyError("inside")
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert not any(layer.merged for layer in foldable(model))
    assert len(foldable(model)) == moved


def test_folds_where_it_pays():
    def folds(prompts=PROMPTS, **options):
        rollout = rollout_of(model, **options)
        return len(rollout._layers_to_fold(model.get_base_model(), prompts))

    model = lora(tiny_model("llama"))
    assert folds() == 14
    assert folds(merge_adapter=False) == 0
    assert folds(max_new_tokens=2) == 0
    assert folds(prompts=[]) == 0


def test_what_cannot_be_folded_is_left_alone():
    tied = lora(tiny_model("llama", tie_word_embeddings=True), target_modules=["lm_head", "q_proj"])
    assert [layer.get_base_layer().weight.shape for layer in foldable(tied)] == [(32, 32)] * 2, "not the tied head"
    assert foldable(lora(tiny_model("llama"), use_dora=True)) == []
    assert foldable(tiny_model("llama")) == []
    switched_off = lora(tiny_model("llama"))
    with switched_off.disable_adapter():
        assert foldable(switched_off) == []
    merged = lora(tiny_model("llama"))
    merged.merge_adapter()
    assert foldable(merged) == []


# ---------------------------------------------------------------------------------------------------------- cache


def test_growing_layers_hold_what_transformers_layers_hold():
    draw = torch.Generator().manual_seed(0)
    config = tiny_model("mistral", sliding_window=6, layers=1).config
    for make in (
        lambda: DynamicCache(config=tiny_model("llama", layers=1).config),
        lambda: DynamicCache(config=config),
    ):
        ours, theirs, rows = make(), make(), 7
        use_growing_layers(ours)
        for tokens in [9, *[1] * 90]:
            keys, values = (torch.randn(rows, 2, tokens, 4, generator=draw) for _ in range(2))
            got, expected = ours.update(keys, values, 0), theirs.update(keys, values, 0)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            assert ours.get_seq_length() == theirs.get_seq_length()
            assert ours.get_mask_sizes(1, 0) == theirs.get_mask_sizes(1, 0)
            if rows > 1 and torch.rand((), generator=draw) < 0.1:
                leaving = set(
                    torch.randperm(rows, generator=draw)[: int(torch.randint(1, rows, (), generator=draw))].tolist()
                )
                places = places_to_keep(rows, leaving)
                assert sorted(places) == [place for place in range(rows) if place not in leaving]
                keep_rows(ours, places, torch.device("cpu"))
                theirs.reorder_cache(torch.tensor(places))
                rows = len(places)
        assert rows < 7


def test_rows_stay_in_a_cache_that_holds_something_beside_its_layers():
    """MiniMax keeps the state of its linear attention there: finished rows go on unseen, and the tokens are right."""
    layers = ["linear_attention", "full_attention"]
    model = tiny_model("minimax", layer_types=layers, num_local_experts=2, num_experts_per_tok=1, head_dim=16)
    stop_ids, prompts = tuple(range(0, 256, 5)), [[row, 7, 9] for row in range(8)]
    together = rollout_of(model, stop_ids=stop_ids).generate(prompts, 0)
    assert len({len(completion) for completion in together}) > 2, "rows must finish at different times"
    for row, prompt in enumerate(prompts):
        assert rollout_of(model, stop_ids=stop_ids).generate([prompt], 0, [row]) == [together[row]]


def test_few_rows_move():
    assert places_to_keep(5, {1}) == [0, 4, 2, 3]
    assert places_to_keep(5, {4}) == [0, 1, 2, 3]
    assert places_to_keep(4, {0, 1, 2}) == [3]
    assert places_to_keep(6, {0, 5}) == [4, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("vocab", [1, 2, 7, 64, 65, 1000])
def test_sample_is_the_inverse_cdf(vocab):
    draw = torch.Generator().manual_seed(vocab)
    scores = 3 * torch.randn(50, vocab, generator=draw)
    uniforms = torch.rand(50, dtype=torch.float64, generator=draw)
    cdf = scores.double().softmax(-1).cumsum(-1)
    expected = (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(-1)
    close = (cdf - uniforms[:, None]).abs().amin(-1) < 1e-6  # rounding may decide these
    assert close.float().mean() < 0.05 or vocab == 1
    assert torch.equal(sample(scores, uniforms, block=64)[~close], expected[~close])


def test_sample_never_takes_an_excluded_token():
    uniforms = torch.tensor([0.0, 1 - 2**-53, 0.5, 1.0], dtype=torch.float64)
    for vocab, block in [(10, 4), (300, 64), (2049, 1024)]:
        draw = torch.Generator().manual_seed(vocab)
        for kept in (1, 2, vocab // 3):
            scores = torch.full((4, vocab), -torch.inf)
            allowed = torch.randperm(vocab, generator=draw)[:kept]
            scores[:, allowed] = 30 * torch.randn(4, kept, generator=draw)
            tokens = sample(scores, uniforms, block)
            probabilities = scores.softmax(-1).gather(-1, tokens[:, None])
            assert (probabilities > 0).all()
            assert set(tokens.tolist()) <= set(allowed.tolist())


def test_no_finite_logit_is_no_token():
    bad = torch.tensor([[1.0, float("nan")], [-torch.inf, -torch.inf], [torch.inf, 0.0], [0.0, 100.0]])
    uniforms = torch.full((4,), 0.5, dtype=torch.float64)
    assert sample(bad, uniforms).tolist() == [NOT_A_TOKEN] * 3 + [1]
    assert most_likely(bad).tolist() == [NOT_A_TOKEN] * 3 + [1]


_OVERRIDES = {
    "gemma2": {"sliding_window": 8, "tie_word_embeddings": False},
    "minimax": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "head_dim": 16,
    },
}


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gemma2", "falcon_mamba", "minimax"])
def test_equal_prompts_are_read_once_and_go_on_apart(kind):
    """As each row alone: its own random numbers, and the state that its prompt leaves."""
    model = tiny_model(kind, seed=3, **_OVERRIDES.get(kind, {}))
    prompts = [PROMPTS[i] for i in (1, 1, 1, 3, 3, 1, 0)]
    if kind == "minimax":  # padding is not hidden from its linear attention
        prompts = [prompt[-1:] for prompt in prompts]
    rollout = rollout_of(model, max_new_tokens=10, stop_ids=tuple(range(80)))
    sizes = []
    handle = model.register_forward_hook(lambda m, args, kw, out: sizes.append(out.logits.shape[0]), with_kwargs=True)
    found = rollout.generate(prompts, 3)
    handle.remove()
    copies = kind not in ("minimax", "falcon_mamba")  # whose state is not known row by row
    assert sizes[:2] == ([3, len([one for one in found if len(one) > 1])] if copies else [7, 7])
    assert found == [rollout.generate([prompt], 3, [row])[0] for row, prompt in enumerate(prompts)]
    assert len(set(map(tuple, (found[i] for i in (0, 1, 2, 5))))) == 4
    assert len(set(map(len, found))) > 2, "rows must finish at different times"
