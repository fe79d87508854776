"""A recipe's own scores: of each completion by itself, and of all completions at once (corpus BLEU)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gkd.common.ranges import as_number
from gkd.evaluation.measures import Estimate, bootstrap_estimate, mean_estimate

Score = Callable[[str, dict[str, Any]], float]
CorpusScore = Callable[[list[str], list[dict[str, Any]]], float]
RESAMPLES = 200


@dataclass(frozen=True)
class TaskScore:
    """How completions of the evaluation's prompts are scored.

    Attributes:
        rows: the prompts' rows.
        score: (completion, its row) -> number; the table gives the mean.
        corpus_score: (completions, their rows) -> number; its error is the spread over sets of as many rows that are
            drawn from these with replacement (bootstrap), the same sets for every model.
    """

    rows: Sequence[dict[str, Any]]
    score: Score | None = None
    corpus_score: CorpusScore | None = None

    def estimates(self, texts: Sequence[str], way: str) -> dict[str, Estimate]:
        """The scores of one completion for each row; `way` ("greedy", "sampled") ends the measures' names.

        Raises:
            ValueError: a score that is no number.
        """
        assert len(texts) == len(self.rows), (len(texts), len(self.rows))
        found = {}
        if self.score is not None:
            values = [_number(self.score(text, row), "score") for text, row in zip(texts, self.rows, strict=True)]
            at = next((number for number, value in enumerate(values) if math.isnan(value)), None)
            if at is not None:  # the mean of all would be none
                raise ValueError(f"the recipe's score of evaluation prompt {at} is nan: it should return a number")
            found[f"score_{way}"] = mean_estimate(values)
        if self.corpus_score is not None:
            found[f"corpus_score_{way}"] = bootstrap_estimate(
                lambda chosen: self._of_corpus(texts, chosen), len(texts), RESAMPLES, random.Random(0)
            )
        return found

    def _of_corpus(self, texts: Sequence[str], chosen: Sequence[int]) -> float:
        assert self.corpus_score is not None
        return _number(self.corpus_score([texts[i] for i in chosen], [self.rows[i] for i in chosen]), "corpus_score")


def _number(value: Any, name: str) -> float:
    number = as_number(value)
    if number is None:
        raise ValueError(f"the recipe's {name} returned {value!r}: it should return a number")
    return number
