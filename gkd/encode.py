"""Token ids and labels of one row: where the answer begins and ends, found from texts and lengths, never from ids.

A chat is rendered twice by its template, as prompt (with the generation prompt) and with the answer. The prompt's ids
are what a rollout starts from, so they are kept whole: if the tokenizer would merge a token across the border of
prompt and answer, the answer is tokenized on its own, as it is when a model writes it. The answer ends with the
end-of-turn token, which is trained; what a template writes after it is cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from gkd.batch import IGNORE
from gkd.markdown import printable
from gkd.rows import ChatRow, Message, Place, Row, TextRow, TokenRow
from gkd.vocab import end_of_turn, stop_token_ids


@dataclass(frozen=True)
class Encoded:
    """One row in ids; `notes` are keys of `gkd.data.NOTES`.

    A rollout starts from `prompt`: `prompt_ids` where the row begins otherwise, else `input_ids[:prompt_length]`.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    notes: tuple[str, ...] = ()
    prompt_ids: list[int] = field(default_factory=list)

    @property
    def prompt(self) -> list[int]:
        return self.prompt_ids or self.input_ids[: self.prompt_length]

    @property
    def prompt_only(self) -> bool:
        return all(label == IGNORE for label in self.labels)

    def starting_from(self, prompt: list[int]) -> Encoded:
        """With this prompt for rollouts, which is kept beside the row only where the row does not begin with it."""
        same = self.input_ids[: self.prompt_length] == prompt
        return replace(self, prompt_ids=[] if same else prompt)

    def noted(self, note: str, **changes: Any) -> Encoded:
        return replace(self, notes=(*self.notes, note), **changes)


