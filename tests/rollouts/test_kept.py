"""The teacher's sequences: sampled once per prompt, kept on disk, never stale; and what is trained on them."""

import copy
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects
from tiny import save_tiny, tiny_model, tiny_rows
from training import Remember, change, dense_loss, logged, losses, trainer_of
from transformers import AutoModelForCausalLM, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from gkd.config.fields import GKDConfig
from gkd.models.fingerprint import fingerprint
from gkd.rollouts.base import SamplingSettings
from gkd.rollouts.hf import HFRollout
from gkd.rollouts.kept import KeptRollout, key_of
from gkd.rollouts.store import open_store, prompt_number

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[5, 6, 7], [40, 41], [9] * 11, [3]]


@pytest.fixture
def asked(monkeypatch):
    """How many prompts each real call of the teacher's `generate` was given."""
    calls, original = [], HFRollout.generate

    def generate(self, prompts, step, *rows):
        if self.source == "teacher":
            calls.append(len(prompts))
        return original(self, prompts, step, *rows)

    monkeypatch.setattr(HFRollout, "generate", generate)
    return calls


# ----------------------------------------------------------------------------------------------------- the store


def records(store):
    return [path for path in store.path.iterdir() if path.suffix == ".jsonl"]


def test_a_store_gives_back_what_it_was_given_also_to_another_process(tmp_path):
    store = open_store(tmp_path, {"a": 1})
    store.add([(PROMPTS[0], [1, 2, 3]), (PROMPTS[1], [7])])
    store.add([(PROMPTS[2], [0, 2**31])])
    again = open_store(tmp_path, {"a": 1})
    for each in (store, again):
        assert [each.get(prompt) for prompt in PROMPTS[:3]] == [[1, 2, 3], [7], [0, 2**31]]
        assert PROMPTS[3] not in each
        assert len(each) == 3
    assert len(open_store(tmp_path, {"a": 2})) == 0
    assert again.about()["key"] == {"a": 1}


def test_a_torn_last_record_is_left_out_with_a_warning_wherever_it_is_torn(tmp_path, caplog):
    store = open_store(tmp_path, {})
    store.add([(prompt, [i, i]) for i, prompt in enumerate(PROMPTS)])
    (file,) = records(store)
    whole = file.read_bytes()
    start = whole.rstrip(b"\n").rindex(b"\n") + 1
    for end in range(start + 1, len(whole)):
        file.write_bytes(whole[:end])
        caplog.clear()
        torn = open_store(tmp_path, {})
        assert [prompt in torn for prompt in PROMPTS] == [True, True, True, False]
        assert "incomplete" in caplog.text
    torn.add([(PROMPTS[3], [8])])  # goes into another file, not behind the torn record
    assert file.read_bytes() == whole[:-1]
    assert open_store(tmp_path, {}).get(PROMPTS[3]) == [8]


def test_a_damaged_record_is_left_out_with_its_line_number(tmp_path, caplog):
    store = open_store(tmp_path, {})
    store.add([(prompt, [700 + i]) for i, prompt in enumerate(PROMPTS)])
    (file,) = records(store)
    file.write_text(file.read_text().replace("[701]", "[791]"))
    damaged = open_store(tmp_path, {})
    assert [prompt in damaged for prompt in PROMPTS] == [True, False, True, True]
    assert "line 2" in caplog.text
    with pytest.raises(ValueError, match="changed while it was in use"):
        store.get(PROMPTS[1])


WRITER = """
import sys, time
from gkd.rollouts.store import open_store
folder, own, other, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
store = open_store(folder, {"shared": True})
for i in range(number):
    store.add([([own, i], [own] * (i % 50 + 1)), ([own, i, 0], [i])])
    store.refresh()
print("wrote", flush=True)
end = time.time() + 60
while [other, number - 1, 0] not in store and time.time() < end:
    store.refresh()
assert all(store.get([other, i]) == [other] * (i % 50 + 1) for i in range(number))
assert len(store) == 4 * number, len(store)
assert not {"torch", "pickle5"} & set(sys.modules)
"""


