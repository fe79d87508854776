"""The HTTP client, rollouts and teacher of a server, against a small server with vLLM's formats and many faults."""

import copy
import os
import threading
import tracemalloc
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from served import STOP, AtStep, client_of, loss_of, ragged_batch, rollout_of, student_of, trainer_with
from tiny import tiny_model, tiny_tokenizer
from training import change, config
from vllm_server.fake import FakeServer

from gkd.models.head import head_of
from gkd.rollouts.hf import HFRollout
from gkd.servers import client as vllm_client
from gkd.servers.answers import ServedModel
from gkd.servers.checks import check_length, check_tokenizer, served_model
from gkd.servers.client import RefusedError, ServerError, VLLMClient
from gkd.teachers.local import LocalTeacher
from gkd.teachers.server import ServerTeacher

PATH = "/v1/models"


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch):
    monkeypatch.setattr(vllm_client, "FIRST_PAUSE", 0.005)


@pytest.fixture
def server():
    with FakeServer(tiny_model(seed=1), tiny_tokenizer()) as server:
        yield server


# ---------------------------------------------------------------------------------------------------- the client


@pytest.mark.parametrize("urls", ["", " , ", "localhost:8000", "ftp://host", "http://", "http://host?x=1"])
def test_an_address_that_is_none_is_refused(urls):
    with pytest.raises(ValueError, match=r"rollout_server_url.*http://host:port"):
        VLLMClient(urls, field="rollout_server_url")


def test_addresses_are_cleaned():
    assert VLLMClient(" http://a:1/v1/, https://b ", field="x").urls == ["http://a:1", "https://b"]


@pytest.mark.parametrize("fault", [408, 429, 500, 502, 503, 504, "close", "cut", "garbage"])
def test_a_passing_fault_is_asked_again(server, fault):
    server.faults["/tokenize"] = [fault, fault, None]
    payload = {"prompt": "a", "add_special_tokens": False}
    assert client_of(server).post("/tokenize", payload)["count"] == 1
    assert server.counts()["/tokenize"] == 3


@pytest.mark.parametrize(("status", "attempts"), [(400, 1), (404, 1), (422, 1), (302, 1), (500, 7)])
def test_a_refusal_is_passed_on_with_its_reason(server, status, attempts):
    server.faults["/tokenize"] = [status] * 20
    with pytest.raises(RefusedError, match=rf"http://127.0.0.1:\d+/tokenize answers HTTP {status}: fault {status}"):
        client_of(server).post("/tokenize", {})
    assert server.counts()["/tokenize"] == attempts


@pytest.mark.parametrize(("fault", "cause"), [("slow", "timed out"), (503, "HTTP 503: fault 503")])
def test_the_total_time_ends_it(server, fault, cause):
    server.faults["/tokenize"] = [fault] * 500
    with pytest.raises(ServerError, match=rf"{server.url}/tokenize gave no answer: .*{cause}.*rollout_server_url"):
        client_of(server, timeout=0.2).post("/tokenize", {"prompt": "a", "add_special_tokens": False})
    assert server.counts()["/tokenize"] < 30


def test_a_closed_port_is_named_with_its_cause(server):
    server.__exit__()
    with pytest.raises(ServerError, match=rf"{server.url}/tokenize gave no answer: .*Connection refused"):
        client_of(server, timeout=0.2).post("/tokenize", {})


def test_a_server_that_starts_anew_is_found_again(server):
    client = client_of(server)
    client.get(PATH, server.url, 5)
    server.__exit__()
    with FakeServer(server.base, server.tokenizer, server.port) as again:  # the old connection is dead
        assert client.get(PATH, server.url, 5)["data"][0]["id"] == "base"
        assert len(again.seen) == 1


def test_requests_take_the_servers_in_turn_and_pass_over_a_dead_one(server):
    with FakeServer(server.base, server.tokenizer) as other:
        client = client_of(server, other)
        payload = {"prompt": "a", "add_special_tokens": False}
        calls = [lambda stop, i=i: client.post("/tokenize", payload, first=i, stop=stop) for i in range(6)]
        client.run_all(calls)
        assert (len(server.seen), len(other.seen)) == (3, 3)
        server.__exit__()
        assert [answer["count"] for answer in client.run_all(calls)] == [1] * 6
        assert len(other.seen) == 9


def test_calls_run_at_the_same_time_and_keep_their_order(server):
    barrier = threading.Barrier(5, timeout=20)
    assert client_of(server).run_all([lambda _, i=i: (barrier.wait(), i)[1] for i in range(5)]) == [0, 1, 2, 3, 4]


