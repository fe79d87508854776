"""The models of a run, loaded, and how each one answers: through transformers' own generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)

from gkd.commands.export.merging import check_run
from gkd.data.vocabulary import same_token_maps, stop_token_ids
from gkd.models.adapters import load_adapter, merged
from gkd.models.facts import position_limit
from gkd.models.loading import adapter_config, base_name, load_errors_named, load_tokenizer
from gkd.models.quantized import keep_layout, with_quantization
from gkd.training.origin import Origin, read_origin

BEFORE, AFTER, TEACHER = "before", "after", "teacher"
NAMES = (BEFORE, AFTER, TEACHER)
Turns = list[dict[str, str]]
Tell = Callable[[str], None]
Load = Callable[..., Any]


@dataclass(frozen=True)
class Manner:
    """How answers are written: at most `max_new_tokens`, greedily at temperature 0, else sampled from `seed`."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What was written; `ended`: by itself."""

    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class Speaker:
    """One model of a run. `entered` gives the context in which it is that one."""

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    entered: Callable[[], AbstractContextManager[Any]] = nullcontext

    def prompt(self, turns: Turns) -> list[int]:
        """Token ids: the chat in the template, or the last turn where there is none."""
        if self.tokenizer.chat_template is None:
            return list(self.tokenizer(turns[-1]["content"])["input_ids"])
        found = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        return list(found["input_ids"])

    @torch.no_grad()
    def answer(self, turns: Turns, manner: Manner, tell: Tell | None = None) -> Answer:
        """Write an answer; `tell` is given its text piece by piece.

        Raises:
            ValueError: prompt and answer have no room in the model.
        """
        ids = self.prompt(turns)
        room, binds = position_limit(self.model.config)
        if room is not None and binds and len(ids) + manner.max_new_tokens > room:
            raise ValueError(
                f"--max_new_tokens {manner.max_new_tokens} behind {len(ids)} tokens is more than the {room} positions "
                f"of the model {self.name!r}: lower it, or begin anew"
            )
        stops = stop_token_ids(self.tokenizer, self.model.generation_config)
        set_seed(manner.seed)
        with self.entered():
            out = self.model.generate(
                input_ids=torch.tensor([ids], device=self.model.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=self.model.device),
                generation_config=_generation(manner, stops, self.tokenizer.pad_token_id),
                streamer=None if tell is None else _Pieces(self.tokenizer, tell),
            )
        written = out[0, len(ids) :].tolist()
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        return Answer(str(text), len(written), bool(written) and written[-1] in stops)


def _generation(manner: Manner, stops: Sequence[int], pad: int | None) -> GenerationConfig:
    """Nothing of the model's own habits but where it stops: top-k, penalties and the like would hide differences."""
    sampled = {"temperature": manner.temperature, "top_p": 1.0, "top_k": 0} if manner.temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=manner.max_new_tokens,
        do_sample=manner.temperature > 0,
        repetition_penalty=1.0,
        eos_token_id=list(stops) or None,
        pad_token_id=pad,
        **sampled,
    )


