"""What every rollout backend shares: its interface, the sampling settings, the random numbers; the backends by name.

A rollout takes prompts (token ids) and gives completions (token ids): the stop token is part of a completion when it
was sampled, nothing follows it, and there is never any padding.
"""

from __future__ import annotations

import math
import pkgutil
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any

from gkd.common.ranges import called, whole, within
from gkd.common.text import shorten

if TYPE_CHECKING:  # the config reads the names below, and `gkd --help` is quick
    from gkd.rollouts.store import SequenceStore

# The values of the field `rollout_backend`, and the class that each stands for; loaded when it is asked for.
BACKENDS = {
    "hf": "gkd.rollouts.hf:HFRollout",
    "vllm": "gkd.rollouts.vllm:VLLMRollout",
}

# What `generation_kwargs` may hold beside the fields of SamplingSettings: rules on the next token that transformers
# applies row by row, without state between steps. Everything else is refused by name, so that a typo cannot be lost.
EXTRA_OPTIONS = frozenset(
    {
        "bad_words_ids",
        "begin_suppress_tokens",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "logits_processor",
        "min_new_tokens",
        "no_repeat_ngram_size",
        "prefill_chunk_size",
        "remove_invalid_values",
        "sequence_bias",
        "suppress_tokens",
        "top_h",
        "typical_p",
    }
)
# Options that a field of ours already decides, and which field that is.
_OWNED_OPTIONS = {
    "do_sample": "temperature (0 takes the most likely token)",
    "eos_token_id": "the stop token ids",
    "max_length": "max_new_tokens",
    "max_new_tokens": "max_new_tokens",
    "min_p": "min_p",
    "pad_token_id": "the tokenizer's padding token",
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
}


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are sampled. Complete: nothing is taken from a model's own generation config.

    Attributes:
        max_new_tokens: cap on the completion, stop token included.
        temperature: divides the logits before sampling; 0 takes the most likely token (greedy).
        top_p: keep the smallest set of tokens with this much probability; 1 keeps all.
        top_k: keep the k most likely tokens; 0 keeps all.
        min_p: drop tokens below this share of the most likely token's probability; None keeps all.
        repetition_penalty: divides positive, multiplies negative logits of tokens already in the row; 1 is off.
        stop_ids: a completion ends with the first of these tokens.
        pad_id: fills short rows; never read as a token, so it may equal a stop token.
        extra: further rules, see `EXTRA_OPTIONS`.
        names: what the user calls an attribute, where that is another name: for errors only.

    Raises:
        ValueError: a value out of range, or an option in `extra` that is unknown or belongs to another field.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()
    pad_id: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    names: InitVar[Mapping[str, str] | None] = None

    def in_words(self) -> str:
        """One line for a log."""
        how = f"sampled at temperature {self.temperature:g}" if self.temperature else "greedy"
        off = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
        more = [f"{name} {getattr(self, name):g}" for name, value in off.items() if getattr(self, name) != value]
        more += [f"{name} {shorten(str(value), 40)}" for name, value in self.extra.items()]
        ids = ", ".join(map(str, self.stop_ids[:4])) + (", ..." if len(self.stop_ids) > 4 else "")
        return ", ".join([how, f"at most {self.max_new_tokens} tokens", f"stop ids {ids or 'none'}", *more])

    def __post_init__(self, names: Mapping[str, str] | None) -> None:
        whole("max_new_tokens", self.max_new_tokens, 1)
        within(called("temperature", names), self.temperature, 0, math.inf, "use 0 for greedy; the paper samples at 1")
        within("top_p", self.top_p, 0, 1, "use 1 to turn it off", above=True)
        whole("top_k", self.top_k, 0)
        if self.min_p is not None:
            within("min_p", self.min_p, 0, 1, "use None to turn it off")
        within("repetition_penalty", self.repetition_penalty, 0, math.inf, "use 1 to turn it off", above=True)
        for token in self.stop_ids:
            whole("stop_ids", token, 0)
        whole("pad_id", self.pad_id, 0)
        for key in self.extra:
            if key in _OWNED_OPTIONS:
                raise ValueError(f"generation_kwargs[{key!r}] is decided by {_OWNED_OPTIONS[key]}: set it there")
            if key not in EXTRA_OPTIONS:
                raise ValueError(f"generation_kwargs[{key!r}] is unknown here: use {', '.join(sorted(EXTRA_OPTIONS))}")

    @property
    def greedy(self) -> bool:
        """True when the most likely token is taken instead of a sample."""
        return self.temperature == 0


