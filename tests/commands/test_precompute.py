"""`gkd precompute` through the command line, on tiny local models: the cache, the data set, and training on both."""

import json
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from datasets import load_dataset
from other_tokens import other_model, other_tokenizer
from tiny import CHATML, save_tiny, tiny_model, tiny_rows, tiny_tokenizer
from training import Remember
from views import own_prompt, teacher_prompt, viewed_rows
from vllm_server.fake import FakeServer

from gkd.assembly import models
from gkd.cli import main
from gkd.commands.doctor.examine import examine
from gkd.commands.precompute import answers as module
from gkd.recipe.capture import capture
from gkd.recipe.rows import recipe_data
from gkd.rollouts.base import SamplingSettings
from gkd.rollouts.hf import HFRollout
from gkd.rollouts.store import prompt_number
from gkd.run import run

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
RECIPE = """
import sys
from pathlib import Path
from gkd.run import dataset_by_name, run

def load_data(settings):
    assert settings.training.output_dir
    return {"train": dataset_by_name(settings)["train"]}

def score(completion, row):
    return 1.0

if __name__ == "__main__":
    try:
        run(load_data, defaults={"max_new_tokens": 6, "lmbda": 0.5, "rollout_batch_size": 4}, score=score)
    except Exception:
        raise SystemExit("nothing of a capture may be caught here")
    Path(sys.argv[0]).with_name("ran_on").touch()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("user")
    save_tiny(path / "student", seed=1)
    save_tiny(path / "other", seed=5)
    save_tiny(path / "teacher", seed=2, hidden=48, layers=3, vocab=272)
    rows = tiny_rows(10)
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[3]]))  # one prompt twice
    (path / "recipe.py").write_text(RECIPE)
    return path


@pytest.fixture
def asked(monkeypatch):
    """The prompts of each real call of the teacher's `generate`."""
    calls, original = [], HFRollout.generate

    def generate(self, prompts, step, *rows):
        if self.source == "teacher":
            calls.append([tuple(prompt) for prompt in prompts])
        return original(self, prompts, step, *rows)

    monkeypatch.setattr(HFRollout, "generate", generate)
    return calls


def flags(folder, output, *more, **changes):
    values = {
        "model_name_or_path": folder / "student",
        "teacher_model_name_or_path": folder / "teacher",
        "dataset_name": folder / "rows.jsonl",
        "output_dir": output,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "report_to": "none",
        "logging_steps": 1,
        "evaluate_before_and_after": "false",
        **changes,
    }
    return [*(part for name, value in values.items() for part in (f"--{name}", str(value))), *more]


def precompute(folder, output, *more, **changes):
    return main(["precompute", str(folder / "recipe.py"), *flags(folder, output, *more, **changes)])


def history(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------- capture


def test_a_recipe_is_captured_instead_of_run(folder, tmp_path):
    before = list(sys.argv)
    recipe = capture(folder / "recipe.py", flags(folder, tmp_path / "out", lmbda=0.25))
    assert sys.argv == before
    assert recipe.settings.training.lmbda == 0.25
    assert recipe.settings.training.max_new_tokens == 6
    assert len(recipe.load_data(recipe.settings)["train"]) == 11
    assert recipe.score("", {}) == 1.0
    assert not (tmp_path / "out").exists()
    assert not (folder / "ran_on").exists()
    run(argv=flags(folder, tmp_path / "out", max_steps=1))  # and afterwards recipes run again
    assert (tmp_path / "out" / "metrics.jsonl").is_file()


def test_what_cannot_be_captured_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no recipe .*none\.py"):
        capture(tmp_path / "none.py", [])
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"empty\.py.*does not call"):
        capture(tmp_path / "empty.py", [])
    (tmp_path / "plain.py").write_text("from gkd.run import run\nrun()\n")
    with pytest.raises(ValueError, match="lmbda=7"):
        capture(tmp_path / "plain.py", flags(folder, tmp_path, lmbda=7))


# ---------------------------------------------------------------------------------------------- the whole command


