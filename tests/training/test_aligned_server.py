"""A teacher with another tokenizer that tells its K most likely tokens: on a server, and in this process."""

import copy

import pytest
import torch
from aligned_training import ASCII, BYTES, OTHER, ROWS, check, expected, prompt_of, trainer_of
from other_tokens import other_model, other_tokenizer
from tiny import tiny_model
from training import Remember, change, logged, losses
from vllm_server.fake import FakeServer

K = 12


@pytest.fixture
def server(tmp_path):
    other_tokenizer().save_pretrained(tmp_path / "served")
    with FakeServer(other_model().eval(), other_tokenizer(), root=str(tmp_path / "served")) as server:
        yield server


def served(server, **values):
    return {"teacher_server_url": server.url, "teacher_top_k": K, **values}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"lmbda": 1.0, "generation_kwargs": ASCII},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
    ],
    ids=["data", "student", "accumulated"],
)
def test_the_gradient_is_that_of_the_definition(tmp_path, monkeypatch, server, values):
    remembered = Remember(monkeypatch)
    student = tiny_model(seed=1)
    models = [copy.deepcopy(student).double(), copy.deepcopy(server.base).double()]
    trainer = trainer_of(tmp_path / "run", student=student, log_top_k_overlap=4, **served(server, **values))
    moved = change(trainer)
    loss, in_full = check(moved, models, remembered.windows[0], k=K)
    assert 0 <= logged(trainer, "student/top_k_overlap")[0] < 1
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-4)
    assert logged(trainer, "aligned/in_full")[0] == pytest.approx(in_full)
    assert 0 < logged(trainer, "teacher/top_k_mass")[0] < 1
    assert abs(expected(models, remembered.windows[0])[0].item() - loss.item()) > 1e-3 * loss.item()  # K is a matter


def test_in_this_process_it_is_the_same(tmp_path, server):
    found = []
    for name, values in (("a", served(server)), ("b", {"teacher_top_k": K}), ("c", {})):
        trainer = trainer_of(tmp_path / name, **values)
        moved = change(trainer)
        found.append((moved, losses(trainer)[0]))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    assert float((found[0][0] - found[1][0]).norm() / found[1][0].norm()) < 1e-4
    assert abs(found[2][1] - found[1][1]) > 1e-3 * found[1][1]


def test_what_it_writes_is_read_in_its_own_ids(tmp_path, monkeypatch, server):
    remembered = Remember(monkeypatch)
    student = tiny_model(seed=1)
    models = [copy.deepcopy(student).double(), copy.deepcopy(server.base).double()]
    letters = {i for i, text in enumerate(BYTES[OTHER]) if text and len(text) == 1 and text < b"\x80"} | {1}
    silent = [i for i in range(len(OTHER) + 6) if i not in letters]
    values = served(server, lmbda=0.0, seq_kd=True, max_new_tokens=6, generation_kwargs={"suppress_tokens": silent})
    trainer = trainer_of(tmp_path / "run", student=student, **values)
    moved = change(trainer)
    window = remembered.windows[0]
    assert {sequence.source for sequence in window} == {"teacher"}
    for sequence in window:
        assert sequence.teacher_ids == trainer.rollouts["teacher"].store.get(prompt_of(ROWS[sequence.row], OTHER))
    check(moved, models, window, k=K)


def test_an_evaluation_is_the_same_mean(tmp_path, server):
    evaluates = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3, "eval_dataset": ROWS}
    trainer = trainer_of(tmp_path / "run", **served(server, **evaluates))
    models = [copy.deepcopy(trainer.model).double(), copy.deepcopy(server.base).double()]
    loss, _ = expected(models, trainer.data_collator.sequences(list(trainer.eval_dataset)), k=K)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_what_the_server_takes_is_compared_and_what_stands_behind_is_not(tmp_path, server):
    server.options["max_model_len"] = 40
    trainer = trainer_of(tmp_path / "run", **served(server))
    assert trainer.alignment.room == 39
    trainer.train()
    assert 0 < logged(trainer, "aligned/not_compared")[0] < 1
    assert max(len(body["token_ids"]) for path, body in server.seen if path == "/inference/v1/generate") <= 39


def test_a_server_whose_tokenizer_is_not_known_here_or_another_is_refused(tmp_path, server):
    server.options["root"] = "nowhere/at-all"
    with pytest.raises(ValueError, match=r"needs the teacher's tokenizer.*serve it under a name, or from a folder"):
        trainer_of(tmp_path / "run", **served(server))
    other_tokenizer().save_pretrained(tmp_path / "changed")
    changed = other_tokenizer()
    changed.add_tokens(["quick"])
    changed.save_pretrained(tmp_path / "changed")
    server.options["root"] = str(tmp_path / "changed")
    with pytest.raises(ValueError, match="with another tokenizer"):
        trainer_of(tmp_path / "run", **served(server))


def test_a_server_that_leaves_out_a_token_ends_the_run(tmp_path, server):
    trainer = trainer_of(tmp_path / "run", **served(server))

    def without_the_own(answer):
        answer["prompt_logprobs"][-1] = {"0": {"logprob": -1.0}}
        return answer

    server.faults["/inference/v1/generate"] = [without_the_own]
    with pytest.raises(Exception, match="missing from its scores"):
        trainer.train()
    assert torch.isfinite(torch.cat([p.flatten() for p in trainer.model.parameters()])).all()
