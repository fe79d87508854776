"""The end of a run: nothing that was trained is lost, what cannot be written is told, what is there fits together."""

import json
import re
import signal
import tempfile

import pytest
from safetensors.torch import load_file
from training import trainer_of
from transformers import TrainerCallback
from user import flags

from gkd.recipe.build import build_trainer
from gkd.report.card import CardInfo, create_card
from gkd.report.repo import Repo
from gkd.run import run


def at_the_end(monkeypatch, act):
    """Do something when the training is over and before anything of it is written."""

    class AtTheEnd(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            act()

    def build(*args, **kwargs):
        trainer = build_trainer(*args, **kwargs)
        trainer.add_callback(AtTheEnd())
        return trainer

    monkeypatch.setattr("gkd.run.build_trainer", build)


def test_weights_that_the_folder_cannot_take_are_saved_elsewhere(folder, tmp_path, monkeypatch, capsys):
    out, refuge = tmp_path / "out", tmp_path / "tmp"
    refuge.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(refuge))
    at_the_end(monkeypatch, (out / "model.safetensors").mkdir)  # in the way
    with pytest.raises(SystemExit) as stopped:
        run(argv=flags(folder, out, evaluate_before_and_after="false"))
    assert stopped.value.code == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    (saved,) = refuge.glob("out-*")
    assert str(saved) in message
    assert load_file(saved / "model.safetensors")
    assert (saved / "tokenizer_config.json").is_file()


def test_what_cannot_be_written_keeps_nothing_else_back(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    at_the_end(monkeypatch, (out / "metrics.jsonl").mkdir)
    with pytest.raises(SystemExit) as stopped:
        run(argv=flags(folder, out, num_eval_prompts=2))
    assert stopped.value.code == 1
    said = capsys.readouterr()
    assert "metrics.jsonl could not be written" in said.err.strip().splitlines()[-1]
    assert "Student before and after" in said.out
    for name in ("model.safetensors", "evaluation.json", "README.md"):
        assert (out / name).is_file(), name


def test_metrics_jsonl_is_json(folder, tmp_path, monkeypatch):
    """Whatever a step's numbers were: the norm of a skipped step's gradient is NaN, which JSON has not."""

    def spoilt(*args, **kwargs):
        trainer = build_trainer(*args, **kwargs)
        for parameter in trainer.model.parameters():
            parameter.register_hook(lambda gradient: gradient * float("nan"))
        return trainer

    def refuse(token):
        raise AssertionError(token)

    monkeypatch.setattr("gkd.run.build_trainer", spoilt)
    run(argv=flags(folder, tmp_path, max_steps=1, evaluate_before_and_after="false"))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    history = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [line["grad_norm"] for line in history if "grad_norm" in line] == [None]


def test_a_resumed_run_leaves_no_evaluation_of_other_weights(folder, tmp_path):
    """And its card counts the whole run, and says how all of it was started."""
    first = flags(folder, tmp_path, num_eval_prompts=2, save_strategy="steps", save_steps=2)
    run(argv=first)
    earlier = (tmp_path / "evaluation.json").read_text()
    assert (tmp_path / "plots" / "evaluation.png").is_file()
    again = flags(
        folder, tmp_path, max_steps=3, save_strategy="steps", save_steps=2, evaluate_before_and_after="false",
        resume_from_checkpoint="true",
    )  # fmt: skip
    run(argv=again)
    assert not (tmp_path / "evaluation.json").exists()
    assert not (tmp_path / "plots" / "evaluation.png").exists()
    assert (tmp_path / "_earlier" / "evaluation.json").read_text() == earlier
    state = json.loads((tmp_path / "checkpoint-3" / "gkd_state.json").read_text())
    before = json.loads((tmp_path / "checkpoint-2" / "gkd_state.json").read_text())
    assert state["seconds"] > before["seconds"] > 0
    assert re.search(r"Optimizer steps \| 3 ", (tmp_path / "README.md").read_text())


def test_a_card_tells_how_the_whole_run_was_started():
    def card(*commands):
        info = CardInfo("m", Repo("s"), Repo("t"), commands=commands)
        return create_card(info).split("## Reproduce")[1].split("##")[0]

    plain, resumed = "r.py --lmbda 0.5", "r.py --lmbda 0.5 --resume_from_checkpoint true"
    assert card((0, plain)).strip() == "```bash\npython r.py --lmbda 0.5\n```"
    assert card((0, plain), (4, resumed), (8, resumed.replace(" true", "=true"))) == card((0, plain))
    other = card((0, plain), (4, "r.py --lmbda 1.0 --resume_from_checkpoint true"))
    assert "python r.py --lmbda 0.5\n" in other
    assert "stopped after step 4, and gone on with" in other
    assert "--lmbda 1.0 --resume_from_checkpoint true" in other


def test_a_stopped_runs_card_names_a_folder_with_weights(tmp_path):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                signal.raise_signal(signal.SIGTERM)

    trainer = trainer_of(tmp_path / "out", max_steps=5, callbacks=[Stop()])
    with pytest.raises(SystemExit):
        trainer.train()
    card = (tmp_path / "out" / "README.md").read_text()
    (name,) = set(re.findall(r'from_pretrained\("([^"]+)"\)', card))
    assert name == "out/checkpoint-2"
    assert (tmp_path / name / "model.safetensors").is_file()
    assert "after step 2 of 5" in card
    trainer.save_model()
    trainer.create_model_card()
    assert "had not ended" not in (tmp_path / "out" / "README.md").read_text()


def test_a_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"teacher_cache_dir=.*cannot be made"):
        trainer_of(tmp_path / "run", seq_kd=True, lmbda=0.0, teacher_cache_dir=str(tmp_path / "file" / "cache"))


@pytest.mark.parametrize("text", ["", "x = 1\n", '{"prompt": "a"}\n'])
def test_a_file_that_never_calls_run_is_an_error(tmp_path, text, capsys):
    from gkd.cli import main

    path = tmp_path / "recipe.py"
    path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(path)])
    assert stopped.value.code == 2
    assert "does not call gkd.run.run" in capsys.readouterr().err


def test_an_adapter_that_is_a_pickle_is_not_evaluated(folder, tmp_path, capsys):
    from gkd.commands.evaluate import evaluate_recipe

    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="a pickle may run any program"):
        evaluate_recipe(None, str(tmp_path))
