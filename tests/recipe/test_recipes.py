"""Every recipe of recipes/ runs: two steps with tiny models and a few rows in the columns of its own data set."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
from other_tokens import other_model, other_tokenizer
from tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"

ALPACA = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Translate into French.", "input": "The red apple", "output": "La pomme rouge"},
    {"instruction": "Add the numbers.", "input": "3, 4", "output": "The sum is 7."},
]
CONVERSATIONS = [
    {
        "conversations": [
            {"role": "user", "content": f"Count to {n}."},
            {"role": "assistant", "content": " ".join(map(str, range(1, n + 1)))},
            {"role": "user", "content": "Thanks."},
            {"role": "assistant", "content": "You are welcome."},
        ]
    }
    for n in (2, 3, 4)
]
GUANACO = [
    {"text": "### Human: What is a monopsony?### Assistant: One buyer, many.### Human: Why?### Assistant: So."},
    {"text": "### Human: ¿Qué hora es?### Assistant: Son las tres."},
    {"text": "### Human: Write a haiku.### Assistant: Rain on the tin roof"},
]
GSM8K = [
    {
        "question": "Natalia sold 48 clips in April, and half as many in May. How many altogether?",
        "answer": "In May she sold 48/2 = <<48/2=24>>24 clips.\nAltogether 48+24 = <<48+24=72>>72 clips.\n#### 72",
    },
    {
        "question": "A bat costs $1,200 and a ball $34. What do both cost?",
        "answer": "1,200+34=<<1200+34=1234>>1,234\n#### 1,234",
    },
]
XSUM = [
    {
        "document": "The bridge over the river was closed on Monday. Repairs last a week.",
        "summary": "A bridge shut.",
    },
    {"document": "Three people were hurt when a lorry hit a bus in Leeds.", "summary": "A crash in Leeds hurt three."},
]
WMT14 = [
    {"translation": {"de": "Wiederaufnahme der Sitzungsperiode", "en": "Resumption of the session"}},
    {"translation": {"de": "Das Parlament erhebt sich.", "en": "The House rose."}},
]
ARENA = [
    {"prompt": [{"role": "user", "content": "Hi!"}], "completion": [{"role": "assistant", "content": "Hello."}]},
    {"prompt": [{"role": "user", "content": "2 + 2?"}], "completion": [{"role": "assistant", "content": "4"}]},
]
DATA = {
    "gkd_qwen2": ARENA,
    "kd_qwen2_5": ALPACA,
    "kd_minimind": CONVERSATIONS,
    "kd_qwen3": GUANACO,
    "gkd_gsm8k": GSM8K,
    "gkd_xsum": XSUM,
    "gkd_wmt14": WMT14,
    "gkd_glass": None,  # these take their rows from packages
    "gkd_draft": None,
    "gkd_smollm2": None,
    "kd_recover_pruned": None,
    "kd_recover_4bit": None,
    "gkd_context": None,
    "gkd_other_tokenizer": None,
    "gkd_two_teachers": None,
}
SCORED = {"gkd_gsm8k", "gkd_xsum", "gkd_wmt14", "gkd_context", "gkd_two_teachers"}
ALL_WEIGHTS = {"kd_minimind", "kd_qwen2_5", "kd_qwen3", "gkd_two_teachers", "gkd_other_tokenizer"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    other_model().save_pretrained(path / "other")
    other_tokenizer().save_pretrained(path / "other")
    own = save_tiny(path / "student", seed=1), save_tiny(path / "teacher", seed=2, hidden=48, layers=3)
    return *own, str(path / "other")


def run_recipe(name, models, folder, monkeypatch, rows=(), **changes):
    """Execute the file as the user's `python recipes/NAME.py --flags` does; returns the output folder."""
    values = {
        "model_name_or_path": models[0],
        "teacher_model_name_or_path": models[1],
        "output_dir": folder / "out",
        "max_steps": 2,
        "max_new_tokens": 5,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "dataloader_num_workers": 0,
        "num_eval_prompts": 2,
        "logging_steps": 1,
        "warmup_steps": 0,
        **changes,
    }
    if rows:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        values["dataset_name"] = folder / "rows.jsonl"
    argv = [part for key, value in values.items() if value is not None for part in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", [f"recipes/{name}.py", *argv])
    runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    return folder / "out"


def teachers_of(name, models):
    """What the flags say of recipes that say themselves who teaches."""
    if name == "gkd_context":
        return {"teacher_model_name_or_path": None}
    if name == "gkd_two_teachers":
        two = {"numbers": {"model": models[1]}, "words": {"model": models[0]}}
        return {"teacher_model_name_or_path": None, "teachers": json.dumps(two)}
    if name == "gkd_other_tokenizer":
        return {"teacher_model_name_or_path": models[2], "teacher_end_of_turn": "<|im_end|>=</s>"}
    return {}


def history(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_every_recipe_is_tested_and_listed():
    names = {path.stem for path in RECIPES.glob("*.py")}
    assert names == set(DATA)
    page = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert not [name for name in names if f"`{name}.py`" not in page]


@pytest.mark.parametrize("name", sorted(DATA))
def test_recipe_runs_two_steps(name, models, tmp_path, monkeypatch):
    monkeypatch.setattr("gkd.demo.texts.translation_sentences", lambda: ["one two three four five six seven"] * 270)
    monkeypatch.setattr("gkd.demo.texts.healthsearchqa_prompts", lambda: [f"Is {n} healthy?" for n in range(80)])
    monkeypatch.setattr("gkd.demo.texts.openwebtext_excerpts", lambda: ["Rain falls on the roof."] * 3)
    rows = (DATA[name] or []) * 4
    out = run_recipe(name, models, tmp_path, monkeypatch, rows, **teachers_of(name, models))

    losses = [entry["loss"] for entry in history(out) if "loss" in entry]
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    adapter = (out / "adapter_model.safetensors").is_file()
    assert adapter != (out / "model.safetensors").is_file()
    assert adapter == (name not in ALL_WEIGHTS)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "2306.13649" in card
    assert (out / "plots").is_dir()
    measured = {row["key"]: row for row in json.loads((out / "evaluation.json").read_text())["rows"]}
    assert {"divergence_own", "ended"} <= measured.keys()
    assert ({"acceptance", "acceptance_greedy", "speedup", "draft_cost"} <= measured.keys()) == (name == "gkd_draft")
    assert ("score_greedy" in measured) == (name in SCORED)
    assert ("corpus_score_sampled" in measured) == (name == "gkd_wmt14")
    if name in ("kd_qwen3", "kd_minimind", "gkd_glass"):
        assert all(measured["perplexity"][place]["value"] > 1 for place in ("before", "after", "teacher"))


def test_kd_qwen2_5_with_every_divergence_and_logs_to_tensorboard(models, tmp_path, monkeypatch):
    seen = []
    for divergence in ("reverse_kl", "skew_forward_kl", "skew_reverse_kl"):
        folder = tmp_path / divergence
        folder.mkdir()
        options = {"divergence": divergence, "ce_weight": 0.0, "evaluate_before_and_after": "false", "max_steps": 1}
        out = run_recipe("kd_qwen2_5", models, folder, monkeypatch, ALPACA, **options)
        seen.append(next(entry["loss"] for entry in history(out)))
        assert list(out.rglob("events.out.tfevents*"))
    assert len(set(seen)) == 3


def test_kd_qwen3_trains_on_the_first_answer_only():
    split_text = functions("kd_qwen3")["split_text"]
    assert split_text(GUANACO[0]) == {
        "prompt": "### Human: What is a monopsony?\n### Assistant:",
        "completion": " One buyer, many.",
    }
    assert split_text({"text": "### Human: No answer"})["completion"] == ""


def test_held_out_rows_are_the_same_every_time_and_only_taken_where_needed():
    from datasets import Dataset

    from gkd.data.held_out import with_held_out

    rows = Dataset.from_dict({"n": list(range(100))})
    data = with_held_out({"train": rows, "eval": None}, 64)
    assert len(data["eval"]) == 10  # a tenth at most
    assert sorted(data["train"]["n"]) + sorted(data["eval"]["n"]) != list(range(100))  # not simply the last ones
    assert sorted([*data["train"]["n"], *data["eval"]["n"]]) == list(range(100))
    assert with_held_out({"train": rows}, 64)["eval"]["n"] == data["eval"]["n"]
    assert len(with_held_out({"train": rows}, 3)["eval"]) == 3
    given = {"train": rows, "eval": rows}
    assert with_held_out(given) is given
    with pytest.raises(ValueError, match="one row"):
        with_held_out({"train": rows.select([0])})


# ------------------------------------------------------------------------------------------------------- minimind


def test_kd_minimind_with_experts_and_a_cosine_to_a_tenth(tmp_path, monkeypatch):
    """The makers themselves, with fewer steps; the router's auxiliary loss is in the log."""
    from gkd.demo import minimind as maker

    monkeypatch.setenv("GKD_CACHE", str(tmp_path))
    monkeypatch.setattr(maker, "ROWS_OF_THE_MODELS", 64)
    monkeypatch.setattr(maker, "TEACHER", maker.Shape(hidden=32, layers=2, steps=6))
    monkeypatch.setattr(maker, "STUDENT_MOE", maker.Shape(hidden=32, layers=1, steps=3, experts=4))
    models = (maker.minimind_student_moe(), maker.minimind_teacher())
    out = run_recipe("kd_minimind", models, tmp_path, monkeypatch, dataset_name=maker.minimind_rows(), max_steps=3)
    log = [entry for entry in history(out) if "loss" in entry]
    assert all(entry["aux_loss"] > 0 for entry in log)
    rates = [entry["learning_rate"] for entry in log]
    assert rates == pytest.approx([5e-4 * (0.1 + 0.9 * (1 + math.cos(math.pi * n / 3)) / 2) for n in range(3)])


def test_gkd_two_teachers_makes_both_and_asks_each(tmp_path, monkeypatch):
    """With fewer steps; the function that makes them is the field's value where no flag gives it."""
    from gkd.demo import minimind as maker

    monkeypatch.setenv("GKD_CACHE", str(tmp_path))
    monkeypatch.setattr(maker, "ROWS_OF_THE_MODELS", 64)
    shapes = {name: maker.Shape(hidden=32, layers=1, steps=3, kinds=name) for name in maker.SPECIALISTS}
    monkeypatch.setattr(maker, "SPECIALISTS", shapes)
    monkeypatch.setattr(maker, "TEACHER", maker.Shape(hidden=32, layers=1, steps=2))
    changes = {"teacher_model_name_or_path": None, "per_device_train_batch_size": 16, "num_eval_prompts": 24}
    out = run_recipe("gkd_two_teachers", (maker.minimind_teacher(), None), tmp_path, monkeypatch, **changes)
    first = next(entry for entry in history(out) if "loss" in entry)
    assert all(first[f"teacher/{name}/divergence"] > 0 for name in ("numbers", "words"))
    measured = {row["key"] for row in json.loads((out / "evaluation.json").read_text())["rows"]}
    assert {"divergence_own_numbers", "divergence_own_words"} <= measured
    rows = maker.minimind_questions()
    assert len({row["prompt"][0]["content"] for row in rows}) == len(rows) > 300
    asked = {name: " ".join(row["completion"] for row in rows if row["teacher"] == name) for name in shapes}
    assert not any(letter.isalpha() for letter in asked["numbers"])
    assert not any(letter.isdigit() for letter in asked["words"])


def test_the_models_of_kd_minimind_learn_and_share_a_vocabulary(tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gkd.demo import minimind as maker

    monkeypatch.setenv("GKD_CACHE", str(tmp_path))
    shapes = {"few": maker.Shape(32, 1, 2), "many": maker.Shape(32, 1, 60)}
    text = "<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n<|im_start|>assistant\n3 + 4 = 7.<|im_end|>"
    losses, vocabularies = {}, []
    before = torch.get_rng_state()
    for name, shape in shapes.items():
        folder = maker._model(name, shape)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        losses[name] = float(model(input_ids=ids, labels=ids).loss)
        vocabularies.append(tokenizer.get_vocab())
    assert torch.equal(before, torch.get_rng_state())
    assert losses["many"] < losses["few"] - 0.5
    assert vocabularies[0] == vocabularies[1]


# --------------------------------------------------------------------------------------------------------- scores


def functions(name):
    return runpy.run_path(str(RECIPES / f"{name}.py"), run_name="recipe")


@pytest.mark.parametrize(
    ("completion", "points"),
    [
        ("She sold 24, so #### 72", 1),
        ("#### 1\nno, #### 72.0", 1),
        ("72", 1),
        ("The answer is $72.", 1),
        ("#### 72 clips and 3 more? 71", 0),
        ("#### -72", 0),
        ("seventy-two", 0),
        ("", 0),
    ],
)
def test_gsm8k_score(completion, points):
    assert functions("gkd_gsm8k")["score"](completion, GSM8K[0]) == points


@pytest.mark.parametrize(
    ("completion", "points"),
    [
        ("Il est à l'école, et elle est à la maison.", 100),
        ("He is at school, and she is at home.", 0),
        ("LA VILLE EST LA", 100),
        ("the la", 0),
        ("Leslie dances", 0),
        ("", 0),
    ],
)
def test_context_score_is_of_words_that_are_whole(completion, points):
    assert functions("gkd_context")["score"](completion, {}) == points


def test_gsm8k_reads_thousands_and_drops_the_calculator():
    recipe = functions("gkd_gsm8k")
    assert recipe["score"]("It is 1234", GSM8K[1]) == 1
    assert "<<" not in recipe["as_chat"](GSM8K[0])["completion"]
    assert recipe["as_chat"](GSM8K[0])["completion"].endswith("#### 72")


def test_rouge_2_and_bleu_against_values_by_hand():
    rouge = functions("gkd_xsum")["score"]
    row = {"summary": "a bridge is shut"}  # 3 bigrams; the completion has 4, of which 2 are common
    assert rouge("the bridge is shut now", row) == pytest.approx(100 * 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    bleu = functions("gkd_wmt14")["score"]
    assert bleu(" Das Parlament erhebt sich. ", WMT14[1]) == pytest.approx(100)
    assert 0 < bleu("Das Parlament erhebt sich nicht.", WMT14[1]) < 100
    assert bleu("", WMT14[1]) == 0


def test_corpus_bleu_sums_the_counts_of_all_sentences():
    """By hand (Papineni et al. 2002): clipped n-grams over all sentences, brevity by the corpus's lengths."""
    corpus = functions("gkd_wmt14")["corpus_score"]
    rows = [{"translation": {"de": "a b c d e f"}}, {"translation": {"de": "g h i j"}}]
    # 10 words, of which 9 match; 2-grams 7 of 8, 3-grams 5 of 6, 4-grams 3 of 4; as long as the reference
    expected = 100 * (9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25
    assert corpus(["a b c d e x", " g h i j "], rows) == pytest.approx(expected)
    mean = functions("gkd_wmt14")["score"]
    assert abs(sum(mean(t, r) for t, r in zip(["a b c d e x", "g h i j"], rows, strict=True)) / 2 - expected) > 1
    measured = corpus(["", ""], rows)
    assert measured == 0
