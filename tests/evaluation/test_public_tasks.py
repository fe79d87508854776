"""lm-eval's tasks beside the harness: the real package on a task of its own, without a network; and its absence."""

import json

import pytest
import torch
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer

from gkd.cli import main
from gkd.evaluation.measures import Measures
from gkd.evaluation.public_tasks import PublicTasks
from gkd.report.comparison import as_dict

ITEMS = [
    {"question": "one", "choices": ["red", "blue"], "answer": 0},
    {"question": "two", "choices": ["a river", "the sea"], "answer": 1},
    {"question": "three", "choices": ["yes", "no"], "answer": 0},
    {"question": "four", "choices": ["7", "340"], "answer": 1},
    {"question": "five", "choices": ["sings", "under"], "answer": 1},
]
TASK = """
task: gkd_tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}} A:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
RECIPE = """
from gkd.run import dataset_by_name, run

run(dataset_by_name, defaults={"max_new_tokens": 4, "lmbda": 1.0, "report_to": "none"})
"""


def test_without_lm_eval_the_command_to_install_it_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gkd.evaluation.public_tasks.find_spec", lambda name: None)
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(recipe), "--lm_eval_tasks", "hellaswag,arc_easy"])
    assert stopped.value.code == 2
    assert "pip install lm-eval" in capsys.readouterr().err


def test_no_tasks_without_an_evaluation(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gkd.evaluation.public_tasks.find_spec", lambda name: object())
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    with pytest.raises(SystemExit):
        main(["run", str(recipe), "--lm_eval_tasks=a", "--evaluate_before_and_after=false", "--model_name_or_path=x"])
    assert "no effect" in capsys.readouterr().err


@pytest.fixture
def task(tmp_path):
    pytest.importorskip("lm_eval", reason="pip install lm-eval")
    rows = tmp_path / "items.jsonl"
    rows.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (tmp_path / "choice.yaml").write_text(TASK.format(rows=rows))
    return tmp_path / "choice.yaml"


def accuracy(model):
    """Share of items whose right choice has the largest log-probability, from the model's own logits."""
    tokenizer, right = tiny_tokenizer(), []
    for item in ITEMS:
        context = tokenizer(f"Q: {item['question']} A:")["input_ids"]
        scores = []
        for choice in item["choices"]:
            ids = context + tokenizer(f" {choice}")["input_ids"]
            with torch.no_grad():
                log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(log_p[t - 1, ids[t]]) for t in range(len(context), len(ids))))
        right.append(float(scores.index(max(scores)) == item["answer"]))
    return right


def test_a_task_gives_what_the_models_logits_say(task):
    tasks = PublicTasks(str(task), batch_size=3)
    measured = {}
    for seed in (1, 2):
        values, metrics = tasks.measure(tiny_model(seed=seed), tiny_tokenizer())
        ((key, estimate),) = values.items()
        right = accuracy(tiny_model(seed=seed))
        assert key == "lm_eval/gkd_tiny_choice/acc"
        assert estimate.value == pytest.approx(sum(right) / len(right))
        assert len(estimate.residuals) == len(ITEMS)  # item by item, for paired errors
        assert metrics[key].goal == "higher"
        measured[seed] = Measures(str(seed), values, extra=metrics)
    (row,) = as_dict(measured[1], measured[2])["rows"]
    assert row["label"] == "gkd_tiny_choice, acc"
    few, _ = PublicTasks(str(task), limit=2).measure(tiny_model(seed=1), tiny_tokenizer())
    assert few["lm_eval/gkd_tiny_choice/acc"].count == 2


def test_an_unknown_task_is_named(task):
    with pytest.raises(ValueError, match="no task 'not_a_task_at_all'"):
        PublicTasks("not_a_task_at_all")
    with pytest.raises(ValueError, match="no file"):
        PublicTasks(str(task.parent / "none.yaml"))


def test_gkd_evaluate_with_a_task(task, tmp_path, capsys):
    save_tiny(tmp_path / "student", seed=1)
    save_tiny(tmp_path / "teacher", seed=2)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(8)))
    (tmp_path / "recipe.py").write_text(RECIPE)
    argv = ["evaluate", str(tmp_path / "recipe.py"), "--json", "--lm_eval_tasks", str(task), "--num_eval_prompts", "2"]
    argv += ["--model_name_or_path", str(tmp_path / "student"), "--dataset_name", str(tmp_path / "rows.jsonl")]
    argv += ["--teacher_model_name_or_path", str(tmp_path / "teacher")]
    assert main(argv) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    for name, seed in (("student", 1), ("teacher", 2)):
        right = accuracy(tiny_model(seed=seed))
        assert models[name]["lm_eval/gkd_tiny_choice/acc"]["value"] == pytest.approx(sum(right) / len(right))
