"""`chat_template_path` and `eos_token` are applied before the rows are rendered, and add no token to the student."""

import pytest
from datasets import Dataset
from tiny import CHATML, VOCABULARY, save_tiny, tiny_model, tiny_tokenizer
from training import Remember, config

from gkd.training.trainer import GKDTrainer

MARKED = CHATML.replace("<|im_start|>", "<|im_start|>@")
CHATS = Dataset.from_list(
    [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}] * 4
)


def trainer(folder, tokenizer, rows=CHATS, **values):
    return GKDTrainer(
        model=tiny_model(seed=1),
        teacher_model=tiny_model(seed=2),
        args=config(folder, lmbda=0.0, **values),
        train_dataset=rows,
        processing_class=tokenizer,
    )


def texts(memory):
    return {tiny_tokenizer().decode(sequence.input_ids) for sequence in memory.windows[0]}


def test_a_template_file_renders_the_rows(tmp_path, monkeypatch):
    memory = Remember(monkeypatch)
    (tmp_path / "chat.jinja").write_text(MARKED)
    run = trainer(tmp_path, tiny_tokenizer(chat_template=None), chat_template_path=str(tmp_path / "chat.jinja"))
    run.train()
    assert texts(memory) == {"<|im_start|>@user\nhi<|im_end|>\n<|im_start|>@assistant\nyo<|im_end|>"}
    assert run.args.chat_template_path == str(tmp_path / "chat.jinja")  # for the card and the loggers
    assert run.processing_class.chat_template == MARKED


def test_another_tokenizers_template_is_taken_without_its_padding_tokens(tmp_path, monkeypatch):
    memory = Remember(monkeypatch)
    source = save_tiny(tmp_path / "source", tokenizer=tiny_tokenizer(chat_template=MARKED))
    run = trainer(tmp_path, tiny_tokenizer(chat_template=None), chat_template_path=source)
    run.train()
    assert "<|im_start|>@user" in texts(memory).pop()
    assert run.model.get_output_embeddings().weight.shape[0] == VOCABULARY
    assert len(run.processing_class) == VOCABULARY


def test_a_template_with_tokens_that_the_teacher_lacks_is_refused(tmp_path):
    other = tiny_tokenizer(chat_template=MARKED)
    other.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    other.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"1 special tokens which the student's lacks \(<\|tool\|>\)"):
        trainer(tmp_path, tiny_tokenizer(), chat_template_path=str(tmp_path / "source"))


@pytest.mark.parametrize(
    ("path", "message"),
    [("none.jinja", "there is no such file"), ("nowhere", "neither a .jinja file nor"), ("bare", "no chat template")],
)
def test_a_template_that_is_not_there(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, tiny_tokenizer(), chat_template_path=path)


def test_eos_token_ends_the_answers_and_the_rollouts(tmp_path, monkeypatch):
    memory = Remember(monkeypatch)
    rows = Dataset.from_list([{"prompt": "go ", "completion": "on"}] * 4)
    run = trainer(tmp_path, tiny_tokenizer(), rows, eos_token="<|endoftext|>")
    run.train()
    assert [sequence.input_ids[-1] for sequence in memory.windows[0]] == [256] * 4
    assert 256 in run.rollouts["student"].settings.stop_ids


def test_pad_token_is_what_batches_are_padded_with(tmp_path):
    run = trainer(tmp_path, tiny_tokenizer(), pad_token="<|im_start|>")
    assert run.processing_class.pad_token_id == run.data_collator.pad_id == run.model.config.pad_token_id == 257


@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
def test_an_unknown_token_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}='<nope>' is not in the vocabulary"):
        trainer(tmp_path, tiny_tokenizer(), **{name: "<nope>"})


def test_options_of_the_base_class_that_would_do_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dataset_kwargs: add_special_tokens has no effect"):
        config(tmp_path, dataset_kwargs={"add_special_tokens": False, "skip_prepare_dataset": True})
    for name, value in (("dataset_text_field", "body"), ("packing_strategy", "wrapped")):
        with pytest.raises(ValueError, match=f"{name}='{value}' has no effect"):
            config(tmp_path, **{name: value})
    assert config(tmp_path, dataset_kwargs={"skip_prepare_dataset": True}).dataset_kwargs  # as scripts for TRL have it
