"""`gkd precompute`: the teacher answers a recipe's training prompts beforehand.

The answers go where training looks for them (`teacher_cache_dir`), under the same key, so a run with `seq_kd` and the
same settings finds all of them. On request they are also written as a data set: token ids and labels as they are
trained on, beside their text, with a record of how they were made. Any recipe
takes that folder as `--dataset_name`.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset, Features, Sequence, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import propagate_args_to_deepspeed

from gkd.assembly.materials import Given, materials
from gkd.assembly.parts import Parts, assemble
from gkd.assembly.rollouts import keep_completions, rows_at_a_time
from gkd.assembly.scores import evaluation_sets, rows_of_teacher
from gkd.assembly.student import align_pad_token
from gkd.common.environment import installed_versions
from gkd.common.redact import redact_command
from gkd.common.sign_of_life import SignOfLife
from gkd.config.fields import GKDConfig
from gkd.data.aligned_view import Alignment
from gkd.data.sequences import TokenSequence, columns_read, join, sequence_of
from gkd.data.targets import IGNORE
from gkd.models.loading import base_name
from gkd.recipe.build import loading_arguments, student_name, student_tokenizer
from gkd.recipe.capture import Recipe
from gkd.recipe.rows import recipe_data
from gkd.report.dataset_folder import check_folder, push_folder, write_folder
from gkd.report.repo import Repo
from gkd.rollouts.hygiene import Hygiene
from gkd.rollouts.kept import KeptRollout
from gkd.teachers.absent import as_absent

logger = logging.getLogger(__name__)

_COLUMNS = Features(
    {
        "prompt": Value("string"),
        "completion": Value("string"),
        "input_ids": Sequence(Value("int32")),
        "labels": Sequence(Value("int32")),
        "prompt_length": Value("int32"),
        "truncated": Value("bool"),
        "repetitive": Value("bool"),
        "source_row": Value("int64"),
    }
)
# Beside them where the teacher has prompts of its own: what it reads in front of the answer.
_OF_A_VIEW = Features({"teacher_context": Sequence(Value("int32"))})


@dataclass
class Precomputation:
    """What is to be done: the training rows (and those of the evaluation), the teacher, and what a sound answer is.

    `answers` is the rollout of the teacher's sequences, None without `seq_kd`; `teacher` is None on a server;
    `held_out` is what `load_data` gave beside the train rows. `name` is the teacher's, of several, whose rows alone
    these are. `alignment` is how a teacher with other tokens reads them. `source` is who writes.
    """

    rows: Dataset
    evaluation: list[Dataset]
    tokenizer: PreTrainedTokenizerBase
    teacher: Any
    answers: KeptRollout | None
    hygiene: Hygiene
    accelerator: Accelerator
    batch_size: int
    held_out: dict[str, Any] = field(default_factory=dict)
    name: str | None = None
    alignment: Alignment | None = None
    source: str = "teacher"

    @property
    def of_whom(self) -> str:
        """Who writes, in a sentence."""
        if self.source == "student":
            return "the student"
        return "the teacher" if self.name is None else f"teacher {self.name!r}"

    @property
    def rollout(self) -> KeptRollout:
        assert self.answers is not None, "the teacher writes nothing without seq_kd"
        return self.answers


def precompute(recipe: Recipe, output: str | None = None, push_to: str | None = None) -> None:
    """Fill the teacher's cache for a recipe's training prompts; write them as a data set, and push that, if asked.

    What is there already is not made again, so a run that was stopped goes on where it was. Several processes
    (`accelerate launch`) share the work.

    Args:
        recipe: from `gkd.recipe.capture.capture`, with `seq_kd` on.
        output: folder of the data set; None writes none.
        push_to: repository on the Hub; needs `output`.

    Raises:
        ValueError: no student, teacher or place for the cache is named; the folder holds something else.
    """
    if push_to is not None and output is None:
        raise ValueError("--precompute_push_to_hub needs a data set to push: pass --precompute_output DIR")
    if output is not None:
        check_folder(output)
    works = prepare(recipe)
    for work in works:
        fill(work)
    if not works[0].accelerator.is_main_process:
        return
    for work in works:
        store = work.rollout.store
        print(f"{len(store):,} answers of {work.of_whom} are in {store.path}")
    if output is None:
        return
    rows, left_out = rows_of_all(works)
    about = provenance(recipe, works, len(rows), left_out)
    write_folder(rows, output, about, works[0].held_out)
    told = ", ".join(f"{number:,} {why}" for why, number in left_out.items() if number)
    print(f"{len(rows):,} rows in {output}{f' (left out: {told})' if told else ''}.", end=" ")
    if work.hygiene.rewriting is None:
        print(f"To train on them as on any data:\n  {_training_command(recipe, output)}")
    else:  # the teacher can be compared with nothing, so they are no rows of a distillation
        print("The same recipe with the same flags trains on these answers: gkd run finds them")
    if push_to is not None:
        settings = recipe.settings.training
        print(f"pushed to {push_folder(output, push_to, settings.hub_token, bool(settings.hub_private_repo))}")


def _training_command(recipe: Recipe, output: str) -> str:
    """How this recipe is run on its precomputed answers: without seq_kd, which would ask the teacher again."""
    args = recipe.settings.training
    file = next((arg for arg in sys.argv[1:] if arg.endswith(".py")), "RECIPE")
    more = [] if args.teacher_writes else ["--lmbda", "0"]  # the student alone uses no answer of a data set
    return shlex.join(["gkd", "run", file, "--dataset_name", output, "--seq_kd", "false", *more])


def prepare(recipe: Recipe) -> list[Precomputation]:
    """Rows, tokenizer and teacher exactly as training has them, for each teacher that has rows; the student itself is
    not loaded."""
    settings = recipe.settings
    args, student = loading_arguments(settings), student_name(settings)
    own = _teacher_is_the_base(args)
    if own:
        _name_the_base(args, student)
    data = recipe_data(recipe.load_data, settings)
    asked = data.get("eval") if args.evaluates_along else None
    given = Given(
        student,
        tokenizer=student_tokenizer(settings),
        train=data["train"],
        evaluation=asked,
        teacher_view=recipe.teacher_view,
    )
    ready = materials(args, given)
    if own and as_absent(ready.teachers[None]) is None:  # as the student's is in a training: it counts in what is kept
        align_pad_token(ready.teachers[None], ready.tokenizer)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, deepspeed_plugin=args.deepspeed_plugin)
    if args.deepspeed_plugin is not None and getattr(args, "hf_deepspeed_config", None) is None:
        propagate_args_to_deepspeed(accelerator, args)  # fills in its "auto" values, as the Trainer does
    parts = assemble(ready, accelerator)
    assert ready.train is not None
    common = Precomputation(
        rows=ready.train,
        evaluation=evaluation_sets(ready.evaluation),
        tokenizer=ready.tokenizer,
        teacher=parts.teacher,
        answers=None,
        hygiene=parts.hygiene,
        alignment=parts.alignment,
        accelerator=accelerator,
        batch_size=args.rollout_batch_size or 4 * args.per_device_train_batch_size,
        held_out={name: part for name, part in data.items() if name != "train"},
    )
    works = [_of_teacher(common, args, parts, number) for number in range(max(1, len(args.teacher_names)))]
    return [work for work in works if len(work.rows) or any(map(len, work.evaluation))]


def _of_teacher(common: Precomputation, args: GKDConfig, parts: Parts, number: int) -> Precomputation:
    """What one of the teachers does; the only one does all of it."""
    name = args.teacher_names[number] if args.teacher_names else None
    side = parts.sides[name if args.teachers is not None else None]
    teacher, rollout = side.teacher, side.rollout
    if args.teacher_adapters is not None:
        assert teacher is not None
        teacher, rollout = teacher.each()[number], rollout.each()[number]
    answers: Any = rollout if args.seq_kd else None
    if answers is not None and answers.store is None:  # lmbda=1: training would not ask the teacher
        place: Any = side.server if side.server is not None or teacher is None else teacher.model
        answers = keep_completions(answers, side.args, place, common.accelerator)
    batch_size = common.batch_size
    if side.server is None:
        batch_size = rows_at_a_time(args, side.model.config, common.accelerator.device)
    own: dict[str, Any] = {}
    if name is not None:
        rows, *evaluation = (rows_of_teacher(rows, number) for rows in (common.rows, *common.evaluation))
        own = {"name": name, "rows": rows, "evaluation": evaluation}
    return replace(common, teacher=teacher, answers=answers, batch_size=batch_size, **own)


def _teacher_is_the_base(args: GKDConfig) -> bool:
    """Whether the teacher is the student's own base, as it is.

    Raises:
        ValueError: it is none that could be loaded by itself.
    """
    if args.teacher_follows:
        raise ValueError(
            f"gkd precompute does not go with self_teacher={args.self_teacher!r}, which changes with every step of "
            "the training: use self_teacher='base', or leave gkd precompute out"
        )
    tuned = args.shares_weights and args.teacher_adapter_name_or_path is not None
    if tuned or (args.shares_weights and args.teacher_names):
        raise ValueError(
            "gkd precompute loads teachers and no student, so adapters on its base (share_base_model with "
            "teacher_adapter_name_or_path, teacher_adapters or teachers) do not go with it: leave gkd precompute out, "
            "their sequences and scores are kept during the training"
        )
    return args.shares_weights


def _name_the_base(args: GKDConfig, student: str) -> None:
    """The student's base as a teacher by its name, loaded as the student is."""
    base = base_name(student)
    kwargs: Any = dict(args.model_init_kwargs or {})
    if base != student:  # the student is an adapter, whose revision is no revision of its base
        kwargs.pop("revision", None)
    args.self_teacher, args.share_base_model = None, False
    args.teacher_model_name_or_path, args.teacher_model_init_kwargs = base, kwargs


