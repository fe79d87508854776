"""Cached scores: the same training as with the live teacher, without it where everything is on disk."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer
from training import Remember, change, config, logged, losses
from transformers import AutoModelForCausalLM, TrainerCallback

import gkd.assembly.models
from gkd.cli import main
from gkd.config.fields import GKDConfig
from gkd.data.sequences import TokenSequence, collate
from gkd.teachers import store as score_store
from gkd.teachers.kept import KeptTeacher
from gkd.teachers.local import LocalTeacher
from gkd.teachers.store import open_scores, row_key
from gkd.training.trainer import GKDTrainer

ARCHITECTURES = {
    "untied": {"kind": "qwen2"},
    "tied": {"kind": "qwen2", "tie_word_embeddings": True},
    "softcap": {"kind": "gemma2", "final_logit_softcapping": 5.0},
    "scale": {"kind": "cohere"},
    "bias": {"kind": "phi"},
    "positions": {"kind": "gpt2"},
}


@pytest.fixture
def asked(monkeypatch):
    """The number of rows of each real call of a live teacher."""
    calls, original = [], LocalTeacher.score

    def score(self, batch):
        calls.append(len(batch["labels"]))
        return original(self, batch)

    monkeypatch.setattr(LocalTeacher, "score", score)
    return calls


@pytest.fixture
def loads(monkeypatch):
    """The teachers that were loaded by name."""
    names, original = [], gkd.assembly.models.load_teacher

    def load(name, *args, **kwargs):
        names.append(Path(name).name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(gkd.assembly.models, "load_teacher", load)
    return names


def sequences(number=6, seed=0):
    """Rows of odd lengths; one without targets, one with a target in its midst, one whose first token is 'trained'."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(number):
        ids = torch.randint(3, 250, (5 + 7 * i % 23,), generator=draw).tolist()
        start = 1 + i % 4
        rows.append(TokenSequence(ids, [-100] * start + ids[start:], start, "data", i))
    rows[1].labels = [-100] * len(rows[1].input_ids)
    rows[2].labels[-3:] = [-100] * 3
    rows[3].labels[0] = rows[3].input_ids[0]
    return rows


def cached(folder, model, sources=("data", "teacher")):
    live = LocalTeacher(model, Accelerator(cpu=True))
    return KeptTeacher(open_scores(folder, {}), lambda: live, None, live.accelerator, together=False, sources=sources)


# ------------------------------------------------------------------------------------------------------ one batch


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_from_the_disk_are_the_models_own(tmp_path, name, asked):
    model = tiny_model(seed=2, hidden=48, layers=3, **ARCHITECTURES[name])
    rows = sequences()
    batch = collate(rows, 256)
    with torch.no_grad():
        wanted = [  # each row by itself, from the model's own logits
            model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1][torch.tensor(row.labels[1:]) != -100]
            for row in rows
        ]
    teacher = cached(tmp_path, model)
    for number in range(3):  # live, from memory, from the disk
        if number == 2:
            teacher = cached(tmp_path, model)
        signal = teacher.score(batch)
        logits = signal.head.logits(signal.hidden)
        torch.testing.assert_close(logits, torch.cat(wanted), rtol=1e-5, atol=1e-5)
        if number == 0:
            first = signal.hidden
        assert torch.equal(signal.hidden, first)
        teacher.flush()
    assert asked == [5]


def test_only_what_is_missing_is_scored_and_the_students_rows_are_never_kept(tmp_path, asked):
    teacher = cached(tmp_path, tiny_model(seed=2))
    rows = sequences(8)
    for i, source in ((0, "student"), (5, "student"), (6, "teacher")):
        rows[i].source = source
    whole = LocalTeacher(tiny_model(seed=2), teacher.accelerator)
    del asked[:]
    first = collate(rows[:4], 256)
    seen = []
    live = teacher.live.score
    teacher.live.score = lambda part: seen.append(tuple(part["input_ids"].shape)) or live(part)
    for batch, calls in (
        (first, [2, 1]),  # two to keep, one of the student; one has no target
        (first, [1]),
        (collate(rows, 256), [3, 2]),
        (collate(rows, 256), [2]),
    ):
        del asked[:], seen[:]
        signal = teacher.score(batch)
        assert asked == calls
        lengths = [len(row.input_ids) for row in rows]
        assert all(width <= max(lengths) for _, width in seen)
        torch.testing.assert_close(signal.hidden, whole.score(batch).hidden, rtol=1e-6, atol=1e-6)
    kept = [row_key(row.input_ids, row.labels) in teacher.store for row in rows]
    assert kept == [False, False, True, True, True, False, True, True]
    lengths = [len(row.input_ids) for row in rows]
    assert (1, lengths[0]) != (2, max(lengths[0], lengths[5])) == seen[0]  # without others' padding


