"""A teacher behind an OpenAI-compatible chat address: what is sent and kept, what goes wrong, no key that shows."""

import json
import logging
import pickle

import pytest
from chat_server import MODEL, PATH, ChatStandIn
from datasets import Dataset
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer
from training import Remember, change, config

from gkd.cli import main
from gkd.config.fields import GKDConfig
from gkd.data.message_bytes import END, bytes_of, messages_of, text_of
from gkd.rollouts.base import SamplingSettings
from gkd.rollouts.chat import ChatRollout
from gkd.servers import client as client_module
from gkd.servers.chat import ChatServer
from gkd.servers.client import ServerError
from gkd.training.trainer import GKDTrainer

SETTINGS = {"lmbda": 0.0, "seq_kd": True, "seq_kd_loss": "nll", "max_new_tokens": 16}
OWN = tiny_tokenizer()
STOP = 258
SECRET = "abc-not-of-any-known-form-1"
QUESTION = [{"role": "user", "content": "é? the red one"}]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.01)
    with ChatStandIn() as running:
        yield running


def trainer_of(folder, server, rows=None, **values):
    extra = {name: values.pop(name) for name in ("eval_dataset", "teacher_model") if name in values}
    fields = {"teacher_chat_url": f"{server.url}/v1", "teacher_chat_model": MODEL, **SETTINGS, **values}
    return GKDTrainer(
        model=tiny_model(seed=1),
        args=config(folder, **fields),
        train_dataset=Dataset.from_list(tiny_rows(8) if rows is None else rows),
        processing_class=tiny_tokenizer(),
        **extra,
    )


def rollout_of(server, url=None, timeout=20.0, **values):
    chat = ChatServer(f"{server.url}/v1" if url is None else url, MODEL, timeout=timeout)
    return ChatRollout(chat, SamplingSettings(max_new_tokens=6, stop_ids=(END,), **values))


def prompt_of(messages):
    return bytes_of(json.dumps(messages, ensure_ascii=False, separators=(",", ":")))


# --------------------------------------------------------------------------------------------------- one answer


def test_messages_go_as_they_are_and_text_comes_back_as_bytes(server):
    rollout = rollout_of(server, temperature=0.5, top_p=0.9)
    (found,) = rollout.generate([prompt_of(QUESTION)], 0)
    ids, ended = server.written(QUESTION, 6)
    assert text_of(found) == server.tokenizer.decode(ids, skip_special_tokens=True)
    assert (found[-1] == END) == ended
    (path, body), *rest = server.seen
    assert (path, rest) == (PATH, [])
    assert body == {"model": MODEL, "messages": QUESTION, "max_tokens": 6, "temperature": 0.5, "top_p": 0.9}
    assert server.authorization is None
    assert rollout.generate([], 0) == []


@pytest.mark.parametrize(
    ("path", "ending"), [(PATH, ""), (PATH, "/"), (PATH, "/v1/"), ("/beta/openai/chat/completions", "/beta/openai")]
)
def test_an_address_is_as_openais_client_takes_it(server, path, ending):
    server.path = path
    rollout_of(server, server.url + ending).generate([prompt_of(QUESTION)], 0)


def test_the_other_name_of_the_cap_is_used_where_the_first_is_refused(server):
    server.limit = "max_completion_tokens"
    rollout = rollout_of(server)
    rollout.generate([prompt_of(QUESTION)], 0)
    rollout.generate([prompt_of(QUESTION)], 0)
    assert [("max_tokens" in body) for _, body in server.seen] == [True, False, False]


def test_what_fails_for_a_while_is_asked_again_and_what_is_refused_is_not(server):
    server.faults[PATH] = [503, "close", 429, lambda _: {"error": {"message": "upstream is busy"}}]
    assert rollout_of(server).generate([prompt_of(QUESTION)], 0)
    assert len(server.seen) == 5
    server.faults[PATH] = [401]
    with pytest.raises(ServerError, match="HTTP 401: fault 401"):
        rollout_of(server).generate([prompt_of(QUESTION)], 0)
    assert len(server.seen) == 6
    server.faults[PATH] = [lambda _: {"error": {"message": "upstream is gone"}}] * 100
    with pytest.raises(ServerError, match=r"upstream is gone.*teacher_chat_url"):
        rollout_of(server, timeout=0.2).generate([prompt_of(QUESTION)], 0)


@pytest.mark.parametrize(
    "answer", [{}, [], "text", {"choices": []}, {"choices": [{}]}, {"choices": [{"message": {"content": [1]}}]}]
)
def test_what_is_no_answer_is_an_error(server, answer):
    server.faults[PATH] = [lambda _: answer]
    with pytest.raises(ServerError, match="teacher_chat_url"):
        rollout_of(server).generate([prompt_of(QUESTION)], 0)


