"""Rollouts and scores against a real vLLM server on CPU. `make test-vllm` builds its environment and runs this.

Skipped elsewhere. One server for all tests: starting it takes half a minute on an idle machine
and a few on a busy one. GKD_TEST_VLLM_URL and GKD_TEST_VLLM_MODEL (its folder) name one that runs already.
"""

import copy
import os
from itertools import pairwise

import pytest
import requests
import torch
from accelerate import Accelerator
from aligned_training import OTHER, OWN, ROWS, check
from datasets import Dataset
from other_tokens import other_model
from peft import LoraConfig, get_peft_model
from served import loss_of, ragged_batch
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer
from training import Remember, change, config, losses
from transformers import AutoModelForCausalLM
from vllm_server.serve import INSTALLED, Server

from gkd.models.head import head_of
from gkd.rollouts.base import SamplingSettings
from gkd.rollouts.hf import HFRollout
from gkd.rollouts.vllm import VLLMRollout
from gkd.servers.checks import check_tokenizer, served_model
from gkd.servers.client import VLLMClient
from gkd.teachers.local import LocalTeacher
from gkd.teachers.server import ServerTeacher
from gkd.training.trainer import GKDTrainer

URL = os.environ.get("GKD_TEST_VLLM_URL")
pytestmark = pytest.mark.skipif(
    not URL and not (os.environ.get("GKD_TEST_VLLM") and INSTALLED.exists()), reason="make test-vllm runs this"
)

PROMPTS = [[5, 9, 40], [7], [100, 3, 3, 8, 50, 61, 7], [200, 2]]
STOP = 258


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The served model: random, 2 layers, far from uniform; with its tokenizer."""
    if URL:
        return os.environ["GKD_TEST_VLLM_MODEL"]
    return save_tiny(tmp_path_factory.mktemp("served") / "model", "qwen3", hidden=64, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    if URL:
        yield URL
        return
    server = Server(folder, tmp_path_factory.mktemp("log") / "server.log")
    try:
        server.wait()
        yield server.url
    finally:
        server.stop()


@pytest.fixture
def client(url):
    return VLLMClient(url, field="rollout_server_url", timeout=120)


def base_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def student_of(folder, rank=4):
    options = {"r": rank, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return get_peft_model(base_of(folder), LoraConfig(**options))


def rollout_of(client, tmp_path, student, **settings):
    settings = SamplingSettings(**({"max_new_tokens": 24, "stop_ids": (STOP,)} | settings))
    adapters = str(tmp_path / "adapters")
    return VLLMRollout(client, served_model(client), settings, seed=4, get_model=lambda: student, adapter_dir=adapters)


def test_what_the_server_tells(client, folder):
    model = served_model(client)
    assert model.root == folder
    assert model.max_model_len == 256
    check_tokenizer(client, model, tiny_tokenizer())
    other = tiny_tokenizer()
    other.add_tokens(["quick"])
    with pytest.raises(ValueError, match="another tokenizer"):
        check_tokenizer(client, model, other)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}])
def test_greedy_is_what_the_model_gives_in_process(client, tmp_path, folder, options):
    student = student_of(folder)
    rollout = rollout_of(client, tmp_path, student, temperature=0, **options)
    expected = HFRollout(lambda: student, None, rollout.settings, seed=4).generate(PROMPTS, 0)
    assert rollout.generate(PROMPTS, 0) == expected
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS)


def test_samples_repeat_for_their_key_and_stop_tokens_end_them(client, tmp_path, folder):
    rollout = rollout_of(client, tmp_path, student_of(folder), stop_ids=tuple(range(0, 259, 9)))
    prompts = PROMPTS * 4
    whole = rollout.generate(prompts, 3)
    assert rollout.generate(prompts[::-1], 3, list(range(16))[::-1])[::-1] == whole
    assert rollout.generate(prompts, 4) != whole
    assert whole[:4] != whole[4:8]  # the same prompts in other rows
    stops = set(rollout.settings.stop_ids)
    assert any(ids[-1] in stops and len(ids) < 24 for ids in whole)
    assert not any(set(ids[:-1]) & stops for ids in whole)


def test_several_completions_of_a_prompt_are_one_request(client, tmp_path, folder):
    """Each is drawn by itself, and what is said of its tokens is the student's own."""
    student = student_of(folder)
    rollout = rollout_of(client, tmp_path, student)
    rollout._number, rollout._asks_log_probs = 3, True
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    found = rollout.generate(prompts, 5)
    assert rollout.generate(prompts, 5) == found
    assert [len(set(map(tuple, found[i : i + 3]))) for i in range(0, 12, 3)] == [3] * 4
    for prompt, ids, said in zip(prompts, found, rollout.log_probs, strict=True):
        log_probs = student(input_ids=torch.tensor([prompt + ids])).logits[0].detach().log_softmax(-1)
        own = [float(log_probs[len(prompt) - 1 + t, token]) for t, token in enumerate(ids)]
        assert said == pytest.approx(own, abs=1e-3)