def test_the_teachers_rows_pass_where_they_are_not_cached(tmp_path, asked):
    teacher = cached(tmp_path, tiny_model(seed=2), sources=("data",))
    rows = sequences(4)
    rows[0].source = "teacher"
    teacher.score(collate(rows, 256))
    assert asked == [2, 1]
    assert row_key(rows[0].input_ids, rows[0].labels) not in teacher.store


def test_a_batch_without_targets_asks_nobody(tmp_path, asked):
    model = tiny_model(seed=2)
    teacher = cached(tmp_path, model)
    row = sequences()[1]
    signal = teacher.score(collate([row, row], 256))
    assert signal.hidden.shape == (0, 32)
    assert asked == []


def test_what_passes_is_scored_in_the_same_company_whatever_is_on_disk(tmp_path):
    """The live teacher's last bits depend on the rows beside; a resumed run must repeat them."""
    rows = sequences(6)
    rows[0].source = rows[5].source = "student"
    batch, model = collate(rows, 256), tiny_model(seed=2)
    teacher = cached(tmp_path, model)
    fresh, again = teacher.score(batch).hidden, teacher.score(batch).hidden
    assert torch.equal(fresh, again)


def test_a_full_disk_stops_the_keeping_not_the_scoring(tmp_path, caplog, monkeypatch, asked):
    monkeypatch.setattr(score_store, "ROOM", 1 << 60)
    teacher = cached(tmp_path, tiny_model(seed=2))
    batch = collate(sequences(), 256)
    first = teacher.score(batch).hidden
    teacher.flush()
    assert "Training goes on" in caplog.text
    assert torch.equal(teacher.score(batch).hidden, first)
    assert asked == [5, 5]
    assert list(teacher.store.path.glob("rows-*")) == []
    teacher.score(batch)
    assert caplog.text.count("Training goes on") == 1


# -------------------------------------------------------------------------------------------------- in the trainer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a student and a teacher that is larger, with more rows in its head."""
    path = tmp_path_factory.mktemp("models")
    save_tiny(path / "student", seed=1)
    save_tiny(path / "teacher", seed=2, hidden=48, layers=3, vocab=272)
    return path


ROWS = tiny_rows(10)


