"""`gkd new`: a recipe that runs, from a template, after a look at the data.

What is looked at (`gkd.commands.new_look`): the columns (a format of `gkd.data.formats`, or a known pair of column
names that the recipe then renames), whether the rows have answers, how long the answers are, and whether the student's
tokenizer has a chat template.
"""

from __future__ import annotations

import keyword
import logging
from pathlib import Path
from typing import Any

from gkd.commands.new_look import CHARACTERS_PER_TOKEN, DataLook, look_at
from gkd.common.text import printable
from gkd.models.loading import load_tokenizer
from gkd.recipe.rows import load_rows

logger = logging.getLogger(__name__)


def write_recipe(
    name: str,
    data: str,
    student: str,
    teacher: str,
    *,
    output: str | None = None,
    columns: tuple[str, str | None] | None = None,
    force: bool = False,
    template: str | None = None,
) -> Path:
    """Look at the data and write the recipe; returns its path.

    Args:
        name: of the recipe; its file is recipes/NAME.py unless `output` says otherwise.
        data: a local .jsonl, .json, .csv or .parquet file, or a Hub data set.
        student, teacher: names or folders, written as they are.
        columns: the columns that hold the question and the answer (None: there are none), when they have other names.
        force: overwrite a file that is there.
        template: the prompt, made of several columns: "{passage}\\n{question}".

    Raises:
        ValueError: a name that is no file name, a file that is there, data that cannot be read, unknown columns.
    """
    if not name.replace("-", "_").isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"NAME={name!r} should be a plain name such as my_recipe: letters, digits and _")
    path = Path(output) if output else Path("recipes") / f"{name}.py"
    if path.suffix != ".py":
        raise ValueError(f"--output {path} should end with .py")
    if path.exists() and not force:
        raise ValueError(f"{path} is there already: choose another name or --output, or pass --force")
    splits = load_rows(data)
    split = "train" if "train" in splits else next(iter(splits))
    look = look_at(splits[split], _has_chat_template(student), columns, template)
    if look.unused:
        question = "{question}" if look.pair is None else look.template or f"{{{look.pair[0]}}}"
        example = printable(f"{{{look.unused[0]}}}\\n{question}")
        logger.warning(
            "the recipe does not use %s; into the prompt with --prompt_template %r or in load_data",
            ", ".join(map(printable, look.unused)),
            example,
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = render(name, data, split, student=student, teacher=teacher, look=look, path=path)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}; pass another --output") from error
    return path


def _has_chat_template(student: str) -> bool:
    try:
        return bool(load_tokenizer(student).chat_template)
    except ValueError:
        chat = any(word in student.lower() for word in ("instruct", "chat", "-it"))
        form = "chats" if chat else "plain text"
        logger.warning("the tokenizer of %s cannot be loaded here; from the name, rows are taken as %s", student, form)
        return chat


# ---------------------------------------------------------------------------------------------------- the file


def render(name: str, data: str, split: str, *, student: str, teacher: str, look: DataLook, path: Path) -> str:
    """The recipe's text. Local files and folders are written with their whole path: it is run from anywhere."""
    short = [Path(part).name.replace('"', "'") for part in (student, teacher, data)]
    title = f"GKD of {short[0]} from {short[1]} on {short[2]} ({look.rows:,} rows)."
    student, teacher, data = (str(Path(n).resolve()) if Path(n).exists() else n for n in (student, teacher, data))
    fields: list[tuple[str, Any, str]] = [
        ("model_name_or_path", student, ""),
        ("teacher_model_name_or_path", teacher, ""),
        ("dataset_name", data, ""),
        *([("dataset_train_split", split, "")] if split != "train" else []),
        ("output_dir", f"outputs/{name}", ""),
        *_method(look),
        ("use_peft", True, "False trains all weights: then lower the learning rate, to about 1e-5"),
        ("lora_r", 64, ""),
        ("lora_alpha", 64, ""),
        ("lora_target_modules", ["all-linear"], ""),
        ("learning_rate", 2e-4, ""),
        ("num_train_epochs", 1, ""),
        ("per_device_train_batch_size", 4, ""),
        ("gradient_accumulation_steps", 4, ""),
        ("logging_steps", 10, ""),
    ]
    values = "\n".join(
        f'    "{field}": {_literal(value)},' + (f"  # {note}" if note else "") for field, value, note in fields
    )
    return _TEMPLATE.format(title=title, path=path.as_posix(), values=values, load=_load_data(look))