def test_every_sampling_option_is_taken_by_the_server(client, tmp_path, folder):
    options = {"top_p": 0.8, "top_k": 5, "min_p": 0.05, "repetition_penalty": 1.1, "temperature": 0.8}
    extra = {"min_new_tokens": 3, "suppress_tokens": [1, 2, 3]}
    rollout = rollout_of(client, tmp_path, student_of(folder), extra=extra, stop_ids=tuple(range(100, 259)), **options)
    completions = rollout.generate(PROMPTS * 4, 0)
    assert min(map(len, completions)) >= 3
    assert not {1, 2, 3} & {token for ids in completions for token in ids}


def test_top_k_of_one_is_greedy(client, tmp_path, folder):
    student = student_of(folder)
    greedy = rollout_of(client, tmp_path, student, temperature=0).generate(PROMPTS, 0)
    assert rollout_of(client, tmp_path, student, temperature=1.0, top_k=1).generate(PROMPTS, 0) == greedy


def test_a_step_changes_the_rollout_and_the_stamp(client, tmp_path, folder, url):
    student = student_of(folder)
    rollout = rollout_of(client, tmp_path, student, temperature=0)
    reference = HFRollout(lambda: student, None, rollout.settings, seed=4)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=5.0)
    texts, names = [], []
    for step in range(4):
        texts.append(rollout.generate(PROMPTS, step))
        names.append(rollout.upload.name)
        assert texts[-1] == reference.generate(PROMPTS, step)
        ids = torch.tensor([PROMPTS[2]])
        student(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(set(names)) == 4
    assert all(before != after for before, after in pairwise(texts))
    loaded = {card["id"] for card in requests.get(url + "/v1/models", timeout=10).json()["data"]}
    assert {name for name in names if name in loaded} == set(names[-2:]) == set(os.listdir(tmp_path / "adapters"))


def test_an_adapter_that_the_server_forgot_is_loaded_again(client, tmp_path, folder):
    rollout = rollout_of(client, tmp_path, student_of(folder), temperature=0)
    before = rollout.generate(PROMPTS, 0)
    client.post("/v1/unload_lora_adapter", {"lora_name": rollout.upload.name})
    assert rollout.generate(PROMPTS, 0) == before


def test_more_adapters_than_the_server_has_slots(client, tmp_path, folder):
    """Several runs share a server: it swaps, and every run gets its own weights."""
    students = [student_of(folder) for _ in range(6)]
    for i, student in enumerate(students):
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.requires_grad:
                    parameter.mul_((-1) ** i * (1 + 0.2 * i))
    rollouts = [rollout_of(client, tmp_path / str(i), s, temperature=0) for i, s in enumerate(students)]
    expected = [HFRollout(lambda s=s: s, None, rollouts[0].settings, seed=4).generate(PROMPTS, 0) for s in students]
    for _ in range(2):
        assert [rollout.generate(PROMPTS, 0) for rollout in rollouts] == expected


def test_other_weights_and_too_large_a_rank_are_refused(client, tmp_path, folder):
    other = get_peft_model(
        tiny_model("qwen3", hidden=64, tie_word_embeddings=True, seed=9), LoraConfig(r=4, target_modules="all-linear")
    )
    with pytest.raises(ValueError, match=r"does not hold the student's weights"):
        rollout_of(client, tmp_path, other).generate(PROMPTS, 0)
    with pytest.raises(ValueError, match=r"LoRA rank 16 is greater than max_lora_rank 8.*--max-lora-rank 16"):
        rollout_of(client, tmp_path, student_of(folder, rank=16)).generate(PROMPTS, 0)


def teacher_of(client, top_k):
    return ServerTeacher(client, served_model(client), top_k)


@pytest.mark.parametrize("path", ["/inference/v1/generate", "/v1/completions"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_scores_loss_and_gradient_equal_the_local_teachers(client, folder, path, name):
    teacher, batch = teacher_of(client, 32), ragged_batch()
    teacher._path = path
    base = base_of(folder)
    signal, dense = teacher.score(batch), LocalTeacher(copy.deepcopy(base), Accelerator(cpu=True)).score(batch)
    log_probs = head_of(base).logits(dense.hidden).log_softmax(-1)
    torch.testing.assert_close(signal.log_probs, log_probs.topk(32).values, rtol=0, atol=1e-3)
    torch.testing.assert_close(signal.log_probs, log_probs.gather(1, signal.ids), rtol=0, atol=1e-3)
    (ours, gradient), (theirs, expected) = loss_of(signal, batch, name, 32), loss_of(dense, batch, name, 32)
    torch.testing.assert_close(ours.divergence, theirs.divergence, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-4)


def test_the_cheap_way_in_is_found_and_the_limit_is_checked(client):
    assert teacher_of(client, 32)._path == "/inference/v1/generate"
    with pytest.raises(ValueError, match=r"--max-logprobs 33"):
        teacher_of(client, 33)


def test_training_with_the_server_as_student_and_teacher(tmp_path, url, folder):
    """Three steps, all sources, greedy: every student rollout is the present student's own."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(6)
    urls = {"rollout_backend": "vllm", "rollout_server_url": url, "teacher_server_url": url, "teacher_top_k": 32}
    trainer = GKDTrainer(
        model=base_of(folder),
        args=config(tmp_path, lmbda=0.5, seq_kd=True, temperature=0.0, max_steps=3, max_length=200, learning_rate=5.0,
                    gradient_accumulation_steps=2, per_device_train_batch_size=2, **urls),
        train_dataset=Dataset.from_list(tiny_rows(16)),
        processing_class=tiny_tokenizer(),
        peft_config=lora,
    )  # fmt: skip
    rollout, seen = trainer.rollouts["student"], []
    generate = rollout.generate
    reference = HFRollout(lambda: trainer.model_wrapped, None, rollout.settings, seed=4)

    def compared(prompts, step, rows=None, teachers=None):
        completions = generate(prompts, step, rows)
        seen.append((completions == reference.generate(prompts, step, rows), rollout.upload.name, len(prompts)))
        return completions

    rollout.generate = compared
    trainer.train()
    assert [(same, number) for same, _, number in seen] == [(True, 2)] * 3
    stamps = [name.split("-")[2:] for _, name, _ in seen]
    assert [step for step, _ in stamps] == ["0", "1", "2"]
    assert len({digest for _, digest in stamps}) == 3
    assert trainer.ledger.targets["student"] > 0
    assert trainer.ledger.targets["teacher"] > 0
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert min(losses) > 0.01


def test_a_teacher_with_another_tokenizer_is_compared_as_its_definition_says(tmp_path, monkeypatch, url, folder):
    """The student has the longer tokens; the teacher's tokenizer is read by the name that the server gives."""
    remembered, student = Remember(monkeypatch), other_model()
    models = [copy.deepcopy(student).double(), base_of(folder).double()]
    how = {"teacher_tokenizer_alignment": "bytes", "teacher_server_url": url, "teacher_top_k": 32}
    args = config(tmp_path, lmbda=0.0, per_device_train_batch_size=8, **how)
    trainer = GKDTrainer(model=student, args=args, train_dataset=ROWS, processing_class=OTHER)
    moved = change(trainer)
    loss, _ = check(moved, models, remembered.windows[0], bound=1e-3, tokenizers=(OTHER, OWN), k=32)
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-3)


def test_training_one_step_ahead(tmp_path, url, folder):
    """rollout_staleness=1: what a step trains on is what the student of one step before would have said."""
    torch.manual_seed(6)
    urls = {"rollout_backend": "vllm", "rollout_server_url": url, "rollout_staleness": 1}
    urls["rollout_logprob_tolerance"] = 0  # at this learning rate the student of one step before is nats away
    trainer = GKDTrainer(
        model=base_of(folder),
        teacher_model=base_of(folder),
        args=config(tmp_path, lmbda=1.0, temperature=0.0, max_steps=4, max_length=200, learning_rate=5.0, **urls),
        train_dataset=Dataset.from_list(tiny_rows(16)),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False),
    )
    rollout = trainer.rollouts["student"]
    generate, ahead = rollout.generate, rollout.generate_ahead
    reference = HFRollout(lambda: trainer.model_wrapped, None, rollout.settings, seed=4)
    expected, fresh = {}, {}

    def compared(prompts, step, rows=None, teachers=None):
        completions = generate(prompts, step, rows)
        fresh[step] = reference.generate(prompts, step, rows)
        assert completions == expected.get(step, fresh[step])
        return completions

    def asked(prompts, step, rows):
        expected[step] = reference.generate(prompts, step, rows)
        ahead(prompts, step, rows)

    rollout.generate, rollout.generate_ahead = compared, asked
    trainer.train()
    assert sorted(fresh) == [0, 1, 2, 3]
    assert sorted(expected) == [1, 2, 3]
    assert any(expected[step] != fresh[step] for step in expected), "the weights moved in between"
    assert [e["rollout/staleness"] for e in trainer.state.log_history if "loss" in e] == [0, 1, 1, 1]