def test_one_failure_ends_the_waiting_of_the_others(server):
    def failing(_):
        raise ServerError("enough")

    with pytest.raises(ServerError, match="enough"):
        client_of(server).run_all([lambda stop: stop.wait(60) or pytest.fail("waited"), failing])


def test_a_key_is_sent_as_bearer_token(server, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "abc")
    client_of(server).get(PATH, server.url, 5)
    assert server.authorization == "Bearer abc"


# ---------------------------------------------------------------------------------------------- start-up checks


@pytest.mark.parametrize(
    ("url", "header"),
    [
        ("http://{}", None),
        ("http://tok%40en@{}", "Bearer tok@en"),
        ("http://user:pass%2Fword@{}/v1", "Basic dXNlcjpwYXNzL3dvcmQ="),
        ("http://:secret@{}", "Basic OnNlY3JldA=="),
    ],
)
def test_what_stands_before_the_host_becomes_a_header_and_nothing_else(server, url, header, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password netrc-secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    client = VLLMClient(url.format(server.url.removeprefix("http://")), field="x", timeout=5)
    assert client.urls == [server.url]
    client.get(PATH, server.url, 5)
    assert server.authorization == header


@pytest.mark.parametrize(
    "url",
    [
        "user:s3cr3t@host:8000",
        "user:s3cr3t@host",
        "ftp://user:s3cr3t@host",
        "http://user:a/s3cr3t@host",
        "http://user:1/s3cr3t@host",
        "http://host?token=s3cr3t",
        "http://host/?sig=s3cr3t",
        "http://s3cr3t@host:x",
    ],
)
def test_an_address_that_is_refused_is_shown_without_its_secrets(url):
    with pytest.raises(ValueError, match="is not an address") as error:
        VLLMClient(url, field="rollout_server_url")
    assert "s3cr3t" not in str(error.value)


def test_a_key_that_no_header_can_hold_is_not_shown(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "s3cr3t\u2026x")
    with pytest.raises(ValueError, match="VLLM_API_KEY") as error:
        VLLMClient("http://host", field="x")
    assert "s3cr3t" not in str(error.value)


def test_a_proxy_is_used_where_it_is_named(server):
    """The stand-in for a proxy answers for a host that does not exist; it is asked with the whole address."""
    client = VLLMClient("http://no-such-host.invalid", field="x", timeout=5, proxy=server.url)
    with pytest.raises(RefusedError, match="Not Found"):
        client.get(PATH, "http://no-such-host.invalid", 5)
    assert server.seen[-1][0] == "http://no-such-host.invalid/v1/models"


@pytest.mark.parametrize("fault", ["drip", "drip_head", "slow"])
def test_a_server_that_never_finishes_is_given_up_after_the_total_time(server, fault):
    """It would go on for ever, or for three seconds an attempt: that the test ends is the assertion."""
    server.slow = 3.0
    server.faults["/tokenize"] = [fault] * 50
    client = VLLMClient(server.url, field="rollout_server_url", timeout=0.4)
    with pytest.raises(ServerError, match=r"gave no answer: it timed out.*rollout_server_url"):
        client.post("/tokenize", {"prompt": "a", "add_special_tokens": False})


@pytest.mark.parametrize("fault", ["bomb", "endless"])
def test_an_answer_is_read_no_further_than_it_may_be_long(server, fault):
    server.faults["/tokenize"] = [fault]
    client = VLLMClient(server.url, field="rollout_server_url", timeout=20)
    tracemalloc.start()
    try:
        with pytest.raises(ServerError, match=r"/tokenize answers more than the 2.0 MB.*rollout_server_url"):
            client.post("/tokenize", {"prompt": "a", "add_special_tokens": False}, most=2_000_000)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert client.get(PATH, server.url, 5)["data"]


def test_a_packed_answer_is_unpacked(server):
    server.faults[PATH] = ["packed"]
    client = VLLMClient(server.url, field="x", timeout=5)
    assert client.get(PATH, server.url, 5) == client.get(PATH, server.url, 5)


BAD_JSON = {
    "deep": b"[" * 100_000,
    "digits": b"[" + b"1" * 5000 + b"]",
    "bytes": b"\xff\xfe",
    "none": b"",
    "x": b'{"a":}',
}


@pytest.mark.parametrize("body", BAD_JSON.values(), ids=BAD_JSON)
def test_what_is_no_json_is_asked_for_again_and_then_told(server, body):
    server.faults[PATH] = [lambda _: body] * 50
    with pytest.raises(ServerError, match="the answer is not valid JSON"):
        VLLMClient(server.url, field="x").get(PATH, server.url, 0.1)


def test_the_reason_of_a_refusal_is_shown_without_escapes_and_secrets(server):
    server.faults[PATH] = [lambda _: "<html>\x1b[2J\x9b31m Authorization: Bearer s3cr3t-s3cr3t-12"]
    server.status = 403
    with pytest.raises(RefusedError) as error:
        VLLMClient(server.url, field="x", timeout=5).get(PATH, server.url, 5)
    assert r"<html>\x1b[2J" in str(error.value)
    assert not {"\x1b", "\x9b"} & set(str(error.value))
    assert "s3cr3t" not in str(error.value)


@pytest.mark.parametrize(
    "models",
    [
        None, [], "x", {"data": None}, {"data": []}, {"data": [None]}, {"data": [{"root": "x"}]},
        {"data": [{"id": 3}]}, {"data": [{"id": "a", "root": ["x"]}]}, {"data": [{"id": "a", "max_model_len": "9"}]},
        {"data": [{"id": "a", "max_model_len": True}]}, {"data": [{"id": "a", "max_model_len": -1}]},
        {"data": [{"id": "a", "parent": "b"}]}, {"models": []},
    ],
)  # fmt: skip
def test_models_of_another_shape_are_told(server, models):
    server.faults[PATH] = [lambda _: models]
    with pytest.raises(ValueError, match=r"x='http.*does not answer /v1/models as a vLLM server does"):
        served_model(VLLMClient(server.url, field="x", timeout=5))


@pytest.mark.parametrize(
    "tokens", [None, [], {}, {"tokens": None}, {"tokens": [1.0]}, {"tokens": ["a"]}, {"tokens": 3}, "x"]
)
def test_tokens_of_another_shape_are_told(server, tokens):
    client = VLLMClient(server.url, field="x", timeout=5)
    server.faults["/tokenize"] = [lambda _: tokens]
    with pytest.raises(ValueError, match=r"x='http.*does not tokenize"):
        check_tokenizer(client, served_model(client), tiny_tokenizer())


def test_what_a_server_serves(server):
    server.adapters["x"] = None
    assert served_model(client_of(server)) == ServedModel("base", "tiny/base", 256)
    with FakeServer(server.base, max_model_len=128) as other, pytest.raises(ValueError, match="max_model_len=128"):
        served_model(client_of(server, other))


def test_a_server_that_is_not_there_is_a_mistake_of_the_user():
    client = VLLMClient("http://127.0.0.1:9", field="teacher_server_url", timeout=0.05)
    with pytest.raises(ValueError, match=r"teacher_server_url='http://127.0.0.1:9' cannot be used.*vllm serve"):
        served_model(client)


def test_another_tokenizer_is_refused(server):
    model = ServedModel("base", "tiny/base", 256)
    check_tokenizer(client_of(server), model, tiny_tokenizer())
    other = tiny_tokenizer()
    other.add_tokens(["quick"])
    with pytest.raises(ValueError, match=r"another tokenizer.*different from id"):
        check_tokenizer(client_of(server), model, other)
    server.tokenizer = None  # nothing to compare with
    check_tokenizer(client_of(server), model, other)


def test_a_model_length_that_is_too_short_is_refused(server):
    model = ServedModel("base", "tiny/base", 256)
    check_length(client_of(server), model, 256)
    check_length(client_of(server), model, None)
    with pytest.raises(ValueError, match=r"257 tokens do not fit into max_model_len=256.*--max-model-len 257"):
        check_length(client_of(server), model, 257)


# ----------------------------------------------------------------------------------------------------- rollouts

PROMPTS = [[5, 9, 40], [7], [100, 3, 3, 8, 50, 61, 7], [200, 2]]


def test_greedy_is_what_the_model_gives_in_process(server, tmp_path):
    student = student_of()
    rollout = rollout_of(server, tmp_path, student, temperature=0)
    expected = HFRollout(lambda: student, None, rollout.settings, seed=4).generate(PROMPTS, 0)
    assert rollout.generate(PROMPTS, 0) == expected
    assert rollout.generate([], 1) == []


def test_a_completion_depends_on_seed_step_row_and_source_only(server, tmp_path):
    rollout = rollout_of(server, tmp_path, student_of())
    whole = rollout.generate(PROMPTS, 3, [0, 1, 2, 3])
    assert rollout.generate(PROMPTS[::-1], 3, [3, 2, 1, 0])[::-1] == whole
    assert rollout.generate(PROMPTS[2:3], 3, [2]) == whole[2:3]
    assert rollout.generate(PROMPTS[2:3], 4, [2]) != whole[2:3]
    assert rollout.generate(PROMPTS[2:3], 3, [7]) != whole[2:3]
    teacher = rollout_of(server, tmp_path, None, source="teacher")
    seeds = {body["seed"] for path, body in server.seen if path == "/v1/completions" and body["max_tokens"] > 1}
    teacher.generate(PROMPTS, 3, [0, 1, 2, 3])
    assert seeds.isdisjoint(body["seed"] for _, body in server.seen[-4:])
    assert {body["model"] for _, body in server.seen[-4:]} == {"base"}


def test_a_completion_ends_with_its_first_stop_token_or_at_the_cap(server, tmp_path):
    rollout = rollout_of(server, tmp_path, student_of(), stop_ids=tuple(range(0, 259, 9)))
    completions = rollout.generate(PROMPTS * 8, 0)
    stops = set(rollout.settings.stop_ids)
    assert all((ids[-1] in stops) != (len(ids) == 12 and ids[-1] not in stops) for ids in completions)
    assert not any(set(ids[:-1]) & stops for ids in completions)
    assert any(ids[-1] in stops for ids in completions)


def test_nothing_is_left_to_the_servers_defaults(server, tmp_path):
    settings = {"top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "temperature": 0.7}
    rollout = rollout_of(server, tmp_path, student_of(), **settings, extra={"min_new_tokens": 2})
    rollout.generate(PROMPTS[:1], 0)
    rollout_of(server, tmp_path, student_of()).generate(PROMPTS[:1], 0)
    given, plain = (body for _, body in server.seen if body.get("max_tokens") == 12)
    assert given.items() >= (settings | {"min_tokens": 2, "ignore_eos": True, "stop_token_ids": [STOP, 10]}).items()
    off = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "temperature": 1.0, "min_tokens": 0}
    assert plain.items() >= (off | {"presence_penalty": 0.0, "frequency_penalty": 0.0, "n": 1}).items()


def test_suppressed_tokens_are_not_sampled_and_foreign_options_are_refused(server, tmp_path):
    student = student_of()
    first = rollout_of(server, tmp_path, student, temperature=0).generate(PROMPTS[:1], 0)[0][0]
    rollout = rollout_of(server, tmp_path, student, temperature=0, extra={"suppress_tokens": [first]})
    assert first not in rollout.generate(PROMPTS[:1], 0)[0]
    with pytest.raises(ValueError, match=r"\['typical_p'\].*rollout_backend='hf'"):
        rollout_of(server, tmp_path, student, extra={"typical_p": 0.5})


def test_a_step_gets_its_own_adapter_and_old_ones_go(server, tmp_path):
    student = student_of()
    rollout = rollout_of(server, tmp_path, student, temperature=0)
    names, texts = [], []
    for step in range(4):
        texts.append(rollout.generate(PROMPTS, step))
        names.append(rollout.upload.name)
        assert {body["model"] for _, body in server.seen[-len(PROMPTS) :]} == {names[-1]}
        assert rollout.generate(PROMPTS[:1], step) == texts[-1][:1]  # the same weights: nothing to upload
        assert rollout.upload.name == names[-1]
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.requires_grad:
                    parameter.mul_(-1.2)
    assert len(set(names)) == 4
    assert all(before != after for before, after in pairwise(texts))
    assert set(server.adapters) == set(names[-2:]) == set(os.listdir(tmp_path / "adapters"))
    assert server.counts()["/v1/load_lora_adapter"] == 4
    assert all(name.startswith(f"gkd-{rollout.upload.run}-{step}-") for step, name in enumerate(names))


def test_weights_that_change_within_a_step_are_uploaded_too(server, tmp_path):
    student = student_of()
    rollout = rollout_of(server, tmp_path, student)
    before = rollout.upload.current(0)
    with torch.no_grad():
        next(p for p in student.parameters() if p.requires_grad).add_(1e-3)
    assert rollout.upload.current(0) != before
    assert len(server.adapters) == 2


def test_an_adapter_that_the_server_has_lost_is_loaded_again(server, tmp_path):
    rollout = rollout_of(server, tmp_path, student_of(), temperature=0)
    before = rollout.generate(PROMPTS, 0)
    server.adapters.clear()
    assert rollout.generate(PROMPTS, 0) == before
    server.adapters.clear()  # unloading what is not there any more does no harm either
    for step in range(1, 4):
        rollout.upload._publish(rollout.get_model(), step)


def test_a_lost_answer_to_the_upload_is_no_second_adapter(server, tmp_path):
    server.faults["/v1/load_lora_adapter"] = ["cut"]
    rollout = rollout_of(server, tmp_path, student_of())
    rollout.generate(PROMPTS, 0)
    assert list(server.adapters) == [rollout.upload.name]


@pytest.mark.parametrize("fault", ["close", 503, "cut", 500])
def test_faults_in_between_change_nothing(server, tmp_path, fault):
    rollout = rollout_of(server, tmp_path, student_of())
    expected = rollout.generate(PROMPTS, 0)
    server.faults["/v1/completions"] = [None, fault, None, fault]
    assert rollout.generate(PROMPTS, 0) == expected


def test_every_server_gets_the_adapter_and_its_share(server, tmp_path):
    student = student_of()
    alone = rollout_of(server, tmp_path, student).generate(PROMPTS, 0)
    with FakeServer(server.base) as other:
        rollout = rollout_of(server, tmp_path, student, client=client_of(server, other))
        assert rollout.generate(PROMPTS, 0) == alone
        assert rollout.upload.name in server.adapters
        assert rollout.upload.name in other.adapters
        assert other.counts()["/v1/completions"] >= 2


def _choice(**values):
    def change_it(answer):
        answer["choices"][0].update(values)
        return answer

    return change_it


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda answer: answer | {"model": "base"}, "the answer is from 'base'"),
        (_choice(token_ids=None), "no token_ids"),
        (_choice(prompt_token_ids=[1]), "a completion of another prompt"),
        (_choice(token_ids=[]), "0 tokens"),
        (_choice(token_ids=[1] * 13), "13 tokens, where max_new_tokens=12"),
        (_choice(token_ids=[STOP, 1]), "tokens behind a stop token"),
        (_choice(token_ids=[1, 2]), "an end without a stop token"),
        (_choice(token_ids=[-1, STOP]), "holds -1, which is no token id"),
        (_choice(token_ids=[65.7, STOP]), "holds 65.7, which is no token id"),
        (_choice(token_ids=[True, STOP]), "holds True, which is no token id"),
        (_choice(token_ids=["1", STOP]), "holds '1', which is no token id"),
        (_choice(token_ids=[None, STOP]), "holds None, which is no token id"),
        (_choice(token_ids=[10**30, STOP]), "which is no token id"),
        (_choice(token_ids="12"), "no list"),
        (_choice(prompt_token_ids=None), "no token_ids and prompt_token_ids"),
        (_choice(prompt_token_ids=[[1]]), "no token id"),
        (_choice(index=1), "index 1, where one was asked for"),
        (_choice(finish_reason=None), "finish_reason=None"),
        (lambda answer: answer | {"choices": None}, "no list"),
        (lambda answer: answer | {"choices": []}, "0 choices"),
        (lambda answer: answer | {"choices": "x"}, "no list"),
        (lambda answer: answer | {"choices": {"0": 1}}, "no list"),
        (lambda answer: answer | {"choices": [None]}, "stands where an object"),
        (lambda answer: answer | {"choices": answer["choices"] * 2}, "2 choices"),
        (lambda answer: None, "stands where an object"),
        (lambda answer: [answer], "stands where an object"),
        (lambda answer: "<html>", "stands where an object"),
        ("html", "stands where an object"),
    ],
)
def test_an_answer_that_cannot_be_right_is_an_error(server, tmp_path, fault, message):
    rollout = rollout_of(server, tmp_path, student_of())
    rollout.generate(PROMPTS[:1], 0)
    server.faults["/v1/completions"] = [fault]
    with pytest.raises(ServerError, match=message) as error:
        rollout.generate(PROMPTS[:1], 0)
    assert error.value.on_all_ranks