def _method(look: DataLook) -> list[tuple[str, Any, str]]:
    if look.running_text:
        return [("lmbda", 0.0, "running text has no prompt to continue"), ("max_length", 1024, "")]
    tokens = 128 if not look.answered else 64 * -(-(look.answer_length // CHARACTERS_PER_TOKEN + 1) // 64)
    note = f"95 % of the answers have at most {look.answer_length:,} characters" if look.answered else ""
    method: list[tuple[str, Any, str]] = [
        ("lmbda", 0.5, "share of the answers that the student writes"),
        ("beta", 0.5, "0 = KL(teacher||student), 1 = KL(student||teacher)"),
        ("temperature", 1.0, ""),
        ("max_new_tokens", min(tokens, 2048), note),
        ("max_length", min(tokens, 2048) + 1024, "prompt and answer"),
    ]
    if look.several_answers:
        hint = f"all trains on each: {look.several_answers:,} of the first rows have several answers"
        method.append(("assistant_turns", "last", hint))
    if not look.answered:
        method.insert(1, ("seq_kd", True, "rows have no answers: the teacher writes the others"))
    return method


def _literal(value: Any) -> str:
    """Python source with double quotes, as the formatter writes it."""
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in escaped) + '"'
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return repr(value)


def _column(name: str, look: DataLook) -> str:
    return f"str(row[{_literal(name)}])" if name in look.numbers else f"row[{_literal(name)}]"


def _load_data(look: DataLook) -> str:
    if look.running_text:
        return _RUNNING_TEXT
    if look.pair is None:
        return _AS_THEY_ARE
    question, answer = look.pair
    prompt = _column(question, look)
    if look.template is not None:
        prompt = f"{_literal(look.template)}.format(**row)"
    if look.chat and question not in look.turns:
        prompt = f'[{{"role": "user", "content": {prompt}}}]'
    completion = f', "completion": {_column(answer, look)}' if answer else ""
    return _RENAMED.format(prompt=prompt, completion=completion)


_TEMPLATE = '''"""{title}

    gkd doctor {path}
    python {path}
    accelerate launch {path}

Written by `gkd new` and yours to change. Any field that --help lists may stand in DEFAULTS.
"""

from typing import Any

from gkd.run import Settings, dataset_by_name, run, with_held_out

DEFAULTS: dict[str, Any] = {{
{values}
}}


{load}

if __name__ == "__main__":
    run(load_data, defaults=DEFAULTS, description=__doc__.splitlines()[0])
'''

_AS_THEY_ARE = '''def load_data(settings: Settings) -> dict[str, Any]:
    """Rows as they are; without a test split, some are held out for the before/after table."""
    return with_held_out(dataset_by_name(settings))
'''

_RUNNING_TEXT = '''def load_data(settings: Settings) -> dict[str, Any]:
    """Running text, all of it target. The before/after table continues the first words of held-out texts."""
    data = with_held_out(dataset_by_name(settings))
    prompts = data["eval"].map(lambda row: {"prompt": " ".join(row["text"].split()[:8])})
    return {"train": data["train"], "prompts": prompts, "held_out_text": list(data["eval"]["text"])}
'''

_RENAMED = '''def as_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the data set as prompt and completion."""
    return {{"prompt": {prompt}{completion}}}


def load_data(settings: Settings) -> dict[str, Any]:
    """Rows with other column names; without a test split, some are held out for the before/after table."""
    return with_held_out(dataset_by_name(settings), as_row=as_row)


# For a score of your own in that table: def score(completion: str, row: dict) -> float, and run(..., score=score).
'''
