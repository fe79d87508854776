"""`gkd shrink`: a student from a teacher, without the layers and inner neurons that change the hidden state least."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from gkd.data.prepare import prepare_dataset
from gkd.models.adapters import load_adapter, merged
from gkd.models.loading import adapter_config, base_name, load_errors_named, load_tokenizer
from gkd.models.narrow import adding_most, inner_of, with_neurons
from gkd.models.shrink import layers_of, least_changing, with_layers
from gkd.recipe.capture import capture
from gkd.recipe.rows import load_rows, recipe_data
from gkd.recipe.shipped import built_in

ROWS, TOKENS = 32, 256  # that layers and neurons are measured on


@dataclass(frozen=True)
class Order:
    """What is wanted.

    Attributes:
        teacher: a name or a folder, also of an adapter. layers: how many the student has; None leaves all.
        width: how many inner neurons each of its MLPs has; None leaves all.
        rows: a recipe, by its file or its name, or a file of rows.
        output: the student's folder; None is `outputs/TEACHER-N-layers-M-wide`.
        single: leave out the layers that change least one by one, not one run of neighbours.
        trust_remote_code: let the model's own code run.
    """

    teacher: str
    rows: str
    layers: int | None = None
    width: int | None = None
    output: Path | None = None
    single: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.layers is None and self.width is None:
            raise ValueError("say what to shrink it to: --layers N, --width N (inner neurons of its MLPs), or both")
        if self.single and self.layers is None:
            raise ValueError("--single has no effect without --layers: leave it out")

    @property
    def folder(self) -> Path:
        """Where the student goes."""
        sizes = ((self.layers, "layers"), (self.width, "wide"))
        name = "-".join([Path(self.teacher).name, *(f"{size}-{what}" for size, what in sizes if size is not None)])
        return self.output or Path("outputs", name)


def shrink(order: Order) -> list[str]:
    """Do it: layers first, then the neurons, measured on what is left.

    Returns:
        Lines that say what was left out, and what to do next.

    Raises:
        ValueError: no such teacher, rows, number of layers or width; the folder is not empty; or the student, loaded
            again, is not what it should be.
    """
    folder = order.folder
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty: name another folder with --output")
    tokenizer = load_tokenizer(order.teacher, trust_remote_code=order.trust_remote_code)
    rows = _rows(order, tokenizer)
    teacher = _teacher(order)
    _check_sizes(order, teacher)
    student, left_out = teacher, []
    if order.layers is not None:
        kept = least_changing(teacher, rows, order.layers, in_one=not order.single)
        student = with_layers(teacher, kept)
        number = len(layers_of(teacher)[1])
        left_out.append(f"{_in_words([layer for layer in range(number) if layer not in kept])} of 0-{number - 1}")
    if order.width is not None:
        width = inner_of(student).width
        student = with_neurons(student, adding_most(student, rows, order.width))
        left_out.append(f"{width - order.width:,} of {width:,} inner neurons in every layer")
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _check(student, folder, rows[0], order.trust_remote_code)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (student, teacher)]
    tokens = sum(map(len, rows))
    return [
        f"measured on {len(rows)} rows, {tokens:,} tokens: left out {' and '.join(left_out)}",
        f"wrote {folder}: {sizes[0]:,} of {sizes[1]:,} weights",
        f"next: gkd run RECIPE --model_name_or_path {shlex.quote(str(folder))} "
        f"--teacher_model_name_or_path {shlex.quote(order.teacher)}",
    ]


def _check_sizes(order: Order, teacher: Any) -> None:
    number = len(layers_of(teacher)[1])
    if order.layers is not None and not 1 <= order.layers < number:
        raise ValueError(f"--layers {order.layers}: {order.teacher!r} has {number}, so keep 1 to {number - 1}")
    if order.width is not None:
        width = inner_of(teacher).width
        if not 1 <= order.width < width:
            raise ValueError(
                f"--width {order.width}: the MLPs of {order.teacher!r} have {width} inner neurons, so keep 1 to "
                f"{width - 1}"
            )


def _in_words(layers: list[int]) -> str:
    if layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 1:
        return f"layers {layers[0]}-{layers[-1]}"
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"


def _teacher(order: Order) -> Any:
    name = base_name(order.teacher)
    with load_errors_named(f"the teacher {name!r}", "name a folder with a whole model, or a model on the Hub"):
        model: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype="auto", trust_remote_code=order.trust_remote_code
        )
    if getattr(model, "is_quantized", False):
        raise ValueError(f"the teacher {name!r} is quantized: shrink the model that it was made from")
    if adapter_config(order.teacher) is not None:
        model = merged(load_adapter(model, order.teacher, "TEACHER"))
    return model.eval()


def _rows(order: Order, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the first rows, prompt and answer."""
    if order.rows.endswith(".py") or order.rows in built_in():
        argv = ["--objective", "sft", "--model_name_or_path", order.teacher, "--output_dir", str(order.folder)]
        recipe = capture(order.rows, argv)
        found = recipe_data(recipe.load_data, recipe.settings)["train"]
    else:
        splits = load_rows(order.rows)
        found = splits if isinstance(splits, Dataset) else next(iter(splits.values()))
    prepared, _ = prepare_dataset(
        found.select(range(min(ROWS, len(found)))),
        tokenizer,
        max_length=TOKENS,
        max_prompt_length=TOKENS - 1,
        overlong_prompt="keep_end",
        prompt_only_ok=True,
        prompts_needed=False,
        name="--rows",
    )
    return [list(ids) for ids in prepared["input_ids"]]


@torch.no_grad()
def _check(student: Any, folder: Path, row: list[int], trust_remote_code: bool) -> None:
    again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code).eval()
    ids = torch.tensor([row])
    difference = float((again(input_ids=ids).logits - student(input_ids=ids).logits).abs().max())
    if not difference < 1e-3:
        raise ValueError(
            f"{str(folder)!r}, loaded again, says something else (logits differ by {difference:.1e}): the config of a "
            f"{type(student).__name__} says its sizes in a way that is not known here, so delete the folder"
        )
