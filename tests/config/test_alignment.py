"""`teacher_tokenizer_alignment`: refused where it has no effect, or cannot be honoured, with the remedy."""

import pytest
from training import config

NLL = {"lmbda": 0.0, "seq_kd": True, "seq_kd_loss": "nll"}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"teacher_tokenizer_alignment": "text"}, r"teacher_tokenizer_alignment='text'.*bytes"),
        ({"share_base_model": True}, r"no effect with share_base_model, .*leave it out"),
        ({"self_teacher": "base"}, r"no effect with self_teacher, .*leave it out"),
        (NLL, r"no effect with seq_kd_loss='nll' and lmbda=0, .*seq_kd_loss='divergence'"),
        (
            {**NLL, "teacher_chat_url": "http://localhost:8/v1", "teacher_chat_model": "m"},
            r"teacher_chat_url.*only write",
        ),
        ({"teacher_server_url": "http://localhost:8"}, r"teacher_server_url needs teacher_top_k"),
        (
            {"teacher_server_url": "http://localhost:8", "teacher_top_k": 4, "loss_temperature": 2.0},
            r"loss_temperature=2.0.*teacher_server_url",
        ),
        ({"teachers": {"a": {"model": "x"}, "b": {"model": "y"}}}, r"does not go with teachers: take one"),
        ({"teacher_adapters": {"a": "x", "b": None}}, r"does not go with teacher_adapters: take one"),
        ({"loss_compile": True}, r"^loss_compile=True does not go with .*leave it out$"),
    ],
)
def test_what_does_not_go_with_it(tmp_path, values, told):
    with pytest.raises(ValueError, match=told):
        config(tmp_path, **{"teacher_tokenizer_alignment": "bytes", **values})


def test_what_goes_with_it(tmp_path):
    config(tmp_path, teacher_tokenizer_alignment="bytes", teacher_end_of_turn="<|im_end|>=</s>")
    config(tmp_path, teacher_tokenizer_alignment="bytes", seq_kd=True, seq_kd_loss="nll", lmbda=0.5)
    config(tmp_path, teacher_tokenizer_alignment="bytes", eval_strategy="steps", eval_steps=1, **NLL)
    config(
        tmp_path, teacher_tokenizer_alignment="bytes", teacher_top_k=8, teacher_top_k_student=4, loss_temperature=2.0
    )
    config(tmp_path, teacher_tokenizer_alignment="bytes", teacher_server_url="http://localhost:8", teacher_top_k=4)
    with pytest.raises(ValueError, match=r"teacher_end_of_turn.*has no effect"):
        config(tmp_path, teacher_end_of_turn="<|im_end|>=</s>")
