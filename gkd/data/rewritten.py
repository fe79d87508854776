"""What a teacher with other tokens has written, in the student's: by way of its text.

Its special tokens are left out, and what merely looks like one of the student's stays text. Where the teacher ended
its answer stands the token that ends the student's. An answer that was cut in the middle of a character loses that
beginning of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from gkd.data.end_map import templates_end

UNREADABLE = "\ufffd"  # what decoders write for bytes that are no character


@dataclass(frozen=True)
class Rewriting:
    """From a teacher's completion to the student's.

    Attributes:
        tokenizer: the student's.
        text_of: the text of a completion of the teacher's, without special tokens.
        stop_ids: at which the teacher ends.
        end_id: the student's token for that; None where it has none.
        most: tokens of the student's that an answer may have; a longer one is cut, and counts as cut off.
    """

    tokenizer: PreTrainedTokenizerBase
    text_of: Callable[[Sequence[int]], str]
    stop_ids: tuple[int, ...]
    end_id: int | None
    most: int

    def __call__(self, completion: Sequence[int]) -> tuple[list[int], bool]:
        """The student's ids, and whether the answer ends there as the teacher ended it."""
        ended = bool(completion) and completion[-1] in self.stop_ids
        text = self.text_of(completion[:-1] if ended else completion)
        if not ended:
            text = text.rstrip(UNREADABLE)
        ids = list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids)
        if ended and self.end_id is not None:
            ids.append(self.end_id)
        return ids[: self.most], ended and len(ids) <= self.most


def text_by(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], str]:
    """The text of a tokenizer's ids, without its special tokens and without the ids that it does not know."""
    known = 1 + max(tokenizer.get_vocab().values())

    def text_of(ids: Sequence[int]) -> str:
        own = [i for i in ids if i < known]
        return str(tokenizer.decode(own, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return text_of


def end_of_answers(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int] = ()) -> int | None:
    """The id that ends the answers of rows of this tokenizer's: that of its template, else its eos."""
    known = templates_end(tokenizer, stop_ids)
    eos = tokenizer.eos_token_id
    return int(eos) if known is None and eos is not None else known
