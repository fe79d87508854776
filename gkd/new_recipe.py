"""`gkd new`: a recipe that runs, from a template, after a look at the data.

What is looked at: the columns (a format of `gkd.rows`, or a known pair of column names that the recipe then renames),
whether the rows have answers, how long the answers are, and whether the student's tokenizer has a chat template.
"""

from __future__ import annotations

import keyword
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from gkd.loading import load_tokenizer
from gkd.rows import ChatRow, Place, Row, TextRow, TokenRow, canonical_row
from gkd.settings import load_rows

logger = logging.getLogger(__name__)

# Column names that data sets use for a question and its answer, besides the formats of gkd.rows.
PAIRS = (
    ("question", "answer"),
    ("query", "response"),
    ("query", "answer"),
    ("problem", "solution"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("prompt", "chosen"),
    ("question", "response"),
    ("input", "output"),
    ("source", "target"),
    ("document", "summary"),
    ("article", "highlights"),
)
PROMPTS = ("question", "query", "problem")  # columns that alone can be a prompt
_LOOKED_AT = 1000
_CHARACTERS_PER_TOKEN = 3  # on the safe side of the usual 4 for English


@dataclass(frozen=True)
class Look:
    """What the rows are. `pair` are columns to rename, answer None: prompts only; None: rows are taken as they are.
    `numbers` are those of them that hold numbers, which become texts."""

    rows: int
    pair: tuple[str, str | None] | None
    numbers: frozenset[str]
    chat: bool
    answered: bool
    running_text: bool
    answer_length: int  # characters; 95 % of the answers are no longer


def write_recipe(
    name: str,
    data: str,
    student: str,
    teacher: str,
    output: str | None = None,
    columns: tuple[str, str | None] | None = None,
    force: bool = False,
) -> Path:
    """Look at the data and write the recipe; returns its path.

    Args:
        name: of the recipe; its file is recipes/NAME.py unless `output` says otherwise.
        data: a local .jsonl, .json, .csv or .parquet file, or a Hub data set.
        student, teacher: names or folders, written as they are.
        columns: the columns that hold the question and the answer (None: there are none), when they have other names.
        force: overwrite a file that is there.

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
    look = look_at(splits[split], _has_chat_template(student), columns)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(name, data, split, student, teacher, look, path), encoding="utf-8")
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


def look_at(rows: Dataset, has_template: bool, columns: tuple[str, str | None] | None = None) -> Look:
    """Read the format off the first rows.

    Raises:
        ValueError: no format fits, with the columns that are there; or a row is broken.
    """
    pair = _pair(rows, columns)
    numbers = frozenset(name for name in pair or () if name is not None and _is_number(rows, name))
    texts, kinds = [], []
    for number, raw in enumerate(rows.select(range(min(_LOOKED_AT, len(rows))))):
        kind = canonical_row(_renamed(raw, pair, numbers, has_template), Place("train", number), has_template)
        kinds.append(kind)
        texts.append(_answer(kind))
    answers = sorted(len(text) for text in texts if text is not None)
    return Look(
        rows=len(rows),
        pair=pair,
        numbers=numbers,
        chat=isinstance(kinds[0], ChatRow),
        answered=len(answers) == len(kinds),
        running_text=any(isinstance(kind, TextRow) and not kind.prompt for kind in kinds),
        answer_length=answers[int(0.95 * (len(answers) - 1))] if answers else 0,
    )


def _pair(rows: Dataset, columns: tuple[str, str | None] | None) -> tuple[str, str | None] | None:
    """The columns to rename; None when the rows have a known format."""
    names = rows.column_names
    if columns is not None:
        missing = [column for column in columns if column is not None and column not in names]
        if missing:
            raise ValueError(f"there is no column {missing[0]!r}: the data has {', '.join(names)}")
        return columns
    if {"messages", "conversations", "instruction", "input_ids"} & set(names) or {"prompt", "completion"} <= set(
        names
    ):
        return None
    for question, answer in PAIRS:
        if question in names and answer in names:
            return question, answer
    alone = next((column for column in PROMPTS if column in names), None)
    return None if alone is None or {"prompt", "text"} & set(names) else (alone, None)


def _is_number(rows: Dataset, name: str) -> bool:
    """Whether a column holds numbers, one in every row: what is missing is no text and shall be told."""
    numeric = str(getattr(rows.features[name], "dtype", "")).startswith(("int", "uint", "float"))
    return numeric and rows.data.column(name).null_count == 0


def _renamed(
    row: dict[str, Any], pair: tuple[str, str | None] | None, numbers: frozenset[str], chat: bool
) -> dict[str, Any]:
    """As the written recipe's `as_row` does it."""
    if pair is None:
        return row
    question, answer = (None if name is None else str(row[name]) if name in numbers else row[name] for name in pair)
    out: dict[str, Any] = {"prompt": [{"role": "user", "content": question}] if chat else question}
    return out if pair[1] is None else {**out, "completion": answer}


def _answer(kind: Row) -> str | None:
    if isinstance(kind, ChatRow):
        return None if kind.answer is None else str(kind.messages[kind.answer]["content"])
    if isinstance(kind, TokenRow):
        return "x" * _CHARACTERS_PER_TOKEN * sum(label != -100 for label in kind.labels)
    return kind.completion


# ---------------------------------------------------------------------------------------------------- the file


def render(name: str, data: str, split: str, student: str, teacher: str, look: Look, path: Path) -> str:
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


def _method(look: Look) -> list[tuple[str, Any, str]]:
    if look.running_text:
        return [("lmbda", 0.0, "running text has no prompt to continue"), ("max_length", 1024, "")]
    tokens = 128 if not look.answered else 64 * -(-(look.answer_length // _CHARACTERS_PER_TOKEN + 1) // 64)
    note = f"95 % of the answers have at most {look.answer_length:,} characters" if look.answered else ""
    method: list[tuple[str, Any, str]] = [
        ("lmbda", 0.5, "share of the answers that the student writes"),
        ("beta", 0.5, "0 = KL(teacher||student), 1 = KL(student||teacher)"),
        ("temperature", 1.0, ""),
        ("max_new_tokens", min(tokens, 2048), note),
        ("max_length", min(tokens, 2048) + 1024, "prompt and answer"),
    ]
    if not look.answered:
        method.insert(1, ("seq_kd", True, "rows have no answers: the teacher writes the others"))
    return method


def _literal(value: Any) -> str:
    """Python source with double quotes, as the formatter writes it."""
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return repr(value)


def _column(name: str, look: Look) -> str:
    return f"str(row[{_literal(name)}])" if name in look.numbers else f"row[{_literal(name)}]"


def _load_data(look: Look) -> str:
    if look.running_text:
        return _RUNNING_TEXT
    if look.pair is None:
        return _AS_THEY_ARE
    question, answer = look.pair
    prompt = _column(question, look)
    if look.chat:
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
