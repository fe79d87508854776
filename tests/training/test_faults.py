"""Signals, steps that are not finite, a full disk: what happens is what docs/reliability.md says."""

import dataclasses
import errno
import json
import logging
import os
import pickle
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from disks import small_disk
from safetensors.torch import load_file
from tiny import save_tiny, tiny_rows, tiny_tokenizer
from training import config, logged, losses, trainer_of
from transformers import TrainerCallback

from gkd import run as run_module
from gkd.common.disk import full_disk_explained
from gkd.common.errors import DiskFullError, NotFiniteError, TrainingStopped
from gkd.data.files import read_rows
from gkd.run import run
from gkd.training import checkpoint_files as files
from gkd.training.faults import nan_unless_finite
from gkd.training.stop_request import StopRequest

SAVING = {"save_strategy": "steps", "save_steps": 100, "optim": "adamw_torch", "learning_rate": 1e-2}


def at_step(step, act):
    """Does something in the middle of the given step (counted from 1)."""

    class AtStep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step + 1 == step:
                act()

    return AtStep()


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


# ------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("number", "strategy"), [(signal.SIGTERM, "no"), (signal.SIGINT, "steps"), (signal.SIGTERM, "epoch")]
)
def test_a_signal_finishes_the_step_saves_and_stops(tmp_path, capfd, number, strategy):
    values = {**SAVING, "save_strategy": strategy, "max_steps": 8, "lmbda": 0.5}
    stop = at_step(3, lambda: signal.raise_signal(number))
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(TrainingStopped) as stopped:
        trainer_of(tmp_path, callbacks=[stop], **values).train()
    assert stopped.value.code == 128 + number
    assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    assert files.find(tmp_path) == str(tmp_path / "checkpoint-3")
    last = capfd.readouterr().err.strip().splitlines()[-1]
    for part in (number.name, "step 3 of 8", str(tmp_path / "checkpoint-3"), "resume_from_checkpoint=true"):
        assert part in last
    resumed = trainer_of(tmp_path, **values)
    resumed.train(resume_from_checkpoint=True)
    never = trainer_of(tmp_path / "never", **values)
    never.train()
    assert torch.equal(weights(resumed), weights(never))


def test_a_signal_does_not_wait_for_an_evaluation(tmp_path, monkeypatch):
    trainer = trainer_of(
        tmp_path, callbacks=[at_step(2, lambda: signal.raise_signal(signal.SIGTERM))], max_steps=4,
        eval_strategy="steps", eval_steps=1, eval_dataset=Dataset.from_list(tiny_rows(3)),
    )  # fmt: skip
    with pytest.raises(TrainingStopped):
        trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [1]