def start_writer(folder, own, other, number):
    command = [sys.executable, "-c", WRITER, str(folder), str(own), str(other), str(number)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_write_and_read_one_folder_at_the_same_time(tmp_path):
    processes = [start_writer(tmp_path, 1, 2, 300), start_writer(tmp_path, 2, 1, 300)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "does not match" not in errors  # a record seen half written would be told as torn, never as damaged
    assert len(open_store(tmp_path, {"shared": True})) == 1200


def test_what_a_killed_process_had_written_is_there(tmp_path):
    process = start_writer(tmp_path, 1, 2, 100_000)
    store = open_store(tmp_path, {"shared": True})
    end = time.time() + 60
    while len(store) < 50 and time.time() < end:
        store.refresh()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    store = open_store(tmp_path, {"shared": True})
    assert len(store) >= 50
    assert all(store.get([1, i]) == [1] * (i % 50 + 1) for i in range(len(store) // 2))


# ------------------------------------------------------------------------------------------------ the cached rollout


def cached(folder, model=None, seed=0, batch_size=None, **settings):
    model = model if model is not None else tiny_model(seed=2)
    values = {"max_new_tokens": 7, "stop_ids": (258,), "pad_id": 256, **settings}
    inner = HFRollout(
        lambda: model, None, SamplingSettings(**values), seed=seed, source="teacher", batch_size=batch_size
    )
    return KeptRollout(inner, open_store(folder, key_of(inner.settings, seed, fingerprint(model))))


def test_each_prompt_is_asked_once_and_always_answered_alike(tmp_path, asked):
    rollout = cached(tmp_path)
    first = rollout.generate([PROMPTS[0], PROMPTS[1], PROMPTS[0]], 0, [0, 1, 2])
    assert asked == [2]
    assert first[0] == first[2] != first[1]
    second = rollout.generate([PROMPTS[1], PROMPTS[2], PROMPTS[0]], 1, [0, 1, 2])
    assert asked == [2, 1]
    assert [second[2], second[0]] == first[:2]
    assert cached(tmp_path).generate(PROMPTS[:3], 9, [7, 8, 9]) == [first[0], first[1], second[1]]
    assert asked == [2, 1]
    # neither the order nor the step in which prompts are met matters
    assert cached(tmp_path / "other").generate([PROMPTS[2]], 4, [3]) == [second[1]]


def test_what_another_rank_or_run_has_written_meanwhile_is_found(tmp_path, asked):
    one, two = cached(tmp_path), cached(tmp_path)
    first = one.generate(PROMPTS[:2], 0)
    assert two.generate(PROMPTS[:2], 0) == first
    one.generate(PROMPTS[2:], 1)
    two.generate(PROMPTS, 1)
    assert asked == [2, 2]


def test_completions_are_those_of_the_model_under_the_prompts_own_random_numbers(tmp_path):
    rollout = cached(tmp_path)
    plain = rollout.inner.generate(PROMPTS, 0, [prompt_number(prompt) for prompt in PROMPTS])
    assert rollout.generate(PROMPTS, 3) == plain
    assert len({prompt_number(prompt) for prompt in PROMPTS}) == len(PROMPTS)


def other_weight(model):
    model = copy.deepcopy(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[5, 3] = torch.nextafter(weight[5, 3], torch.tensor(9.0))
    return model


@pytest.mark.parametrize(
    "changed",
    [
        {"model": other_weight(tiny_model(seed=2))},
        {"model": tiny_model(seed=2).bfloat16()},
        {"model": tiny_model(seed=2, rope_theta=20_000.0)},
        {"seed": 1},
        {"temperature": 0.9},
        {"temperature": 0.0},
        {"max_new_tokens": 8},
        {"stop_ids": (257, 258)},
        {"stop_ids": ()},
        {"top_k": 5},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"repetition_penalty": 1.2},
        {"extra": {"suppress_tokens": [4]}},
        {"extra": {"sequence_bias": {(4,): 3.0}}},
    ],
    ids=lambda changed: "_".join(f"{k}={v}" for k, v in changed.items() if k != "model") or "model",
)
def test_any_change_of_the_key_asks_again(tmp_path, asked, changed):
    cached(tmp_path).generate(PROMPTS, 0)
    cached(tmp_path, **changed).generate(PROMPTS, 0)
    assert asked == [4, 4]
    cached(tmp_path).generate(PROMPTS, 0)  # and what was there before is still there
    assert asked == [4, 4]


@pytest.mark.parametrize("changed", [{"pad_id": 3}, {"batch_size": 1}, {"stop_ids": (258, 258)}], ids=str)
def test_what_decides_nothing_is_no_part_of_the_key(tmp_path, asked, changed):
    cached(tmp_path).generate(PROMPTS, 0)
    cached(tmp_path, **changed).generate(PROMPTS, 0)
    assert asked == [4]


def test_a_rank_that_lacks_nothing_generates_with_the_others(tmp_path, asked):
    """A sharded model needs every rank. Two ranks in one process: the sum over ranks is what the other one lacks."""

    class Ranks:
        num_processes, device, others = 2, torch.device("cpu"), 0

        def reduce(self, value, reduction):
            assert reduction == "sum"
            return value + self.others

    rollout = cached(tmp_path)
    rollout.accelerator = Ranks()
    rollout.generate(PROMPTS[:2], 0)
    rollout.generate(PROMPTS[:2], 1)
    assert asked == [2]
    rollout.accelerator.others = 1
    rollout.generate(PROMPTS[:2], 2)
    assert asked == [2, 0]


def test_an_option_that_cannot_be_compared_is_refused():
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.1)])
    settings = SamplingSettings(max_new_tokens=1, extra={"logits_processor": processors})
    with pytest.raises(ValueError, match=r"logits_processor.*teacher_cache_dir='off'"):
        key_of(settings, 0, "x")


# -------------------------------------------------------------------------------------------------- the fingerprint


def test_fingerprint_is_of_weights_and_config_not_of_the_name(tmp_path):
    model = tiny_model(seed=2)
    own = fingerprint(model)
    for folder in ("one", "two"):
        save_tiny(tmp_path / folder, seed=2)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder, attn_implementation="eager")
        assert fingerprint(loaded) == own
    assert fingerprint(tiny_model(seed=3)) != own
    assert fingerprint(other_weight(model)) != own


