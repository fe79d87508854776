"""The model card: what a reader needs to reproduce a run and to judge it, with metadata that the Hub understands.

A pure function of a dataclass: no trainer, no model, no network. `CardInfo` needs a name, a student and a teacher;
everything else may be missing (a checkpoint has no evaluation yet) and its section is then left out. Secrets are
redacted from the command line and from the settings, and a path of this machine is never written as a repository.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from gkd.common.redact import redact_command, redact_settings
from gkd.common.text import duration, shorten
from gkd.report.comparison import as_markdown
from gkd.report.markdown import escape_caption, escape_cell, fenced, inline_code, markdown_table
from gkd.report.repo import Repo

PAPER_TITLE = "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes"
PAPER_URL = "https://arxiv.org/abs/2306.13649"
CITATION = f"""@inproceedings{{agarwal2024onpolicy,
  title     = {{{{{PAPER_TITLE}}}}},
  author    = {{Agarwal, Rishabh and Vieillard, Nino and Zhou, Yongchao and Stanczyk, Piotr and Ramos, Sabela and
               Geist, Matthieu and Bachem, Olivier}},
  booktitle = {{The Twelfth International Conference on Learning Representations (ICLR)}},
  year      = {{2024}},
  url       = {{{PAPER_URL}}}
}}"""
TAGS = ("gkd", "knowledge-distillation", "on-policy-distillation", "trl", "arxiv:2306.13649")
SAMPLE_LIMIT = 600  # characters of a sample completion


def create_card(info: CardInfo) -> str:
    """The whole README.md: metadata block and text."""
    sections = (
        _introduction(info),
        _quick_start(info),
        _section("Results", _results(info)),
        _section("Samples", _samples(info)),
        _section("How it was trained", _training(info)),
        _section("Plots", "\n\n".join(f"![{escape_caption(caption)}]({file})" for file, caption in info.plots)),
        _section("Reproduce", _reproduction(info)),
        _section("Citation", f"```bibtex\n{CITATION}\n```"),
    )
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{card_data(info).to_yaml()}\n---\n\n{body}\n"


def write_card(info: CardInfo, folder: str | Path) -> Path:
    """Write the card as `README.md` into `folder`, UTF-8."""
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(create_card(info), encoding="utf-8", newline="\n")
    return path


# ----------------------------------------------------------------------------------------------------- metadata


def card_data(info: CardInfo) -> ModelCardData:
    """The Hub's metadata. Only ids that are on the Hub are named; unknown values are absent, not guessed."""
    base_model = info.student.hub_id
    datasets = [data.hub_id for data in info.datasets if data.hub_id]
    results = _eval_results(info)
    return ModelCardData(
        model_name=info.model_name,
        base_model=base_model,
        datasets=datasets or None,
        library_name="peft" if info.lora is not None else "transformers",
        pipeline_tag="text-generation",
        license=info.license,
        language=info.language,
        tags=[*TAGS, *(["lora"] if info.lora is not None else []), *info.tags],
        eval_results=results or None,
        base_model_relation=_relation(info) if base_model else None,
    )


def _relation(info: CardInfo) -> str:
    return "adapter" if info.lora is not None else "finetune"


def _eval_results(info: CardInfo) -> list[EvalResult]:
    """The student's values after training as model-index results; what was not measured is left out."""
    if info.evaluation is None:
        return []
    data = info.datasets[0] if info.datasets else Repo("the run's held-out prompts", on_hub=False)
    # The Hub wants a type for every data set: its id, or a plain word for data that is not there.
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            metric_type=row["key"],
            metric_name=row["label"] + (f" ({row['unit']})" if row["unit"] else ""),
            metric_value=row["after"]["value"],
            dataset_name=data.display_name,
            dataset_type=data.hub_id or "local",
            dataset_revision=data.revision,
        )
        for row in info.evaluation["rows"]
        if row.get("after") and row["after"]["value"] is not None
    ]


# --------------------------------------------------------------------------------------------------------- text


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _link(repo: Repo, kind: str = "") -> str:
    at = f" at revision {inline_code(repo.revision)}" if repo.revision else ""
    if repo.hub_id:
        return f"[{repo.display_name}](https://huggingface.co/{kind}{repo.hub_id}){at}"
    return f"{escape_cell(repo.display_name)}{at}"


