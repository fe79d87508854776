"""No block of the documents is unchecked: each command is parsed by what it calls, each example runs.


tests/house/test_docs.py holds README's tables, links and files; tests/house/test_coming_from_trl.py the page about
TRL; `python -m doctest docs/losses.md` runs in tests/loss/test_divergences.py.
"""

import dataclasses
import json
import re
import runpy
import shlex
from pathlib import Path

import matplotlib.image
import nbformat
import pytest
import yaml
from datasets import Dataset
from nbclient import NotebookClient
from peft import LoraConfig
from tiny import save_tiny, tiny_rows
from training import trainer_of
from transformers import pipeline
from trl import ModelConfig, ScriptArguments

from gkd.cli import main
from gkd.commands.flags import make_parser
from gkd.config.fields import GKDConfig
from gkd.data.formats import canonical_row
from gkd.data.row_values import RowPlace
from gkd.data.teacher_rows import COLUMNS
from gkd.demo.models import GLASS, GLASS_KEPT, cached_folder
from gkd.evaluation.measures import METRICS
from gkd.loss import DIVERGENCES
from gkd.recipe.capture import execute_recipe
from gkd.recipe.settings import RunArguments, parse
from gkd.recipe.shipped import built_in

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(DOCS.rglob("*.md")),
    ROOT / "recipes" / "README.md",
    *sorted((ROOT / "studies").rglob("*.md")),
]
SHELL = ("bash", "sh")
FIELDS = {
    field.name
    for kind in (GKDConfig, ModelConfig, ScriptArguments, RunArguments)
    for field in dataclasses.fields(kind)
}
THEIR_OWN = ("mine", "my", "my_recipe")  # files that the reader has written
UNCHECKED = (
    "chat_template_path",
    "rollout_backend",
    "rollout_server",
    "rollout_staleness",
    "share_base_model",
    "generation_kwargs",
    "lm_eval_tasks",
    "lm_eval_limit",
)  # need others, or a package
PROGRAMS = {"gkd", "make", "python", "pip", "hf"}
# python blocks that a test of their own runs, by a line in them
RUN_ELSEWHERE = {
    "trainer.train()": "test_docs.py",
    "LogCompletionsCallback": "test_completions.py",
    "def load_data(settings": "test_docs.py for the README, test_the_recipe_of_the_recipes_page_runs",
    "AutoPeftModelForCausalLM": "test_the_adapter_is_used_as_getting_started_shows",
}


def blocks(page):
    """(language, text) of every fenced block; indented ones are shell."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^    \S.*\n|^     .*\n|^\n(?=    ))+", rest, flags=re.MULTILINE)
    return [*fenced, *(("bash", block) for block in indented if block.strip())]


def shell_lines(page):
    found = []
    for language, block in blocks(page):
        if language in SHELL:
            joined = block.replace("\\\n", " ")
            found += [
                line.strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")
            ]
    return found


def ids(pages):
    return [str(page.relative_to(ROOT)) for page in pages]


# --------------------------------------------------------------------------------------------------- every block


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_block_is_of_a_kind_that_is_checked(page):
    kinds = {language for language, _ in blocks(page)}
    output = {"text"}  # what a command printed
    if page.name == "README.md" and page.parent == ROOT:
        output.add("")  # the file tree
    assert kinds <= {*SHELL, "python", "yaml", "json", *output}


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_shell_line_is_a_command_that_exists(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in shell_lines(page):
        for inner in re.findall(r"\$\(([^)]*)\)", line):
            check_command(shlex.split(inner), line)
        check_command(shlex.split(re.sub(r"\$\([^)]*\)", "it", line), comments=True), line)


def check_command(words, line):
    while words and re.fullmatch(r"[A-Za-z_]+=.*", words[0]):  # NAME=value in front, or an assignment
        words = words[1:]
    if not words:
        return None
    program, *rest = words
    program = program.removeprefix("vllm-env/bin/")  # of the environment that docs/rollouts.md makes
    if program == "gkd":
        return check_gkd(rest, line)
    if program == "make":
        targets = [word for word in rest if "=" not in word]
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), line
    if program in ("python", "accelerate"):
        check_recipe(rest, line)
    if program == "python":
        target = next(word for word in rest if word != "-m")
        exists = target in ("doctest", "venv") or (ROOT / target).is_file()
        assert exists or (ROOT / (target.replace(".", "/") + ".py")).is_file(), line
        return None
    assert program in ("make", "accelerate", "pip", "git", "cd", "cp", "vllm", "source", "export"), line
    return None


def check_recipe(words, line):
    """Files that are named are there, and a recipe takes the flags behind it."""
    files = [word for word in words if word.endswith((".py", ".yaml")) and "/" in word]
    assert all((ROOT / file).is_file() for file in files if Path(file).stem not in THEIR_OWN), line
    recipe = next((i for i, word in enumerate(words) if word.startswith("recipes/")), None)
    if recipe is not None and "--help" not in words:
        parse({}, without_config(words[recipe + 1 :]))


def without_config(flags):
    """The flags without `--config` and its file, which is the reader's."""
    at = flags.index("--config") if "--config" in flags else len(flags)
    return flags[:at] + flags[at + 2 :]