def test_precomputed_answers_are_what_training_uses(folder, tmp_path, asked, capsys):
    output, data = tmp_path / "out", tmp_path / "data"
    assert precompute(folder, output, "--precompute_output", str(data)) == 0
    assert "10 answers of the teacher are in" in capsys.readouterr().out
    assert [len(call) for call in asked] == [4, 4, 2]  # each prompt once
    lengths = [len(prompt) for call in asked for prompt in call]
    assert lengths == sorted(lengths, reverse=True)
    answers = {tuple(row["input_ids"][: row["prompt_length"]]): row["input_ids"] for row in read(data)}

    # training with seq_kd: nothing is left to ask
    asked.clear()
    run(argv=flags(folder, output, seq_kd="true", lmbda=0.5, max_new_tokens=6, max_steps=4))
    assert asked == []
    assert history(output)[-2]["ledger/targets/teacher"] > 0

    # training on the data set: the same tokens, without a teacher that writes
    rows = windows(folder, data, tmp_path / "plain")
    assert len(rows) == 11
    for sequence in rows:
        assert sequence.source == "data"
        assert sequence.input_ids == answers[tuple(sequence.input_ids[: sequence.prompt_length])]
        completion = sequence.input_ids[sequence.prompt_length :]
        assert sequence.labels == [-100] * sequence.prompt_length + completion
    assert asked == []


def read(data):
    return load_dataset(str(data))["train"]


def without_teacher(argv):
    at = argv.index("--teacher_model_name_or_path")
    return [*argv[:at], *argv[at + 2 :]]


@pytest.mark.parametrize("field", [{"self_teacher": "base"}, {"share_base_model": "true"}], ids=["self", "shared"])
def test_the_students_own_base_answers_and_scores_beforehand(field, folder, tmp_path, asked, capsys):
    """What a training with an adapter on that base asks its teacher is there already, under the same keys."""
    output, common = tmp_path / "out", {"seq_kd": "true", "lmbda": 0.0, "teacher_scores_dir": tmp_path / "scores"}
    argv = without_teacher(flags(folder, output, "--use_peft", max_new_tokens=6, max_steps=6, **common, **field))
    assert main(["precompute", str(folder / "recipe.py"), "--scores", *argv]) == 0
    assert sum(map(len, asked)) == 10
    kept = sorted(path.name for path in tmp_path.glob("**/rows-*.safetensors"))
    asked.clear()
    run(argv=argv)
    assert asked == []
    assert sorted(path.name for path in tmp_path.glob("**/rows-*.safetensors")) == kept, "a row was scored again"


def test_a_student_that_has_written_beforehand_needs_no_engine_and_with_the_scores_no_teacher(
    folder, tmp_path, monkeypatch, capsys
):
    data, scores, argv = tmp_path / "data", tmp_path / "scores", ("precompute", str(folder / "recipe.py"))
    common = {"max_new_tokens": 6, "temperature": 0.8, "teacher_scores_dir": scores, "lmbda": 0.0}
    written, original = [], HFRollout.generate

    def generate(self, prompts, step, *rows):
        written.extend((self.source, tuple(prompt)) for prompt in prompts)
        return original(self, prompts, step, *rows)

    monkeypatch.setattr(HFRollout, "generate", generate)
    for _ in range(2):  # the second time all is there
        assert (
            main(
                [
                    *argv,
                    *flags(
                        folder, tmp_path / "out", "--student", "--scores", "--precompute_output", str(data), **common
                    ),
                ]
            )
            == 0
        )
        assert len(written) == len(set(written)) == 10
        assert {source for source, _ in written} == {"student"}
    assert "11 rows of the student's in" in (printed := capsys.readouterr().out)
    assert "the scores of 11 rows are in" in printed
    assert f"--dataset_name {data} --lmbda 0 --seq_kd false --teacher_scores_dir {scores}" in printed
    student = tiny_model(seed=1)
    alone = HFRollout(lambda: student, None, SamplingSettings(6, 0.8, stop_ids=(258,)), seed=42)
    for row in (rows := read(data)):
        prompt = row["input_ids"][: row["prompt_length"]]
        assert row["input_ids"][row["prompt_length"] :] == original(alone, [prompt], 0, [prompt_number(prompt)])[0]
    (mark,) = set(rows["student_fingerprint"])
    record = json.loads((data / "provenance.json").read_text())
    assert (record["student"], record["student_fingerprint"], record["rows"]) == ("student", mark, 11)
    assert "# Completions of student" in (data / "README.md").read_text()

    monkeypatch.setattr(models, "load_teacher", lambda *args, **kwargs: pytest.fail("the teacher was loaded"))
    monkeypatch.setattr(HFRollout, "generate", lambda *args: pytest.fail("somebody writes"))
    trained = {**common, "dataset_name": data, "max_steps": 6, "seq_kd": "false"}
    run(argv=flags(folder, tmp_path / "lora", "--use_peft", **trained))
    offline = history(tmp_path / "lora")
    assert offline[-2]["ledger/targets/data"] == sum(len(r["input_ids"]) - r["prompt_length"] for r in rows)
    with pytest.raises(SystemExit):
        main(
            [
                "run",
                str(folder / "recipe.py"),
                *flags(folder, tmp_path / "else", model_name_or_path=folder / "other", **trained),
            ]
        )
    assert "train_dataset: another student has written these rows" in capsys.readouterr().err

    monkeypatch.undo()
    run(argv=flags(folder, tmp_path / "live", "--use_peft", **{**trained, "teacher_scores_dir": tmp_path / "none"}))
    for one, other in zip(offline[:6], history(tmp_path / "live")[:6], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5), "as with the teacher at hand"