class _Pieces(TextStreamer):
    """Hands whole words on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tell: Tell) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._tell = tell

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._tell(text)


def load_speakers(
    run: Path,
    asked: Sequence[str] = NAMES,
    *,
    teacher: str | None = None,
    trust_remote_code: bool = False,
    say: Tell = lambda text: None,
) -> list[Speaker]:
    """The models of a run that can be had.

    Args:
        run: its output folder, or a checkpoint.
        asked: which of NAMES.
        teacher: another one than the run's: a name or a folder, also of an adapter.
        trust_remote_code: let the models' own code run.
        say: is told what is loaded, and what cannot be.

    Raises:
        ValueError: there is no model in the folder, or one that was asked for cannot be loaded.
    """
    adapter, origin = check_run(run), read_origin(run)
    tokenizer = load_tokenizer(str(run), trust_remote_code=trust_remote_code)
    load = partial(_loaded, trust_remote_code=trust_remote_code, say=say)
    of_student = _of_adapter if adapter is not None else _of_whole
    found = of_student(run, origin, tokenizer, [name for name in asked if name != TEACHER], load, say)
    if TEACHER in asked:
        found += _teacher(teacher, origin, tokenizer, load, say)
    if not found:
        raise ValueError(f"--models {','.join(asked)}: none of them can be had from {str(run)!r}; try --models after")
    return found


def _of_adapter(
    run: Path, origin: Origin, tokenizer: PreTrainedTokenizerBase, asked: Sequence[str], load: Load, say: Tell
) -> list[Speaker]:
    """A run that trained an adapter: the student before is the base, or the base with the adapter it went on with."""
    first = origin.student
    goes_on = first is not None and base_name(first) != first
    found = []
    if BEFORE in asked and goes_on:
        assert first is not None
        found.append(Speaker(f"student {BEFORE}", load(first, None, origin.quantization), tokenizer))
    if AFTER in asked or (BEFORE in asked and not goes_on):
        model = load(str(run), None, origin.quantization)
        if BEFORE in asked and not goes_on:
            found.append(Speaker(f"student {BEFORE}", model, tokenizer, model.disable_adapter))
        if AFTER in asked:
            found.append(Speaker(f"student {AFTER}", model, tokenizer))
    return found


def _of_whole(
    run: Path, origin: Origin, tokenizer: PreTrainedTokenizerBase, asked: Sequence[str], load: Load, say: Tell
) -> list[Speaker]:
    """A run that trained all weights: the student before is a model of its own."""
    found = []
    if BEFORE in asked and origin.student is None:
        say("the student before the training is not known here, and left out")
    elif BEFORE in asked:
        found.append(Speaker(f"student {BEFORE}", load(origin.student, origin.student_revision), tokenizer))
    if AFTER in asked:
        found.append(Speaker(f"student {AFTER}", load(str(run)), tokenizer))
    return found


def _teacher(
    named: str | None, origin: Origin, tokenizer: PreTrainedTokenizerBase, load: Load, say: Tell
) -> list[Speaker]:
    if named is not None:
        origin = Origin(teacher=named)
    if origin.teacher is None:
        say(f"no teacher: {origin.teacher_in_words or 'the folder does not name one'} (--teacher NAME)")
        return []
    model = load(origin.teacher, origin.teacher_revision)
    if origin.teacher_adapter is not None:
        say(f"with the adapter {origin.teacher_adapter}")
        model = merged(load_adapter(model, origin.teacher_adapter, "--teacher"))
    own = load_tokenizer(origin.teacher, revision=origin.teacher_revision)
    reads_own = origin.teacher_template == "own" or not same_token_maps(tokenizer, own)
    return [Speaker(TEACHER, model, own if reads_own else tokenizer)]


def _loaded(
    name: str,
    revision: str | None = None,
    quantization: dict[str, Any] | None = None,
    *,
    trust_remote_code: bool,
    say: Tell,
) -> Any:
    """A model, or an adapter on its base, on the best device there is."""
    adapter = adapter_config(name, revision)
    if adapter is not None:
        base = str(adapter["base_model_name_or_path"])
        model = _loaded(base, adapter.get("revision"), quantization, trust_remote_code=trust_remote_code, say=say)
        say(f"with the adapter {name}")
        return load_adapter(model, name, "the adapter").to(model.device)
    say(f"loading {name}")
    options: dict[str, Any] = {"dtype": "auto", "trust_remote_code": trust_remote_code, "revision": revision}
    if quantization is not None:
        options |= with_quantization({"quantization_config": quantization}, torch.float32, "the student")
    with load_errors_named(f"the model {name!r}", "it has to be where it was during the run, or on the Hub"):
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed = bool(getattr(model, "is_quantized", False))
    return keep_layout((model if packed else model.to(device)).eval())