@pytest.mark.parametrize("when", ["steps", "epoch", "start"])
def test_an_evaluation_is_left_at_the_next_batch(tmp_path, when):
    """In its second batch of twelve: no further one, no further step, and the step before it is saved."""
    batches = []

    class Stop(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            batches.append(state.global_step)
            if len(batches) == 2:
                signal.raise_signal(signal.SIGTERM)

    values = {
        "max_steps": 6, "per_device_eval_batch_size": 1, "eval_dataset": Dataset.from_list(tiny_rows(12)),
        "eval_strategy": "steps" if when == "start" else when, "eval_steps": 3, "metric_for_best_model": "loss",
        **SAVING,
    }  # fmt: skip
    if when == "start":
        values |= {"eval_on_start": True, "eval_steps": 100}
    trainer = trainer_of(tmp_path, **values)
    trainer.callback_handler.callbacks.insert(0, Stop())
    with pytest.raises(TrainingStopped) as stopped:
        trainer.train()
    assert stopped.value.code == 143
    assert len(batches) == 2
    step = {"steps": 3, "epoch": 4, "start": 1}[when]
    assert trainer.state.global_step == step
    assert files.find(tmp_path) == str(tmp_path / f"checkpoint-{step}")
    resumed = trainer_of(tmp_path, **values)
    resumed.train(resume_from_checkpoint=True)
    never = trainer_of(tmp_path / "never", **values)
    never.train()
    assert torch.equal(weights(resumed), weights(never))
    assert never.evaluate()["eval_loss"] == pytest.approx(resumed.evaluate()["eval_loss"])


def test_a_signal_too_late_to_stop_training_is_not_swallowed(tmp_path):
    class AtTheEnd(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path, callbacks=[AtTheEnd()]).train()


def in_a_child(work):
    """The exit code of a forked child that only does this."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(number, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def twice():
        with StopRequest():
            signal.raise_signal(number)
            signal.raise_signal(number)

    assert in_a_child(twice) == 128 + number


def test_the_launchers_echo_of_a_signal_is_not_a_second_one(monkeypatch):
    """Ctrl-C reaches every process of the terminal, and the launcher hands it on once more."""
    monkeypatch.setenv("LOCAL_RANK", "0")

    def twice():
        with StopRequest() as request:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            request._since -= 60
            signal.raise_signal(signal.SIGTERM)

    assert in_a_child(twice) == 143


def test_handlers_of_the_program_itself_are_left_alone(tmp_path):
    calls = []
    before = signal.signal(signal.SIGTERM, lambda *a: calls.append(a))
    try:
        trainer = trainer_of(
            tmp_path, callbacks=[at_step(1, lambda: signal.raise_signal(signal.SIGTERM))], max_steps=2
        )
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(calls) == 1
    assert trainer.state.global_step == 2


def test_training_in_another_thread_catches_no_signals(tmp_path):
    import threading

    trainer, done = trainer_of(tmp_path), []
    thread = threading.Thread(target=lambda: done.append(trainer.train()))
    thread.start()
    thread.join()
    assert done


# ---------------------------------------------------------------------------------------------- not finite


def spoil(trainer, steps, how, monkeypatch):
    """Make loss or gradient of these steps (from 0) not finite, in the first micro-batch of each."""
    original, done = type(trainer.micro_batches).divergence, set()

    def divergence(hidden, *args, **options):
        output = original(trainer.micro_batches, hidden, *args, **options)
        step = trainer.state.global_step
        if step in steps and step not in done:
            done.add(step)
            if how == "gradient":
                hidden.register_hook(lambda grad: grad * float("inf"))
            elif how == "loss alone":  # its gradient stays finite
                output = dataclasses.replace(output, loss=output.loss + float("inf"))
            else:
                output = dataclasses.replace(output, loss=output.loss * float(how))
        return output

    monkeypatch.setattr(trainer.micro_batches, "divergence", divergence)


@pytest.mark.parametrize(
    ("how", "optim"),
    [
        ("nan", "adamw_torch"),
        ("inf", "adamw_torch_fused"),
        ("loss alone", "sgd"),
        ("gradient", "adamw_torch"),
        ("nan", "adafactor"),
    ],
)
def test_a_step_that_is_not_finite_is_skipped(tmp_path, monkeypatch, caplog, how, optim):
    values = {**SAVING, "optim": optim, "lmbda": 0.0, "per_device_train_batch_size": 2, "weight_decay": 0.1}
    trainer = trainer_of(
        tmp_path, max_steps=4, gradient_accumulation_steps=2, lr_scheduler_type="linear", max_grad_norm=1.0, **values
    )
    spoil(trainer, {1}, how, monkeypatch)
    states = []

    class Remember(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            moments = [v.clone() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
            states.append((weights(trainer).clone(), moments, trainer.lr_scheduler.get_last_lr()[0]))

    trainer.add_callback(Remember())
    with caplog.at_level(logging.WARNING, "gkd"):
        trainer.train()
    same = [torch.equal(states[i][0], states[i + 1][0]) for i in range(3)]
    assert same == [True, False, False]  # after steps 1 and 2 the weights are equal: step 2 moved nothing
    assert len(states[0][1]) == len(states[1][1])
    assert all(torch.equal(a, b) for a, b in zip(states[0][1], states[1][1], strict=True))  # no moment, no step count
    assert [round(lr / 1e-2, 6) for _, _, lr in states] == [0.75, 0.5, 0.25, 0.0]  # a function of the step alone
    assert logged(trainer, "nonfinite_steps") == [1.0, 1.0, 1.0]
    assert all(loss == loss for loss in losses(trainer))
    assert torch.isfinite(weights(trainer)).all()
    assert sum(trainer.ledger.sequences.values()) == 12  # what was trained on: three steps of four
    assert [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]


@pytest.mark.parametrize("lost", [{0}, {2}, {0, 3}])
def test_a_lost_step_is_no_part_of_the_logged_loss(tmp_path, monkeypatch, lost):
    """Nor are its other micro-batches; a period of lost steps alone has no loss."""
    values = {
        "lmbda": 0.0, "per_device_train_batch_size": 2, "max_steps": 4, "gradient_accumulation_steps": 2,
        "learning_rate": 0.0,
    }  # fmt: skip
    each = trainer_of(tmp_path / "each", **values)
    each.train()
    true = [loss for step, loss in enumerate(losses(each)) if step not in lost]
    for every in (1, 4):
        trainer = trainer_of(tmp_path / str(every), **values, logging_steps=every)
        spoil(trainer, lost, "nan", monkeypatch)
        output = trainer.train()
        expected = true if every == 1 else [sum(true) / len(true)]
        assert losses(trainer) == pytest.approx(expected, rel=1e-6)
        assert output.training_loss == pytest.approx(sum(true) / len(true), rel=1e-6)


def test_the_rows_of_the_micro_batch_are_named(tmp_path, monkeypatch, caplog):
    trainer = trainer_of(tmp_path, max_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    spoil(trainer, {0}, "nan", monkeypatch)
    seen, original = [], trainer.guard.watch
    monkeypatch.setattr(trainer.guard, "watch", lambda loss, rows: (seen.append(rows.tolist()), original(loss, rows)))
    trainer.train()
    assert f"step 1 is skipped: its loss is not finite; rows {sorted(seen[0])}" in caplog.text
    assert len(seen) == 2


def test_finite_losses_are_left_bit_for_bit():
    values = torch.tensor([0.0, -0.0, 1e-45, 3.3333333, -7e37], requires_grad=True)
    for value in values.unbind():
        result = nan_unless_finite(value)
        assert torch.equal(result, value)
        assert torch.autograd.grad(result, values)[0].sum() == 1
    for bad in ("inf", "-inf", "nan"):
        weight = torch.tensor(1.0, requires_grad=True)
        nan_unless_finite(weight * 0 + float(bad)).backward()
        assert weight.grad is not None
        assert weight.grad.isnan()


def test_training_gives_up_after_too_many_in_a_row(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, max_steps=12, max_nonfinite_steps=2, lmbda=0.0, **SAVING)
    before = weights(trainer).clone()
    spoil(trainer, {0, 2, 4, 5, 6}, "nan", monkeypatch)
    with pytest.raises(NotFiniteError) as error:
        trainer.train()
    for part in ("2 steps in a row", "max_nonfinite_steps=2", "step 6", "checkpoint-6", "learning_rate"):
        assert part in str(error.value)
    assert not torch.equal(weights(trainer), before)
    assert files.find(tmp_path) == str(tmp_path / "checkpoint-6")
    state = json.loads((tmp_path / "checkpoint-6" / files.STATE_FILE).read_text())
    assert state["nonfinite_steps"] == 4
    resumed = trainer_of(tmp_path, max_steps=12, max_nonfinite_steps=2, lmbda=0.0, **SAVING)
    resumed.train(resume_from_checkpoint=True)  # the next rows are tried
    assert resumed.state.global_step == 12
    assert resumed.record.nonfinite_steps == 4


def test_it_may_never_give_up(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, max_steps=5, max_nonfinite_steps=0, lmbda=0.0)
    spoil(trainer, set(range(5)), "nan", monkeypatch)
    trainer.train()
    assert trainer.record.nonfinite_steps == 5
    with pytest.raises(ValueError, match="max_nonfinite_steps=-1"):
        trainer_of(tmp_path, max_nonfinite_steps=-1)


# -------------------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("room", [0, 30, 300, 460])
def test_a_full_disk_during_a_save_on_a_real_file_system(tmp_path, room):
    """The second checkpoint meets a disk with `room` KiB left: in the weights, the optimizer, the last small files."""
    disk = tmp_path / "disk"
    if not small_disk(disk, "3m"):
        pytest.skip("mounting needs rights that this process does not have")
    try:

        def fill():
            free = os.statvfs(disk)
            (disk / "other").write_bytes(bytes(free.f_bavail * free.f_frsize - room * 1024))

        values = {**SAVING, "save_steps": 1, "lmbda": 0.0}
        trainer = trainer_of(disk / "run", max_steps=4, callbacks=[at_step(2, fill)], **values)
        with pytest.raises(DiskFullError) as error:
            trainer.train()
        for part in ("disk is full", "checkpoint-2", str(disk / "run" / "checkpoint-2"), "make room"):
            assert part in str(error.value)
        assert not (disk / "run" / "checkpoint-2").exists()
        assert files.find(disk / "run") == str(disk / "run" / "checkpoint-1")
        (disk / "other").unlink()
        resumed = trainer_of(disk / "run", max_steps=2, **values)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 2
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # weights may still be mapped


@pytest.mark.parametrize("during", ["torch.save", "os.fsync", "os.replace"])
def test_a_full_disk_during_a_save(tmp_path, monkeypatch, during):
    """The same without a file system of one's own: the error comes from one of the calls that write."""
    values = {**SAVING, "save_steps": 1, "lmbda": 0.0}

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill():
        owner, name = during.split(".")
        monkeypatch.setattr({"torch": torch, "os": os}[owner], name, refuse)

    trainer = trainer_of(tmp_path, max_steps=4, callbacks=[at_step(2, fill)], **values)
    with pytest.raises(DiskFullError, match="checkpoint-2"):
        trainer.train()
    monkeypatch.undo()
    assert files.find(tmp_path) == str(tmp_path / "checkpoint-1")


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    for error in (OSError(errno.EACCES, "no"), RuntimeError("shapes"), ValueError("x")):
        with pytest.raises(type(error)) as seen, full_disk_explained("it", tmp_path, "do"):
            raise error
        assert seen.value is error


def test_a_full_disk_during_a_cache_write(tmp_path):
    disk = tmp_path / "disk"
    if not small_disk(disk, "3m"):
        pytest.skip("mounting needs rights that this process does not have")
    try:

        def fill():
            free = os.statvfs(disk)
            (disk / "other").write_bytes(bytes(free.f_bavail * free.f_frsize))

        values = {"lmbda": 0.0, "seq_kd": True, "teacher_cache_dir": str(disk / "cache"), "max_new_tokens": 40}
        trainer = trainer_of(tmp_path / "run", max_steps=4, **values)
        fill()
        with pytest.raises(DiskFullError) as error:
            trainer.train()
        for part in ("disk is full", str(disk / "cache"), "teacher_cache_dir"):
            assert part in str(error.value)
        (disk / "other").unlink()
        trainer_of(tmp_path / "run", max_steps=4, **values).train()  # what there is of a record is left out
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # weights may still be mapped


# ------------------------------------------------------------------------------------------------- secrets


TOKEN = "hf_" + "Zq" * 16


def test_no_secret_is_written_anywhere(tmp_path, caplog):
    """Into no file of a run: checkpoints, pickled arguments, logs of the loggers, the card."""
    trainer = trainer_of(tmp_path / "run", max_steps=2, hub_token=TOKEN, report_to=["tensorboard"], **SAVING)
    with caplog.at_level(logging.DEBUG):
        trainer.train()
        trainer.save_model(str(tmp_path / "run"))
        trainer.create_model_card()
    assert trainer.args.hub_token == TOKEN  # pushing still needs it
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in written)
    assert any("events.out" in path.name for path in written)
    for path in written:
        assert TOKEN.encode() not in path.read_bytes(), path
    assert TOKEN not in caplog.text