def test_fingerprint_sees_one_weight_and_an_exchange_in_tensors_of_any_shape():
    shapes = [(3,), (), (5, 7), (1, 1), (70_001,), (0, 4)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn):
        draw = torch.Generator().manual_seed(0)
        module = torch.nn.Module()
        for i, shape in enumerate(shapes):
            values = torch.randn(shape, generator=draw).to(dtype)
            module.register_parameter(f"p{i}", torch.nn.Parameter(values, requires_grad=False))
        seen = {fingerprint(module)}
        for i, place in ((0, (2,)), (1, ()), (2, (4, 6)), (3, (0, 0)), (4, (69_999,)), (4, (70_000,)), (4, (12_345,))):
            parameter = getattr(module, f"p{i}").data
            before = parameter[place].clone()
            parameter[place] = (before.float() + 1.5).to(dtype)
            seen.add(fingerprint(module))
            parameter[place] = before
        assert len(seen) == 8, dtype
        rows = module.p2.data
        rows.copy_(rows.to(torch.float64).flip(0).to(dtype))
        assert fingerprint(module) not in seen
    strided = torch.nn.Module()
    strided.register_parameter("p", torch.nn.Parameter(torch.arange(12.0).view(3, 4).t()))
    whole = torch.nn.Module()
    whole.register_parameter("p", torch.nn.Parameter(torch.arange(12.0).view(3, 4).t().contiguous()))
    assert fingerprint(strided) == fingerprint(whole)


# -------------------------------------------------------------------------------------------------- in the trainer


def test_the_second_epoch_asks_the_teacher_nothing(tmp_path, asked):
    values = {"seq_kd": True, "lmbda": 0.0, "max_steps": -1, "num_train_epochs": 3}
    trainer = trainer_of(tmp_path, Dataset.from_list(tiny_rows(8)), **values)
    trainer.train()
    assert asked == [4, 4]
    assert trainer.ledger.sequences["teacher"] == 24
    trainer_of(tmp_path, Dataset.from_list(tiny_rows(8)), **values).train()  # another run, the same folder
    assert asked == [4, 4]


def test_a_kept_completion_gives_the_gradient_that_a_new_one_gave(tmp_path, asked):
    results = [change(trainer_of(tmp_path, seq_kd=True, lmbda=0.5, max_steps=2)) for _ in range(2)]
    assert asked == [2, 2]
    assert torch.equal(*results)


def test_without_the_cache_every_step_samples_anew(tmp_path, asked, monkeypatch):
    memory = Remember(monkeypatch)
    rows = Dataset.from_list(tiny_rows(4))
    trainer_of(tmp_path, rows, seq_kd=True, lmbda=0.0, teacher_cache_dir="off", max_steps=2).train()
    assert asked == [4, 4]
    first, second = ({s.row: s.input_ids for s in window} for window in memory.windows)
    assert first.keys() == second.keys()
    assert all(first[row] != second[row] for row in first)


def test_another_teacher_asks_again_in_the_same_folder(tmp_path, asked):
    values = {"seq_kd": True, "lmbda": 0.0, "teacher_cache_dir": str(tmp_path / "kept")}
    teacher = tiny_model(hidden=48, layers=3, seed=2)
    for model in (teacher, copy.deepcopy(teacher), other_weight(teacher)):
        trainer_of(tmp_path, teacher=model, **values).train()
    teacher.generation_config.eos_token_id = [258, 7]  # its own stop tokens
    trainer_of(tmp_path, teacher=teacher, **values).train()
    assert asked == [4, 4, 4]
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_nothing_is_kept_where_the_teacher_writes_nothing(tmp_path, asked):
    for values in ({"lmbda": 1.0, "seq_kd": True}, {"lmbda": 0.5}):
        trainer = trainer_of(tmp_path, **values)
        assert isinstance(trainer.rollouts["teacher"], HFRollout)
        trainer.train()
    assert asked == []
    assert not (tmp_path / "_teacher_sequences").exists()