def test_the_student_needs_a_folder_to_write_to(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["precompute", str(folder / "recipe.py"), *flags(folder, tmp_path / "out", "--student")])
    assert "--student needs a folder" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["live", "ema"])
def test_a_teacher_that_changes_has_nothing_to_precompute(kind, folder, tmp_path, capsys):
    argv = without_teacher(flags(folder, tmp_path / "out", "--use_peft", self_teacher=kind))
    with pytest.raises(SystemExit):
        main(["precompute", str(folder / "recipe.py"), *argv])
    assert f"gkd precompute does not go with self_teacher='{kind}'" in capsys.readouterr().err


def test_options_of_the_tokenizer_reach_the_prompts_of_training_precompute_and_doctor(folder, tmp_path, monkeypatch):
    """Another template and another end of sequence: what is prepared beforehand is what training then asks for."""
    (tmp_path / "chat.jinja").write_text(CHATML.replace("<|im_start|>", "<|im_start|>@"))
    chats = [
        {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "yo"}]}
        for i in range(6)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    options = {
        "dataset_name": tmp_path / "chats.jsonl",
        "chat_template_path": tmp_path / "chat.jinja",
        "eos_token": "!",
    }

    (prepared,) = module.prepare(
        capture(folder / "recipe.py", flags(folder, tmp_path / "a", seq_kd="true", **options))
    )
    assert prepared.tokenizer.eos_token == "!"
    beforehand = {prepared.tokenizer.decode(row["input_ids"][: row["prompt_length"]]) for row in prepared.rows}

    memory = Remember(monkeypatch)
    run(argv=flags(folder, tmp_path / "b", max_new_tokens=6, max_steps=3, **options))
    trained = {tiny_tokenizer().decode(s.input_ids[: s.prompt_length]) for window in memory.windows for s in window}
    assert len(trained) == 6
    assert beforehand == trained
    assert all(prompt.startswith("<|im_start|>@user\nhi") for prompt in trained)

    diagnosis = examine(capture(folder / "recipe.py", flags(folder, tmp_path / "c", seq_kd="true", **options)))
    assert all("<|im_start|>@user" in "".join(text for _, text in row.pieces) for row in diagnosis.rows)