def test_pickled_arguments_can_still_be_read(tmp_path):
    trainer = trainer_of(tmp_path, hub_token=TOKEN, generation_kwargs={"no_repeat_ngram_size": 3})
    trainer.save_model(str(tmp_path))
    args = torch.load(Path(tmp_path) / "training_args.bin", weights_only=False)
    assert args.hub_token is None
    assert args.generation_kwargs == {"no_repeat_ngram_size": 3}
    assert args.seed == 5


def test_secrets_in_loading_arguments_and_addresses_are_hidden_from_loggers(tmp_path):
    args = config(tmp_path, hub_token=TOKEN, teacher_model_init_kwargs={"token": TOKEN, "dtype": "float32"})
    assert args.teacher_model_init_kwargs == {"token": TOKEN, "dtype": "float32"}
    for text in (args.to_json_string(), str(args.to_sanitized_dict())):
        assert TOKEN not in text
        assert "float32" in text


# -------------------------------------------------------------------------------- what is loaded, what is read


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_weights_come_from_safetensors_only(tmp_path, who):
    save_tiny(tmp_path / "student", seed=1)
    save_tiny(tmp_path / "teacher", seed=2)
    weights_of = tmp_path / who / "model.safetensors"
    torch.save(load_file(weights_of), tmp_path / who / "pytorch_model.bin")
    values = {"student": str(tmp_path / "student"), "teacher": str(tmp_path / "teacher")}
    assert trainer_of(tmp_path / "out", **values)  # both are there: safetensors it is
    weights_of.unlink()
    field = {"student": "model_init_kwargs", "teacher": "teacher_model_init_kwargs"}[who]
    with pytest.raises(ValueError, match=f"pickle.*{field}="):
        trainer_of(tmp_path / "out", **values)
    assert trainer_of(tmp_path / "out", **values, **{field: {"use_safetensors": False}})


