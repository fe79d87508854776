"""A value out of range and an unknown choice are refused with the config, by the name of the field."""

import math
import re

import pytest

from gkd.config.fields import GKDConfig
from gkd.data.encoded import Answers, Limits
from gkd.data.sources import Mixture
from gkd.loss import make_divergence
from gkd.loss.settings import LossSettings
from gkd.rollouts.base import SamplingSettings
from gkd.rollouts.hygiene import Hygiene

RANGES = [
    ({"lmbda": 1.5}, "lmbda=1.5 is out of range [0, 1]: 0 trains on the data only"),
    ({"lmbda": -0.1}, "lmbda=-0.1 is out of range [0, 1]"),
    ({"ce_weight": 1.01}, "ce_weight=1.01 is out of range [0, 1]"),
    ({"temperature": -1.0}, "temperature=-1.0 is out of range [0, inf)"),
    ({"temperature": math.inf}, "temperature=inf is out of range"),
    ({"seq_kd": True, "teacher_temperature": -1.0}, "teacher_temperature=-1.0 is out of range [0, inf)"),
    ({"top_p": 0.0}, "top_p=0.0 is out of range (0, 1]: use 1 to turn it off"),
    ({"top_k": -1}, "top_k=-1 is out of range: use a whole number of at least 0"),
    ({"min_p": 1.5}, "min_p=1.5 is out of range [0, 1]: use None to turn it off"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 is out of range (0, inf)"),
    ({"max_new_tokens": 0}, "max_new_tokens=0 is out of range: use a whole number of at least 1"),
    ({"generation_kwargs": {"num_beams": 2}}, "generation_kwargs['num_beams'] is unknown here"),
    ({"generation_kwargs": {"top_p": 0.9}}, "generation_kwargs['top_p'] is decided by top_p"),
    ({"loss_temperature": 0.0}, "loss_temperature=0.0 is out of range (0, inf): 1 is the plain softmax"),
    ({"teacher_loss_temperature": 0.0}, "teacher_loss_temperature=0.0 is out of range"),
    ({"teacher_top_k": 0}, "teacher_top_k=0 is out of range: use a whole number of at least 1"),
    ({"loss_chunk_size": 0}, "loss_chunk_size=0 is out of range: use a whole number of at least 1"),
    ({"loss_compile": True, "teacher_top_k": 4}, "loss_compile=True has no effect with divergence=jsd"),
    ({"teacher_top_k": 4, "top_k_tail": "drop"}, "top_k_tail='drop' is unknown: use one of bucket, renormalize"),
    ({"teacher_top_k": 4, "top_k_tail": "ignore"}, "top_k_tail='ignore' is defined for the forward KL only"),
    ({"repetition_threshold": 1.1}, "repetition_threshold=1.1 is out of range [0, 1]"),
    ({"max_nonfinite_steps": -1}, "max_nonfinite_steps=-1 is out of range: use a whole number of at least 0"),
    ({"rollout_batch_size": 0}, "rollout_batch_size=0 is out of range: use a whole number of at least 1"),
    ({"max_length": 0}, "max_length=0 is out of range: use a whole number of at least 1"),
    ({"max_prompt_length": 0}, "max_prompt_length=0 is out of range: use a whole number of at least 1"),
    ({"mixing": "coin"}, "mixing='coin' is unknown: use one of sample, batch"),
    ({"loss_reduction": "sum"}, "loss_reduction='sum' is unknown: use one of token, sequence"),
    ({"seq_kd": True, "seq_kd_loss": "ce"}, "seq_kd_loss='ce' is unknown: use one of divergence, nll"),
    ({"overlong_prompt": "cut"}, "overlong_prompt='cut' is unknown: use one of drop, keep_start, keep_end"),
    ({"overlong_row": "keep"}, "overlong_row='keep' is unknown: use one of cut, drop"),
    ({"unanswered_rows": "keep"}, "unanswered_rows='keep' is unknown: use one of cut, drop"),
    ({"assistant_turns": "first"}, "assistant_turns='first' is unknown: use one of last, all"),
    ({"rollout_backend": "sglang"}, "rollout_backend='sglang' is unknown: use one of hf, vllm"),
    # what the base classes' fields hold, and their libraries would meet late or never
    ({"learning_rate": -1.0}, "learning_rate=-1.0 is out of range [0, inf)"),
    ({"learning_rate": math.nan}, "learning_rate=nan is out of range [0, inf)"),
    ({"weight_decay": math.inf}, "weight_decay=inf is out of range [0, inf)"),
    ({"adam_beta2": 1.0}, "adam_beta2=1.0 is out of range [0, 1)"),
    ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0 is out of range [0, inf): 0 does not clip"),
    ({"max_steps": 0}, "max_steps=0 trains nothing"),
    ({"num_train_epochs": math.inf}, "num_train_epochs=inf should be above 0, or set max_steps"),
    ({"save_steps": 0}, "save_steps=0 should be above 0: a number of steps, or below 1 a share"),
    ({"eval_strategy": "steps", "eval_steps": -5}, "eval_steps=-5 should be above 0"),
    ({"logging_steps": -1}, "logging_steps=-1 should be above 0: a number of steps"),
    (
        {"load_best_model_at_end": True, "save_strategy": "no"},
        "load_best_model_at_end=True has no effect with eval_st",
    ),
    ({"train_sampling_strategy": "length"}, "train_sampling_strategy='length' is unknown: use one of random, sequent"),
    ({"log_level": "loud"}, "log_level='loud' is unknown: use one of"),
    ({"report_to": ["wandbb"]}, "report_to='wandbb' is unknown: use one of none, all, "),
    ({"seed": -1}, "seed=-1 is out of range: use a whole number of at least 0"),
    ({"pad_to_multiple_of": -8}, "pad_to_multiple_of=-8 is out of range"),
    ({"accelerator_config": {"split": True}}, "accelerator_config='split' is unknown: use one of"),
    ({"teacher_placement": "gpu"}, "teacher_placement='gpu' is unknown: use one of same, cpu_offload"),
]


@pytest.mark.parametrize(("values", "message"), RANGES, ids=[" ".join(map(str, values)) for values, _ in RANGES])
def test_a_config_names_the_field_the_value_and_the_remedy(tmp_path, values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        GKDConfig(**{"output_dir": str(tmp_path), "report_to": [], **values})


# The settings object that holds the range of a field, and what else it needs.
HOLDERS = {
    Mixture: ({"lmbda": 0.5}, ["lmbda", "mixing"]),
    Limits: ({}, ["max_length", "max_prompt_length", "overlong_prompt", "overlong_row"]),
    Answers: ({}, ["assistant_turns", "unanswered_rows"]),
    Hygiene: ({"stop_ids": {}, "max_new_tokens": 1}, ["repetition_threshold"]),
    SamplingSettings: (
        {"max_new_tokens": 1},
        ["max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"],
    ),
    LossSettings: (
        {"divergence": make_divergence("jsd")},
        ["loss_temperature", "teacher_loss_temperature", "teacher_top_k"],
    ),
}


def test_a_settings_object_says_the_same_as_the_config():
    for values, message in RANGES:
        name, value = next(iter(values.items()))
        holder = next((kind for kind, (_, names) in HOLDERS.items() if name in names), None)
        if holder is None or len(values) > 1:
            continue
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            holder(**{**HOLDERS[holder][0], name: value})
