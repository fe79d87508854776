"""Rollouts of a server compared with the student in every step: what is right passes, what is not is found."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from forked import ranks
from peft import LoraConfig
from tiny import tiny_model, tiny_rows, tiny_tokenizer
from training import config, logged
from vllm_server.fake import FakeServer

from gkd.assembly.servers import score_together
from gkd.loss.signals import Head
from gkd.rollouts.against_the_student import RolloutCheck
from gkd.rollouts.base import SamplingSettings
from gkd.servers import client as vllm_client
from gkd.servers.checks import served_model
from gkd.servers.client import ServerError, VLLMClient
from gkd.teachers.server import ServerTeacher
from gkd.training.trainer import GKDTrainer


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch):
    monkeypatch.setattr(vllm_client, "FIRST_PAUSE", 0.005)


@pytest.fixture
def server():
    with FakeServer(tiny_model(seed=1), tiny_tokenizer(), max_model_len=300) as server:
        yield server


# ------------------------------------------------------------------------------------------------ the statistics


def compared(
    settings, of=lambda log_p, at: log_p.gather(1, at), temperature=None, head=None, count=600, tolerance=99.0
):
    """What the check makes of tokens drawn in float64 by the definition of the settings, or at another temperature."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(count, 8, generator=generator)
    head = Head(torch.randn(50, 8, generator=generator), bias=torch.randn(50, generator=generator))
    log_p = head.logits(hidden).double().log_softmax(-1)
    q = (log_p / (temperature or settings.temperature)).softmax(-1)
    if settings.top_k:
        q = torch.where(q >= q.topk(settings.top_k).values[:, -1:], q, 0.0)
    if settings.top_p < 1:
        ordered, order = (q / q.sum(-1, keepdim=True)).sort(descending=True)
        kept = ordered.cumsum(-1) - ordered < settings.top_p
        q = torch.zeros_like(q).scatter(1, order, torch.where(kept, ordered, 0.0))
    ids = torch.multinomial(q / q.sum(-1, keepdim=True), 1, generator=generator)
    check = RolloutCheck(settings, 99.0, Accelerator(cpu=True), "rollout_server_url")
    pieces = 6  # micro-batches
    check.open(pieces, 0)
    said = log_p.gather(1, ids)[:, 0].float()
    for part in torch.arange(count).chunk(pieces):
        assert check._left > 0
        check.add(hidden[part], head, ids[part, 0], said[part])
        found = check.close()
    return found


SAMPLINGS = [{}, {"temperature": 0.7}, {"temperature": 1.5, "top_p": 0.8}, {"temperature": 0.9, "top_k": 7}]


@pytest.mark.parametrize("values", SAMPLINGS, ids=str)
def test_tokens_sampled_as_asked_from_the_student_pass(values):
    found = compared(SamplingSettings(8, **values))
    assert found.gap < 1e-5
    assert abs(found.surprise) < 4 * found.error
    assert found.tokens == 600


@pytest.mark.parametrize("values", SAMPLINGS, ids=str)
def test_tokens_of_another_temperature_are_a_surprise(values):
    settings = SamplingSettings(8, **values)
    found = compared(settings, temperature=3 * settings.temperature)
    assert found.gap < 1e-5  # the log-probabilities themselves are right
    assert found.surprise > 5 * found.error
    assert compared(settings, temperature=settings.temperature / 3).surprise < -5 * found.error