def test_code_of_a_model_repository_does_not_run_by_itself(tmp_path):
    save_tiny(tmp_path / "student", seed=1)
    settings = json.loads((tmp_path / "student" / "config.json").read_text())
    settings["model_type"] = "home_made"
    settings["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "student" / "config.json").write_text(json.dumps(settings))
    (tmp_path / "student" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for values in ({"student": str(tmp_path / "student")}, {"teacher": str(tmp_path / "student")}):
        with pytest.raises(ValueError, match="trust_remote_code"):
            trainer_of(tmp_path / "out", **values)
    assert not (tmp_path / "ran").exists()
    assert config(tmp_path).trust_remote_code is False


def test_a_poisoned_cache_is_not_unpickled(tmp_path):
    values = {"lmbda": 0.0, "seq_kd": True, "teacher_cache_dir": str(tmp_path / "cache")}
    trainer_of(tmp_path / "run", **values).train()
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "more.jsonl").write_bytes(pickle.dumps(Bomb()) + b"\n")
    (folder / "more.pkl").write_bytes(pickle.dumps(Bomb()))
    trainer_of(tmp_path / "run", **values).train()


def test_a_row_that_cannot_be_tokenized_is_named(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "a ", "completion": "b"})
    path.write_text(good + "\n" + r'{"prompt": "half an emoji \ud83d ", "completion": "c"}' + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, row 1: column 'prompt' is not valid Unicode"):
        read_rows(path)
    tokenizer = tiny_tokenizer()
    original = type(tokenizer).__call__

    def call(self, text, *args, **kwargs):
        if "boom" in text:
            raise RuntimeError("it gives up")
        return original(self, text, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", call)
    rows = [{"prompt": word, "completion": " b"} for word in ("a", "b", "boom")]
    with pytest.raises(ValueError, match=r"train data set, row 2: cannot be tokenized \(RuntimeError: it gives up"):
        trainer_of(tmp_path, Dataset.from_list(rows))


def test_exit_codes_of_a_recipe(tmp_path, monkeypatch, capsys):
    """2 for the user, 1 for a training that gave up, 128 + n for a signal; one line each."""
    save_tiny(tmp_path / "student", seed=1)
    save_tiny(tmp_path / "teacher", seed=2)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(8)))

    def code(act, **changes):
        class Act(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                act()

        build = run_module.build_trainer

        def build_trainer(*given, **functions):
            trainer = build(*given, **functions)
            trainer.add_callback(Act())
            return trainer

        values = {
            "model_name_or_path": tmp_path / "student", "teacher_model_name_or_path": tmp_path / "teacher",
            "dataset_name": tmp_path / "rows.jsonl", "output_dir": tmp_path / "out", "max_steps": 3,
            "per_device_train_batch_size": 2, "max_new_tokens": 4, "evaluate_before_and_after": "false",
            "report_to": "none", "resume_from_checkpoint": "true", **changes,
        }  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "build_trainer", build_trainer)
            with pytest.raises(SystemExit) as stopped:
                run(argv=[part for k, v in values.items() for part in (f"--{k}", str(v))])
        return stopped.value.code

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert code(lambda: signal.raise_signal(signal.SIGTERM)) == 143
    assert code(lambda: signal.raise_signal(signal.SIGINT)) == 130  # goes on from checkpoint-1
    assert files.find(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2")
    capsys.readouterr()
    assert code(lambda: monkeypatch.setattr(torch, "save", refuse), save_steps=1) == 1
    monkeypatch.undo()
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: [Errno 28] the disk is full: checkpoint-3")
    diverging = {"learning_rate": "1e38", "max_nonfinite_steps": 1, "output_dir": tmp_path / "inf"}
    assert code(lambda: None, **diverging, lmbda=0) == 1
    assert "error: the loss or gradient of 1 steps in a row" in capsys.readouterr().err
    assert code(lambda: None, **diverging, lmbda=1) == 1  # a rollout meets those weights
    assert "error: a rollout met logits" in capsys.readouterr().err