def test_each_of_several_teachers_answers_and_scores_its_own_rows(folder, tmp_path, asked, capsys, monkeypatch):
    """Beforehand into stores and a data set, and in a training that asks nobody again."""
    save_tiny(tmp_path / "other", seed=5)
    rows = [{**row, "teacher": ("a", "b")[i % 2]} for i, row in enumerate(tiny_rows(6))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teachers = {"a": {"model": str(folder / "teacher")}, "b": {"model": str(tmp_path / "other")}}
    several = {
        "teachers": json.dumps(teachers),
        "dataset_name": tmp_path / "rows.jsonl",
        "seq_kd": "true",
        "lmbda": 0.0,
        "teacher_cache_dir": tmp_path / "cache",
        "teacher_scores_dir": tmp_path / "scores",
    }

    def argv(*more, **changes):
        given = flags(folder, tmp_path / "run", *more, **{**several, **changes})
        place = given.index("--teacher_model_name_or_path")
        return given[:place] + given[place + 2 :]

    assert main(["precompute", str(folder / "recipe.py"), *argv("--precompute_output", str(tmp_path / "made"))]) == 0
    assert [len(call) for call in asked] == [3, 3]
    made = load_dataset(str(tmp_path / "made"), split="train")
    assert made["teacher"] == [row["teacher"] for row in rows]
    assert main(["precompute", str(folder / "recipe.py"), *argv("--scores")]) == 0
    printed = capsys.readouterr().out
    assert "3 answers of teacher 'a' are in" in printed
    assert printed.count("the scores of 3 rows are in") == 2
    asked.clear()
    loads, load = [], models.load_teacher
    monkeypatch.setattr(models, "load_teacher", lambda *args, **kwargs: loads.append(args) or load(*args, **kwargs))
    run(argv=argv(max_new_tokens=6, max_steps=3))
    assert (asked, loads) == ([], [])
    found = examine(capture(folder / "recipe.py", argv()))
    assert found.passed, [(check.name, check.message) for check in found.checks if check.level == "error"]
    names = {check.name for check in found.checks}
    assert {"Tokenizers, a", "Token maps, b", "Perplexity", "Rollouts, teacher"} <= names


def test_a_load_data_that_gives_no_dict_ends_in_one_line(folder, tmp_path, capsys):
    recipe = tmp_path / "list.py"
    recipe.write_text("from gkd.run import run\n\ndef load_data(settings):\n    return [1]\n\nrun(load_data)\n")
    for options in (), ("--scores", "--teacher_scores_dir", str(tmp_path / "scores")):
        with pytest.raises(SystemExit) as end:
            main(["precompute", str(recipe), *options, *flags(folder, tmp_path / "out")])
        assert end.value.code == 2
        assert "error: load_data returned list: it should return a dict" in capsys.readouterr().err


def test_a_rewritten_folder_and_one_of_the_same_name_are_read_as_they_are_now(folder, tmp_path):
    """`datasets` keeps what it has read, and must not find it here."""
    for place, cap in (("a", 2), ("b", 3), ("a", 4)):
        data = tmp_path / place / "answers"
        precompute(folder, tmp_path / "out", "--precompute_output", str(data), max_new_tokens=cap)
        rows = read(data)
        assert max(len(row["input_ids"]) - row["prompt_length"] for row in rows) == cap


def windows(folder, data, output):
    """What is trained on in one epoch of an ordinary run on that data set."""
    from gkd.training import trainer

    seen, original = [], trainer.count

    def count(sequences):
        seen.extend(sequences)
        return original(sequences)

    trainer.count = count
    try:
        run(argv=flags(folder, output, dataset_name=data, lmbda=0.0, max_steps=-1, num_train_epochs=1))
    finally:
        trainer.count = original
    return seen


def test_the_data_set_says_what_it_holds_and_how_it_was_made(folder, tmp_path):
    data, token = tmp_path / "data", "hf_" + "x" * 20
    precompute(folder, tmp_path / "out", "--precompute_output", str(data), teacher_temperature=0.5, hub_token=token)
    rows, tokenizer = read(data), tiny_tokenizer()
    source = tiny_rows(10)
    assert list(rows["source_row"]) == list(range(11))
    for row in rows:
        length = row["prompt_length"]
        prompt, completion = row["input_ids"][:length], row["input_ids"][length:]
        turns = source[3 if row["source_row"] == 10 else row["source_row"]]["messages"][:-1]
        assert row["prompt"] == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert (row["prompt"], row["completion"]) == (tokenizer.decode(prompt), tokenizer.decode(completion))
        assert row["labels"] == [-100] * length + completion
        assert 1 <= len(completion) <= 6
        assert max(completion) < 259  # the teacher's head has 272 rows, the student knows 259
        assert row["truncated"] == (completion[-1] != 258)
    record = json.loads((data / "provenance.json").read_text())
    assert record["key"]["sampling"]["temperature"] == 0.5
    assert record["key"]["seed"] == 42
    assert (record["rows"], record["teacher"]) == (11, "teacher")
    assert record["prompts"]["dataset"] == "rows.jsonl"
    assert {"gkd", "torch", "transformers"} <= record["versions"].keys()
    assert record["date"].endswith("+00:00")
    readme = (data / "README.md").read_text()
    assert token not in readme + json.dumps(record)
    assert readme.startswith("---\n")
    assert "--lmbda 0" in readme


HELD_OUT_RECIPE = """
from gkd.run import dataset_by_name, run, with_held_out

def load_data(settings):
    data = with_held_out(dataset_by_name(settings), 2)
    prompts = data["eval"].map(lambda row: {"mark": "kept"})
    return {**data, "prompts": prompts, "held_out_text": ["one text", "another é"]}

run(load_data, defaults={"max_new_tokens": 3, "lmbda": 0.5})
"""


@pytest.fixture(scope="module")
def answers(folder, tmp_path_factory):
    """A data set of answers, made by a recipe that holds rows out, and what the recipe gives itself."""
    path = tmp_path_factory.mktemp("answers")
    rows = tiny_rows(31, seed=5)
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "recipe.py").write_text(HELD_OUT_RECIPE)
    argv = flags(folder, path / "out", dataset_name=path / "rows.jsonl")
    assert main(["precompute", str(path / "recipe.py"), *argv, "--precompute_output", str(path / "answers")]) == 0
    own = capture(path / "recipe.py", argv)
    return path, recipe_data(own.load_data, own.settings)