@pytest.mark.parametrize(
    ("reason", "content", "want"),
    [
        ("stop", "", [END]),
        ("length", None, []),
        ("content_filter", "a", [97]),
        (None, "a", [97]),
        ("stop", "\ud800", [63, END]),
    ],
)
def test_only_a_stop_is_an_end(server, reason, content, want):
    server.faults[PATH] = [lambda _: {"choices": [{"message": {"content": content}, "finish_reason": reason}]}]
    assert rollout_of(server).generate([prompt_of(QUESTION)], 0) == [want]


# ------------------------------------------------------------------------------------------------------ a training


def test_its_text_is_trained_on_and_kept(tmp_path, server, monkeypatch):
    rows = tiny_rows(8)
    remembered = Remember(monkeypatch)
    trainer = trainer_of(tmp_path, server, rows, per_device_train_batch_size=8, max_steps=2)
    assert change(trainer).norm() > 0
    assert len(server.seen) == 8, "each prompt is asked once, over epochs"
    assert sorted(json.dumps(body["messages"]) for _, body in server.seen) == sorted(
        json.dumps(row["messages"][:-1]) for row in rows
    )
    assert len(remembered.windows) == 2
    for sequence in remembered.windows[1]:
        messages = rows[sequence.row]["messages"][:-1]
        ids, ended = server.written(messages, 16)
        text = server.tokenizer.decode(ids, skip_special_tokens=True)
        own = OWN(text if ended else text.rstrip("\ufffd"), split_special_tokens=True).input_ids
        own = [*own, *([STOP] if ended else [])]
        prompt = OWN.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert sequence.input_ids == [*prompt, *own[:16]]
        assert sequence.truncated == (not ended or len(own) > 16)
    assert {s.truncated for s in remembered.windows[1]} == {True, False}
    store = trainer.rollouts["teacher"].store
    assert store.about()["key"]["model"] == f"chat:{MODEL}"
    assert store.about()["notes"]["teacher"] == MODEL
    again = trainer_of(tmp_path, server, rows, overwrite_output_dir=True)
    again.train()
    assert len(server.seen) == 8, "and over runs"
    assert trainer.teacher_model is None


def test_rows_of_every_form_and_views_of_them_are_messages(tmp_path, server):
    rows = [{"prompt": "the red", "completion": "one"}, {"prompt": "a", "completion": "b"}]
    trainer_of(tmp_path / "texts", server, rows).train()
    asked = [body["messages"] for _, body in server.seen]
    assert sorted(turns[0]["content"] for turns in asked) == ["a", "the red"]
    assert all(len(turns) == 1 and turns[0]["role"] == "user" for turns in asked)
    server.seen.clear()
    rows = [{**row, "teacher_system": "Be brief."} for row in tiny_rows(2)]
    trainer_of(tmp_path / "views", server, rows).train()
    assert all(body["messages"][0] == {"role": "system", "content": "Be brief."} for _, body in server.seen)


def test_a_row_with_tools_is_refused(tmp_path, server):
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    with pytest.raises(ValueError, match=r"row 0.*tools.*teacher_chat_url"):
        trainer_of(tmp_path, server, [{**tiny_rows(1)[0], "tools": json.dumps([tool])}])