def check_gkd(words, line):
    """The arguments go through the real parser, and a recipe's flags through the recipe's."""
    arguments, flags = make_parser().parse_known_args(words)
    flags = [*flags, *getattr(arguments, "flags", [])]
    recipe = getattr(arguments, "recipe", None)
    if recipe is None:
        assert not flags, line
        return
    assert recipe.is_file() or str(recipe) in built_in() or recipe.stem in THEIR_OWN, (
        line
    )  # those that `gkd new` writes on the page
    flags = without_config(flags)
    parse({}, [*flags, "--seq_kd", "true"] if arguments.command == "precompute" else flags)


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_yaml_and_json_blocks_are_settings_and_rows(page, tmp_path):
    for language, block in blocks(page):
        if language == "yaml":
            file = tmp_path / "my.yaml"
            file.write_text(block)
            values = yaml.safe_load(block)
            settings = parse({}, ["--output_dir", "out", "--config", str(file)])
            parsed = {**vars(settings.script), **vars(settings.training), **vars(settings.model)}
            for name, value in values.items():
                assert parsed[name] == (float(value) if isinstance(parsed[name], float) else value), name
        if language == "json":
            for number, line in enumerate(block.splitlines()):
                canonical_row(json.loads(line), RowPlace(page.name, number), has_chat_template=True)


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for language, block in blocks(page):
        if language == "python" and not block.startswith(">>>") and not any(line in block for line in RUN_ELSEWHERE):
            exec(compile(block, page.name, "exec"), {})


# --------------------------------------------------------------------------------------------------- every name


@pytest.mark.parametrize("name", ["faq", "recipes", "getting_started", "teacher_sequences"])
def test_settings_in_the_text_are_fields_with_values_that_they_take(name, tmp_path):
    """`field=value` in running text is parsed as the flag that it is."""
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    found = re.findall(r"`(?:--)?(\w+)[= ]([^`\s]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    checked = 0
    for field, value in found:
        if field in FIELDS and field not in UNCHECKED:
            needs = ["--seq_kd", "true"] if field in ("seq_kd_loss", "teacher_temperature") else []
            parse({}, ["--output_dir", str(tmp_path), f"--{field}", value.strip("\"'"), *needs])
            checked += 1
        else:
            assert field in FIELDS | PROGRAMS or field.startswith("precompute_"), field
    assert checked or name == "getting_started"


def test_the_faq_names_fields_and_metrics_that_exist():
    text = (DOCS / "faq.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`(\w+_\w+)`", text)) - FIELDS - set(DIVERGENCES) - {"eval_loss", "merge_and_unload"}
    files = {path.stem for folder in ("docs", "recipes", "deepspeed_configs") for path in (ROOT / folder).iterdir()}
    assert names - files - {"nonfinite_steps", "chat_template_kwargs", *COLUMNS} == set()
    metrics = set(re.findall(r"`((?:loss|rollout|student|teacher|time)/\w+(?:/\w+)?)`", text))
    assert metrics - {f"{name}{s}" for name in documented() for s in ("", "/data", "/student", "/teacher")} == set()


def documented(heading="In every log of the training"):
    """Names in a table of docs/metrics.md, `…` cut off."""
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    lines = [
        line for line in text.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines() if line.startswith("| `")
    ]
    return {name.removesuffix("/…") for line in lines for name in re.findall(r"`([^`]+)`", line.split(" | ")[0])}


def test_every_measure_of_the_table_is_documented():
    assert set(METRICS) <= documented("Before and after training")


def test_every_logged_metric_is_documented_and_the_other_way_round(tmp_path):
    rows = Dataset.from_list(tiny_rows(12))
    common = {"per_device_train_batch_size": 6, "max_steps": 2, "eval_dataset": rows, "eval_strategy": "steps"}
    common |= {"eval_steps": 2, "ce_weight": 0.5, "max_grad_norm": 1.0}
    logged = set()
    for values in ({"lmbda": 0.5}, {"lmbda": 0.5, "seq_kd": True}):
        trainer = trainer_of(tmp_path, rows, **common, **values)
        trainer.record.nonfinite_steps = 1
        trainer.train()
        logged |= {name for entry in trainer.state.log_history for name in entry}
    named = documented()
    plain = {name if name in named else re.sub(r"/(data|student|teacher)$", "", name) for name in logged}
    missing = {name for name in plain if name not in named and not name.startswith(("eval_", "train_"))}
    assert missing == set()
    evaluated = {name.removeprefix("eval_") for name in plain if name.startswith("eval_")}
    assert evaluated - named <= {"runtime", "samples_per_second", "steps_per_second", "bits_per_byte"}
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "gkd" / "training").glob("*.py"))
    elsewhere = {name for name in named - plain if "<" in name or f'"{name}"' in source}  # several teachers, a server
    assert named - plain - elsewhere == set()