def _introduction(info: CardInfo) -> str:
    what = "A LoRA adapter for" if info.lora is not None else "A version of"
    data = ", ".join(_link(repo, "datasets/") for repo in info.datasets)
    start = f"# {escape_cell(info.model_name)}\n\n{what} {_link(info.student)} that was"
    on_data = f" on {data}" if data else ""
    if info.teacher is None:
        return f"{start} trained by supervised fine-tuning{on_data}."
    return (
        f"{start} trained to match {_link(info.teacher)}{on_data} by generalized knowledge distillation (GKD), which "
        f"mixes sequences from the data set, from the student itself and from the teacher: "
        f"[{PAPER_TITLE}]({PAPER_URL})."
    )


def _quick_start(info: CardInfo) -> str:
    where = info.hub_model_id or info.weights_in or info.model_name
    load = (
        ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer", ""]
        if info.lora is not None
        else ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    )
    prompt = [
        'messages = [{"role": "user", "content": "Why is the sky blue?"}]',
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", '
        "return_dict=True)",
    ]
    if not info.chat:
        prompt = ['inputs = tokenizer("Why is the sky blue?", return_tensors="pt")']
    name = "AutoPeftModelForCausalLM" if info.lora is not None else "AutoModelForCausalLM"
    lines = [
        *load,
        f"model = {name}.from_pretrained({json.dumps(where)})",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(where)})",
        *prompt,
        "output = model.generate(**inputs, max_new_tokens=128)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    note = ""
    if info.lora is not None and info.student.hub_id is None:
        note = (
            f"The adapter needs its base model, {inline_code(info.student.display_name)}, which was a local one: set "
            "`base_model_name_or_path` in `adapter_config.json` to where it stands on your machine.\n\n"
        )
    return _section("Quick start", note + fenced("\n".join(lines), "python"))


def _results(info: CardInfo) -> str:
    return "" if info.evaluation is None else as_markdown(info.evaluation)


def _samples(info: CardInfo) -> str:
    blocks = []
    for number, sample in enumerate((info.evaluation or {}).get("samples", ()), start=1):
        parts = [f"**Prompt {number}**\n\n{fenced(shorten(sample['prompt'], SAMPLE_LIMIT))}"]
        for place in ("before", "after", "teacher"):
            if sample.get(place) is not None:
                parts.append(f"{place.capitalize()}:\n\n{fenced(shorten(sample[place], SAMPLE_LIMIT))}")
        blocks.append("\n\n".join(parts))
    return "\n\n".join(blocks)


def _training(info: CardInfo) -> str:
    parts = list(info.notes)
    if info.settings:
        parts.append(markdown_table(("Setting", "Value"), redact_settings(info.settings).items()))
    if info.lora is not None:
        parts.append(
            "LoRA:\n\n" + markdown_table(("Setting", "Value"), redact_settings(_brief_modules(info.lora)).items())
        )
    if info.ledger is not None:
        parts.append(
            "What it was trained on, counted after the rollout and over all processes:\n\n" + _ledger(info.ledger)
        )
    run = _run_facts(info)
    if run:
        parts.append(markdown_table(("Run", ""), run))
    if info.versions:
        parts.append(markdown_table(("Package", "Version"), info.versions.items()))
    return "\n\n".join(parts)


def _brief_modules(lora: Mapping[str, Any]) -> dict[str, Any]:
    """A long list of module paths (one for each layer) as the modules' own names and their number."""
    brief = dict(lora)
    for name, value in lora.items():
        if isinstance(value, list | tuple) and len(value) > 8:
            kinds = dict.fromkeys(str(path).split(".")[-1] for path in value)
            brief[name] = f"{', '.join(kinds)} ({len(value)} in all)"
    return brief


def _ledger(ledger: Mapping[str, Mapping[str, int]]) -> str:
    writers = {"data": "the data set", "student": "the student", "teacher": "the teacher"}
    sequences, targets = ledger["sequences"], ledger["targets"]
    rows = [
        (writers.get(source, source), _count(sequences[source]), _count(targets.get(source, 0)))
        for source in sequences
    ]
    total = ("all", _count(sum(sequences.values())), _count(sum(targets.values())))
    return markdown_table(("Written by", "Sequences", "Target tokens"), [*rows, total])