def trainer_by_name(folder, teacher, rows=None, callbacks=None, eval_dataset=None, **values):
    defaults = {"lmbda": 0.0, "max_steps": -1, "num_train_epochs": 2, "learning_rate": 0.1}
    return GKDTrainer(
        model=tiny_model(seed=1),
        args=config(folder, teacher_model_name_or_path=str(teacher), **{**defaults, **values}),
        train_dataset=Dataset.from_list(ROWS if rows is None else rows),
        eval_dataset=None if eval_dataset is None else Dataset.from_list(eval_dataset),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


@pytest.mark.parametrize(
    "values",
    [
        {"lmbda": 0.0},
        {"lmbda": 0.5, "loss_temperature": 2.0},
        {"lmbda": 0.5, "seq_kd": True, "divergence": "reverse_kl"},
        {"lmbda": 0.0, "teacher_top_k": 5, "divergence": "forward_kl", "mask_truncated_completions": True},
    ],
)
def test_training_is_the_same_as_with_the_live_teacher(models, tmp_path, values, asked):
    plain = trainer_by_name(tmp_path / "plain", models / "teacher", **values)
    wanted = change(plain)
    calls = []
    for run in ("first", "second"):
        del asked[:]
        trainer = trainer_by_name(tmp_path / "kept", models / "teacher", teacher_scores_dir=tmp_path / "s", **values)
        torch.testing.assert_close(change(trainer), wanted, rtol=1e-4, atol=1e-6 * 10)
        assert losses(trainer) == pytest.approx(losses(plain), rel=1e-5)
        calls.append(list(asked))
        assert (run == "first") or trainer.teacher.loaded == (values["lmbda"] > 0)
    if values["lmbda"] == 0:
        assert sum(calls[0]) == 10  # the second epoch asks nothing
        assert calls[1] == []
    else:
        assert sum(calls[1]) < sum(calls[0])


def test_an_evaluation_is_scored_once(models, tmp_path, asked):
    values = {"eval_dataset": tiny_rows(5, seed=1), "eval_strategy": "epoch", "per_device_eval_batch_size": 2}
    plain = trainer_by_name(tmp_path / "plain", models / "teacher", **values)
    plain.train()
    del asked[:]
    trainer = trainer_by_name(tmp_path / "kept", models / "teacher", teacher_scores_dir=str(tmp_path / "s"), **values)
    trainer.train()
    assert sum(asked) == 15
    assert logged(trainer, "eval_loss") == pytest.approx(logged(plain, "eval_loss"), rel=1e-5)
    again = trainer_by_name(tmp_path / "kept", models / "teacher", teacher_scores_dir=str(tmp_path / "s"), **values)
    again.train()
    assert not again.teacher.loaded
    assert logged(again, "eval_loss") == logged(trainer, "eval_loss")


def test_a_teacher_that_is_passed_as_a_model_is_cached_too(models, tmp_path, asked):
    model = AutoModelForCausalLM.from_pretrained(models / "teacher")
    for _ in range(2):
        trainer = GKDTrainer(
            model=tiny_model(seed=1), teacher_model=model, processing_class=tiny_tokenizer(),
            args=config(tmp_path, lmbda=0.0, teacher_scores_dir=str(tmp_path / "s"), max_steps=3),
            train_dataset=Dataset.from_list(ROWS),
        )  # fmt: skip
        trainer.train()
    assert sum(asked) == 10
    assert trainer.teacher_model is model


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("killed")


@pytest.mark.parametrize("lmbda", [0.0, 0.5])
@pytest.mark.parametrize("flushed", [True, False])
def test_resuming_in_the_midst_of_an_epoch_repeats_every_bit(models, tmp_path, lmbda, flushed):
    """Killed in the first epoch after a checkpoint; what was scored behind it is on disk or lost."""
    values = {"lmbda": lmbda, "num_train_epochs": 3, "per_device_train_batch_size": 3, "optim": "adamw_torch"}
    values |= {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    results = []
    for name, interrupted in (("whole", False), ("killed", True)):
        options = {**values, "teacher_scores_dir": str(tmp_path / name / "scores")}
        if interrupted:
            killed = trainer_by_name(tmp_path / name, models / "teacher", callbacks=[Interrupt(3)], **options)
            with pytest.raises(RuntimeError, match="killed"):
                killed.train()
            if flushed:
                killed.teacher.flush()
            else:
                assert killed.teacher.store._pending_bytes > 0
        trainer = trainer_by_name(tmp_path / name, models / "teacher", **options)
        trainer.train(resume_from_checkpoint=True if interrupted else None)
        assert trainer.state.global_step == 12
        results.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ------------------------------------------------------------------------------------- the teacher stays on disk


def fill(models, folder, **values):
    trainer = trainer_by_name(folder / "fill", models / "teacher", teacher_scores_dir=str(folder / "s"), **values)
    trainer.train()
    assert trainer.teacher.loaded
    return trainer


def test_when_all_is_on_disk_the_backbone_is_never_loaded(models, tmp_path, loads, caplog):
    teacher = tmp_path / "teacher"
    save_tiny(teacher, seed=2, hidden=48, layers=3, vocab=272)
    wanted = fill(tmp_path, tmp_path)
    assert loads == ["teacher"]
    again = trainer_by_name(tmp_path / "again", teacher, teacher_scores_dir=str(tmp_path / "s"))
    again.train()
    assert loads == ["teacher"]
    assert losses(again) == losses(wanted)
    assert again.teacher._head.weight.shape == (272, 48)
    again.create_model_card()
    assert loads == ["teacher"]
    assert "teacher" in (tmp_path / "again" / "README.md").read_text()
    (teacher / "model.safetensors").unlink()  # and it need not even be there
    again = trainer_by_name(tmp_path / "again", teacher, teacher_scores_dir=str(tmp_path / "s"))
    again.train()
    assert losses(again) == losses(wanted)
    more = [*ROWS, *tiny_rows(2, seed=9)]
    with pytest.raises(ValueError, match="cannot be loaded"):
        trainer_by_name(tmp_path / "more", teacher, rows=more, teacher_scores_dir=str(tmp_path / "s"))


def test_a_teacher_of_the_hub_is_known_by_its_commit(tmp_path, loads, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--teacher"
    (repository / "refs").mkdir(parents=True)
    for commit, seed in (("a" * 40, 2), ("b" * 40, 3)):
        save_tiny(repository / "snapshots" / commit, seed=seed)
    values = {"teacher_scores_dir": str(tmp_path / "s"), "num_train_epochs": 1}
    expected = []
    for commit, loaded in (("a" * 40, 1), ("a" * 40, 1), ("b" * 40, 2), ("a" * 40, 2)):
        (repository / "refs" / "main").write_text(commit)
        trainer = trainer_by_name(tmp_path / "out", "org/teacher", **values)
        trainer.train()
        assert len(loads) == loaded
        expected.append(losses(trainer))
        (repository / "snapshots" / ("a" * 40) / "model.safetensors").unlink(missing_ok=True)  # is not needed again
    assert expected[0] == expected[1] == expected[3] != expected[2]


@pytest.mark.parametrize("why", ["rows", "lmbda", "weights", "dtype", "head", "eval", "precision"])
def test_the_teacher_is_loaded_when_something_is_missing_or_other(models, tmp_path, loads, why):
    teacher = tmp_path / "teacher"
    save_tiny(teacher, seed=2, hidden=48, layers=3, vocab=272)
    fill(tmp_path, tmp_path)
    (store,) = (tmp_path / "s").iterdir()
    values = {"teacher_scores_dir": str(tmp_path / "s")}
    if why == "rows":
        values["rows"] = [*ROWS, *tiny_rows(1, seed=9)]
    elif why == "lmbda":
        values["lmbda"] = 0.25
    elif why == "weights":  # one of them, and the file looks as old as before
        before = (teacher / "model.safetensors").stat()
        tensors = load_file(teacher / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 0.01
        save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
        assert (teacher / "model.safetensors").stat().st_mtime_ns != before.st_mtime_ns
    elif why == "dtype":
        values["teacher_model_init_kwargs"] = {"dtype": "bfloat16"}
    elif why == "head":
        (store / "head.safetensors").write_bytes((store / "head.safetensors").read_bytes()[:-5])
    elif why == "eval":
        values |= {"eval_dataset": tiny_rows(3, seed=4), "eval_strategy": "epoch"}
    elif why == "precision":
        values["bf16"] = True
    trainer = trainer_by_name(tmp_path / "other", teacher, **values)
    assert loads == ["teacher", "teacher"]
    assert trainer.teacher.loaded
    stores = len(list((tmp_path / "s").iterdir()))
    assert stores == (2 if why in ("weights", "dtype", "precision") else 1)
    if why in ("weights", "dtype", "precision"):
        assert len(trainer.teacher.store) == 0
    if why == "head":
        assert trainer.teacher.store.read_head() is not None
    trainer.train()


def test_a_row_that_turns_out_to_be_damaged_loads_the_teacher_in_the_midst(models, tmp_path, loads, caplog, asked):
    wanted = fill(models, tmp_path)
    del asked[:]
    trainer = trainer_by_name(tmp_path / "again", models / "teacher", teacher_scores_dir=str(tmp_path / "s"))
    assert not trainer.teacher.loaded
    (shard,) = trainer.teacher.store.path.glob("rows-*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255  # of the states; the list of rows has been read
    shard.write_bytes(content)
    trainer.train()
    assert trainer.teacher.loaded
    assert "damaged" in caplog.text
    assert "loaded now" in caplog.text
    assert losses(trainer) == pytest.approx(losses(wanted), rel=1e-5)
    assert 0 < sum(asked) <= 10


def test_the_teachers_sequences_and_their_scores_suffice(models, tmp_path, loads, monkeypatch):
    values = {"seq_kd": True, "teacher_cache_dir": str(tmp_path / "sequences"), "teacher_temperature": 0.7}
    memory = Remember(monkeypatch)
    wanted = fill(models, tmp_path, **values)
    written = [[s.input_ids for s in window] for window in memory.windows]
    memory.windows.clear()
    again = trainer_by_name(tmp_path / "again", models / "teacher", teacher_scores_dir=str(tmp_path / "s"), **values)
    again.train()
    assert loads == ["teacher"]
    assert [[s.input_ids for s in window] for window in memory.windows] == written
    assert {s.source for window in memory.windows for s in window} == {"teacher"}
    assert losses(again) == losses(wanted)
    other = {**values, "teacher_temperature": 0.6}  # other sequences, which have not been written
    trainer_by_name(tmp_path / "again", models / "teacher", teacher_scores_dir=str(tmp_path / "s"), **other)
    assert loads == ["teacher", "teacher"]


def test_which_adapter_acts_and_how_strongly_is_part_of_the_key(tmp_path):
    stores = []
    for alpha, active in ((8, "default"), (16, "default"), (8, "other"), (8, "default")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            adapter = LoraConfig(r=4, lora_alpha=alpha, target_modules="all-linear", init_lora_weights=False)
            model = get_peft_model(tiny_model(seed=2), adapter)
            model.add_adapter("other", adapter)
        model.set_adapter(active)
        trainer = GKDTrainer(
            model=tiny_model(seed=1), teacher_model=model, processing_class=tiny_tokenizer(),
            args=config(tmp_path, lmbda=0.0, teacher_scores_dir=str(tmp_path / "s")),
            train_dataset=Dataset.from_list(ROWS[:4]),
        )  # fmt: skip
        stores.append(trainer.teacher.store.path)
    assert stores[0] == stores[3]
    assert len(set(stores)) == 3


@pytest.mark.parametrize("kind", ["in 8 bits", "in CPU memory", "with an adapter", "on the student's base"])
def test_other_kinds_of_local_teachers_are_cached_alike(models, tmp_path, asked, kind):
    """The second epoch asks none of them, and a second run finds what the first has kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(tiny_model(seed=1), adapter).save_pretrained(tmp_path / "adapter")
    if kind == "in 8 bits":
        pytest.importorskip("bitsandbytes")
    fields = {
        "in 8 bits": {"teacher_model_init_kwargs": {"load_in_8bit": True}},
        "in CPU memory": {"teacher_placement": "cpu_offload"},
        "with an adapter": {"teacher_adapter_name_or_path": str(tmp_path / "adapter")},
        "on the student's base": {
            "teacher_adapter_name_or_path": str(tmp_path / "adapter"),
            "share_base_model": True,
            "teacher_model_name_or_path": None,
        },
    }[kind]
    results = []
    for name, scores in (("plain", None), ("first", str(tmp_path / "s")), ("second", str(tmp_path / "s"))):
        del asked[:]
        torch.manual_seed(6)  # the adapter's initial values
        base = "student" if "adapter" in kind else "teacher"
        values = {"teacher_model_name_or_path": str(models / base), **fields}
        trainer = GKDTrainer(
            model=str(models / "student"),
            args=config(
                tmp_path / name, lmbda=0.0, max_steps=6, learning_rate=0.1, teacher_scores_dir=scores, **values
            ),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        )
        trainer.train()
        results.append((losses(trainer), sum(asked)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-2 if kind == "in 8 bits" else 1e-5)
    assert results[2][0] == results[1][0]
    assert [number for _, number in results] == [20, 10, 0]


# ------------------------------------------------------------------------------------------------------ the fields


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"lmbda": 1.0}, ["lmbda=1", "lower lmbda"]),
        ({"seq_kd": True, "teacher_cache_dir": "off"}, ["seq_kd=True", "teacher_cache_dir='off'"]),
        ({"teacher_server_url": "http://x:1", "teacher_top_k": 4}, ["teacher_server_url", "hidden states"]),
        ({"teacher_scores_dir": " "}, ["names no folder"]),
        ({"seq_kd": True, "lmbda": 0.0, "seq_kd_loss": "nll"}, ["seq_kd_loss='nll'", "not used"]),
    ],
)
def test_what_has_no_effect_is_an_error(values, parts):
    with pytest.raises(ValueError) as error:
        GKDConfig("out", **{"teacher_scores_dir": "scores", **values})
    assert all(part in str(error.value) for part in (*parts, "teacher_scores_dir"))


def test_an_evaluation_alone_is_reason_enough():
    GKDConfig("out", teacher_scores_dir="scores", lmbda=1.0, eval_strategy="epoch")


# --------------------------------------------------------------------------------------------- gkd precompute --scores


RECIPE = """
from gkd.run import dataset_by_name, run

def load_data(settings):
    rows = dataset_by_name(settings)["train"]
    return {"train": rows.select(range(8)), "eval": rows.select(range(8, 10))}

run(load_data, defaults={"max_new_tokens": 6, "lmbda": 0.0, "evaluate_before_and_after": False})
"""


@pytest.fixture(scope="module")
def user(models):
    (models / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:7], ROWS[3], *ROWS[8:]]))
    (models / "recipe.py").write_text(RECIPE)
    return models


def flags(user, folder, *more, **changes):
    values = {
        "model_name_or_path": user / "student",
        "teacher_model_name_or_path": user / "teacher",
        "dataset_name": user / "rows.jsonl",
        "output_dir": folder / "out",
        "teacher_scores_dir": folder / "scores",
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "report_to": "none",
        **changes,
    }
    return [*(part for name, value in values.items() for part in (f"--{name}", str(value))), *more]


def precompute(user, folder, *more, **changes):
    return main(["precompute", str(user / "recipe.py"), "--scores", *flags(user, folder, *more, **changes)])


def run_recipe(user, folder, **changes):
    return main(["run", str(user / "recipe.py"), *flags(user, folder, **changes)])


@pytest.mark.parametrize("seq_kd", ["false", "true"])
def test_scored_beforehand_training_never_loads_the_teacher(user, tmp_path, asked, loads, capsys, seq_kd):
    changes = {"seq_kd": seq_kd, "eval_strategy": "steps", "eval_steps": 2}
    assert precompute(user, tmp_path, **changes) == 0
    said = capsys.readouterr().out
    assert "target tokens x 48 x 4 bytes = " in said
    assert "are free in" in said
    assert "the scores of 10 rows are in" in said
    assert asked == [1, 2, 2, 2, 2, 1]  # one to see how large a row is; one row is there twice
    assert loads == ["teacher"]
    del asked[:]
    assert precompute(user, tmp_path, **changes) == 0
    assert run_recipe(user, tmp_path, **changes) == 0
    assert asked == []
    assert loads == ["teacher"]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists() or (
        tmp_path / "out" / "model.safetensors"
    ).exists()


def test_scores_that_were_stopped_go_on_where_they_were(user, tmp_path, asked, monkeypatch):
    original = LocalTeacher.score

    def stop_at_the_fourth(self, batch):
        if len(asked) == 3:
            raise KeyboardInterrupt
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(LocalTeacher, "score", stop_at_the_fourth)
        with pytest.raises(SystemExit) as stopped:
            precompute(user, tmp_path)
    assert stopped.value.code == 130
    del asked[:]
    assert precompute(user, tmp_path) == 0
    assert asked == [1, 2, 1]


def test_scores_that_do_not_fit_are_refused_before_they_are_made(user, tmp_path, asked, monkeypatch, capsys):
    monkeypatch.setattr(score_store, "ROOM", 1 << 60)
    monkeypatch.setattr("gkd.commands.precompute.scores.ROOM", 1 << 60)  # imported by name
    with pytest.raises(SystemExit) as stopped:
        precompute(user, tmp_path)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    for part in ("teacher_scores_dir", "7 rows", "are free in", "make room"):
        assert part in message
    assert asked == [1]


@pytest.mark.parametrize(
    ("more", "changes", "parts"),
    [
        ([], {"teacher_scores_dir": None}, ["--teacher_scores_dir DIR"]),
        (["--precompute_output", "x"], {}, ["--precompute_output"]),
        (
            [],
            {"teacher_server_url": "http://localhost:1", "teacher_top_k": 4, "teacher_model_name_or_path": None},
            ["hidden states"],
        ),
        ([], {"lmbda": 1.0}, ["lmbda=1"]),
        (
            [],
            {"share_base_model": "true", "teacher_model_name_or_path": None, "teacher_adapter_name_or_path": "x"},
            ["share_base_model", "teacher_adapter_name_or_path"],
        ),
    ],
)
def test_a_mistake_is_one_line(user, tmp_path, capsys, more, changes, parts):
    argv = flags(user, tmp_path, *more, **changes)
    for name in [name for name, value in changes.items() if value is None]:
        del argv[argv.index(f"--{name}") : argv.index(f"--{name}") + 2]
    with pytest.raises(SystemExit) as stopped:
        main(["precompute", str(user / "recipe.py"), "--scores", *argv])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert all(part in message for part in parts), message
