"""Settings and data made into a trainer: to train with, or only to measure with."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback
from trl import get_peft_config, get_quantization_config

from gkd.common.sign_of_life import SignOfLife
from gkd.config.fields import GKDConfig
from gkd.data.teacher_rows import View
from gkd.models.loading import adapter_config, load_tokenizer
from gkd.recipe.objective import leave_teacher_out
from gkd.recipe.settings import Settings
from gkd.training.progress import ProgressBar
from gkd.training.reward import Reward
from gkd.training.token_weights import Own
from gkd.training.trainer import GKDTrainer


def student_name(settings: Settings) -> str:
    """The student's name or path.

    Raises:
        ValueError: there is none.
    """
    if settings.model.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: pass --model_name_or_path, the student")
    return str(settings.model.model_name_or_path)


def student_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """The student's own, at the revision of its weights; `resolve_tokenizer` applies the fields' options to it.

    Raises:
        ValueError: the student has no name, or no tokenizer.
    """
    return load_tokenizer(
        student_name(settings),
        trust_remote_code=settings.training.trust_remote_code,
        revision=settings.model.model_revision,
    )


def loading_arguments(settings: Settings) -> GKDConfig:
    """The training arguments, copied, with how student and teacher are loaded: dtype, attention, quantization."""
    args, model = copy.copy(settings.training), settings.model
    quantization = get_quantization_config(model)
    shared: dict[str, Any] = {
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    args.model_init_kwargs = {**shared, "revision": model.model_revision, **(args.model_init_kwargs or {})}
    if quantization is not None:
        _check_adapter(settings)
        device_map = {"": str(PartialState().device)}  # quantized weights cannot be moved later
        args.model_init_kwargs |= {"device_map": device_map, "quantization_config": quantization}
    if args.shares_weights and args.teachers is None:  # the teacher is not loaded
        return args
    own = args.teacher_model_init_kwargs or {}
    assert not isinstance(own, str)  # TrainingArguments has parsed it
    # float32 is ModelConfig's default, made for a student: a teacher stays as it was saved unless the user says more.
    dtype = "auto" if model.dtype == "float32" else model.dtype
    args.teacher_model_init_kwargs = {**shared, "dtype": dtype, **own}
    return args


def _check_adapter(settings: Settings) -> None:
    model = settings.model
    if not model.use_peft and adapter_config(student_name(settings), model.model_revision) is None:
        field = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
        raise ValueError(
            f"{field}=True without use_peft: packed weights are not trained, only an adapter on them is; add "
            f"--use_peft, or leave {field} out"
        )


def copied(settings: Settings) -> Settings:
    """The same settings, whose fields can be set without changing the user's."""
    return replace(settings, training=copy.copy(settings.training), model=copy.copy(settings.model))


TRAIN_ROWS = 256  # of the training set, which only the set-up of a trainer needs


@contextmanager
def measuring_trainer(
    settings: Settings, data: dict[str, Any], teacher_view: View | None = None, most: int | None = TRAIN_ROWS
) -> Iterator[GKDTrainer]:
    """The trainer of a run, with its models, tokenizer and sampling, that leaves nothing behind on disk or Hub; nor in
    `settings`, of which it has a copy. It has `most` of the training rows, None is all of them."""
    train, settings = data["train"], copied(settings)
    with tempfile.TemporaryDirectory() as folder:
        args = settings.training
        args.output_dir, args.push_to_hub, args.report_to, args.teacher_cache_dir = folder, False, [], "off"
        args.teacher_scores_dir, args.log_completions = None, False
        args.reward_weight, args.reward_baseline = 0.0, "leave_one_out"  # nothing is trained
        rows = train if most is None else train.select(range(min(len(train), most)))
        yield build_trainer(settings, {**data, "train": rows}, teacher_view)


def build_trainer(
    settings: Settings,
    data: dict[str, Any],
    teacher_view: View | None = None,
    *,
    reward: Reward | None = None,
    token_weights: Own | None = None,
) -> GKDTrainer:
    """Tokenizer, models and trainer from the settings; the functions are the recipe's, and the reward is asked for
    where it has a weight."""
    args, model = loading_arguments(settings), settings.model
    leave_teacher_out(args, settings.run.evaluate_before_and_after)
    with SignOfLife("loading models and rows"):
        trainer = GKDTrainer(
            model=model.model_name_or_path,
            args=args,
            train_dataset=data["train"],
            eval_dataset=data.get("eval") if args.evaluates_along else None,
            processing_class=student_tokenizer(settings),
            peft_config=get_peft_config(model),
            teacher_view=teacher_view if args.needs_teacher or args.teacher_model_name_or_path else None,
            reward=reward if args.reward_weight else None,
            token_weights=token_weights,
        )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressBar())
    return trainer