@dataclass(frozen=True, kw_only=True)
class RolloutOrder:
    """All that a run has for a backend, which takes of it what it needs (`Rollout.of`).

    Attributes:
        settings: how to sample.
        get_model: gives the model as the trainer holds it (bare, DDP, DeepSpeed engine) at the time of the call.
        accelerator: its autocast, and the other ranks.
        seed: the run's seed, part of the key of the random numbers.
        source: `"student"` or `"teacher"`, so that the two draw different numbers for the same row.
        batch_size: rows decoded at once, or a function that tells them of the model's config and device.
        fold_adapter: whether a LoRA adapter may be folded into the weights meanwhile.
        server: a `gkd.servers.checks.Server` that has been looked at; None where the model is in this process.
        adapter_dir: where the student's adapter, or its weights, are written for a server.
        vocabulary: ids from here on the other model cannot read; None allows all.
        log_probs: whether the log-probabilities of the sampled tokens are wanted.
        num_completions: so many rows with consecutive numbers have the same prompt.
        shares_device: whether the server is on the GPUs of the training.
    """

    settings: SamplingSettings
    get_model: Callable[[], Any]
    accelerator: Any
    seed: int
    source: str = "student"
    batch_size: int | Callable[[Any, Any], int] | None = None
    fold_adapter: bool = True
    server: Any = None
    adapter_dir: str = "rollout_adapters"
    vocabulary: int | None = None
    log_probs: bool = False
    num_completions: int = 1
    shares_device: bool = False


class Rollout(ABC):
    """A backend that samples completions. A new one says how it is made (`of`) and how it writes (`generate`).

    Attributes:
        settings: how it samples.
        age: of the weights that sampled the last completions, in optimizer steps; 0 is on-policy.
        log_probs: what it says of the tokens of each of the last completions; empty where it says nothing.
        server_field: the field that names its servers; None where it samples in this process.
        store: where its completions are kept; None where each is sampled anew.
        tick: is told how many more completions are there, by a backend that writes them in turn.
    """

    age: int = 0
    log_probs: Sequence[list[float]] = ()
    server_field: str | None = None
    store: SequenceStore | None = None
    tick: Callable[[int], None] | None = None

    def __init__(self, settings: SamplingSettings) -> None:
        self.settings = settings

    @classmethod
    def of(cls, order: RolloutOrder) -> Rollout:
        """Made for a run."""
        return cls(order.settings)

    @abstractmethod
    def generate(
        self, prompts: list[list[int]], step: int, rows: list[int] | None = None, teachers: list[int] | None = None
    ) -> list[list[int]]:
        """Sample one completion for each prompt.

        Args:
            prompts: token ids, one list per row; may be empty, a prompt may not.
            step: number of the optimizer step; part of the key of the random numbers.
            rows: each prompt's number in the window of all ranks (default 0, 1, ...); the rest of that key.
            teachers: number of each row's teacher, which matters where several write.

        Returns:
            Completions in the order of the prompts: the ids after the prompt, with the stop token when it was sampled.
        """

    def each(self) -> Sequence[Rollout]:
        """The rollouts that this one is made of, in the order of their teachers' numbers: itself, or several."""
        return [self]

    def generate_ahead(self, prompts: list[list[int]], step: int, rows: list[int]) -> None:  # noqa: B027
        """Begin with the next step's completions, where that can go on beside the training; else nothing happens."""

    def forget(self) -> None:  # noqa: B027
        """Give up what was asked for ahead."""

    def _numbered(self, prompts: list[list[int]], rows: list[int] | None) -> list[int]:
        """The row numbers, one for each prompt."""
        rows = list(range(len(prompts))) if rows is None else rows
        assert len(rows) == len(prompts), f"{len(prompts)} prompts with {len(rows)} row numbers"
        return rows

    def _check_prompts(
        self,
        prompts: list[list[int]],
        step: int,
        rows: list[int],
        room: int | None = None,
        *,
        limit: str = "",
        remedy: str = "lower max_new_tokens or max_prompt_length",
    ) -> None:
        """Refuse a prompt that cannot be completed.

        Args:
            room: tokens that a sequence may have, as `limit` puts it; None is not bounded.
            remedy: what to do about a long one.

        Raises:
            ValueError: an empty prompt, or one that leaves no room for `max_new_tokens`; the row is named.
        """
        for prompt, row in zip(prompts, rows, strict=True):
            if not prompt:
                raise ValueError(f"row {row} of step {step} has an empty prompt: give it at least one token")
            if room is not None and len(prompt) + self.settings.max_new_tokens > room:
                raise ValueError(
                    f"row {row}: a prompt of {len(prompt)} tokens and max_new_tokens={self.settings.max_new_tokens} "
                    f"exceed {limit}: {remedy}"
                )


def backend(name: str) -> type[Rollout]:
    """The class of a value of `rollout_backend`."""
    kind: type[Rollout] = pkgutil.resolve_name(BACKENDS[name])
    return kind


def row_uniforms(seed: int, step: int, row: int, source: str, count: int) -> list[float]:
    """The random numbers of one completion: `count` draws from U[0, 1), one for each token, float64; a longer cap
    keeps the start of the stream."""
    rng = _random_of(seed, step, row, source)
    return [rng.random() for _ in range(count)]


def row_seed(seed: int, step: int, row: int, source: str) -> int:
    """A server's seed for one completion: 62 bits."""
    return _random_of(seed, step, row, source).getrandbits(62)


def _random_of(seed: int, step: int, row: int, source: str) -> random.Random:
    """A function of the key only, so a completion depends neither on the rank nor on the rows next to it. A string
    seed goes through SHA-512, so neighbouring keys are unrelated."""
    return random.Random(f"gkd rollout {source} {seed} {step} {row}")