def test_the_default_folder_is_left_out_of_what_the_trainer_pushes():
    folder = os.path.relpath(GKDConfig("out").teacher_cache_folder, "out")
    files = [f"{folder}/ab/about.json", "model.safetensors"]
    assert list(filter_repo_objects(files, ignore_patterns=["_*", "checkpoint-*"])) == ["model.safetensors"]


@pytest.mark.parametrize("value", ["", "off", "OFF", False, "false"])
def test_the_cache_can_be_turned_off(value):
    assert GKDConfig("out", teacher_cache_dir=value).teacher_cache_folder is None


# ------------------------------------------------------------------------------ how the teacher writes, and the loss


def test_the_teacher_samples_at_its_own_temperature_and_stops_at_its_own_tokens(tmp_path, monkeypatch):
    memory = Remember(monkeypatch)
    teacher = tiny_model(hidden=48, layers=3, seed=2)
    teacher.generation_config.eos_token_id = [258, 30]
    trainer = trainer_of(
        tmp_path, teacher=teacher, seq_kd=True, lmbda=0.0, temperature=1.0, teacher_temperature=0.0, learning_rate=0.0
    )
    assert [trainer.rollouts[source].settings.temperature for source in ("student", "teacher")] == [1.0, 0.0]
    assert [trainer.rollouts[source].settings.stop_ids for source in ("student", "teacher")] == [(258,), (30, 258)]
    trainer.train()
    for sequence in memory.windows[0]:
        ids = sequence.input_ids[: sequence.prompt_length]
        for token in sequence.input_ids[sequence.prompt_length :]:  # greedy: each the most likely one
            assert token == teacher(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
            ids = [*ids, token]
    assert trainer_of(tmp_path, seq_kd=True, temperature=0.7).rollouts["teacher"].settings.temperature == 0.7


@pytest.mark.parametrize("ce_weight", [0.0, 0.25])
def test_nll_on_the_teachers_tokens_and_divergence_on_the_students(tmp_path, monkeypatch, ce_weight):
    memory = Remember(monkeypatch)
    trainer = trainer_of(
        tmp_path, seq_kd=True, lmbda=0.5, seq_kd_loss="nll", ce_weight=ce_weight, ce_on_student_tokens=ce_weight > 0
    )
    student = tiny_model(seed=1)
    gradient = -change(trainer)
    total, number = torch.zeros((), dtype=torch.float64), 0
    for sequence in memory.windows[0]:
        ids, labels = torch.tensor([sequence.input_ids]), torch.tensor(sequence.labels[1:])
        logits = student(input_ids=ids).logits[0, :-1].double()
        nll = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        if sequence.source == "teacher":
            total = total + nll
        else:
            divergence = dense_loss(student, trainer.teacher_model, [sequence]) * sequence.num_targets
            total = total + (1 - ce_weight) * divergence + ce_weight * nll
        number += sequence.num_targets
    assert {s.source for s in memory.windows[0]} == {"student", "teacher"}
    (total / number).backward()
    wanted = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert losses(trainer)[0] == pytest.approx(total.item() / number, rel=2e-4)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    assert logged(trainer, "loss/teacher")[0] > 0  # the divergence is still measured


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"teacher_temperature": 0.5}, ["teacher_temperature=0.5", "seq_kd=True"]),
        ({"seq_kd_loss": "nll"}, ["seq_kd_loss='nll'", "seq_kd=True"]),
        ({"seq_kd": True, "seq_kd_loss": "ce"}, ["seq_kd_loss='ce'", "nll"]),
        ({"seq_kd": True, "teacher_temperature": -1.0}, ["teacher_temperature=-1.0"]),
        ({"repetition_threshold": 1.5}, ["repetition_threshold=1.5", "[0, 1]"]),
    ],
)
def test_what_has_no_effect_or_is_out_of_range_is_an_error(values, parts):
    with pytest.raises(ValueError) as error:
        GKDConfig("out", **values)
    assert all(part in str(error.value) for part in parts)


def test_about_says_what_was_made_how(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    trainer_of(tmp_path, seq_kd=True, lmbda=0.0).train()
    (about,) = tmp_path.glob("_teacher_sequences/*/about.json")
    record = json.loads(about.read_text())
    assert record["key"]["sampling"]["max_new_tokens"] == 8
    assert record["key"]["seed"] == 5
    assert {"torch", "transformers"} <= record["notes"]["versions"].keys()