def test_an_aborted_generation_is_asked_again(server, tmp_path):
    rollout = rollout_of(server, tmp_path, student_of())
    expected = rollout.generate(PROMPTS[:1], 0)
    server.faults["/v1/completions"] = [_choice(finish_reason="abort", token_ids=[1])] * 2
    assert rollout.generate(PROMPTS[:1], 0) == expected


def test_tokens_that_the_other_model_cannot_read_are_an_error(server, tmp_path):
    rollout = rollout_of(server, tmp_path, student_of())
    rollout.vocabulary = 5
    with pytest.raises(ServerError, match=r"token \d+, where the vocabulary has 5"):
        rollout.generate(PROMPTS, 0)


@pytest.mark.parametrize(
    ("prompts", "message"), [([[1], []], "row 1 of step 6 has an empty"), ([[1] * 250], "max_model_len=256")]
)
def test_prompts_that_cannot_be_completed_are_named(server, tmp_path, prompts, message):
    with pytest.raises(ValueError, match=message):
        rollout_of(server, tmp_path, student_of()).generate(prompts, 6)


def test_a_server_with_other_weights_is_refused(server, tmp_path):
    with pytest.raises(ValueError, match=r"does not hold the student's weights.*'tiny/base'"):
        rollout_of(server, tmp_path, student_of(seed=8)).generate(PROMPTS, 0)


