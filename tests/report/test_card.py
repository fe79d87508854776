"""The model card: read back by huggingface_hub's own parser, rendered from tricky values, and free of secrets."""

import copy
import dataclasses
import json
import re
import shlex
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from gkd.common.environment import describe_hardware, installed_versions
from gkd.common.redact import REDACTED, is_secret_name, redact_command, redact_settings, redact_value
from gkd.common.text import duration, shorten
from gkd.config.fields import GKDConfig
from gkd.evaluation.measures import Estimate, Measures, mean_estimate
from gkd.report.card import CardInfo, create_card, write_card
from gkd.report.comparison import as_dict
from gkd.report.markdown import escape_cell, fenced, markdown_table
from gkd.report.repo import Repo, is_repo_id
from gkd.training.card_settings import CORE, ELSEWHERE, FILLED_IN, settings_for_card

TOKEN = "hf_" + "aB3dE6gH9" * 4


def comparison() -> dict:
    def measures(name: str, perplexity: float) -> Measures:
        values = {
            "perplexity": mean_estimate([perplexity - 1, perplexity + 1]),
            "ended": mean_estimate([0.0, 1.0]),
            "length": Estimate(float("nan"), None, 2),
        }
        samples = (("Why | is `it`?\n```\n---", f"{name}: é 日本 <|im_end|> ````\n| not | a | table |"),)
        return Measures(name, values, samples, {"prompts": 2, "temperature": 0.9})

    return as_dict(measures("before", 9.0), measures("after", 7.0), measures("teacher", 5.0))


def full_info(**changes) -> CardInfo:
    values = {
        "model_name": "qwen2-0.5b-gkd",
        "student": Repo("Qwen/Qwen2-0.5B-Instruct", "c540970f9e29518b1d8f06ab8b24cba66ad77b6d"),
        "teacher": Repo("Qwen/Qwen2-1.5B-Instruct", "main"),
        "datasets": [Repo("trl-lib/chatbot_arena_completions")],
        "settings": {
            "lmbda": 0.5,
            "beta": 0.5,
            "temperature": 0.9,
            "seq_kd": False,
            "min_p": None,
            "divergence": "jsd",
        },
        "lora": {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
        "ledger": {
            "sequences": {"data": 10, "student": 22, "teacher": 0},
            "targets": {"data": 1000, "student": 23456, "teacher": 0},
        },
        "evaluation": comparison(),
        "plots": [("plots/loss.png", "Loss by source [nats]")],
        "hardware": "1 x Some GPU",
        "wall_time_s": 7384.0,
        "peak_memory_bytes": 3 * 2**30,
        "versions": {"torch": "2.13.0"},
        "command": ["gkd_qwen2.py", "--lmbda", "0.5", "--hub_token", TOKEN, "--output_dir", "a folder"],
        "steps": 1234,
        "num_processes": 2,
        "license": "apache-2.0",
        **changes,
    }
    return CardInfo(**values)


def parsed(info: CardInfo) -> ModelCard:
    card = ModelCard(create_card(info))
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()  # survives another round
    return card


# ----------------------------------------------------------------------------------------------------- metadata


def test_the_hubs_parser_reads_the_metadata_back():
    data = parsed(full_info()).data
    assert data.base_model == "Qwen/Qwen2-0.5B-Instruct"
    assert data.base_model_relation == "adapter"
    assert data.datasets == ["trl-lib/chatbot_arena_completions"]
    assert (data.library_name, data.license, data.pipeline_tag) == ("peft", "apache-2.0", "text-generation")
    assert {"gkd", "knowledge-distillation", "lora"} <= set(data.tags)
    assert data.model_name == "qwen2-0.5b-gkd"
    results = {result.metric_type: result for result in data.eval_results}
    assert set(results) == {"perplexity", "ended"}  # what came out as NaN is not published
    assert results["perplexity"].metric_value == 7.0
    assert results["perplexity"].dataset_type == "trl-lib/chatbot_arena_completions"
    assert results["ended"].task_type == "text-generation"


def test_a_full_fine_tune_is_a_finetune_of_its_base():
    data = parsed(full_info(lora=None)).data
    assert (data.library_name, data.base_model_relation) == ("transformers", "finetune")
    assert "lora" not in data.tags


def test_local_models_and_data_are_no_repositories(tmp_path, monkeypatch):
    (tmp_path / "student").mkdir()
    monkeypatch.chdir(tmp_path)
    info = full_info(
        student=Repo("student"), teacher=Repo("/home/someone/models/big-teacher"), datasets=[Repo("data/rows.jsonl")]
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").touch()
    text, data = create_card(info), parsed(info).data
    assert data.base_model is None
    assert "base_model_relation" not in data
    assert data.datasets is None
    assert "someone" not in text
    assert "huggingface.co/student" not in text
    assert "A LoRA adapter for student that was trained to match big-teacher" in text
    assert "rows.jsonl" in text
    assert data.eval_results[0].dataset_type == "local"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", True),
        ("Qwen/Qwen2-0.5B", True),
        ("a/b/c", False),
        ("/abs/path", False),
        ("./relative", False),
        ("~/home", False),
        ("C:\\models\\x", False),
        ("in memory", False),
        ("rows/gone.jsonl", False),
        ("", False),
        ("SmolLM2-113M (layers 12-17 removed)", False),
    ],
)
def test_what_can_be_a_repository(name, expected):
    assert is_repo_id(name) is expected


