"""`gkd chat`: what the models of a run answer is what they say in plain transformers."""

import io
import json
import shlex

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from tiny import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM
from user import flags, user_folder

from gkd.cli import main
from gkd.commands.chat.chat import Order, chat
from gkd.commands.chat.speakers import Manner, load_speakers
from gkd.commands.export.merging import save_merged
from gkd.commands.flags import make_parser
from gkd.training.origin import FILE, read_origin


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run with an adapter."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    values = {"use_peft": "true", "lora_r": 4, "learning_rate": 0.1, "max_length": 128}
    argv = flags(folder, out, evaluate_before_and_after="false", save_strategy="steps", save_steps=1, **values)
    assert main(["run", "gkd_qwen2", *argv]) == 0
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return user_folder(tmp_path_factory.mktemp("user"))


def greedy(model, turns, number):
    """The definition: the likeliest token, until a turn ends."""
    tokenizer = tiny_tokenizer()
    ids = list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"])
    written = []
    while len(written) < number and 258 not in written:
        with torch.no_grad():
            written.append(int(model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax()))
    return tokenizer.decode(written, skip_special_tokens=True)


def asked(capsys, *argv):
    capsys.readouterr()
    assert main(["chat", *map(str, argv)]) == 0
    return capsys.readouterr().out


def test_each_answers_what_it_says_in_plain_transformers(run, folder, capsys):
    questions = ["red apples", "river 7"]
    argv = [run, "--ask", questions[0], "--ask", questions[1], "--system", "sings", "--max_new_tokens", 9, "--json"]
    found = json.loads(asked(capsys, *argv))
    base = AutoModelForCausalLM.from_pretrained(folder / "student").eval()
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher").eval()
    for entry, question in zip(found, questions, strict=True):
        turns = [{"role": "system", "content": "sings"}, {"role": "user", "content": question}]
        answers = {name: answer["text"] for name, answer in entry["answers"].items()}
        assert list(answers) == ["student before", "student after", "teacher"]
        assert answers["student before"] == greedy(base, turns, 9)
        assert answers["teacher"] == greedy(teacher, turns, 9)
    adapted = PeftModel.from_pretrained(base, run).eval()
    for entry, question in zip(found, questions, strict=True):
        turns = [{"role": "system", "content": "sings"}, {"role": "user", "content": question}]
        assert entry["answers"]["student after"]["text"] == greedy(adapted, turns, 9)
    assert found[0]["answers"]["student after"] != found[0]["answers"]["student before"], "it has learnt something"


def test_the_student_before_is_the_adapter_that_was_gone_on_with(run, folder, tmp_path, capsys):
    argv = flags(folder, tmp_path / "on", model_name_or_path=run, evaluate_before_and_after="false", lmbda=0)
    assert main(["run", "gkd_qwen2", *argv, "--learning_rate", "0.1"]) == 0
    questions = ["--ask", "one", "--max_new_tokens", "9", "--json"]
    first, second = (json.loads(asked(capsys, where, *questions))[0]["answers"] for where in (run, tmp_path / "on"))
    assert second["student before"] == first["student after"]
    assert second["teacher"] == first["teacher"]


def test_checkpoints_whole_models_and_a_teacher_by_name(run, folder, tmp_path, capsys):
    argv = ["--ask", "one", "--max_new_tokens", "4", "--json"]
    of_run = json.loads(asked(capsys, run, *argv))[0]["answers"]
    of_checkpoint = json.loads(asked(capsys, run / "checkpoint-2", *argv))[0]["answers"]
    assert of_checkpoint == of_run
    save_merged(run, tmp_path / "merged")
    capsys.readouterr()
    whole = json.loads(asked(capsys, tmp_path / "merged", *argv, "--models", "after"))[0]["answers"]
    assert whole == {"student after": of_run["student after"]}
    swapped = json.loads(asked(capsys, run, *argv, "--models", "teacher", "--teacher", folder / "student"))
    assert swapped[0]["answers"]["teacher"] == of_run["student before"]


def test_a_run_of_all_weights_knows_the_student_before(folder, tmp_path, capsys):
    out = tmp_path / "full"
    argv = flags(folder, out, evaluate_before_and_after="false", use_peft="false", learning_rate=0.1)
    assert main(["run", "gkd_qwen2", *argv]) == 0
    answers = json.loads(asked(capsys, out, "--ask", "one", "--max_new_tokens", "4", "--json"))[0]["answers"]
    base = AutoModelForCausalLM.from_pretrained(folder / "student").eval()
    assert answers["student before"]["text"] == greedy(base, [{"role": "user", "content": "one"}], 4)
    assert read_origin(out).teacher == str(folder / "teacher")
    (out / FILE).unlink()
    answers = json.loads(asked(capsys, out, "--ask", "one", "--max_new_tokens", "4", "--json"))[0]["answers"]
    assert list(answers) == ["student after"]