def test_no_row_is_lost_and_the_held_out_rows_are_those_of_the_recipe(folder, answers, tmp_path, capsys):
    path, own = answers
    recipe = capture(path / "recipe.py", flags(folder, tmp_path, dataset_name=path / "answers", seq_kd="false"))
    data = recipe_data(recipe.load_data, recipe.settings)
    assert len(data["train"]) == len(own["train"]) == 29
    assert list(data["train"]["source_row"]) == list(range(29))
    assert [row["messages"] for row in data["eval"]] == [row["messages"] for row in own["eval"]]
    assert list(data["prompts"]["mark"]) == ["kept", "kept"]
    assert data["held_out_text"] == own["held_out_text"]
    assert load_dataset(str(path / "answers"))["train"].num_rows == 29  # and for others it is a data set as any
    argv = flags(folder, tmp_path / "out", dataset_name=path / "answers", seq_kd="false", lmbda=0, max_steps=1)
    argv = [*argv, "--evaluate_before_and_after", "true", "--num_eval_prompts", "2"]
    assert main(["run", str(path / "recipe.py"), *argv]) == 0
    assert "held-out prompts are also trained on" not in capsys.readouterr().err


def test_the_last_line_is_a_command_that_trains_on_the_answers(folder, answers, tmp_path, monkeypatch, capsys):
    path, _ = answers
    argv = flags(folder, path / "out", dataset_name=path / "rows.jsonl", lmbda=1.0)
    monkeypatch.setattr(sys, "argv", ["gkd", "precompute", str(path / "recipe.py")])
    main(["precompute", str(path / "recipe.py"), *argv, "--precompute_output", str(tmp_path / "answers")])
    gkd, *command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert gkd == "gkd"
    assert command[-2:] == ["--lmbda", "0"]  # as the recipe stands, the student writes everything
    rest = {name: value for name, value in pairwise(argv) if name in ("--model_name_or_path", "--output_dir")}
    recipe = capture(command[1], [*command[2:], *(part for pair in rest.items() for part in pair)])
    assert not recipe.settings.training.seq_kd
    assert len(recipe_data(recipe.load_data, recipe.settings)["train"]) == 29


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.py")))
def test_every_recipe_takes_answers_as_a_data_set(folder, answers, tmp_path, name):
    pytest.importorskip({"gkd_wmt14": "sacrebleu", "gkd_xsum": "rouge_score"}.get(name, "gkd"))
    path, own = answers
    argv = flags(folder, tmp_path, dataset_name=path / "answers", seq_kd="false")
    if name == "gkd_two_teachers":  # whose teachers are others in the place of the one
        at = argv.index("--teacher_model_name_or_path")
        argv[at : at + 2] = [
            "--teachers",
            json.dumps({"one": {"model": argv[at + 1]}, "two": {"model": argv[at + 1]}}),
        ]
    recipe = capture(RECIPES / f"{name}.py", argv)
    data = recipe_data(recipe.load_data, recipe.settings)
    assert len(data["train"]) == 29
    assert len(data["eval"]) == len(own["eval"])


