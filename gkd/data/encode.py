"""Token ids and labels of one row: where the answer begins and ends, found from texts and lengths, never from ids.

A chat is rendered twice by its template, as prompt (with the generation prompt) and with the answer. The prompt's ids
are what a rollout starts from, so they are kept whole: if the tokenizer would merge a token across the border of
prompt and answer, the answer is tokenized on its own, as it is when a model writes it. The answer ends with the
end-of-turn token, which is trained; what a template writes after it is cut off.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from gkd.common.text import printable
from gkd.data.encoded import Answers, Encoded
from gkd.data.formats import ChatRow, Row, TextRow
from gkd.data.left_out import has_empty_thought, left_out
from gkd.data.row_values import RowPlace
from gkd.data.targets import IGNORE
from gkd.data.templates import STUMBLES, STUMBLES_OF_ROWS, ChatTemplate, common_prefix
from gkd.data.token_rows import TokenRow
from gkd.data.turn_spans import TurnFinder
from gkd.data.turns import Message
from gkd.data.vocabulary import end_of_turn

_IDS_ONLY: dict[str, Any] = {"add_special_tokens": False, "verbose": False, "return_attention_mask": False}


class RowEncoder:
    """Turns rows into ids with one tokenizer.

    Args:
        tokenizer: its padding and truncation settings do not matter.
        assistant_turns: "last" trains on the final assistant turn, "all" on every one.
        stop_ids: at which the model stops beside the tokenizer's eos and the template's end of turn; see
            `gkd.data.vocabulary.configured_stop_ids`.
        today: what the chat template writes as today's date, as YYYY-MM-DD; None = the clock's day.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        assistant_turns: str = "last",
        stop_ids: Collection[int] = (),
        today: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.all_turns = Answers(assistant_turns).all_turns
        self.template = ChatTemplate(tokenizer, today) if tokenizer.chat_template else None
        self.turn = turn = end_of_turn(tokenizer, stop_ids)
        known = (*stop_ids, tokenizer.eos_token_id, turn.token_id if turn else None)
        self.stop_ids = {int(i) for i in known if i is not None}
        self.stop_texts = tuple(sorted(str(tokenizer.convert_ids_to_tokens(i)) for i in self.stop_ids))
        # Asked for once: a tokenizer looks its special ids up anew each time.
        self.bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._known: dict[str, list[int]] = {}  # of `foresee`
        self._rendered: dict[int, tuple[str, str]] = {}  # prompt and whole chat, by the row's identity
        self._adds_bos = self.bos is not None and [self.bos] == tokenizer("a")["input_ids"][:1] != self._raw("a")[:1]

    def encode(self, row: Row, place: RowPlace) -> Encoded:
        """Ids and labels of a row, of any length. Raises ValueError when the template or the ids are at fault."""
        if isinstance(row, ChatRow):
            return self._chat(row, place)
        return self._text(row) if isinstance(row, TextRow) else self._tokens(row, place)

    def foresee(self, rows: Iterable[Row]) -> None:
        """Tokenize together what these rows will ask for: several times faster than each text by itself. What cannot
        be written or tokenized is left to `encode`, which names the row."""
        self._rendered.clear()
        texts = list(dict.fromkeys(text for row in rows for text in self._texts_of(row)))
        try:
            ids = self.tokenizer(texts, **_IDS_ONLY)["input_ids"] if texts else []
        except STUMBLES_OF_ROWS:
            ids = []
        self._known = dict(zip(texts, ids, strict=False))

    def _texts_of(self, row: Row) -> tuple[str, ...]:
        if isinstance(row, TextRow):
            return (row.prompt,) if row.completion is None else (row.prompt, row.prompt + row.completion)
        if not isinstance(row, ChatRow) or self.template is None or row.answer is None:
            return ()
        try:
            rendered = [
                self.template.render(messages, generate, row.tools, row.template_kwargs)
                for messages, generate in ((row.messages[: row.answer], True), (row.messages, False))
            ]
            texts = rendered[0], self._closed(rendered[1])
        except STUMBLES_OF_ROWS:
            return ()
        self._rendered[id(row)] = rendered[0], rendered[1]
        return texts

    # -------------------------------------------------------------------------------------------- text to ids

    def _raw(self, text: str) -> list[int]:
        known = self._known.get(text)
        if known is not None:
            return list(known)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _ids(self, text: str, bos: bool = False) -> list[int]:
        """Ids of a text from its beginning, with one BOS where the text or `bos` asks for any."""
        ids, first = self._raw(text), self.bos
        if bos and self._adds_bos:
            ids = [first, *ids]
        while len(ids) > 1 and first is not None and ids[0] == ids[1] == first:
            del ids[0]
        return ids

    def _joined(self, prompt: str, text: str, bos: bool = False) -> tuple[list[int], list[int], int]:
        """Ids of `prompt`, ids of `text`, and where in these its answer begins.

        Where `text` goes on from `prompt`, so do the ids, unless no tokenization breaks there.
        """
        served, whole = self._ids(prompt, bos), self._ids(text, bos)
        start = common_prefix(served, whole)
        if start < len(served) and text.startswith(prompt):
            joined = served + self._raw(text[len(prompt) :])
            if self._decode(joined) == self._decode(whole):
                return served, joined, len(served)
        return served, whole, start

    def _counts(self, text: str, ids: list[int], cuts: list[int]) -> dict[int, tuple[int, int]]:
        """For each cut in `text` (ascending), how many of its `ids` end before it, and which is the first behind it.

        The two differ where a token reaches over the cut. Every letter is tokenized a few times, however many cuts
        there are, unless a slow tokenizer merges tokens across them.
        """
        pieces = [self._ids(text[: cuts[0]]), *(self._raw(text[a:b]) for a, b in pairwise([*cuts, len(text)]))]
        if list(chain.from_iterable(pieces)) == ids:
            ends = list(accumulate(map(len, pieces)))
            return {cut: (end, end) for cut, end in zip(cuts, ends, strict=False)}
        if not self.tokenizer.is_fast:  # no places of tokens in the text: what comes before each cut is tokenized anew
            before = {cut: self._ids(text[:cut]) for cut in cuts}
            kept = {cut: common_prefix(own, ids) for cut, own in before.items()}
            return {cut: (kept[cut], kept[cut] + (kept[cut] < len(before[cut]))) for cut in cuts}
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        places = found["offset_mapping"][len(found["input_ids"]) - len(ids) :]  # without a second BOS
        firsts, lasts = [first for first, _ in places], [last for _, last in places]
        return {cut: (bisect_right(lasts, cut), bisect_left(firsts, cut)) for cut in cuts}

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _closed(self, text: str) -> str:
        """`text` without what stands behind the stop token that ends its last answer."""
        if self.turn and self.turn.closing and text.endswith(self.turn.closing):
            return text[: -len(self.turn.closing)] + self.turn.kept
        return self._stopped_once(text)

    def _stopped_once(self, text: str) -> str:
        """A text without what stands behind the first of the stop tokens that it ends with: an answer whose content
        ended with one has another by its template."""
        end, rest = len(text), text.rstrip()
        while stop := next((stop for stop in self.stop_texts if rest.endswith(stop)), None):
            end, rest = len(rest), rest[: -len(stop)].rstrip()
        return text[:end]

    def _with_stop(self, encoded: Encoded, note: str | None) -> Encoded:
        """Appends a stop token, as a target, to an answer that none ends: the one that ends an earlier turn where the
        model stops at it, else eos."""
        stop = self._eos
        if note and self.turn and self.turn.next_token_id in self.stop_ids:
            stop = self.turn.next_token_id
        if stop is None or encoded.labels[-1] in self.stop_ids:
            return encoded
        ids, labels = [*encoded.input_ids, stop], [*encoded.labels, stop]
        encoded = replace(encoded, input_ids=ids, labels=labels)
        return encoded.noted(note) if note else encoded

    # ---------------------------------------------------------------------------------------------------- chats

    def _chat(self, row: ChatRow, place: RowPlace) -> Encoded:
        if self.template is None:
            raise ValueError(
                f"{place} is a chat, but the tokenizer has no chat template: use "
                f"an instruction-tuned model's tokenizer, set chat_template_path, or give plain text prompts"
            )
        messages = row.messages
        if row.answer is None:
            text = self._render(self.template, row, messages, place, generate=True)
            ids = self._ids(text)
            return Encoded(ids, [IGNORE] * len(ids), len(ids), tuple(left_out(self.template, row, text)))
        if id(row) in self._rendered:
            prompt, whole = self._rendered.pop(id(row))
        else:
            prompt = self._render(self.template, row, messages[: row.answer], place, generate=True)
            whole = self._render(self.template, row, messages, place)
        text = self._closed(whole)
        if text.startswith(prompt):
            text = prompt + self._stopped_once(text[len(prompt) :])
        served, ids, start = self._joined(prompt, text)
        if start == 0:
            place.bad("messages", "the chat template renders the prompt and the whole chat with different beginnings")
        untrained = row.answer in row.untrained
        labels = [IGNORE] * len(ids) if untrained else [IGNORE] * start + ids[start:]
        encoded = Encoded(ids, labels, start).starting_from(served)
        if encoded.prompt_ids:
            encoded = encoded.noted("prompt_not_prefix")
        if self.all_turns:
            prefix = text.startswith(prompt) and not encoded.prompt_ids
            encoded = self._with_earlier_turns(encoded, row, whole, *((prompt, served) if prefix else (text, ids)))
        for note in left_out(self.template, row, whole):
            encoded = encoded.noted(note)
        if untrained:
            return encoded.noted("untrained") if encoded.prompt_only else encoded
        answer = self._decode(ids[start:])
        if has_empty_thought(answer) and "</think>" not in messages[row.answer]["content"]:
            encoded = encoded.noted("empty_thought")
        if _is_empty(messages[row.answer]) or self._is_bare(answer):
            encoded = encoded.noted("empty_answer")
        return self._with_stop(encoded, "eos_appended")

    def _render(
        self, template: ChatTemplate, row: ChatRow, messages: list[Message], place: RowPlace, generate: bool = False
    ) -> str:
        try:
            return template.render(messages, generate, row.tools, row.template_kwargs)
        except STUMBLES as error:
            raise ValueError(
                f"{place}: the chat template cannot render the roles "
                f"{printable(', '.join(message['role'] for message in messages))}: {printable(str(error))}. Take a "
                f"template that can (chat_template_path), or merge or leave out turns in a formatting_func"
            ) from error

    def _with_earlier_turns(self, encoded: Encoded, row: ChatRow, whole: str, head: str, ids: list[int]) -> Encoded:
        """Trained on the assistant turns before the last, too.

        Args:
            whole: the rendered chat.
            head: the beginning of it that holds these turns, of which `ids` are the row's first ids.
        """
        assert self.template is not None
        numbers = [i for i, message in enumerate(row.messages) if i > 0 and message["role"] == "assistant"]
        numbers = [i for i in numbers if i != row.answer and i not in row.untrained]
        next_id = self.turn.next_token_id if self.turn else None
        stops = {*self.stop_texts, *([] if next_id is None else [str(self.tokenizer.convert_ids_to_tokens(next_id))])}
        finder = TurnFinder(self.template, self.turn, tuple(sorted(stops)), self._raw, self._decode, self._closed)
        found = finder.find(row, whole, numbers) if numbers else {}
        if len(found) < len(numbers):
            encoded = encoded.noted("turn_not_found")
        turns = [(first, self._stopped_once(whole[first:last])) for first, last in found.values()]
        spans = [(first, first + len(turn)) for first, turn in turns if not self._is_bare(turn)]
        if not spans:
            return encoded
        labels = list(encoded.labels)
        counts = self._counts(head, ids, [cut for span in spans for cut in span])
        for first, last in spans:
            begin, end = counts[first][1], counts[last][0]
            labels[begin:end] = ids[begin:end]
        return replace(encoded, labels=labels)

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
        served, ids, start = self._joined(row.prompt, text, bos=True)
        encoded = Encoded(ids, [IGNORE] * start + ids[start:], start).starting_from(served)
        if encoded.prompt_ids:
            encoded = encoded.noted("prompt_not_prefix")
        if not row.completion.strip():
            encoded = encoded.noted("empty_answer")
        return self._with_stop(encoded, None)

    def _tokens(self, row: TokenRow, place: RowPlace) -> Encoded:
        self.check_ids(row.input_ids, "input_ids", place)
        self.check_ids(row.prompt_ids, "prompt_ids", place)
        return Encoded(row.input_ids, row.labels, row.prompt_length, prompt_ids=list(row.prompt_ids))

    @cached_property
    def _last_id(self) -> int:
        return int(max(self.tokenizer.get_vocab().values()))

    def check_ids(self, ids: Sequence[int], column: str, place: RowPlace) -> None:
        """Raises ValueError for ids that the tokenizer does not have."""
        if wrong := [i for i in ids if not 0 <= i <= self._last_id]:
            place.bad(column, f"holds the id {wrong[0]}, but the tokenizer's ids end at {self._last_id}")


def _is_empty(message: Message) -> bool:
    return not message["content"].strip() and not any(
        message.get(key) for key in ("tool_calls", "reasoning_content", "thinking")
    )