def fill(work: Precomputation) -> None:
    """Let who writes answer what is not answered yet, each prompt once, longest first. All ranks call this."""
    store, accelerator = work.rollout.store, work.accelerator
    prompts = [list(prompt) for prompt in dict.fromkeys(tuple(p) for p in _prompts(work))]
    store.refresh()
    missing = [prompt for prompt in prompts if prompt not in store]
    missing.sort(key=len, reverse=True)
    # Other runs may add to the store meanwhile, so one rank's view of what is missing counts.
    missing = broadcast_object_list([missing])[0]
    done = len(prompts) - len(missing)
    logger.info("%s of %s different prompts are answered already", f"{done:,}", f"{len(prompts):,}")
    with SignOfLife("answering", len(missing), "prompt", leave=True) as sign:
        tokens, size = 0, work.batch_size * accelerator.num_processes
        for start in range(0, len(missing), size):
            share = missing[start : start + size][accelerator.process_index :: accelerator.num_processes]
            tokens += sum(map(len, work.rollout.generate(share, 0)))
            sign.tick(min(size, len(missing) - start))
            if sign.bar is not None:
                sign.bar.set_postfix({"tokens": f"{tokens * accelerator.num_processes:,}"})
    accelerator.wait_for_everyone()
    store.refresh()