def _run_facts(info: CardInfo) -> list[tuple[str, str]]:
    facts: list[tuple[str, str | None]] = [
        ("Optimizer steps", None if info.steps is None else _count(info.steps)),
        ("Wall time", None if info.wall_time_s is None else duration(info.wall_time_s)),
        ("Hardware", info.hardware),
        ("Processes", None if info.num_processes is None else str(info.num_processes)),
        ("Peak memory", None if info.peak_memory_bytes is None else f"{info.peak_memory_bytes / 2**30:.1f} GiB"),
    ]
    return [(name, value) for name, value in facts if value is not None]


def _reproduction(info: CardInfo) -> str:
    commands = _distinct([(step, shlex.split(line)) for step, line in info.commands])
    if not commands and info.command:
        commands = [(0, list(info.command))]
    if not commands:
        return ""
    parts = [_shell_line(commands[0][1])]
    for step, command in commands[1:]:
        parts.append(f"stopped after step {step:,}, and gone on with\n\n{_shell_line(command)}")
    return "\n\n".join(parts)


def _distinct(commands: Sequence[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
    """Without those that only went on with what the one before them had begun."""
    kept: list[tuple[int, list[str]]] = []
    for step, command in commands:
        if not kept or _without_resume(command) != _without_resume(kept[-1][1]):
            kept.append((step, command))
    return kept


def _without_resume(command: Sequence[str]) -> list[str]:
    words, skip = [], False
    for word in command:
        name = word.lstrip("-").replace("-", "_").split("=")[0]
        is_flag = word.startswith("--") and name == "resume_from_checkpoint"
        if not is_flag and not skip:
            words.append(word)
        skip = is_flag and "=" not in word
    return words


def _shell_line(command: Sequence[str]) -> str:
    # What Python puts first into sys.argv is the script, which a shell does not run by its name.
    interpreter = ["python"] if command[0].endswith(".py") else []
    return fenced(redact_command([*interpreter, *command]), "bash")


def _count(number: int) -> str:
    return f"{number:,}"


@dataclass
class CardInfo:
    """Everything a card can say. All but the first three may be left at their defaults.

    Attributes:
        model_name: the name of the new model (also in the model index).
        student, teacher: the models trained from; no teacher where it was asked for nothing.
        datasets: training data.
        settings: the method's settings by field name (lmbda, beta, temperature, ...), shown as a table.
        lora: the adapter's settings; not None means that the model is an adapter.
        chat: whether the tokenizer has a chat template, for the quick start.
        ledger: `{"sequences": {source: n}, "targets": {source: n}}`, as `gkd.training.record.Ledger.as_dict`.
        evaluation: the dictionary of `gkd.report.comparison.as_dict`; None before anything was evaluated.
        plots: (file relative to the card, caption).
        hardware: one line, see `describe_hardware`.
        wall_time_s: seconds of training.
        peak_memory_bytes: of the fullest device.
        versions: package -> version, see `installed_versions`.
        command: the argument vector that started the run; secrets are redacted here.
        commands: those of a run that was stopped and gone on with: (step, shell line), in place of `command`.
        weights_in: the folder that has the weights, where it is not the card's own.
        steps, num_processes: optimizer steps taken; processes used.
        hub_model_id: where the model will live, for the quick start.
        license: the Hub's license id, if known.
        language: ISO codes.
        tags: further tags.
        notes: paragraphs of Markdown, written as they are (warnings, known limits).
    """

    model_name: str
    student: Repo
    teacher: Repo | None
    datasets: Sequence[Repo] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] | None = None
    chat: bool = True
    ledger: Mapping[str, Mapping[str, int]] | None = None
    evaluation: Mapping[str, Any] | None = None
    plots: Sequence[tuple[str, str]] = ()
    hardware: str | None = None
    wall_time_s: float | None = None
    peak_memory_bytes: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] | None = None
    commands: Sequence[tuple[int, str]] = ()
    weights_in: str | None = None
    steps: int | None = None
    num_processes: int | None = None
    hub_model_id: str | None = None
    license: str | None = None
    language: str | list[str] | None = None
    tags: Sequence[str] = ()
    notes: Sequence[str] = ()