@pytest.mark.parametrize(
    ("options", "fault", "message"),
    [
        ({"max_lora_rank": 2}, None, "rank 4 is greater.*--enable-lora --max-lora-rank 4"),
        ({"lora": False}, None, "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        ({}, 404, "cannot read .*adapters: set rollout_adapter_dir"),
    ],
)
def test_a_refused_adapter_comes_with_the_remedy(tmp_path, options, fault, message):
    with FakeServer(tiny_model(seed=1), **options) as server:
        server.faults["/v1/load_lora_adapter"] = [fault] if fault else []
        with pytest.raises(ValueError, match=message):
            rollout_of(server, tmp_path, student_of()).generate(PROMPTS, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"init_lora_weights": "olora"}, "changes the base weights"),
    ],
)
def test_adapters_that_a_server_would_apply_otherwise_are_refused(server, tmp_path, options, message):
    with pytest.raises(ValueError, match=rf"cannot serve.*{message}.*rollout_backend='hf'"):
        rollout_of(server, tmp_path, student_of(**options))


def test_full_fine_tuning_needs_a_server_that_takes_weights(tmp_path):
    message = r"takes no new weights.*VLLM_SERVER_DEV_MODE=1.*use_peft.*rollout_backend='hf'"
    with FakeServer(tiny_model(seed=1), dev=False) as closed, pytest.raises(ValueError, match=message):
        rollout_of(closed, tmp_path, tiny_model(seed=1))


