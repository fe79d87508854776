"""A student that teaches itself: its base, its present weights, a moving average of its adapter."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from forked import Child
from peft import IA3Config, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from resumed import history, weights
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer
from training import Remember, config, losses
from transformers import TrainerCallback

from gkd.commands.doctor.examine import examine
from gkd.commands.evaluate import evaluate_recipe
from gkd.commands.plan.memory import estimate
from gkd.commands.plan.plan import setup_of
from gkd.config.fields import GKDConfig
from gkd.config.teacher import SELF_TEACHERS
from gkd.recipe.capture import capture, run_recipe
from gkd.training.card import card_info
from gkd.training.going_on import files
from gkd.training.teacher_state import FILE
from gkd.training.trainer import GKDTrainer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
STEPS, DECAY = 4, 0.7


def student_of(kind: Any = LoraConfig, **options: Any) -> Any:
    """A student in the middle of its training."""
    own = LORA if kind is LoraConfig else {"target_modules": ["q_proj", "v_proj"]}
    if kind is IA3Config:
        own = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        student = get_peft_model(tiny_model(seed=1), kind(task_type="CAUSAL_LM", **{**own, **options}))
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    return student


def build(
    folder: Path, kind: str, student: Any = None, teacher: Any = None, rows: Dataset | None = None, **values: Any
) -> GKDTrainer:
    """Its own answers and the data's, with dropout in the adapter: the teacher has none, so the two differ."""
    defaults = {
        "max_steps": STEPS, "optim": "adamw_torch", "learning_rate": 1e-2, "ce_weight": 0.5, "lmbda": 0.5,
        "save_strategy": "steps", "save_steps": 2, "max_new_tokens": 8, "per_device_train_batch_size": 2,
        **({"self_teacher_decay": DECAY} if kind == "ema" else {}),
    }  # fmt: skip
    return GKDTrainer(
        student if student is not None else student_of(lora_dropout=0.3),
        teacher,
        config(folder, self_teacher=kind, **{**defaults, **values}),
        train_dataset=rows if rows is not None else Dataset.from_list(tiny_rows(12)),
        processing_class=tiny_tokenizer(),
    )


class Watch(TrainerCallback):
    """The trained weights as a training begins and after each of its steps."""

    def __init__(self, trainer: GKDTrainer) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []
        self.trainer = trainer
        trainer.add_callback(self)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(weights(self.trainer))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(weights(self.trainer))


# --------------------------------------------------------------------------- a prompt of the teacher's own


def rows_with_views(n: int = 12) -> Dataset:
    """Two of three rows have a system turn for the teacher alone."""
    system = ("Answer in at most three words.", None, "Be brief.")
    return Dataset.from_list([{**row, "teacher_system": system[i % 3]} for i, row in enumerate(tiny_rows(n))])


