"""Fields of one source and of single tokens: what has no effect is an error, and what is taken arrives in the loss."""

import pytest
from training import config

from gkd.config.by_source import overrides
from gkd.config.settings import loss_settings
from gkd.loss import make_divergence


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"divergence_student": "reverse_kl", "lmbda": 0.0},
            "divergence_student='reverse_kl' has no effect",
        ),
        ({"beta_teacher": 0.3}, "beta_teacher=0.3 has no effect with lmbda=0.5 and seq_kd=False"),
        ({"teacher_top_k_data": 5, "seq_kd": True}, "teacher_top_k_data=5 has no effect"),
        ({"divergence_data": "jsd", "lmbda": 1.0}, "of source 'data'"),
        ({"divergence_teacher": "jsd", "seq_kd": True, "seq_kd_loss": "nll"}, "seq_kd_loss='nll'"),
        ({"divergence_student": "kl"}, "divergence_student='kl' is unknown"),
        ({"divergence_student": 3}, "divergence_student"),
        ({"beta_student": 1.5}, "beta_student must be between 0 and 1, got 1.5"),
        (
            {"divergence_student": "forward_kl", "beta_student": 0.5},
            "beta_student=0.5 has no effect on",
        ),
        ({"divergence": "forward_kl", "beta_data": 0.1}, "set divergence_data='jsd'"),
        ({"divergence": "forward_kl", "divergence_student": "reverse_kl", "beta": 0.2}, "beta=0.2 has no effect on"),
        ({"teacher_top_k_student": 0}, "teacher_top_k"),
        ({"teacher_top_k_student": 4, "loss_compile": True}, "loss_compile=True has no effect"),
        ({"divergence_student": "reverse_kl", "teacher_top_k": 3, "top_k_tail": "renormalize"}, "top_k_tail="),
        ({"skip_first_tokens": -1}, "skip_first_tokens=-1"),
        ({"skip_first_tokens": 2, "teacher_scores_dir": "here"}, "does not go with teacher_scores_dir"),
        ({"token_weights": "entropy"}, "token_weights='entropy'"),
        ({"token_weights": "iw_opd", "lmbda": 0.0}, "has no effect with lmbda=0"),
        ({"log_top_k_overlap": 0}, "log_top_k_overlap=0"),
        ({"log_top_k_overlap": 4, "seq_kd": True, "seq_kd_loss": "nll", "lmbda": 0.0}, "log_top_k_overlap=4"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_refused(tmp_path, fields, text):
    with pytest.raises(ValueError, match=text):
        config(tmp_path, **fields)


def test_what_a_source_has_of_its_own():
    given = config(
        "out", divergence="skew_forward_kl", skew_lambda=0.2, divergence_student="jsd", beta=0.7,
        teacher_top_k_student=9, beta_data=None,
    )  # fmt: skip
    of_data, of_student, of_teacher = overrides(given, given.beta)
    assert of_data == of_teacher == {}
    assert of_student["divergence"].name == make_divergence("jsd", beta=0.7).name
    assert of_student["teacher_top_k"] == 9
    assert loss_settings(given).divergence.name == make_divergence("skew_forward_kl", skew_lambda=0.2).name
    assert overrides(given, given.beta)[1]["divergence"] is of_student["divergence"], "made once, compiled once"
    assert overrides(given, 0.1)[1]["divergence"].name == make_divergence("jsd", beta=0.1).name


def test_a_tail_needs_some_top_k(tmp_path):
    config(tmp_path, teacher_top_k_student=4, top_k_tail="renormalize")
    with pytest.raises(ValueError, match="no effect without teacher_top_k"):
        config(tmp_path, top_k_tail="renormalize")


def test_the_common_divergence_keeps_refusing_what_nothing_takes(tmp_path):
    config(tmp_path, divergence_student="skew_reverse_kl", skew_lambda=0.3)
    with pytest.raises(ValueError, match=r"skew_lambda=0.3 has no effect"):
        config(tmp_path, divergence_student="reverse_kl", skew_lambda=0.3)
