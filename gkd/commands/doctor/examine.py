"""`gkd doctor`: what can be known about a run before it costs a GPU-day.

The order is that of cost: versions and files first, weights last. A check that cannot be made because an earlier one
failed is left out, and the failed one says why.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from gkd.assembly.reading import reading_of_teachers
from gkd.assembly.rollouts import encoding_options
from gkd.commands.doctor.attempt import attempt
from gkd.commands.doctor.cost import examine_memory
from gkd.commands.doctor.models import examine_models
from gkd.commands.doctor.rows import examine_held_out, examine_rows
from gkd.commands.doctor.tokens import examine_tokens
from gkd.commands.doctor.view import Diagnosis
from gkd.common.environment import describe_hardware, installed_versions
from gkd.common.sign_of_life import SignOfLife
from gkd.recipe.build import student_name
from gkd.recipe.capture import Recipe
from gkd.recipe.rows import recipe_data


def examine(recipe: Recipe, console: Console | None = None) -> Diagnosis:
    """Everything, as far as it can be reached. A user's mistake becomes an error line; nothing is written to disk.

    Args:
        recipe: as `gkd.recipe.capture.capture` gives it.
        console: where each finding is printed as soon as it is known.
    """
    out, settings = Diagnosis(console=console), recipe.settings
    _machine(out)
    if settings.remarks:
        out.add("Settings", "ok", "; ".join(settings.remarks))
    tokenizers = examine_tokens(out, settings)
    if out.passed:
        attempt(out, "Memory", lambda: examine_memory(out, recipe))
    data = attempt(out, "Data", lambda: recipe_data(recipe.load_data, settings))
    if data is None or tokenizers is None:
        return out
    args = settings.training
    encoding = attempt(out, "Rows", lambda: _encoding(recipe, tokenizers[0]))
    if encoding is None:
        return out
    with SignOfLife("tokenizing the rows"):
        prepared = attempt(out, "Rows", lambda: examine_rows(out, data["train"], tokenizers[0], args, encoding))
    if prepared is not None:
        attempt(out, "Held out", lambda: examine_held_out(out, data, prepared, tokenizers[0], args, encoding))
    if prepared is None or not out.passed:
        return out
    attempt(out, "Models", lambda: examine_models(out, recipe, data, prepared))
    return out


def _machine(out: Diagnosis) -> None:
    out.add("Versions", "ok", ", ".join(f"{name} {version}" for name, version in installed_versions().items()))
    out.add("Devices", "ok", describe_hardware())


def _encoding(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    settings = recipe.settings
    source = {"revision": settings.model.model_revision, "trust_remote_code": settings.training.trust_remote_code}
    args, name = settings.training, student_name(settings)
    named = {
        key: None if one.shares_weights else one.teacher_model_name_or_path for key, one in args.each_teacher.items()
    }
    reading = reading_of_teachers(args, tokenizer, name, named, view=recipe.teacher_view)
    return encoding_options(name, tokenizer, args, source, reading=reading, write=False)