def test_answers_are_known_by_their_columns_on_the_hub_too(folder, answers, tmp_path, monkeypatch):
    """There is no folder to look into before `load_data` asks for the name."""
    path, _ = answers
    copy = tmp_path / "snapshot"
    shutil.copytree(path / "answers", copy)
    (copy / "provenance.json").unlink()
    monkeypatch.setattr("gkd.report.dataset_folder.snapshot_download", lambda name, repo_type: str(path / name))
    monkeypatch.setattr("gkd.recipe.rows.load_dataset", lambda path, **kwargs: load_dataset(str(copy)))
    monkeypatch.chdir(tmp_path)
    recipe = capture(RECIPES / "gkd_gsm8k.py", flags(folder, tmp_path, dataset_name="answers", seq_kd="false"))
    data = recipe_data(recipe.load_data, recipe.settings)
    assert (len(data["train"]), len(data["eval"])) == (29, 2)


def test_no_id_of_the_heads_padding_is_written(folder, tmp_path):
    """Both heads are padded beyond the tokenizer, as those of Qwen are: such an id is no text."""
    for name, seed in (("student", 1), ("teacher", 2)):
        save_tiny(tmp_path / name, seed=seed, vocab=400)
    models = {f"{who}model_name_or_path": tmp_path / (who.rstrip("_") or "student") for who in ("", "teacher_")}
    precompute(folder, tmp_path / "out", "--precompute_output", str(tmp_path / "data"), **models, max_new_tokens=20)
    rows = read(tmp_path / "data")
    assert len(rows) == 11
    assert max(max(row["input_ids"]) for row in rows) <= 258
    # Training asks for the very same answers, and takes them as a data set.
    settings = {**models, "max_new_tokens": 20, "lmbda": 0.5}
    run(argv=flags(folder, tmp_path / "out", seq_kd="true", **settings))
    assert history(tmp_path / "out")[-2]["ledger/targets/teacher"] > 0
    run(argv=flags(folder, tmp_path / "plain", **{**settings, "dataset_name": tmp_path / "data", "lmbda": 0}))


def test_a_stopped_run_goes_on_where_it_was(folder, tmp_path, asked, monkeypatch):
    original = HFRollout.generate

    def stop_at_the_second(self, prompts, step, *rows):
        if len(asked) == 1:
            raise KeyboardInterrupt
        return original(self, prompts, step, *rows)

    with monkeypatch.context() as patch:
        patch.setattr(HFRollout, "generate", stop_at_the_second)
        with pytest.raises(SystemExit) as stopped:
            precompute(folder, tmp_path / "out")
    assert stopped.value.code == 130
    assert precompute(folder, tmp_path / "out") == 0
    assert [len(call) for call in asked] == [4, 4, 2]
    assert len({prompt for call in asked for prompt in call}) == 10
    asked.clear()
    assert precompute(folder, tmp_path / "out") == 0
    assert asked == []


def test_answers_that_training_would_leave_out_are_left_out(folder, tmp_path):
    data = tmp_path / "data"
    more = ["--precompute_output", str(data), "--mask_truncated_completions", "true"]
    changes = {"max_new_tokens": 30, "generation_kwargs": json.dumps({"suppress_tokens": list(range(230))})}
    precompute(folder, tmp_path / "out", *more, **changes)
    record = json.loads((data / "provenance.json").read_text())
    assert 0 < record["left_out"]["truncated"] < 11
    rows = read(data)
    assert len(rows) == record["rows"] == 11 - record["left_out"]["truncated"]
    assert not any(rows["truncated"])
    with pytest.raises(SystemExit):
        precompute(folder, tmp_path / "out", *more, max_new_tokens=1)