def test_whole_weights_get_a_stamp_and_the_same_ones_are_not_sent_twice(server, tmp_path):
    student = tiny_model(seed=7)
    rollout = rollout_of(server, tmp_path, student, temperature=0)
    rollout._weights_compared = True
    expected = HFRollout(lambda: student, None, rollout.settings, seed=4)
    assert rollout.generate(PROMPTS, 0) == expected.generate(PROMPTS, 0)
    first = rollout.upload.name
    assert server.weight_version == first
    rollout.generate(PROMPTS, 1)  # nothing has moved
    assert server.counts()["/collective_rpc"] == 1
    assert server.weight_version == rollout.upload.name != first
    assert first.split("-")[3] == rollout.upload.name.split("-")[3]
    with torch.no_grad():
        student.get_input_embeddings().weight[5] += 1.0
    assert rollout.generate(PROMPTS, 2) == expected.generate(PROMPTS, 2)
    assert server.counts()["/collective_rpc"] == 2


def test_a_server_that_was_started_anew_in_the_middle_of_a_rollout_is_asked_again(server, tmp_path):
    """It answers from its old weights, under the same name; the stamp it has forgotten tells."""
    student = tiny_model(seed=7)
    rollout = rollout_of(server, tmp_path, student, temperature=0)
    rollout._weights_compared = True
    base, load = copy.deepcopy(server.base.state_dict()), rollout.upload._load

    def lost(url, name):
        load(url, name)
        rollout.upload._load = load
        server.base.load_state_dict(base)
        server.weight_version = "default"

    rollout.upload._load = lost
    assert rollout.generate(PROMPTS, 0) == HFRollout(lambda: student, None, rollout.settings, seed=4).generate(
        PROMPTS, 0
    )
    assert server.counts()["/collective_rpc"] == 2


