"""Completions of the in-process rollout: the tokens of plain `generate`, and samples that follow the distribution."""

import numpy as np
import pytest
import torch
from hf_rollouts import PROMPTS, rollout_of
from tiny import VOCABULARY, tiny_model
from transformers import GenerationConfig

from gkd.rollouts.base import EXTRA_OPTIONS, SamplingSettings, row_uniforms
from gkd.rollouts.hygiene import is_truncated, repeated_ngram_share


def plain_greedy(model, prompt, max_new_tokens, stop_ids=(), **options):
    """transformers' own greedy decoding of one row, which needs no padding."""
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(stop_ids) or None, pad_token_id=0, **options
    )
    output = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), generation_config=config
    )
    return output[0, len(prompt) :].tolist()


def common_tokens(model, count, max_new_tokens=12):
    """Tokens of the model's greedy completions, each at another position, so that rows stop at different lengths."""
    return tuple(plain_greedy(model, PROMPTS[i], max_new_tokens)[2 * i + 1] for i in range(count))


# ------------------------------------------------------------------------------------------------ the same tokens


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2", "gemma2", "mistral"])
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_greedy_equals_plain_generate(kind, batch_size):
    overrides = {"sliding_window": 8, "tie_word_embeddings": False} if kind in ("mistral", "gemma2") else {}
    model = tiny_model(kind, seed=3, **overrides)
    stop_ids = common_tokens(model, 4)
    expected = [plain_greedy(model, prompt, 12, stop_ids) for prompt in PROMPTS]
    assert len({len(completion) for completion in expected}) > 2, "rows must finish at different times"
    # pad_id is a stop token on purpose
    rollout = rollout_of(model, batch_size, temperature=0, stop_ids=stop_ids, pad_id=stop_ids[0])
    assert rollout.generate(PROMPTS, step=0) == expected


@pytest.mark.parametrize(
    "rule", ["repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "bad_words_ids", "suppress_tokens"]
)
def test_rules_that_read_the_row_see_no_padding(rule):
    model = tiny_model("gpt2", seed=5)
    often = common_tokens(model, 5)
    value = {
        "repetition_penalty": 1.7,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 5,
        "bad_words_ids": [[token] for token in often] + [[PROMPTS[0][0], 7]],
        "suppress_tokens": list(often),
    }[rule]
    stop_ids = often[:2] if rule == "min_new_tokens" else ()
    expected = [plain_greedy(model, prompt, 24, stop_ids, **{rule: value}) for prompt in PROMPTS]
    assert expected != [plain_greedy(model, prompt, 24, stop_ids) for prompt in PROMPTS], "the rule must matter"
    options = {rule: value} if rule == "repetition_penalty" else {"extra": {rule: value}}
    # pad_id is a token that the model often takes: it must not count as one of the row's
    rollout = rollout_of(model, temperature=0, stop_ids=stop_ids, max_new_tokens=24, pad_id=often[0], **options)
    assert rollout.generate(PROMPTS, 0) == expected


def test_the_users_own_rule_sees_no_padding():
    def like_before(input_ids, scores):
        counts = torch.nn.functional.one_hot(input_ids, VOCABULARY).sum(1)
        return scores + counts  # counted padding would pull the row to one token

    model = tiny_model("gpt2", seed=5)
    expected = []
    for prompt in PROMPTS:
        config = GenerationConfig(max_new_tokens=24, do_sample=False, pad_token_id=0)
        output = model.generate(torch.tensor([prompt]), generation_config=config, logits_processor=[like_before])
        expected.append(output[0, len(prompt) :].tolist())
    rollout = rollout_of(model, temperature=0, max_new_tokens=24, extra={"logits_processor": [like_before]})
    assert rollout.generate(PROMPTS, 0) == expected


def test_nothing_of_the_generation_config_leaks_in(tmp_path):
    model = tiny_model(seed=2)
    expected = rollout_of(model).generate(PROMPTS, 0)
    greedy = rollout_of(model, temperature=0).generate(PROMPTS, 0)
    own = GenerationConfig(
        do_sample=True, top_k=2, top_p=0.1, temperature=0.1, repetition_penalty=3.0, max_length=20, min_p=0.9,
        eos_token_id=[*range(200)], no_repeat_ngram_size=1, suppress_tokens=[1, 2],
    )  # fmt: skip
    model.generation_config = own
    before = own.to_json_string(use_diff=False)
    assert rollout_of(model).generate(PROMPTS, 0) == expected
    assert rollout_of(model, temperature=0).generate(PROMPTS, 0) == greedy
    assert model.generation_config is own
    assert own.to_json_string(use_diff=False) == before
    model.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.top_k, saved.max_length, saved.repetition_penalty) == (2, 20, 3.0)


# ------------------------------------------------------------------------------------------------------ stopping


def test_completions_end_with_the_first_stop_token_and_keep_it():
    model = tiny_model(seed=4)
    stop_ids = tuple(range(0, VOCABULARY, 4))
    completions = rollout_of(model, max_new_tokens=9, stop_ids=stop_ids).generate(PROMPTS * 4, 0)
    ended = [completion for completion in completions if completion[-1] in stop_ids]
    assert len(ended) > len(completions) / 2
    for completion in completions:
        assert 1 <= len(completion) <= 9
        assert not set(completion[:-1]) & set(stop_ids)
        assert completion[-1] in stop_ids or len(completion) == 9
        assert is_truncated(completion, stop_ids, 9) == (completion[-1] not in stop_ids)