@dataclass(frozen=True)
class Limits:
    """Lengths in tokens, None = no limit, and what happens to rows beyond them; see `gkd.data.prepare_dataset`."""

    max_length: int | None = None
    max_prompt_length: int | None = None
    overlong_prompt: str = "drop"
    overlong_row: str = "cut"

    def __post_init__(self) -> None:
        choices = {"overlong_prompt": ("drop", "keep_start", "keep_end"), "overlong_row": ("cut", "drop")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: use one of {', '.join(known)}")
        for name in ("max_length", "max_prompt_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} should be at least 1, or None for no limit")

    def fit(self, row: Encoded, bos: int | None) -> Encoded:
        """The row within the limits, or with a note from `gkd.data.DROPPED`."""
        row = self._fit_prompt(row, bos)
        dropped = "prompt_too_long" in row.notes
        if dropped or self.max_length is None or len(row.input_ids) <= self.max_length or row.prompt_only:
            return row
        if row.prompt_length >= self.max_length:
            return row.noted("no_room")
        if self.overlong_row == "drop":
            return row.noted("row_too_long")
        return row.noted("row_cut", input_ids=row.input_ids[: self.max_length], labels=row.labels[: self.max_length])

    def _fit_prompt(self, row: Encoded, bos: int | None) -> Encoded:
        limit, length = self.max_prompt_length, row.prompt_length
        if limit is None or max(length, len(row.prompt)) <= limit:
            return row
        if self.overlong_prompt == "drop":
            return row.noted("prompt_too_long")
        places = self._kept(row.input_ids[:length], limit, bos)
        kept = [*places, *range(length, len(row.input_ids))]
        ids, labels = [row.input_ids[i] for i in kept], [row.labels[i] for i in kept]
        prompt = [row.prompt[i] for i in self._kept(row.prompt, limit, bos)]
        row = row.noted("prompt_cut", input_ids=ids, labels=labels, prompt_length=len(places))
        return row.starting_from(prompt)

    def _kept(self, prompt: list[int], limit: int, bos: int | None) -> list[int]:
        """Which places of a prompt stay within the limit."""
        length = len(prompt)
        if length <= limit or self.overlong_prompt == "keep_start":
            return list(range(min(length, limit)))
        head = [0] if prompt[0] == bos and limit > 1 else []  # the one BOS stays in front
        return head + list(range(length - limit + len(head), length))


class RowEncoder:
    """Turns rows into ids with one tokenizer.

    Args:
        tokenizer: its padding and truncation settings do not matter.
        assistant_turns: "last" trains on the final assistant turn, "all" on every one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, assistant_turns: str = "last") -> None:
        if assistant_turns not in ("last", "all"):
            raise ValueError(f"assistant_turns={assistant_turns!r} is unknown: use 'last' or 'all'")
        self.tokenizer = tokenizer
        self.all_turns = assistant_turns == "all"
        self.turn = end_of_turn(tokenizer)
        self.stop_ids = stop_token_ids(tokenizer, None)
        self.stop_texts = [str(tokenizer.convert_ids_to_tokens(i)) for i in self.stop_ids]
        bos = tokenizer.bos_token_id
        self._adds_bos = bos is not None and [bos] == tokenizer("a")["input_ids"][:1] != self._raw("a")[:1]

    def encode(self, row: Row, place: Place) -> Encoded:
        """Ids and labels of a row, of any length. Raises ValueError when the template or the ids are at fault."""
        if isinstance(row, ChatRow):
            return self._chat(row, place)
        return self._text(row) if isinstance(row, TextRow) else self._tokens(row, place)

    # -------------------------------------------------------------------------------------------- text to ids

    def _raw(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _ids(self, text: str, bos: bool = False) -> list[int]:
        """Ids of a text from its beginning, with one BOS where the text or `bos` asks for any."""
        ids, first = self._raw(text), self.tokenizer.bos_token_id
        if bos and self._adds_bos:
            ids = [first, *ids]
        while len(ids) > 1 and first is not None and ids[0] == ids[1] == first:
            del ids[0]
        return ids

    def _segments(self, text: str, cuts: list[int], bos: bool = False) -> tuple[list[int], list[int], bool]:
        """Ids of `text`, and for each cut (ascending, the last the end of the text) the number of ids before it.

        The third value is False if ids before a cut had to be given up, because no tokenization breaks there.
        """
        ids: list[int] = []
        counts: list[int] = []
        exact, before = True, 0
        for cut in cuts:
            whole = self._ids(text[:cut], bos)
            kept = common_prefix(ids, whole)
            if kept < len(ids):
                joined = ids + self._raw(text[before:cut])
                if self._decode(joined) == self._decode(whole):
                    whole = joined
                else:
                    exact = False
                    counts = [min(count, kept) for count in counts]
            ids, before = whole, cut
            counts.append(len(ids))
        return ids, counts, exact

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _closed(self, text: str) -> str:
        """`text` without what stands behind the stop token that ends its last answer."""
        if self.turn and self.turn.closing and text.endswith(self.turn.closing):
            return text[: -len(self.turn.closing)] + self.turn.kept
        end, rest = None, text.rstrip()
        while stop := next((stop for stop in self.stop_texts if rest.endswith(stop)), None):
            end, rest = len(rest), rest[: -len(stop)].rstrip()
        return text[:end]

    def _with_stop(self, encoded: Encoded, note: str | None) -> Encoded:
        """Appends eos, as a target, to an answer that no stop token ends."""
        eos = self.tokenizer.eos_token_id
        if eos is None or encoded.labels[-1] in self.stop_ids:
            return encoded
        ids, labels = [*encoded.input_ids, eos], [*encoded.labels, eos]
        encoded = replace(encoded, input_ids=ids, labels=labels)
        return encoded.noted(note) if note else encoded

    # ---------------------------------------------------------------------------------------------------- chats

    def _chat(self, row: ChatRow, place: Place) -> Encoded:
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{place.dataset} data set, row {place.number} is a chat, but the tokenizer has no chat template: use "
                f"an instruction-tuned model's tokenizer, set chat_template_path, or give plain text prompts"
            )
        messages = row.messages
        if row.answer is None:
            ids = self._ids(self._render(row, messages, place, generate=True))
            return Encoded(ids, [IGNORE] * len(ids), len(ids))
        prompt = self._render(row, messages[: row.answer], place, generate=True)
        text = self._closed(self._render(row, messages, place))
        spans, lost = self._earlier_turns(row, text, place) if self.all_turns else ([], False)
        prefix, untrained = text.startswith(prompt), row.answer in row.untrained
        if prefix and not untrained:
            spans.append((len(prompt), len(text)))
        cuts = sorted({cut for span in spans for cut in span} | {len(prompt) if prefix else len(text), len(text)})
        ids, counts, exact = self._segments(text, cuts)
        at = dict(zip(cuts, counts, strict=True))
        served = self._ids(prompt)
        start = at[len(prompt)] if prefix else common_prefix(served, ids)
        if start == 0:
            place.bad("messages", "the chat template renders the prompt and the whole chat with different beginnings")
        labels = [IGNORE] * len(ids) if untrained else [IGNORE] * start + ids[start:]
        for first, last in spans:
            labels[at[first] : at[last]] = ids[at[first] : at[last]]
        encoded = Encoded(ids, labels, start).starting_from(served)
        if encoded.prompt_ids or not exact:
            encoded = encoded.noted("prompt_not_prefix")
        if lost:
            encoded = encoded.noted("turn_not_found")
        if untrained:
            return encoded if spans else encoded.noted("untrained")
        if _is_empty(messages[row.answer]) or (prefix and self._is_bare(text[len(prompt) :])):
            encoded = encoded.noted("empty_answer")
        return self._with_stop(encoded, "eos_appended")

    def _render(self, row: ChatRow, messages: list[Message], place: Place, generate: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=row.tools, add_generation_prompt=generate, tokenize=False, **row.template_kwargs
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(
                f"{place.dataset} data set, row {place.number}: the chat template cannot render the roles "
                f"{printable(', '.join(message['role'] for message in messages))}: {printable(str(error))}"
            ) from error
        return str(text)

    def _earlier_turns(self, row: ChatRow, text: str, place: Place) -> tuple[list[tuple[int, int]], bool]:
        """Where the assistant turns before the last stand in `text`, as (start, end); whether one was not found.

        A turn starts where the rendering of what precedes it, with the generation prompt, ends. It ends where the
        rendering up to it does; or, in templates that write an earlier turn otherwise than a last one (without its
        thoughts, say), at the first stop token before the next assistant turn.
        """
        numbers = [i for i, message in enumerate(row.messages) if i > 0 and message["role"] == "assistant"]
        numbers = [i for i in numbers if i == row.answer or i not in row.untrained]
        prompts = [self._render(row, row.messages[:i], place, generate=True) for i in numbers]
        starts = [len(prompt) if text.startswith(prompt) else None for prompt in prompts]
        spans: list[tuple[int, int]] = []
        for i, start, limit in zip(numbers, starts, starts[1:], strict=False):
            if start is None:
                continue
            closed = self._closed(self._render(row, row.messages[: i + 1], place))
            if text.startswith(closed):
                spans.append((start, len(closed)))
                continue
            ends = [text.index(stop, start) + len(stop) for stop in self.stop_texts if stop in text[start:limit]]
            if limit is not None and ends:
                spans.append((start, min(ends)))
        return [span for span in spans if not self._is_bare(text[slice(*span)])], len(spans) < len(numbers) - 1

    def _is_bare(self, text: str) -> bool:
        """Whether a turn's text is a stop token and nothing else."""
        for stop in self.stop_texts:
            text = text.replace(stop, "")
        return not text.strip()

    # ------------------------------------------------------------------------------------------- texts, token ids

    def _text(self, row: TextRow) -> Encoded:
        if row.completion is None:
            ids = self._ids(row.prompt, bos=True)
            return Encoded(ids, [IGNORE] * len(ids), len(ids))
        completion = self._closed(row.completion) if any(stop in row.completion for stop in self.stop_texts) else None
        text = row.prompt + (row.completion if completion is None else completion)
        cuts = [len(row.prompt), len(text)]
        ids, counts, _ = self._segments(text, cuts, bos=True)
        encoded = Encoded(ids, [IGNORE] * counts[0] + ids[counts[0] :], counts[0])
        encoded = encoded.starting_from(self._ids(row.prompt, bos=True))
        if encoded.prompt_ids:
            encoded = encoded.noted("prompt_not_prefix")
        if not row.completion.strip():
            encoded = encoded.noted("empty_answer")
        return self._with_stop(encoded, None)

    def _tokens(self, row: TokenRow, place: Place) -> Encoded:
        known = max(self.tokenizer.get_vocab().values())
        if wrong := [i for i in row.input_ids if not 0 <= i <= known]:
            place.bad("input_ids", f"holds the id {wrong[0]}, but the tokenizer's ids end at {known}")
        return Encoded(row.input_ids, row.labels, row.prompt_length)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids both begin with."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _is_empty(message: Message) -> bool:
    return not message["content"].strip() and not any(
        message.get(key) for key in ("tool_calls", "reasoning_content", "thinking")
    )