def dense_gradients(student: Any, teacher: Any, window: list[Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """JSD(0.5) in float64 of the completions, each model behind its own prompt, one row at a time; its gradient."""
    losses = []
    for sequence in window:
        start, length = sequence.prompt_length, len(sequence.input_ids)
        context = sequence.teacher_context or sequence.input_ids[:start]
        q = student(input_ids=torch.tensor([sequence.input_ids])).logits[0, start - 1 : length - 1].softmax(-1)
        read = torch.tensor([[*context, *sequence.input_ids[start:]]])
        with torch.no_grad():
            p = teacher(input_ids=read).logits[0, len(context) - 1 : -1].softmax(-1)
        m = (p + q) / 2
        losses.append(((p * (p / m).log() + q * (q / m).log()) / 2).sum())
    loss = sum(losses) / sum(sequence.completion_length for sequence in window)
    trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    return loss.item(), dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.parametrize("kind", [*SELF_TEACHERS, "live, all weights"])
def test_each_step_is_that_of_two_models_in_float64(kind, tmp_path, monkeypatch):
    """The student's own answers and the teacher's; the teacher as it must be at each step, from recorded weights."""
    adapted, kind = "," not in kind, kind.partition(",")[0]

    def make() -> Any:
        return (student_of() if adapted else tiny_model(seed=1)).eval()

    remember = Remember(monkeypatch)
    values = {"optim": "sgd", "learning_rate": 0.5, "ce_weight": 0.0, "seq_kd": True, "max_grad_norm": 0.0}
    trainer = build(
        tmp_path, kind, make(), rows=rows_with_views(), gradient_accumulation_steps=2, save_strategy="no", **values
    )
    watch, gradients = Watch(trainer), []

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            named = trainer.model.named_parameters()
            gradients.append({name: p.grad.double().clone() for name, p in named if p.requires_grad})

    trainer.add_callback(Gradients())
    trainer.train()
    average = watch.seen[0]
    for step, window in enumerate(remember.windows):
        present = watch.seen[step]
        if step > 0:
            average = {name: DECAY * average[name] + (1 - DECAY) * value.double() for name, value in present.items()}
        models = [make(), make()]
        for model, values in zip(models, (present, {"live": present, "ema": average}.get(kind, present)), strict=True):
            model.load_state_dict(values, strict=False)
        student, teacher = (model.double() for model in models)
        if kind == "base":
            teacher = tiny_model(seed=1).double().eval()
        loss, expected = dense_gradients(student, teacher, window)
        assert losses(trainer)[step] == pytest.approx(loss, rel=1e-6)
        assert loss > 1e-4
        size = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
        for name, gradient in expected.items():
            assert float((gradients[step][name] - gradient).abs().max() / size) < 1e-6
    assert any(sequence.teacher_context for window in remember.windows for sequence in window)
    assert {sequence.source for window in remember.windows for sequence in window} == {"student", "teacher"}


# ------------------------------------------------------------------------------------------------- live


@pytest.mark.parametrize("adapted", [True, False], ids=["an adapter", "all weights"])
def test_live_is_a_frozen_copy_of_the_present_weights_at_each_step(adapted, tmp_path, monkeypatch):
    """Asked at every micro-batch; its copy is made anew each time, and runs in float64 without padding."""
    student = student_of(lora_dropout=0.3) if adapted else tiny_model(seed=1, attention_dropout=0.2)
    trainer = build(tmp_path, "live", student, gradient_accumulation_steps=2, gradient_checkpointing=True, seq_kd=True)
    teacher, score, seen = trainer.teacher, trainer.teacher.score, []

    def compared(batch: dict[str, torch.Tensor]) -> Any:
        signal = score(batch)
        assert not signal.hidden.requires_grad
        frozen = student_of() if adapted else tiny_model(seed=1)
        frozen.load_state_dict(trainer.model.state_dict())
        frozen = frozen.double().eval()
        rows = []
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            length = int(mask.sum())
            with torch.no_grad():
                logits = frozen(input_ids=ids[None, :length]).logits[0, :-1]
            rows.append(logits[labels[1:length] != -100])
        expected = torch.cat(rows)
        own = signal.head.logits(signal.hidden).detach().double()
        seen.append(float((own.log_softmax(-1) - expected.log_softmax(-1)).abs().max()))
        return signal

    monkeypatch.setattr(teacher, "score", compared)
    before = weights(trainer)
    trainer.train()
    assert len(seen) == 2 * STEPS
    assert max(seen) < 1e-4  # logits of about 10 in float32
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert all(parameter.requires_grad == (name in before) for name, parameter in trainer.model.named_parameters())
    own = {id(parameter) for parameter in trainer.model.parameters()}
    assert {id(parameter) for parameter in teacher.model.parameters()} == own, "a second copy of weights"
    assert not any(module.training for module in teacher.model.modules())
    assert sum("loss/teacher" in entry for entry in trainer.state.log_history) > 0
    assert not (tmp_path / "_teacher_sequences").exists()


# ------------------------------------------------------------------------------------------------- the average

ADAPTERS = {
    "lora": student_of,
    "dora, saved head": lambda: student_of(use_dora=True, modules_to_save=["lm_head", "norm"]),
    "biases": lambda: student_of(bias="lora_only"),
    "ia3": lambda: student_of(IA3Config),
    "oft": lambda: student_of(OFTConfig, oft_block_size=8),
    "vera": lambda: student_of(VeraConfig, r=8),
    "bfloat16": lambda: student_of().bfloat16(),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_average_is_the_closed_form(name, tmp_path):
    """d^n w_0 + sum over k of (1 - d) d^(n - k) w_k, in float64."""
    trainer = build(tmp_path, "ema", ADAPTERS[name]())
    watch = Watch(trainer)
    trainer.train()
    assert len(watch.seen) == STEPS + 1
    shares = [DECAY**STEPS, *((1 - DECAY) * DECAY ** (STEPS - k) for k in range(1, STEPS + 1))]
    state, own = trainer.teacher.state(), dict(trainer.teacher_model.named_parameters())
    assert state.keys() == watch.seen[0].keys()
    for weight, average in state.items():
        expected = sum(share * seen[weight].double() for share, seen in zip(shares, watch.seen, strict=True))
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(own[weight], average.to(own[weight].dtype)), "what is averaged is what scores"
    assert any(not torch.equal(average, watch.seen[-1][weight].float()) for weight, average in state.items())


def test_only_the_adapter_is_there_twice_and_nothing_of_the_average_is_trained_or_saved(tmp_path):
    trainer = build(tmp_path, "ema")
    trained = weights(trainer)
    student = dict(trainer.model.named_parameters())
    for name, parameter in trainer.teacher_model.named_parameters():
        assert (parameter is student[name]) != (name in trained)
        assert not parameter.requires_grad
    trainer.train()
    saved = load_file(tmp_path / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    assert len(saved) == len(trained)
    assert trainer.optimizer is not None
    known = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not known & {id(parameter) for parameter in trainer.teacher_model.parameters()}
    assert min(losses(trainer)) > 0


def test_a_decay_of_0_is_the_student_as_it_is(tmp_path):
    """And the two teachers score alike, so the trainings are equal to the bit."""
    live, average = (
        build(tmp_path / kind, kind, **({"self_teacher_decay": 0.0} if kind == "ema" else {}))
        for kind in ("live", "ema")
    )
    for trainer in (live, average):
        torch.manual_seed(3)
        trainer.train()
    assert losses(live) == losses(average)
    assert all(torch.equal(value, weights(average)[name]) for name, value in weights(live).items())


@pytest.mark.parametrize("kind", ["live", "ema"])
def test_resumed_to_the_bit(kind, tmp_path):
    values = {"seq_kd": True, "gradient_accumulation_steps": 2}
    never = build(tmp_path / "never", kind, **values)
    never.train()
    stopped = build(tmp_path / "stopped", kind, **values)
    stopped.train()
    for path in files.checkpoints(tmp_path / "stopped"):
        if files.step_of(path) == STEPS:
            files.discard(path)
    resumed = build(tmp_path / "stopped", kind, **values)
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed) == history(never)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(never).items())
    found, expected = resumed.teacher.state(), never.teacher.state()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_killed_in_a_step_and_resumed(tmp_path):
    def train(folder: Path, fatal: int | None) -> None:
        trainer = build(folder, "ema", save_steps=1)

        class Kill(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

        trainer.add_callback(Kill())
        trainer.train(resume_from_checkpoint=files.find(folder) is not None)

    for folder, fatal, code in (("killed", 3, 137), ("killed", None, 0), ("never", None, 0)):
        child = Child(lambda say, f=folder, n=fatal: train(tmp_path / f, n), tmp_path / "child.txt")
        assert child.join() == code, child.said()[-3000:]
    for name in (FILE, "adapter_model.safetensors"):
        killed, never = (load_file(tmp_path / run / f"checkpoint-{STEPS}" / name) for run in ("killed", "never"))
        assert killed.keys() == never.keys()
        assert all(torch.equal(value, killed[weight]) for weight, value in never.items())


def test_a_checkpoint_without_the_average_is_refused(tmp_path):
    build(tmp_path, "live").train()
    with pytest.raises(ValueError, match=rf"checkpoint-{STEPS} has no {FILE}, which self_teacher='ema' goes on from"):
        build(tmp_path, "ema").train(resume_from_checkpoint=True)
    other = build(tmp_path / "other", "ema")
    with pytest.raises(ValueError, match="the average of other weights"):
        other.teacher.load_state({"q": torch.zeros(1)})
    saved = build(tmp_path / "saved", "ema")
    saved.train()
    path = tmp_path / "saved" / f"checkpoint-{STEPS}" / FILE
    state = load_file(path)
    name = next(iter(state))
    save_file({**state, name: state[name] + 1}, path)
    with pytest.raises(ValueError, match="is damaged"):
        build(tmp_path / "saved", "ema").train(resume_from_checkpoint=str(path.parent))


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"self_teacher": "frozen"}, "self_teacher='frozen' is unknown: use one of base, live, ema"),
        ({"self_teacher": "live", "self_teacher_decay": 0.9}, "self_teacher_decay=0.9 has no effect"),
        ({"self_teacher_decay": 0.9}, "self_teacher_decay=0.9 has no effect"),
        ({"self_teacher": "ema", "self_teacher_decay": 1.5}, "self_teacher_decay=1.5 is out of range"),
        ({"self_teacher": "ema", "self_teacher_decay": 1.0}, "never moves: use self_teacher='base'"),
        ({"self_teacher": "live", "teacher_model_name_or_path": "x"}, "does not go with teacher_model_name_or_path"),
        ({"self_teacher": "base", "teacher_adapters": {"a": "x"}}, "does not go with teacher_adapters"),
        ({"self_teacher": "base", "share_base_model": True}, "does not go with share_base_model"),
        ({"self_teacher": "live", "teacher_placement": "cpu_offload"}, "teacher_placement='cpu_offload'"),
        ({"self_teacher": "ema", "teacher_scores_dir": "s"}, "teacher_scores_dir='s' does not go with"),
        ({"self_teacher": "live", "seq_kd": True, "teacher_cache_dir": "c"}, "teacher_cache_dir='c' does not go with"),
        (
            {"self_teacher": "base", "teacher_server_url": "http://localhost:1", "teacher_top_k": 8},
            "does not go with teacher_server_url",
        ),
    ],
)
def test_fields_that_do_not_go_together(values, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        GKDConfig(str(tmp_path), **values)


def test_students_that_cannot_teach_themselves(tmp_path):
    for kind, student, words in (
        ("ema", tiny_model(seed=1), "self_teacher='ema' needs a student with an adapter"),
        ("base", tiny_model(seed=1), "self_teacher='base' needs a student with an adapter"),
        ("base", student_of(bias="all"), "self_teacher='base', but the student trains"),
    ):
        with pytest.raises(ValueError, match=words):
            build(tmp_path, kind, student)
    with pytest.raises(ValueError, match="teacher_model does not go with self_teacher='live'"):
        build(tmp_path, "live", teacher=tiny_model())


@pytest.mark.parametrize("kind", SELF_TEACHERS)
def test_one_model_that_reads_one_prompt_is_told(kind, tmp_path, caplog):
    student = get_peft_model(tiny_model(seed=1), LoraConfig(task_type="CAUSAL_LM", **LORA))
    with caplog.at_level(logging.WARNING, logger="gkd"):
        trainer = build(tmp_path, kind, student, ce_weight=0.0, max_steps=1)
    assert "divergence and gradient are 0" in caplog.text
    trainer.train()
    assert losses(trainer) == pytest.approx([0], abs=1e-6)


def test_a_teacher_of_the_students_own_name_is_told(tmp_path, caplog):
    """The same flag twice: what is said of it where that teaches nothing, and not where it does."""
    folder, other = save_tiny(tmp_path / "model", seed=1), save_tiny(tmp_path / "other", seed=2)
    cases = {
        (): True, (("ce_weight", 0.1),): False, (("disable_dropout", False),): False,
        (("reward_weight", 0.1), ("temperature", 1.0)): False,
    }  # fmt: skip
    for teacher, values, told in [(folder, dict(case), told) for case, told in cases.items()] + [(other, {}, False)]:
        caplog.clear()
        trainer = GKDTrainer(
            model=str(Path(folder) / "." / ".." / "model"),
            teacher_model=None,
            args=config(tmp_path / "out", teacher_model_name_or_path=teacher, **values),
            train_dataset=Dataset.from_list(tiny_rows(8)),
            processing_class=tiny_tokenizer(),
            **({"reward": lambda completion, row: 0.0} if "reward_weight" in values else {}),
        )
        assert ("student and teacher are the same model" in caplog.text) == told, (teacher, values)
        if told:
            trainer.train()
            assert losses(trainer) == pytest.approx([0], abs=1e-6)


def test_a_card_in_the_working_folder_has_the_folders_name(tmp_path, monkeypatch):
    folder = tmp_path / "my-student"
    folder.mkdir()
    monkeypatch.chdir(folder)
    trainer = build(".", "ema", max_steps=1)
    assert card_info(trainer, None, None, None).model_name == "my-student"


# ------------------------------------------------------------------------------------------ what is said about it


def test_the_card_says_who_teaches(tmp_path):
    notes = {kind: card_info(build(tmp_path / kind, kind), None, None, None).notes[0] for kind in SELF_TEACHERS}
    assert notes == {
        "base": "The student is its own teacher: its base model, without its adapter.",
        "live": "The student is its own teacher: its weights as they are at each step.",
        "ema": f"The student is its own teacher: a moving average of its adapter (decay {DECAY}).",
    }


@pytest.mark.parametrize("kind", SELF_TEACHERS)
def test_a_run_a_look_before_it_and_its_measures(kind, tmp_path):
    """The recipe's own teacher is set aside; the table has a column of the teacher behind its own prompt."""
    base = save_tiny(tmp_path / "base", seed=1)
    rows = [{**row, "teacher_system": "Be brief."} for row in tiny_rows(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from gkd.run import dataset_by_name, run, with_held_out\n"
        "run(lambda settings: with_held_out(dataset_by_name(settings), 2),\n"
        "    defaults={'max_new_tokens': 6, 'teacher_model_name_or_path': 'another'})\n"
    )
    values = {
        "model_name_or_path": base, "dataset_name": tmp_path / "rows.jsonl", "output_dir": tmp_path / "out",
        "self_teacher": kind, "use_peft": True, "max_steps": 2, "num_eval_prompts": 2, "report_to": "none",
        "per_device_train_batch_size": 2,
    }  # fmt: skip
    argv = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    found = examine(capture(recipe, argv))
    assert found.passed, found
    run_recipe(recipe, argv)
    table = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    own = next(row for row in table["rows"] if row["key"] == "divergence_own")
    assert own["before"]["value"] > 1e-4
    assert own["teacher"]["value"] == pytest.approx(0, abs=1e-6)
    assert ("teacher" in table["settings"]) == (kind != "base")
    columns = evaluate_recipe(capture(recipe, argv), None)
    assert [column.name for column in columns] == ["student", "teacher"]
    assert columns[0].values["divergence_own"].value > 1e-4


def test_the_plan_counts_the_average_alone(tmp_path):
    base = save_tiny(tmp_path / "base", seed=1)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(8)))
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from gkd.run import dataset_by_name, run\n"
        "run(dataset_by_name, defaults={'max_new_tokens': 6, 'teacher_model_name_or_path': 'another'})\n"
    )
    common = ["--model_name_or_path", base, "--dataset_name", str(tmp_path / "rows.jsonl"), "--use_peft"]
    common += ["--output_dir", str(tmp_path / "out"), "--self_teacher"]
    found = {kind: setup_of(capture(recipe, [*common, kind]), 1, 0, False) for kind in SELF_TEACHERS}
    parts = {kind: estimate(setup).parts["teacher weights"] for kind, setup in found.items()}
    assert parts == {"base": 0, "live": 0, "ema": 4 * found["ema"].trained}