def test_it_answers_beforehand_and_the_doctor_passes(tmp_path, server, capsys):
    save_tiny(tmp_path / "student", seed=1)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(6)))
    (tmp_path / "recipe.py").write_text(
        "from gkd.run import dataset_by_name, run\n"
        "run(lambda settings: {'train': dataset_by_name(settings)['train']}, defaults={'max_new_tokens': 6})\n"
    )
    values = {
        "model_name_or_path": tmp_path / "student",
        "dataset_name": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "out",
        "teacher_chat_url": server.url,
        "teacher_chat_model": MODEL,
        "lmbda": 0.0,
        "seq_kd": "true",
        "seq_kd_loss": "nll",
        "per_device_train_batch_size": 2,
        "report_to": "none",
    }
    flags = (part for name, value in values.items() for part in (f"--{name}", str(value)))
    argv = [str(tmp_path / "recipe.py"), *flags]
    assert main(["precompute", *argv, "--precompute_output", str(tmp_path / "made")]) == 0
    assert len(server.seen) == 6
    assert "gkd run finds them" in capsys.readouterr().out
    assert main(["doctor", *argv, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all([kind for kind, _ in row["teacher"]] == ["prompt"] for row in rows)
    assert messages_of(bytes_of(rows[0]["teacher"][0][1]))[-1]["role"] == "user"


# --------------------------------------------------------------------------------------------------------- the key


def everything_in(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_the_key_is_sent_and_stands_nowhere(tmp_path, server, monkeypatch, caplog, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("VLLM_API_KEY", "another-key-of-somebody")
    caplog.set_level(logging.DEBUG)
    echo = [lambda _: {"error": {"message": f"try again, {SECRET}"}}] * 7
    server.faults[PATH] = echo
    trainer = trainer_of(tmp_path, server, save_strategy="steps", save_steps=1, report_to=["tensorboard"])
    trainer.train()
    trainer.create_model_card()
    trainer.save_model()
    assert server.authorization == f"Bearer {SECRET}"
    assert len(server.seen) > 4, "it was asked again"
    for text in (caplog.text, *capfd.readouterr(), str(trainer.args), json.dumps(trainer.args.to_dict(), default=str)):
        assert SECRET not in text
    assert SECRET.encode() not in everything_in(tmp_path)
    assert SECRET.encode() not in pickle.dumps(trainer.args)


@pytest.mark.parametrize("status", [401, 400, 500, 503])
def test_a_server_that_repeats_the_key_is_not_repeated(server, monkeypatch, caplog, status):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setattr(client_module, "_ATTEMPTS_AT_500", 2)
    server.status = status
    server.faults[PATH] = [lambda _: {"error": {"message": f"Incorrect key: Bearer {SECRET}."}}] * 100
    with pytest.raises(ServerError, match="REDACTED") as found:
        rollout_of(server, timeout=1.0).generate([prompt_of(QUESTION)], 0)
    assert SECRET not in str(found.value) + caplog.text


def test_the_key_of_a_vllm_server_goes_to_no_chat_address(server, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "another-key-of-somebody")
    rollout_of(server).generate([prompt_of(QUESTION)], 0)
    assert server.authorization is None


@pytest.mark.parametrize("url", ["https://key-1234567@host/v1", "https://user:key-1234567@host/v1"])
def test_a_key_in_the_address_is_refused_and_not_shown(tmp_path, url):
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as found:
        GKDConfig(output_dir=str(tmp_path), teacher_chat_url=url, teacher_chat_model=MODEL, **SETTINGS)
    assert "1234567" not in str(found.value)


# -------------------------------------------------------------------------------------------------------- refusals

URL = {"teacher_chat_url": "http://localhost:1/v1", "teacher_chat_model": MODEL}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"teacher_chat_model": None}, "needs teacher_chat_model"),
        ({"teacher_chat_model": " "}, "needs teacher_chat_model"),
        ({"teacher_chat_url": None}, r"teacher_chat_model='org/writer-1' has no effect"),
        ({"teacher_chat_url": "http://a,http://b"}, "several addresses"),
        ({"lmbda": 0.5}, r"no probabilities.*lmbda=0, seq_kd=True, seq_kd_loss='nll'"),
        ({"seq_kd_loss": "divergence"}, "no probabilities"),
        ({"teacher_model_name_or_path": "x"}, "does not go with teacher_model_name_or_path"),
        ({"self_teacher": "base"}, "does not go with self_teacher"),
        ({"teachers": {"a": {"model": "x"}}}, "does not go with teachers"),
        ({"top_k": 5}, r"top_k=5 has no effect with teacher_chat_url"),
        ({"generation_kwargs": {"min_new_tokens": 3}}, "generation_kwargs="),
        ({"teacher_template": "own"}, "teacher_template='own' has no effect"),
        ({"rollout_batch_size": 3}, "rollout_batch_size=3 has no effect"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tmp_path, values, told):
    with pytest.raises(ValueError, match=told):
        GKDConfig(output_dir=str(tmp_path), **{**URL, **SETTINGS, **values})


def test_an_evaluation_and_a_second_teacher_are_refused(tmp_path, server):
    rows = Dataset.from_list(tiny_rows(4))
    with pytest.raises(ValueError, match=r"eval_strategy='steps'"):
        trainer_of(tmp_path, server, eval_dataset=rows, eval_strategy="steps", eval_steps=1)
    with pytest.raises(ValueError, match=r"teacher_model does not go with args.teacher_chat_url"):
        trainer_of(tmp_path, server, teacher_model=tiny_model())
    assert server.seen == []


def test_no_address_is_an_error_of_the_field(tmp_path, server):
    with pytest.raises(ValueError, match=r"teacher_chat_url: 'nowhere' is not an address.*OPENAI_API_KEY"):
        trainer_of(tmp_path, server, teacher_chat_url="nowhere")


def test_a_prompt_is_one_line_of_bytes_that_gives_its_messages_back():
    ids = prompt_of(QUESTION)
    assert messages_of(ids) == QUESTION
    assert max(ids) < END
    assert text_of([*ids, END]) == bytes(ids).decode()