def test_samples_are_those_of_the_model(run):
    """The share of first tokens over seeds is the model's probability."""
    (speaker,) = load_speakers(run, ["after"])
    turns = [{"role": "user", "content": "one"}]
    ids = torch.tensor([speaker.prompt(turns)])
    with torch.no_grad():
        p = speaker.model(input_ids=ids).logits[0, -1].double().div(0.7).softmax(-1)
    chances, number = {}, 100
    for token, chance in enumerate(p.tolist()):
        text = speaker.tokenizer.decode([token], skip_special_tokens=True)
        chances[text] = chances.get(text, 0.0) + chance
    likely = max(chances, key=chances.get)
    share = sum(speaker.answer(turns, Manner(1, 0.7, seed)).text == likely for seed in range(number)) / number
    error = (chances[likely] * (1 - chances[likely]) / number) ** 0.5
    assert 0.05 < chances[likely] < 0.95
    assert share == pytest.approx(chances[likely], abs=4 * error)


def test_a_terminal_sees_columns_grow_and_a_file_gets_lines(run, capsys):
    screen = io.StringIO()
    manner = Manner(12)
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    quiet = Console(file=io.StringIO())
    found = chat(Order(run, ask=("red",), manner=manner), console, quiet)
    shown = screen.getvalue()
    assert all(name in shown for name in ("student before", "student after", "teacher", "12 tokens, cut off"))
    assert shown.count("student before") > 3, "drawn again when the next one has answered"
    (speaker,) = load_speakers(run, ["before"])
    pieces = []
    answer = speaker.answer([{"role": "user", "content": "red"}], manner, pieces.append)
    assert "".join(pieces) == answer.text == found[0]["answers"]["student before"]["text"]
    lines = asked(capsys, run, "--ask", "red", "--max_new_tokens", "12")
    assert lines.startswith("> red\n[student before] ")
    assert lines.count("(12 tokens, cut off)") == sum(not a["ended"] for a in found[0]["answers"].values())


def test_a_talk_goes_on_with_each_models_own_answers(run, folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\nriver\n/new\none\n/quit\nnever\n"))
    lines = asked(capsys, run, "--models", "before", "--max_new_tokens", "5").splitlines()
    base = AutoModelForCausalLM.from_pretrained(folder / "student").eval()
    first = greedy(base, [{"role": "user", "content": "one"}], 5)
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": first}]
    second = greedy(base, [*turns, {"role": "user", "content": "river"}], 5)
    text = "\n".join(lines)
    places = [text.index(one) for one in (first, second) if one.isprintable()]
    assert places == sorted(places)
    assert text.count("[student before]") == 3


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["nowhere"], "there is no folder 'nowhere'"),
        (["{run}", "--models", "mine"], "--models mine: use before, after, teacher"),
        (["{run}", "--models", "after", "--teacher", "x"], "--teacher x has no effect"),
        (["{run}", "--ask", "x", "--max_new_tokens", "0"], "--max_new_tokens 0"),
        (["{run}", "--ask", "x", "--temperature", "-1"], "--temperature -1"),
        (["{run}", "--json"], "--json needs questions"),
        (["{run}", "--ask", "x", "--teacher", "no/such"], "'no/such' cannot be loaded"),
        (["{run}", "--ask", "x", "--max_new_tokens", "2000"], "more than the 1024 positions"),
    ],
)
def test_mistakes_end_in_one_line(run, capsys, argv, told):
    with pytest.raises(SystemExit) as stopped:
        main(["chat", *(part.format(run=run) for part in argv)])
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_the_commands_that_serve(run, tmp_path, capsys, monkeypatch):
    lines = [line for line in asked(capsys, run, "--serve").splitlines() if not line.startswith("#")]
    beside = shlex.split(lines[0])
    assert beside[:2] == ["vllm", "serve"]
    assert beside[beside.index("--lora-modules") + 1] == f"mine={run}"
    assert int(beside[beside.index("--max-lora-rank") + 1]) >= 4
    export = shlex.split(lines[1])
    make_parser().parse_args(export[1:])
    monkeypatch.chdir(tmp_path)
    assert lines[2:] == [f"vllm serve {run}-merged", f"transformers serve {run}-merged"]
    save_tiny(tmp_path / "whole")
    assert asked(capsys, "whole", "--serve") == "vllm serve whole\ntransformers serve whole\n"