def test_a_server_that_shares_the_gpu_is_awake_for_rollouts_alone(server, tmp_path):
    student = student_of()
    rollout = rollout_of(server, tmp_path, student, temperature=0, shares_device=True)
    plain = rollout_of(server, tmp_path / "plain", student, temperature=0).generate(PROMPTS, 0)
    for step in range(2):
        rollout.device.rest()
        assert server.asleep
        assert rollout.generate(PROMPTS, step) == plain  # the fake answers nothing while it sleeps
        assert server.asleep
    turns = [path for path, _ in server.seen if path in ("/wake_up", "/sleep?level=1")]
    assert turns == ["/sleep?level=1", "/wake_up"] * 2 + ["/sleep?level=1"]


def test_a_server_that_cannot_sleep_is_told_with_the_remedy(tmp_path):
    with FakeServer(tiny_model(seed=1), dev=False) as awake:
        rollout = rollout_of(awake, tmp_path, student_of(), shares_device=True)
        with pytest.raises(ValueError, match=r"rollout_server_sharing='sleep' needs.*--enable-sleep-mode"):
            rollout.device.rest()


# ------------------------------------------------------------------------------------------------------ teacher


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def teacher_of(server, top_k=20):
    client = VLLMClient(server.url, field="teacher_server_url", timeout=20)
    return ServerTeacher(client, served_model(client), top_k, vocabulary=259)