def test_a_recipe_that_trains_on_policy_only_has_a_teacher_to_precompute(folder, tmp_path, asked):
    assert precompute(folder, tmp_path / "out", lmbda=1.0) == 0
    assert sum(map(len, asked)) == 10


def test_a_teacher_with_prompts_of_its_own_answers_and_scores_what_the_training_asks(
    folder, tmp_path, asked, monkeypatch, caplog
):
    """And the data set of its answers says what it read, so that training on it goes on with that."""
    rows = viewed_rows(8)
    data = tmp_path / "viewed.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"dataset_name": data, "seq_kd": "true", "lmbda": 0.0, "max_new_tokens": 6}
    common["teacher_scores_dir"] = tmp_path / "scores"
    argv = flags(folder, tmp_path / "out", **common)
    assert main(["precompute", str(folder / "recipe.py"), "--scores", *argv]) == 0
    wanted = {tuple(teacher_prompt(row)) for row in rows}
    assert {prompt for call in asked for prompt in call} == wanted
    asked.clear()
    memory = Remember(monkeypatch)
    with caplog.at_level("INFO", "gkd"):
        run(argv=argv)
    assert not asked
    assert "the teacher is not loaded" in caplog.text
    assert precompute(folder, tmp_path / "out", "--precompute_output", str(tmp_path / "data"), **common) == 0
    assert not asked
    memory.windows.clear()
    run(argv=flags(folder, tmp_path / "more", **{**common, "dataset_name": tmp_path / "data", "seq_kd": "false"}))
    sequences = [sequence for window in memory.windows for sequence in window]
    assert sequences
    for sequence in sequences:
        start, read = sequence.prompt_length, sequence.teacher_row()[0]
        context = read[: len(read) - sequence.completion_length]
        assert context == teacher_prompt(rows[sequence.row])
        assert sequence.input_ids[:start] == own_prompt(rows[sequence.row])


def test_a_teacher_with_other_tokens_answers_and_scores_what_the_training_asks(folder, tmp_path, asked, caplog):
    other_model().save_pretrained(tmp_path / "teacher")
    other_tokenizer().save_pretrained(tmp_path / "teacher")
    fields = {"seq_kd": "true", "lmbda": 0.0, "max_new_tokens": 6, "teacher_tokenizer_alignment": "bytes"}
    fields |= {"teacher_model_name_or_path": tmp_path / "teacher", "teacher_scores_dir": tmp_path / "scores"}
    argv = flags(folder, tmp_path / "out", **fields)
    assert main(["precompute", str(folder / "recipe.py"), "--scores", *argv]) == 0
    assert sum(map(len, asked)) == 10
    asked.clear()
    with caplog.at_level("INFO", "gkd"):
        run(argv=argv)
    assert not asked
    assert "the teacher is not loaded" in caplog.text


def test_a_teacher_on_a_server_answers_beforehand_too(folder, tmp_path, capsys):
    """And the training finds what it has answered: the server only scores then."""
    teacher = tiny_model(seed=2, hidden=48, layers=3)
    with FakeServer(teacher, tiny_tokenizer(), max_model_len=400) as server:

        def written():
            sampled = [body for _, body in server.seen if body.get("max_tokens", 1) > 1]
            server.seen.clear()
            return sum(len(body["prompt"]) if isinstance(body["prompt"][0], list) else 1 for body in sampled)

        argv = flags(folder, tmp_path / "out", teacher_server_url=server.url, teacher_top_k=5, max_length=300)
        at = argv.index("--teacher_model_name_or_path")
        del argv[at : at + 2]
        data = ["--precompute_output", str(tmp_path / "data")]
        assert main(["precompute", str(folder / "recipe.py"), *argv, *data]) == 0
        assert "10 answers of the teacher are in" in capsys.readouterr().out
        assert written() == 10
        assert len(read(tmp_path / "data")) == 11
        run(argv=[*argv, "--seq_kd", "true", "--lmbda", "0.5", "--max_new_tokens", "6"])
        assert server.seen
        assert written() == 0