def rows_of_all(works: list[Precomputation]) -> tuple[Dataset, dict[str, int]]:
    """`answered_rows` of all teachers together; of several, with the column `teacher`."""
    if len(works) == 1 and works[0].name is None:
        return answered_rows(works[0])
    parts, left_out = [], {"truncated": 0, "repetitive": 0, "unreadable": 0}
    for work in works:
        if not len(work.rows):
            continue
        rows, out = answered_rows(work)
        parts.append(rows.add_column("teacher", [work.name] * len(rows)))
        left_out = {why: number + out[why] for why, number in left_out.items()}
    return concatenate_datasets(parts).sort("source_row"), left_out


def answered_rows(work: Precomputation) -> tuple[Dataset, dict[str, int]]:
    """The rows with the answers, in the order of the recipe's data set, and how many are left out and why.

    Rows that training would not train on (`mask_truncated_completions`, `drop_repetitive_completions`) are left out,
    and so is an answer with an id that stands for no token of the student's tokenizer.
    """
    read = work.hygiene.rewriting is None and bool(set(_OF_A_VIEW) & set(work.rows.column_names))
    features = Features({**_COLUMNS, **(_OF_A_VIEW if read else {})})
    columns: dict[str, list[Any]] = {name: [] for name in features}
    left_out = {"truncated": 0, "repetitive": 0, "unreadable": 0}
    known = max(work.tokenizer.get_vocab().values())
    for sequence in map(sequence_of, columns_read(work.rows.sort("row"))):
        written = work.rollout.store.get(_prompt(sequence, work.source))
        answer, verdict = work.hygiene.received(written, work.source)
        if not work.hygiene.trains(verdict):
            left_out["repetitive" if verdict.repetitive else "truncated"] += 1
            continue
        found = join(
            sequence.prompt,
            answer,
            work.source,
            sequence.row,
            teacher_prompt=() if work.hygiene.rewriting else sequence.teacher_prompt,
            end_map=work.hygiene.end_map,
        )
        prompt, completion = sequence.prompt, found.input_ids[found.prompt_length :]
        if max(completion, default=0) > known:
            left_out["unreadable"] += 1
            continue
        row = {
            "prompt": work.tokenizer.decode(prompt),
            "completion": work.tokenizer.decode(completion),
            "input_ids": [*prompt, *completion],
            "labels": [IGNORE] * len(prompt) + completion,
            "prompt_length": len(prompt),
            "truncated": verdict.truncated,
            "repetitive": verdict.repetitive,
            "source_row": sequence.row,
            "teacher_context": found.teacher_context,
        }
        for name, values in columns.items():
            values.append(row[name])
    if not columns["input_ids"]:
        raise ValueError(
            f"no answer of {work.of_whom} is left for the data set ({left_out}): raise max_new_tokens, or set "
            "mask_truncated_completions and drop_repetitive_completions to false"
        )
    return Dataset.from_dict(columns, features=features), left_out