@pytest.fixture
def scoring():
    with FakeServer(tiny_model(hidden=48, layers=3, seed=2)) as server:
        yield server


@pytest.mark.parametrize("tokens_only", [True, False])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_a_server_scores_as_the_local_teacher_does(scoring, accelerator, tokens_only, name):
    scoring.options["generate"] = tokens_only
    batch = ragged_batch()
    local = LocalTeacher(copy.deepcopy(scoring.base), accelerator)
    signal, dense = teacher_of(scoring).score(batch), local.score(batch)
    log_probs = head_of(scoring.base).logits(dense.hidden).log_softmax(-1)
    torch.testing.assert_close(signal.log_probs, log_probs.topk(20).values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(signal.log_probs, log_probs.gather(1, signal.ids), rtol=1e-4, atol=1e-4)
    (ours, gradient), (theirs, expected) = loss_of(signal, batch, name, 20), loss_of(dense, batch, name, 20)
    torch.testing.assert_close(ours.divergence, theirs.divergence, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_no_target_is_no_request(scoring):
    batch = ragged_batch()
    batch["labels"][:] = -100
    teacher, before = teacher_of(scoring), len(scoring.seen)
    signal = teacher.score(batch)
    assert signal.ids.shape == signal.log_probs.shape == (0, 20)
    assert len(scoring.seen) == before


def _scores(change_it):
    def fault(answer):
        change_it(answer["prompt_logprobs"])
        return answer

    return fault


@pytest.mark.parametrize(
    ("change_it", "message"),
    [
        (lambda scores: scores.pop(), "5 positions for 6 tokens"),
        (lambda scores: scores.insert(1, scores.pop()), "is missing from its scores"),
        (lambda scores: scores.__setitem__(3, None), "is missing from its scores"),
        (lambda scores: [scores[2].pop(key) for key in [*scores[2]][1:4]], "scores, not teacher_top_k=20"),
        (lambda scores: scores[4][[*scores[4]][2]].update(logprob=float("nan")), "nan is no log-probability"),
        (lambda scores: scores[4][[*scores[4]][2]].update(logprob=float("-inf")), "-inf is no log-probability"),
        (lambda scores: scores[4][[*scores[4]][2]].update(logprob=None), "None is no log-probability"),
        (lambda scores: scores[4][[*scores[4]][2]].update(logprob=True), "True is no log-probability"),
        (lambda scores: scores[4][[*scores[4]][2]].update(logprob="-1"), "'-1' is no log-probability"),
        (lambda scores: scores[4].update({"-3": {"logprob": -1e-3}}), "'-3' is no token id"),
        (lambda scores: scores[4].update({"1.5": {"logprob": -1e-3}}), "'1.5' is no token id"),
        (lambda scores: scores[4].update({"07": {"logprob": -1e-3}}), "'07' is no token id"),
        (lambda scores: scores[4].update({"7": -1e-3}), "stands where an object"),
        (lambda scores: scores[4].update({"900": {"logprob": -3.0}}), "token 900, where the vocabulary has 259"),
        (lambda scores: scores.__setitem__(3, [1]), "is missing from its scores"),
        (lambda scores: scores[4][[*scores[4]][2]].update(logprob=0.0), "is not the mass"),
        (lambda scores: scores[4][[*scores[4]][2]].pop("logprob"), "logprob"),
    ],
)
def test_scores_that_cannot_be_right_are_an_error_and_no_nan(scoring, change_it, message):
    teacher, batch = teacher_of(scoring), ragged_batch()
    batch = {name: value[:1] for name, value in batch.items()}
    teacher.score(batch)
    scoring.faults["/inference/v1/generate"] = [_scores(change_it)]
    with pytest.raises(ServerError, match=rf"teacher_server_url: the scores of row 0 .*{message}"):
        teacher.score(batch)


def test_faults_in_between_do_not_change_the_scores(scoring):
    teacher, batch = teacher_of(scoring), ragged_batch()
    expected = teacher.score(batch)
    scoring.faults["/inference/v1/generate"] = ["close", 503, "cut", "garbage"]
    torch.testing.assert_close(teacher.score(batch).log_probs, expected.log_probs)


@pytest.mark.parametrize("tokens_only", [True, False])
def test_more_log_probs_than_the_server_gives_are_refused_at_once(scoring, tokens_only):
    scoring.options["generate"] = tokens_only
    with pytest.raises(ValueError, match=r"teacher_server_url.*Start it with --max-logprobs 21.*lower teacher_top_k"):
        teacher_of(scoring, top_k=21)


def test_a_sequence_that_the_server_cannot_take_is_named(scoring):
    scoring.options["max_model_len"] = 8
    with pytest.raises(ValueError, match=r"a sequence of 9 tokens.*max_model_len=8"):
        teacher_of(scoring).score(ragged_batch())


# ----------------------------------------------------------------------------------------------------- training


def test_training_with_servers_is_training_without(tmp_path):
    """Greedy rollouts and the same top-k teacher: the weights after three steps are the same."""
    teacher = tiny_model(hidden=48, layers=3, seed=2)
    expected = change(trainer_with(tmp_path / "a", copy.deepcopy(teacher)))
    with (
        FakeServer(tiny_model(seed=1), tiny_tokenizer(), max_model_len=300) as server,
        FakeServer(teacher, tiny_tokenizer(), max_model_len=300) as scoring,
    ):
        urls = {"rollout_backend": "vllm", "rollout_server_url": server.url, "teacher_server_url": scoring.url}
        trainer = trainer_with(tmp_path / "b", **urls)
        changed = change(trainer)
    torch.testing.assert_close(changed, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    stamps = [body["lora_name"] for path, body in server.seen if path == "/v1/load_lora_adapter"]
    assert [stamp.split("-")[2] for stamp in stamps] == ["0", "1", "2"]
    assert trainer.teacher_model is None


@pytest.mark.parametrize("who", ["server", "scoring"])
def test_a_server_that_stays_away_costs_no_step(tmp_path, who):
    """The run ends with a checkpoint of its last step, from which it goes on as if nothing had happened."""
    teacher = tiny_model(hidden=48, layers=3, seed=2)
    whole = trainer_with(tmp_path / "a", copy.deepcopy(teacher), seq_kd=False)
    expected = change(whole)
    with (
        FakeServer(tiny_model(seed=1), tiny_tokenizer(), max_model_len=300) as server,
        FakeServer(teacher, tiny_tokenizer(), max_model_len=300) as scoring,
    ):
        urls = {"rollout_backend": "vllm", "rollout_server_url": server.url, "teacher_server_url": scoring.url}
        trainer = trainer_with(tmp_path / "b", **urls, seq_kd=False)
        before = trained_weights(trainer)
        away = {"server": server, "scoring": scoring}[who]
        path = {"server": "/v1/completions", "scoring": "/inference/v1/generate"}[who]
        trainer.add_callback(AtStep(2, lambda: away.faults.update({path: [400] * 50})))
        with pytest.raises(ServerError, match="HTTP 400"):
            trainer.train()
        away.faults.clear()
        resumed = trainer_with(tmp_path / "b", **urls, seq_kd=False)
        assert resumed.train(resume_from_checkpoint=True).global_step == 3
    torch.testing.assert_close(trained_weights(resumed) - before, expected, rtol=1e-3, atol=1e-5)
    assert resumed.ledger.as_dict() == whole.ledger.as_dict()


def trained_weights(trainer):
    return torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rollout_backend": "sglang"}, "use one of hf, vllm"),
        ({"rollout_backend": "vllm"}, "needs rollout_server_url"),
        ({"rollout_backend": "vllm", "rollout_server_url": "http://a", "lmbda": 0.0}, "no effect with lmbda=0"),
        ({"rollout_server_url": "http://a"}, "rollout_server_url has no effect"),
        ({"rollout_adapter_dir": "x"}, "rollout_adapter_dir has no effect"),
        ({"rollout_server_timeout": 5.0}, "rollout_server_timeout=5.0 has no effect"),
        ({"teacher_server_url": "http://a", "teacher_top_k": 4, "rollout_server_timeout": 0.0}, "must be a number"),
        ({"rollout_backend": "vllm", "rollout_server_url": "http://a", "rollout_batch_size": 4}, "rollout_batch_size"),
        (  # the teacher would write nothing
            {
                "rollout_backend": "vllm",
                "rollout_server_url": "http://a",
                "rollout_batch_size": 4,
                "seq_kd": True,
                "lmbda": 1.0,
            },
            "rollout_batch_size",
        ),
        ({"lmbda": 0.0, "rollout_batch_size": 4}, "rollout_batch_size=4 has no effect where nothing is generated"),
        ({"teacher_server_url": "http://a"}, "needs teacher_top_k"),
        ({"teacher_server_url": "http://a", "teacher_top_k": 4, "loss_temperature": 2.0}, "loss_temperature=2.0"),
        ({"teacher_server_url": "http://a", "teacher_top_k": 4, "teacher_model_name_or_path": "t"}, "does not go"),
    ],
)
def test_fields_without_effect_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **values)