def test_a_repo_may_say_where_it_lives():
    assert Repo("gpt2", on_hub=False).hub_id is None
    assert Repo("/some/where/model/").display_name == "model"
    assert Repo("C:\\models\\x").display_name == "x"
    assert Repo("in memory").display_name == "in memory"


# --------------------------------------------------------------------------------------------------------- text


def test_everything_needed_to_reproduce_and_judge_is_there():
    text = create_card(full_info())
    facts = [
        "revision `c540970f9e29518b1d8f06ab8b24cba66ad77b6d`",
        "[Qwen/Qwen2-1.5B-Instruct](https://huggingface.co/Qwen/Qwen2-1.5B-Instruct) at revision `main`",
        "https://huggingface.co/datasets/trl-lib/chatbot_arena_completions",
        "| lmbda | 0.5 |",
        "| min_p | – |",
        "| seq_kd | False |",
        "| target_modules | ['q_proj', 'v_proj'] |",
        "| the student | 22 | 23,456 |",
        "| all | 32 | 24,456 |",
        "| Perplexity, held-out text ↓ | 9.000 ± 1.000 | 7.000 ± 1.000 | 5.000 ± 1.000 | yes |",
        "![Loss by source \\[nats\\]](plots/loss.png)",
        "| Hardware | 1 x Some GPU |",
        "| Wall time | 2 h 3 min |",
        "| Peak memory | 3.0 GiB |",
        "| Optimizer steps | 1,234 |",
        "| torch | 2.13.0 |",
        "\npython gkd_qwen2.py --lmbda 0.5 --hub_token REDACTED --output_dir 'a folder'",
        "arxiv.org/abs/2306.13649",
        "@inproceedings{agarwal2024onpolicy",
        "Measured with: prompts 2, temperature 0.9.",
    ]
    for fact in facts:
        assert fact in text, fact


def test_a_long_list_of_modules_is_summed_up():
    modules = [f"model.layers.{layer}.self_attn.{name}" for layer in range(6) for name in ("q_proj", "v_proj")]
    assert "| target_modules | q_proj, v_proj (12 in all) |" in create_card(
        full_info(lora={"target_modules": modules})
    )


def test_every_setting_that_differs_from_its_default_is_shown(tmp_path):
    args = GKDConfig(str(tmp_path / "out"), report_to="none")
    plain = settings_for_card(args)
    assert plain["beta"] == 0.5
    assert plain["num_train_epochs"] == 3.0
    assert set(plain) == {*CORE, "beta", "num_train_epochs"}
    for one in dataclasses.fields(args):
        changed = copy.copy(args)
        setattr(changed, one.name, 7 if getattr(args, one.name) != 7 else 8)
        if one.name == "divergence":
            changed.divergence = "reverse_kl"
        told = settings_for_card(changed) != plain
        machine = one.name in ELSEWHERE | FILLED_IN or one.name.startswith(("hub_", "trackio_"))
        assert told != (machine or one.name.endswith(("_url", "_dir", "_proxy"))), one.name