def test_the_expected_surprise_and_its_error_are_those_of_the_definition():
    """Against float64: the mean of E[log p] - log p, and the root of the summed variances over the count."""
    settings, generator = SamplingSettings(8, temperature=0.8, top_p=0.9), torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 8, generator=generator), torch.randn(20, 8, generator=generator)
    log_p = (hidden.double() @ weight.double().T).log_softmax(-1)
    targets = torch.tensor([1, 2, 3, 4, 5])
    mean, variance = 0.0, 0.0
    for row, target in zip(log_p, targets, strict=True):
        q = (row / 0.8).softmax(-1)
        kept, mass = [], 0.0
        for token in q.argsort(descending=True).tolist():
            if mass < 0.9:
                kept.append(token)
                mass += float(q[token])
        expected = sum(float(q[t] / mass * row[t]) for t in kept)
        mean += expected - float(row[target])
        variance += sum(float(q[t] / mass * (row[t] - expected) ** 2) for t in kept)
    check = RolloutCheck(settings, 99.0, Accelerator(cpu=True), "x")
    check.open(1, 0)
    check.add(hidden, Head(weight), targets, torch.full((5,), -1.0))
    found = check.close()
    assert found.surprise == pytest.approx(mean / 5, abs=1e-5)
    assert found.error == pytest.approx(math.sqrt(variance) / 5, abs=1e-5)
    assert found.gap == pytest.approx(float((log_p.gather(1, targets[:, None]) + 1).abs().mean()), abs=1e-5)


def test_a_head_in_bf16_is_compared_in_fp32():
    generator = torch.Generator().manual_seed(3)
    head = Head((40 * torch.randn(50, 8, generator=generator)).to(torch.bfloat16), softcap=30.0, logit_scale=0.5)
    wide = Head(head.weight.float(), softcap=30.0, logit_scale=0.5)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(9, 8, generator=generator)
    check = RolloutCheck(SamplingSettings(8), 99.0, Accelerator(cpu=True), "x")
    check.open(1, 0)
    at = torch.arange(9)
    check.add(hidden.bfloat16(), head, at, wide.logits(hidden.bfloat16().float()).log_softmax(-1)[at, at])
    assert check.close().gap < 1e-4


def test_old_weights_are_found_and_one_step_of_age_is_allowed_for():
    check = RolloutCheck(SamplingSettings(8), 0.2, Accelerator(cpu=True), "rollout_server_url")
    hidden, head = torch.zeros(4, 8), Head(torch.zeros(50, 8))
    said = torch.full((4,), -math.log(50) - 0.3)
    for age, fine in ((0, False), (1, True)):
        check.open(1, age)
        check.add(hidden, head, torch.arange(4), said)
        if fine:
            assert check.close().gap == pytest.approx(0.3, abs=1e-5)
        else:
            with pytest.raises(
                ServerError, match=r"rollout_server_url: .*4 tokens.*0\.300 nats.*0\.2 is tol"
            ) as error:
                check.close()
            assert error.value.on_all_ranks


def test_a_step_without_comparable_tokens_says_nothing():
    check = RolloutCheck(SamplingSettings(8), 0.2, Accelerator(cpu=True), "x")
    check.open(1, 0)
    check.add(torch.zeros(4, 8), Head(torch.zeros(50, 8)), torch.arange(4), torch.full((4,), math.nan))
    assert check.close() is None
    assert check.close() is None  # no step is open


# ---------------------------------------------------------------------------------------------------- two ranks


def test_a_failure_of_one_rank_is_every_rank_s(tmp_path):
    """Of the scoring server, for rank 1 alone; and of what rank 0 alone has rollouts to compare of."""
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    batch["labels"] = torch.tensor([[-100, 2, 3]])

    def rank(say):
        AcceleratorState._reset_state(reset_partial_state=True)  # another test's, in the process that was forked
        accelerator = Accelerator(cpu=True)
        client = VLLMClient(server.url, field="teacher_server_url", timeout=20)
        teacher = ServerTeacher(client, served_model(client), 4)
        teacher.served = replace(teacher.served, name="gone" if accelerator.process_index == 1 else "base")
        check = RolloutCheck(SamplingSettings(8), 0.2, accelerator, "rollout_server_url")
        check.open(1, 0)
        if accelerator.process_index == 0:
            check.add(torch.zeros(4, 8), Head(torch.zeros(50, 8)), torch.arange(4), torch.full((4,), -9.0))
        for call in (lambda: score_together(teacher, batch, accelerator), check.close):
            try:
                call()
            except ServerError as error:
                say(f"{error.on_all_ranks} {error}")

    with FakeServer(tiny_model(seed=2)) as server:
        children = ranks(rank, tmp_path)
        assert [child.join() for child in children] == [0, 0], [child.said() for child in children]
    for child in children:
        assert child.lines == children[0].lines, child.said()
        assert [line.split()[0] for line in child.lines] == ["True", "True"], (child.lines, child.said())
        assert "`gone` does not exist" in child.lines[0]
        assert "4 tokens compared" in child.lines[1]


