"""Every way in prepares rows alike: the trainer's entry points, and every kind of data set object."""

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from prepared import GOOD, TOKENIZER, prepare
from tiny import THINKING, tiny_model, tiny_rows, tiny_tokenizer
from training import config, trainer_of

from gkd.training.trainer import GKDTrainer

ROWS = tiny_rows(6)
RAW = Dataset.from_list(ROWS)
TOKENIZED = prepare(ROWS)[0].select_columns(["input_ids", "labels"])

# ------------------------------------------------------------------------------------------------ formats of rows


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow", "python"])
@pytest.mark.parametrize("rows", [RAW, TOKENIZED], ids=["chats", "ids"])
def test_formats_that_show_rows_as_something_else(rows, kind):
    before = rows.with_format(kind)
    assert list(prepare(before)[0]) == list(prepare(rows)[0])
    assert before.format["type"] == (None if kind == "python" else kind)  # the user's own is left alone


def test_a_format_hides_the_columns_that_it_does_not_name():
    rows = TOKENIZED.add_column("attention_mask", [[0] + [1] * (len(row) - 1) for row in TOKENIZED["input_ids"]])
    shown = rows.with_format("torch", columns=["input_ids", "labels"])
    assert list(prepare(shown)[0]) == list(prepare(TOKENIZED)[0])
    every = rows.with_format("torch", columns=["input_ids", "labels"], output_all_columns=True)
    assert list(prepare(every)[0]) == list(prepare(rows)[0])


def test_a_transform_is_applied():
    asked = Dataset.from_list([{"q": row["messages"][-2]["content"], "a": "Yes."} for row in ROWS])
    lazy = asked.with_transform(lambda batch: {"prompt": batch["q"], "completion": batch["a"]})
    plain = asked.rename_columns({"q": "prompt", "a": "completion"})
    assert list(prepare(lazy)[0]) == list(prepare(plain)[0])
    arrays = TOKENIZED.with_transform(lambda batch: {name: [np.array(ids) for ids in batch[name]] for name in batch})
    assert list(prepare(arrays)[0]) == list(prepare(TOKENIZED)[0])
    for wrong in (lambda batch: {"prompt": batch["q"][:1]}, lambda batch: batch["q"]):
        with pytest.raises(ValueError, match=r"transform of the train data set \(set_transform\) should give columns"):
            prepare(asked.with_transform(wrong))


def test_a_formatting_func_may_give_arrays():
    row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    for kind in (np.array, torch.tensor):
        made = prepare([GOOD], formatting_func=lambda _, kind=kind: {name: kind(ids) for name, ids in row.items()})
        assert made[0][0]["labels"] == row["labels"]


def test_rows_that_were_prepared_keep_the_prompt_that_is_served():
    rows, _ = prepare(ROWS, tiny_tokenizer(chat_template=THINKING))
    assert any(rows["prompt_ids"])
    assert list(prepare(rows)[0]) == list(rows)


# ----------------------------------------------------------------------------------------- entry points of the trainer

FORMS = {
    "chats": RAW,
    "ids and labels": TOKENIZED,
    "tensors": TOKENIZED.with_format("torch"),
    "a transform": RAW.with_transform(lambda batch: batch),
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return trainer_of(tmp_path_factory.mktemp("run"), eval_dataset=RAW, lmbda=1.0, max_steps=2)


@pytest.mark.parametrize("rows", FORMS.values(), ids=FORMS.keys())
def test_every_entry_point_takes_every_form(trainer, rows):
    expected = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected)
    assert trainer.evaluate({"a": rows})["eval_a_loss"] == pytest.approx(expected)
    assert trainer.predict(rows).metrics["test_loss"] == pytest.approx(expected)
    assert next(iter(trainer.get_test_dataloader(rows)))["rows"].tolist() == [0, 1, 2, 3, 4, 5]


def test_rows_of_the_training_may_be_evaluated(trainer):
    with_answers = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert with_answers == pytest.approx(trainer.evaluate(Dataset.from_list(tiny_rows(16)))["eval_loss"])


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (ROWS, "got list: use Dataset.from_list"),
        (RAW.to_iterable_dataset(), r"is streamed.*Dataset\.from_list"),
        (Dataset.from_list([{"messages": [{"role": "user", "content": "a"}]}]), "eval_loss is measured on"),
        (Dataset.from_list([{"input_ids": [1, 2]}]), "`labels` with the id"),
        (Dataset.from_list([{"foo": 1}]), "row 0: no format known for the columns"),
    ],
)
def test_what_cannot_be_evaluated_is_named_alike(trainer, rows, problem):
    for enter, name in ((trainer.evaluate, "eval"), (trainer.predict, "test")):
        with pytest.raises(ValueError, match=problem) as error:
            enter(rows)
        assert f"{name} data set" in str(error.value)


def test_names_and_sets_that_are_set_later(tmp_path):
    trainer = trainer_of(tmp_path, eval_dataset={"a": RAW}, max_steps=1)
    assert trainer.evaluate("a")["eval_loss"] > 0
    with pytest.raises(ValueError, match="there is no eval data set 'b': eval_dataset has a"):
        trainer.evaluate("b")
    trainer.eval_dataset = TOKENIZED
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate(RAW)["eval_loss"])
    trainer.train_dataset = RAW
    with pytest.raises(ValueError, match=r"trainer\.train_dataset holds rows that are not prepared"):
        trainer.train()


def test_splits_are_named(tmp_path):
    for given in ({"train_dataset": DatasetDict(train=RAW)}, {"train_dataset": RAW, "eval_dataset": {"a": ROWS}}):
        with pytest.raises(ValueError, match=r"the (train data set is a dict of splits|a data set should be)"):
            GKDTrainer(tiny_model(), tiny_model(seed=2), config(tmp_path), processing_class=TOKENIZER, **given)
