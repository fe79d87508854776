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
        ({"teacher_server_url": "http://localhost:8", "teacher_top_k": 4}, r"elsewhere.*teacher_model_name_or_path"),
        ({**NLL, "teacher_chat_url": "http://localhost:8/v1", "teacher_chat_model": "m"}, r"elsewhere.*only write"),
        ({"teachers": {"a": {"model": "x"}, "b": {"model": "y"}}}, r"does not go with teachers: take one"),
        ({"teacher_adapters": {"a": "x", "b": None}}, r"does not go with teacher_adapters: take one"),
        ({"teacher_top_k": 8}, r"^teacher_top_k=8 does not go with .*leave it out$"),
        ({"teacher_top_k_student": 8}, r"^teacher_top_k_student=8 does not go with .*leave it out$"),
        ({"token_weights": "iw_opd"}, r"^token_weights='iw_opd' does not go with .*leave it out$"),
        ({"log_top_k_overlap": 4}, r"^log_top_k_overlap=4 does not go with .*leave it out$"),
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
    with pytest.raises(ValueError, match=r"teacher_end_of_turn.*has no effect"):
        config(tmp_path, teacher_end_of_turn="<|im_end|>=</s>")