def test_settings_say_what_happened_and_nothing_of_this_machine(tmp_path):
    args = GKDConfig(
        str(tmp_path),
        divergence="alpha_beta",
        loss_temperature=5.0,
        scale_by_temperature_squared=True,
        max_steps=7,
        seed=5,
        optim="adafactor",
        model_init_kwargs={"dtype": "float32", "revision": None},
        teacher_model_init_kwargs={"dtype": "bfloat16"},
        chat_template_path=str(tmp_path / "mine.jinja"),
        report_to="none",
    )
    shown = settings_for_card(args)
    assert (shown["ab_alpha"], shown["ab_beta"], shown["scale_by_temperature_squared"]) == (0.5, 0.5, True)
    assert (shown["max_steps"], shown["optim"], shown["seed"]) == (7, "adafactor", 5)
    assert not {"num_train_epochs", "data_seed", "beta", "output_dir"} & set(shown)
    assert shown["model_init_kwargs"] == {"dtype": "float32"}
    assert shown["chat_template_path"] == "mine.jinja"
    assert str(tmp_path) not in json.dumps(shown)


def test_an_adapters_local_base_model_is_a_condition_of_its_use(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    text = create_card(full_info(student=Repo("models/base")))
    assert "needs its base model, `base`, which was a local one" in text
    for changes in ({}, {"student": Repo("models/base"), "lora": None}):
        assert "needs its base model" not in create_card(full_info(**changes))


def test_a_checkpoint_with_nothing_evaluated_has_a_card():
    text = create_card(CardInfo("run", Repo("gpt2"), Repo("gpt2-xl")))
    data = ModelCard(text).data
    assert data.base_model == "gpt2"
    assert data.eval_results is None
    for heading in ("## Results", "## Samples", "## Plots", "## Reproduce"):
        assert heading not in text
    assert "None" not in text


def test_tricky_values_stay_where_they_belong():
    text = create_card(
        full_info(
            model_name="modèle | 日本",
            settings={"prompt": "a | b\nc", "nothing": None, "html": "<script>x</script>", "stars": "*`*"},
            command=["x.py", "--text", "it's ``` \n | odd"],
            language=["fr", "ja"],
        )
    )
    data = ModelCard(text).data
    assert data.model_name == "modèle | 日本"
    assert data.language == ["fr", "ja"]
    assert "<script>" not in text
    tables = [line for line in text.split("\n") if line.startswith("| ") and "not | a | table" not in line]
    widths = {line.count("|") for line in tables}
    assert widths <= {3, 4, 6}, "a cell broke out of its table"
    assert "| prompt | a &#124; b<br>c |" in text


def test_sample_texts_cannot_leave_their_code_blocks():
    """Walk the fences as CommonMark does: a block ends at a fence at least as long as the one that opened it."""
    open_fence, headings = None, []
    for line in create_card(full_info()).split("\n"):
        fence = re.match(r"^(`{3,})(\w*)\s*$", line)
        if open_fence is None and fence:
            open_fence = fence.group(1)
        elif open_fence is not None and fence and not fence.group(2) and len(fence.group(1)) >= len(open_fence):
            open_fence = None
        elif open_fence is None and line.startswith("## "):
            headings.append(line[3:])
    assert open_fence is None
    assert headings == [
        "Quick start",
        "Results",
        "Samples",
        "How it was trained",
        "Plots",
        "Reproduce",
        "Citation",
    ]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("lora", [None, {"r": 8}])
def test_the_quick_start_is_python(lora, chat):
    text = create_card(full_info(lora=lora, chat=chat, hub_model_id='me/"quoted"'))
    assert ("apply_chat_template" in text) == chat
    source = text.split("```python\n")[1].split("```")[0]
    compile(source, "quick start", "exec")
    assert ("AutoPeftModelForCausalLM" in source) == (lora is not None)


def test_the_card_is_written_as_utf8(tmp_path):
    path = write_card(full_info(model_name="naïve"), tmp_path / "out")
    assert path == tmp_path / "out" / "README.md"
    assert ModelCard.load(path).data.model_name == "naïve"
    assert b"\r" not in path.read_bytes()


def test_markdown_parts():
    assert escape_cell(None) == "–"
    assert escape_cell("a\\|b") == "a\\&#124;b"
    assert fenced("```") == "````text\n```\n````"
    assert markdown_table(("a", "b"), [(1, None)], "lr") == "| a | b |\n| --- | ---: |\n| 1 | – |"
    assert shorten("abcdef", 4) == "abc…"
    assert shorten("abcd", 4) == "abcd"
    assert [duration(seconds) for seconds in (6.74, 245, 7384, 59.96)] == [
        "6.7 s",
        "4 min 5 s",
        "2 h 3 min",
        "1 min 0 s",
    ]


# ------------------------------------------------------------------------------------------------------ secrets


@pytest.mark.parametrize(
    "name",
    [
        *("hub_token", "--hub_token", "push_to_hub_token", "HF_TOKEN", "token", "WANDB_API_KEY", "api-key"),
        *("db.password", "AWS_SECRET_ACCESS_KEY", "client_secret", "--credentials"),
    ],
)
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["max_new_tokens", "eos_token", "pad_token", "tokenizer_name", "monkey", "secretary"])
def test_names_that_only_sound_like_it(name):
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("command", "hidden"),
    [
        (["x.py", "--hub_token", "abcdef123456"], "abcdef123456"),
        (["x.py", "--hub_token=abcdef123456"], "abcdef123456"),
        (["env", "WANDB_API_KEY=0123456789abcdef", "x.py"], "0123456789abcdef"),
        (["x.py", "--run_name", TOKEN], TOKEN),
        (["x.py", "--teacher_model_init_kwargs", '{"token": "plain words here", "dtype": "auto"}'], "plain words"),
        (["x.py", "--model_init_kwargs", "{'api_key':'k-1'}"], "k-1"),
        (["x.py", "--vllm_server", "https://me:s3cr3t@host/v1"], "s3cr3t"),
        (["x.py", "--header", "Authorization: Bearer abcdefghijklmnop1234"], "abcdefghijklmnop1234"),
    ],
)
def test_a_secret_in_the_command_is_never_written(command, hidden):
    line = redact_command(command)
    assert hidden not in line
    assert REDACTED in line
    text = create_card(full_info(command=command, settings={"config": {"hub_token": hidden}, "hub_token": hidden}))
    assert hidden not in text