def _prompts(work: Precomputation) -> Iterable[list[int]]:
    """What is answered."""
    return (_prompt(sequence_of(row), work.source) for row in columns_read(work.rows))


def _prompt(sequence: TokenSequence, source: str) -> list[int]:
    return sequence.teacher_prompt if source == "teacher" else sequence.prompt


def provenance(recipe: Recipe, works: list[Precomputation], kept: int, left_out: dict[str, int]) -> dict[str, Any]:
    """How the rows were made, as JSON: models, sampling, data, date, versions, command."""
    script, args = recipe.settings.script, recipe.settings.training
    made = {str(work.name): work.rollout.store.about() for work in works}
    names = {name: public_name(one["notes"]["teacher"]) or "in memory" for name, one in made.items()}
    first, *others = made.values()
    several = bool(others) or works[0].name is not None
    return {
        "rows": kept,
        "left_out": left_out,
        "teacher": ", ".join(f"{name}: {of}" for name, of in names.items()) if several else names["None"],
        "teacher_revision": None if several else first["notes"]["revision"],
        "key": {**first["key"], "model": {name: one["key"]["model"] for name, one in made.items()}}
        if several
        else first["key"],
        "tokenizer": public_name(recipe.settings.model.model_name_or_path),
        "prompts": {
            "dataset": ", ".join(str(public_name(name)) for name in script.names) or None,
            "config": script.dataset_config,
            "split": script.dataset_train_split,
            "max_prompt_length": args.prompt_limit,
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": installed_versions(),
        "command": redact_command([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    }


def public_name(name: str | None) -> str | None:
    """A repository's id, or the last part of a path: the record may be pushed."""
    return Repo(name).display_name if name else None