# ------------------------------------------------------------------------------------------------------ training


def trainer_with(folder, server, **values):
    torch.manual_seed(6)
    defaults = {
        "lmbda": 1.0, "temperature": 1.0, "max_steps": 4, "optim": "adamw_torch", "learning_rate": 0.05,
        "rollout_backend": "vllm", "rollout_server_url": server.url, "max_new_tokens": 12,
        "gradient_accumulation_steps": 2, "rollout_server_timeout": 20.0,
    }  # fmt: skip
    return GKDTrainer(
        model=tiny_model(seed=1),
        teacher_model=tiny_model(hidden=48, layers=3, seed=2),
        args=config(folder, **defaults | values),
        train_dataset=Dataset.from_list(tiny_rows(16)),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )


@pytest.mark.parametrize("raw", [True, False])
def test_every_step_of_a_sound_run_is_compared_and_logged(tmp_path, server, raw):
    server.raw = raw
    trainer = trainer_with(tmp_path, server, temperature=0.7, lmbda=0.5)
    trainer.train()
    assert len(logged(trainer, "rollout/logprob_gap")) == 4
    assert max(logged(trainer, "rollout/logprob_gap")) < 1e-3
    assert max(map(abs, logged(trainer, "rollout/surprise"))) < 0.6


@pytest.mark.parametrize("stuck", ["base", "first"])
def test_a_server_that_serves_other_weights_under_the_new_name_is_found(tmp_path, server, stuck):
    trainer = trainer_with(tmp_path, server)
    server.stuck = stuck
    with pytest.raises(ServerError, match=r"rollout_server_url: the server does not sample from the student"):
        trainer.train()
    assert 1 <= trainer.state.global_step < 4
    assert (tmp_path / f"checkpoint-{trainer.state.global_step}" / "gkd_state.json").exists()


def test_a_server_that_samples_at_another_temperature_is_found(tmp_path, server):
    with torch.no_grad():
        server.base.lm_head.weight.mul_(40)  # a tiny random model is near uniform, where a temperature does little
    trainer = trainer_with(tmp_path, server)
    with torch.no_grad():
        trainer.accelerator.unwrap_model(trainer.model).get_output_embeddings().weight.mul_(40)
    server.times = 3.0
    with pytest.raises(ServerError, match=r"nats less likely than sampling at temperature=1.0"):
        trainer.train()


def test_what_is_not_to_be_compared_is_not_asked_for(tmp_path, server):
    trainer = trainer_with(tmp_path, server, rollout_logprob_tolerance=0.0, max_steps=2)
    server.stuck = "base"
    trainer.train()
    asked = [body for path, body in server.seen if path == "/v1/completions" and body["max_tokens"] > 1]
    assert asked
    assert not any("logprobs" in body for body in asked)
    assert logged(trainer, "rollout/logprob_gap") == []


def test_a_server_without_log_probabilities_is_told(tmp_path, server):
    def without(answer):
        answer["choices"][0]["logprobs"] = None
        return answer

    trainer = trainer_with(tmp_path, server)
    server.faults["/v1/completions"] = [None] * 8 + [without]
    with pytest.raises(ServerError, match="stands where an object with 'token_logprobs' should be"):
        trainer.train()