@pytest.mark.parametrize(
    ("more", "changes", "parts"),
    [
        (["--precompute_push_to_hub", "me/data"], {}, ["--precompute_output"]),
        (["--precompute_output", "FULL"], {}, ["holds something else"]),
        ([], {"teacher_cache_dir": "off"}, ["teacher_cache_dir='off'"]),
        ([], {"dataset_name": "nowhere.jsonl"}, ["nowhere.jsonl"]),
        ([], {"teacher_model_name_or_path": "nowhere/teacher"}, ["nowhere/teacher"]),
        ([], {"model_name_or_path": "nowhere/student"}, ["nowhere/student"]),
    ],
)
def test_a_mistake_is_one_line(folder, tmp_path, capsys, more, changes, parts):
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        precompute(folder, tmp_path / "out", *[str(full) if m == "FULL" else m for m in more], **changes)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert all(part in message for part in parts), message
    assert [path.name for path in full.iterdir()] == ["thesis.txt"]


def test_pushing_uploads_the_folder_to_a_data_set_repository(folder, tmp_path, monkeypatch, capsys):
    """The Hub itself is out of a test's reach: what the client is told, and what becomes of its refusal."""
    from gkd.report import dataset_folder

    told = []

    class Hub:
        def __init__(self, token):
            told.append(token)

        def create_repo(self, repo_id, **options):
            told.append((repo_id, options))
            return f"hub/{repo_id}"

        def upload_folder(self, **options):
            told.append(options)
            if options["repo_id"] == "no/body":
                raise ValueError("no such user")

    monkeypatch.setattr(dataset_folder, "HfApi", Hub)
    data = str(tmp_path / "data")
    more = ["--precompute_output", data, "--hub_token", "hf_secret", "--precompute_push_to_hub"]
    assert precompute(folder, tmp_path / "out", *more, "me/answers", hub_private_repo="true") == 0
    assert told[0] == "hf_secret"
    assert told[1] == ("me/answers", {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert (told[2]["folder_path"], told[2]["repo_type"]) == (data, "dataset")
    assert "hub/me/answers" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        precompute(folder, tmp_path / "out", *more, "no/body")
    assert stopped.value.code == 2
    assert "no such user" in capsys.readouterr().err
    assert "hf_secret" not in (tmp_path / "data" / "provenance.json").read_text()


def test_help_names_the_flags(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["precompute", "--help"])
    assert stopped.value.code == 0
    assert "--precompute_output" in capsys.readouterr().out
    assert module.precompute.__doc__


def test_a_teacher_with_other_tokens_writes_beforehand(folder, tmp_path, asked, capsys):
    other = other_model()
    other.save_pretrained(folder / "other")
    other_tokenizer().save_pretrained(folder / "other")
    changes = {"teacher_model_name_or_path": folder / "other", "seq_kd": "true", "seq_kd_loss": "nll", "lmbda": 0.0}
    argv = flags(folder, tmp_path / "out", **changes)
    recipe = str(folder / "recipe.py")
    assert main(["precompute", recipe, *argv, "--precompute_output", str(tmp_path / "made")]) == 0
    assert sum(map(len, asked)) == 10
    assert "gkd run finds them" in capsys.readouterr().out
    rows = load_dataset(str(tmp_path / "made"))["train"]
    assert len(rows) == 11
    assert "teacher_context" not in rows.column_names
    own = tiny_tokenizer()
    for row in rows:
        assert own.decode(row["input_ids"][row["prompt_length"] :]) == row["completion"]
        assert row["truncated"] == (row["input_ids"][-1] != 258)
    asked.clear()
    trained = capture(recipe, argv)
    assert asked == []
    diagnosis = examine(trained)
    assert diagnosis.passed, diagnosis.checks
    told = {check.name: check.message for check in diagnosis.checks if check.level == "ok"}
    assert "they differ" in told["Token maps"]
    assert "its own" in told["Chat templates"]
    assert told["Stop ids"].startswith("256, 258") or "1 for the teacher" in told["Stop ids"]
    for row in diagnosis.rows:
        assert [kind for kind, _ in row.teacher] == ["prompt"]
        assert row.teacher[0][1].startswith("<s>[")