def test_without_stop_ids_every_row_reaches_the_cap():
    assert {len(c) for c in rollout_of(tiny_model(), max_new_tokens=7).generate(PROMPTS, 0)} == {7}


@pytest.mark.parametrize("max_new_tokens", [1, 2])
def test_short_caps(max_new_tokens):
    model = tiny_model()
    short = rollout_of(model, max_new_tokens=max_new_tokens).generate(PROMPTS, 0)
    long = rollout_of(model, max_new_tokens=20).generate(PROMPTS, 0)
    assert short == [completion[:max_new_tokens] for completion in long], "a longer cap keeps the start"


def test_no_prompts_and_one_prompt():
    model = tiny_model()
    assert rollout_of(model).generate([], 0) == []
    assert rollout_of(model).generate([[5]], 0, rows=[3]) == rollout_of(model).generate([[1, 2]] * 3 + [[5]], 0)[3:]


# ------------------------------------------------------------------------------------------------ random numbers


def test_each_token_has_its_own_number():
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)  # all tokens equally likely: token = floor(V u)
    completions = rollout_of(model, seed=9, source="teacher").generate(PROMPTS, 4, rows=[*range(20, 27)])
    for row, completion in zip(range(20, 27), completions, strict=True):
        assert completion == [int(VOCABULARY * u) for u in row_uniforms(9, 4, row, "teacher", 12)]


# -------------------------------------------------------------------------------------------------- distribution


def nucleus(probabilities, top_p):
    """The smallest set of most likely tokens with at least `top_p` of the mass, renormalised; in float64."""
    order = np.argsort(-probabilities)
    kept = order[: int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1]
    out = np.zeros_like(probabilities)
    out[kept] = probabilities[kept]
    return out / out.sum()


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.5, 1.0, 0), (1.3, 0.7, 0), (1.0, 1.0, 4)]
)
def test_samples_follow_the_distribution(temperature, top_p, top_k):
    model = tiny_model(vocab=13, seed=8, eos_token_id=None, pad_token_id=None)
    count, prompt = 6000, [1, 5, 2]
    logits = model(torch.tensor([prompt])).logits[0, -1].double().detach().numpy() / temperature
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    if top_k:
        expected[np.argsort(-expected)[top_k:]] = 0
        expected /= expected.sum()
    expected = nucleus(expected, top_p)
    settings = {"max_new_tokens": 1, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    tokens = [completion[0] for completion in rollout_of(model, **settings).generate([prompt] * count, 0)]
    observed = np.bincount(tokens, minlength=13)
    assert observed[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = ((observed - count * expected)[kept] ** 2 / (count * expected)[kept]).sum()
    freedom = kept.sum() - 1
    assert freedom >= 2
    assert chi_square < freedom + 4.5 * np.sqrt(2 * freedom), (observed, count * expected)


# -------------------------------------------------------------------------------------------------------- errors


def test_settings_out_of_range_name_the_field():
    for field, value in [
        ("max_new_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")), ("temperature", float("inf")),
        ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("min_p", 1.5), ("repetition_penalty", 0.0),
        ("stop_ids", (3, -1)), ("pad_id", -1),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^{field}=.*use "):
            SamplingSettings(**({"max_new_tokens": 4} | {field: value}))
    with pytest.raises(ValueError, match="rollout_batch_size=0"):
        rollout_of(None, batch_size=0)


def test_unknown_options_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'top_pp'.*no_repeat_ngram_size"):
        SamplingSettings(4, extra={"top_pp": 0.9})
    for key in ("num_beams", "num_return_sequences", "use_cache", "stop_strings", "streamer"):
        with pytest.raises(ValueError, match=key):
            SamplingSettings(4, extra={key: 1})
    with pytest.raises(ValueError, match=r"'max_length'\] is decided by max_new_tokens"):
        SamplingSettings(4, extra={"max_length": 9})
    assert {key for key in EXTRA_OPTIONS if not hasattr(GenerationConfig(), key)} == {"logits_processor"}


def test_prompts_that_cannot_be_used_name_the_row():
    model = tiny_model()
    with pytest.raises(ValueError, match="row 42 of step 3 has an empty prompt"):
        rollout_of(model).generate([[1], []], 3, rows=[41, 42])
    with pytest.raises(ValueError, match=r"row 1: a prompt of 1020 tokens and max_new_tokens=12.*1024 positions"):
        rollout_of(model).generate([[1], [1] * 1020], 0)
    assert len(rollout_of(model, max_new_tokens=4).generate([[1] * 1020], 0)[0]) == 4


def test_diverged_weights_are_an_error_not_tokens():
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    for temperature in (0, 1.0):
        rollout = rollout_of(model, temperature=temperature)
        with pytest.raises(FloatingPointError, match="NaN"):
            rollout.generate([[1, 2], [7]], 0)


# ------------------------------------------------------------------------------------------------------- helpers


def test_truncated_means_the_cap_ended_it():
    assert is_truncated([1, 2, 3], (9,), 3)
    assert not is_truncated([1, 2, 9], (9,), 3), "the stop token at the cap is an end"
    assert not is_truncated([1, 9], (9, 8), 3)
    assert is_truncated([1, 2], (), 2)


def test_repeated_ngram_share():
    assert repeated_ngram_share(list(range(20))) == 0
    assert repeated_ngram_share([1, 2, 3]) == 0
    assert repeated_ngram_share([]) == 0
    assert repeated_ngram_share([7] * 13) == pytest.approx(1 - 1 / 10)
    assert repeated_ngram_share([1, 2, 1, 2, 1], n=2) == pytest.approx(0.5)