def test_a_command_without_secrets_is_exact():
    command = [
        "x.py",
        "--text",
        "two words",
        "--max_new_tokens",
        "128",
        "--eos_token",
        "<|im_end|>",
        "--learning_rate=1e-5",
    ]
    assert shlex.split(redact_command(command)) == command
    assert redact_command(["x.py", "--hub_token", "--bf16"]) == "x.py --hub_token --bf16"


def test_settings_keep_their_values_but_for_secrets():
    settings = {
        "hub_token": None,
        "token": "t",
        "nested": {"password": "p", "r": 8},
        "lr": 1e-5,
        "url": "http://a:b@c",
    }
    shown = redact_settings(settings)
    assert shown == {
        "hub_token": None,
        "token": REDACTED,
        "nested": {"password": REDACTED, "r": 8},
        "lr": 1e-5,
        "url": f"http://{REDACTED}@c",
    }
    assert redact_value("a basic understanding of hf_transfer") == "a basic understanding of hf_transfer"


# -------------------------------------------------------------------------------------------------- environment


def test_versions_and_hardware_are_those_of_this_process():
    versions = installed_versions()
    assert versions["python"] == sys.version.split()[0]
    assert versions["transformers"] == __import__("transformers").__version__
    assert installed_versions(["no-such-package"]).keys() == {"python", "gkd"}
    assert "CPU cores" in describe_hardware()


def test_the_card_needs_neither_torch_nor_the_trainer():
    code = "import sys, gkd.report.card; assert not {'torch', 'transformers', 'trl'} & set(sys.modules), 'too much'"
    subprocess.run([sys.executable, "-c", code], check=True)