def anchors(page):
    """The anchors that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_into_pages_meet_a_heading(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        there = (page.parent / target).resolve() if target else page
        assert anchor in anchors(there), f"{page.name} links to {target}#{anchor}"


def test_every_page_is_named_in_the_readme_and_every_recipe_in_its_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.iterdir() if page.is_file() and f"(docs/{page.name})" not in readme] == []
    table = (DOCS / "recipes.md").read_text(encoding="utf-8")
    assert [recipe.name for recipe in (ROOT / "recipes").glob("*.py") if f"| `{recipe.name}` |" not in table] == []


# ------------------------------------------------------------------------------------------- the longer examples


LOOK = """
import json
print(json.dumps({
    "step": trainer.state.global_step,
    "sources": list(sources),
    "before": [row[0] for row in before],
    "old": [row[1] for row in before],
    "after": [row[0] for row in after],
    "new": [row[1] for row in after],
    "loss": history[-1]["loss/student"],
}))
"""


def test_the_session_runs(tmp_path, monkeypatch):
    """docs/example_session.ipynb in a kernel of its own, with tiny models in the place of those that pip fetches."""
    monkeypatch.setenv("GKD_CACHE", str(tmp_path))
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "jupyter"))
    made_of = {"source": str(GLASS)}
    cached_folder("glass-teacher", made_of, lambda out: save_tiny(out, seed=2))
    cached_folder("glass-student", {**made_of, "layers": list(GLASS_KEPT)}, lambda out: save_tiny(out, seed=1))
    text = (DOCS / "example_session.ipynb").read_text(encoding="utf-8")
    assert text == runpy.run_path(str(DOCS / "site" / "notebook.py"))["notebook"](), "run docs/site/notebook.py"
    page = nbformat.reads(text, as_version=4)
    page.cells.append(nbformat.v4.new_code_cell(LOOK))
    NotebookClient(page, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in page.cells if cell.cell_type == "code"]
    assert len(code) >= 9
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    told = ["".join(out.get("text", "") for out in cell.outputs if out.get("name") == "stdout") for cell in code]
    found = json.loads(told[-1])
    assert found["step"] == 20
    assert set(found["sources"]) == {"student", "teacher"}
    assert found["before"] == found["after"] == list("lice was beginning to get very tired.")  # a token is a byte
    assert all(old != new for old, new in zip(found["old"], found["new"], strict=True))
    assert any(f"-> {found['loss']:.3f}" in text for text in told)
    plots = sorted((tmp_path / "outputs/session/plots").glob("*.png"))
    assert len(plots) >= 3
    assert all(matplotlib.image.imread(plot).std() > 0 for plot in plots)
    assert (tmp_path / "outputs/session/adapter_model.safetensors").is_file()


def test_the_recipe_of_the_recipes_page_runs(tmp_path, monkeypatch):
    (block,) = [b for kind, b in blocks(ROOT / "recipes" / "README.md") if "DEFAULTS" in b]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(8)))
    block = block.replace("my/student", save_tiny(tmp_path / "student", seed=1)).replace("outputs", str(tmp_path))
    block = block.replace("my/teacher", save_tiny(tmp_path / "teacher", seed=2))
    (tmp_path / "mine.py").write_text(block.replace("my/data", str(tmp_path / "rows.jsonl")))
    flags = ["--max_steps", "1", "--max_new_tokens", "4", "--num_eval_prompts", "2", "--report_to", "none"]
    execute_recipe(tmp_path / "mine.py", flags)
    assert (tmp_path / "mine" / "adapter_model.safetensors").is_file()


def test_the_adapter_is_used_as_getting_started_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    student = save_tiny(tmp_path / "student", seed=1)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer_of(tmp_path, peft_config=lora, student=student).save_model(tmp_path / "outputs/mine")
    (block,) = [b for kind, b in blocks(DOCS / "getting_started.md") if "AutoPeft" in b]
    exec(compile(block, "getting_started.md", "exec"), {})
    assert capsys.readouterr().out.strip()
    assert "`gkd export outputs/mine`" in (DOCS / "getting_started.md").read_text(encoding="utf-8")
    assert main(["export", "outputs/mine"]) == 0
    chat = pipeline("text-generation", "outputs/mine-merged", device="cpu")
    (answer,) = chat([{"role": "user", "content": "What is 3 + 4?"}], max_new_tokens=4)
    assert answer["generated_text"][-1]["role"] == "assistant"
