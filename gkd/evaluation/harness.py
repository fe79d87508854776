"""One harness for the student before training, the student after, and the teacher: fixed prompts, fixed seeds.

What decides about on-policy distillation is how far the student is from the teacher *on what the student itself
writes*. So each model samples completions for the same prompts with the training's own sampling settings, and is
compared there with the teacher token by token; the same on completions that the teacher wrote, once; the difference
of the two is the exposure gap (GKD paper, section 1: the mismatch of training and inference sequences).

The random numbers of a completion depend on (seed, prompt number) alone and are the same for every model, so a model
equal to the teacher writes what the teacher writes, and differences between models are paired. No global random
stream is moved, and the models come back in the mode they were in.

Several processes: every rank measures everything and gets the same numbers. No share is split off, so a single
process and eight agree exactly; under ZeRO-3 all ranks must call `measure` (parameters are gathered, a collective).

What is asked of a model stands in `gkd.evaluation.subject`: a teacher on a server answers the same questions as far as
it can. Without a teacher, what concerns the student alone is measured.

B rows, T tokens, N targets, V vocabulary, D hidden size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gkd.common.sign_of_life import SignOfLife
from gkd.data.last_turn import LastTurn
from gkd.evaluation.bits import Sizes
from gkd.evaluation.draft import Costs, as_draft
from gkd.evaluation.measures import (
    METRICS,
    Estimate,
    Measures,
    Metric,
    difference_estimate,
    distinct_ngrams,
    exponential_estimate,
    mean_estimate,
    ratio_estimate,
)
from gkd.evaluation.public_tasks import PublicTasks
from gkd.evaluation.subject import Conditions, Subject
from gkd.evaluation.target_values import COUNTED, TARGET_VALUES, loss_against, target_values
from gkd.evaluation.task_score import TaskScore
from gkd.evaluation.timing import best_of
from gkd.evaluation.view import TeacherReads, answered, held_out
from gkd.loss.settings import LossSettings
from gkd.rollouts.base import SamplingSettings
from gkd.rollouts.hygiene import repeated_ngram_share

logger = logging.getLogger(__name__)

_OTHER_TOKENS = "has other tokens: its text is counted in the student's, and bits per byte compare the two"


@dataclass
class Evaluator:
    """Measures models on fixed prompts and texts; the teacher's completions are sampled once and kept.

    Attributes:
        teacher: what the models are compared with, or None.
        tokenizer: for the sample texts and the task score.
        prompts: token ids, one list for each prompt.
        held_out: token ids of texts for the perplexity, each of at least two tokens; may be empty.
        sampling: how the student samples: the training's own settings.
        loss: the training's divergence, temperatures and shared vocabulary; the teacher's full distribution is used.
            The forward KL beside it is at temperature 1, always.
        teacher_sampling: the teacher's settings where they differ (its stop ids); None = `sampling`.
        conditions: seed, batch size and precision, the same for every model.
        score: the task's, for the greedy completions and samples at T = 1; None without a task.
        public_tasks: named tasks through lm-eval, for models in this process.
        teacher_reads: what the teacher reads in the place of the student's prompts; None = the same.
        teachers: number of each prompt's teacher, and `held_out_teachers` of each held-out text's, where the teacher
            is several; no numbers of texts: the teacher's perplexity is not measured.
        held_out_starts: for each held-out text, how many tokens at its start are context only; None = 1 for all.
        draft_tokens: the student is measured as a draft model that proposes so many tokens a block; None: it is not.
        num_samples: prompts whose completions are kept as text.
        teacher_follows: the teacher changes while the student trains: a model is compared with it as it is then.

    Raises:
        ValueError: no prompts, an empty prompt, a held-out text without a target.
    """

    teacher: Subject | None
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    held_out: list[list[int]]
    sampling: SamplingSettings
    loss: LossSettings
    teacher_sampling: SamplingSettings | None = None
    conditions: Conditions = field(default_factory=Conditions)
    score: TaskScore | None = None
    public_tasks: PublicTasks | None = None
    held_out_starts: list[int] | None = None
    teacher_reads: TeacherReads | None = None
    teachers: tuple[int, ...] = ()
    held_out_teachers: tuple[int, ...] = ()
    draft_tokens: int | None = None
    num_samples: int = 3
    teacher_follows: bool = False
    costs: Costs | None = field(default=None, init=False, repr=False)
    _teacher_text: list[list[int]] | None = field(default=None, init=False, repr=False)
    _sign: SignOfLife | None = field(default=None, init=False, repr=False)
    _target_text: dict[str, list[list[int]]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.prompts or not all(self.prompts):
            empty = [i for i, prompt in enumerate(self.prompts) if not prompt]
            raise ValueError(
                f"evaluation prompts: {len(self.prompts)} given, empty ones at {empty}; give at least one"
            )
        self._of_answers = bool(self.held_out_starts)
        starts = self.held_out_starts or [1] * len(self.held_out)
        if len(starts) != len(self.held_out):
            raise ValueError(
                f"held_out_starts has {len(starts)} entries for {len(self.held_out)} texts: give one each"
            )
        bad = [
            i for i, (ids, start) in enumerate(zip(self.held_out, starts, strict=True)) if not 1 <= start < len(ids)
        ]
        if bad:
            raise ValueError(
                f"held_out texts {bad} have no token to predict after their context: leave them out, or start at 1"
            )
        self.held_out_starts = starts
        self._trained_as = self.loss
        if self.teacher is not None and self._of_one_teacher:
            self.loss = loss_against(self.loss, self.teacher)
        self._sizes = self._teacher_sizes = Sizes.of(self.tokenizer)
        if self.teacher is not None and self.teacher.tokenizer is not None:
            self._teacher_sizes = Sizes.of(self.teacher.tokenizer)

    @property
    def _of_one_teacher(self) -> bool:
        return not self.teachers

    @property
    def tokens_differ(self) -> bool:
        """Whether the teacher has tokens of its own, and is asked about text."""
        return self.teacher is not None and self.teacher.tokenizer is not None

    def measure(self, model: Subject, name: str) -> Measures:
        """Everything there is to measure of one model (`model` may be the teacher itself).

        Args:
            model: a student, or the teacher.
            name: the heading of its column.
        """
        is_teacher = model == self.teacher
        sampling = self._teacher_sampling if is_teacher else self.sampling
        with self._watched(name, model):
            own = self.teacher_text() if is_teacher else self._generate(model, sampling)
            prompts = self._prompts_of(model)
            values = {
                **self._against_teacher(model, own),
                **self._text_measures(own, sampling),
                **self._perplexity(model),
                **self._of_teacher_text(model),
                **({} if is_teacher else self._as_draft(model)),
                **self._scores(model, sampling, own),
            }
        extra: dict[str, Metric] = {}
        extra |= {key: metric for key, metric in self._of_each_teacher().items() if key in values}
        if self._of_answers:
            for key in ("perplexity", "bits_per_byte"):
                plain = METRICS[key]
                extra[key] = replace(plain, label=plain.label.replace("held-out text", "held-out answers"))
        if self.tokens_differ:  # what models of different tokens are compared by
            extra |= {key: extra.get(key, METRICS[key]) for key in ("bits_per_byte", "bits_per_byte_teacher_text")}
        if self.public_tasks is not None:
            public, of_tasks = model.public_tasks(self.public_tasks, self.tokenizer, self.conditions)
            values, extra = values | public, extra | of_tasks
        texts = zip(prompts[: self.num_samples], own, strict=False)
        asked_in = model.tokenizer or self.tokenizer
        samples = tuple((str(asked_in.decode(prompt)), self._text(completion)) for prompt, completion in texts)
        questions = tuple(map(LastTurn(asked_in), (prompt for prompt, _ in samples)))
        return Measures(name, values, samples, self.settings(), extra, questions)

    def settings(self) -> dict[str, Any]:
        """How everything was measured, for the table's footnote."""
        own = self.teacher_reads is not None and self.teacher_reads.differs_from(self.prompts)
        return {
            "prompts": len(self.prompts),
            **({"the teacher reads": "prompts of its own"} if own else {}),
            "held-out texts": len(self.held_out),
            "divergence": self._divergence_name(),
            "sampling temperature": self.sampling.temperature,
            "max_new_tokens": self.sampling.max_new_tokens,
            "seed": self.conditions.seed,
            **({"bits per byte": f"not measured: {self._sizes.unknown}"} if self._sizes.unknown else {}),
            **({"the teacher": _OTHER_TOKENS} if self.tokens_differ else {}),
            **({} if self.draft_tokens is None else {"tokens of a draft": self.draft_tokens}),
            **({} if self.costs is None else {f"checking {self.costs.tokens + 1} costs": self.costs.in_words()}),
            **(
                {"teacher": "as it was first measured, before it followed the student"} if self.teacher_follows else {}
            ),
        }

    def _divergence_name(self) -> str:
        if self.teacher is None:
            return "not measured: there is no teacher to compare with"
        loss, trained = self.loss, self._trained_as
        if not self._of_one_teacher:
            names = ", ".join(str(share.name) for share in self.teacher.shares(self.teachers))
            return f"{loss.in_words()}, each row with its own teacher ({names})"
        name = loss.in_words()
        if self.tokens_differ:
            name = name.replace("over the whole vocabulary", "where the tokens of both meet")
            name = name.replace(" (a lower bound)", " where the tokens of both meet")
            name = f"{name}, tokens that meet nowhere count as 0"
        if trained.teacher_top_k is None or trained.teacher_top_k == loss.teacher_top_k:
            return name
        return f"{name} (trained on the teacher's top {trained.teacher_top_k}, tail: {trained.top_k_tail})"

    def teacher_text(self) -> list[list[int]]:
        """The teacher's completions of the prompts, sampled at the first call."""
        assert self.teacher is not None
        if self._teacher_text is None:
            self._teacher_text = self._generate(self.teacher, self._teacher_sampling)
        return self._teacher_text

    def held_out_prompts(self) -> list[list[int]]:
        """All prompts that are not to be trained on, each once: those of the samples, and those of the answers."""
        assert self.held_out_starts is not None
        contexts = zip(self.held_out, self.held_out_starts, strict=True) if self._of_answers else ()
        prompts = [*self.prompts, *(ids[:start] for ids, start in contexts)]
        return [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))]

    # --------------------------------------------------------------------------------------------------- parts

    def _text(self, ids: list[int], plain: bool = False) -> str:
        """Decoded text; `plain` leaves out the special tokens, which a sample shows (did it end by itself?)."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=plain))

    @property
    def _teacher_sampling(self) -> SamplingSettings:
        return self.teacher_sampling or self.sampling

    @contextmanager
    def _watched(self, name: str, model: Subject) -> Iterator[None]:
        """A line in a log, a bar on a terminal: this takes as long as so many sequences written and read."""
        logger.info("measuring the %s on %d prompts", name, len(self.prompts))
        with SignOfLife(name, self._number_of_sequences(model), "sequence") as self._sign:
            yield
        self._sign = None

    def _number_of_sequences(self, model: Subject) -> int:
        """To be written and read for one model."""
        is_teacher, prompts = model == self.teacher, len(self.prompts)
        passes = 0 if is_teacher else 1
        if self.teacher is not None:
            passes += int(self._teacher_text is None) + (1 if is_teacher else 2) + int(self._sizes.of_ids is not None)
        if self.score is not None:
            sampling = self._teacher_sampling if is_teacher else self.sampling
            passes += 1 + int(_undistorted(sampling) != sampling)
        if self.draft_tokens is not None and not is_teacher:
            own, sampled = self._teacher_sampling, int(self._teacher_sampling.temperature > 0)
            passes += 1 + sampled
            passes += 0 if self._target_text else 1 + sampled * int(_plain(own) != own)
        return passes * prompts + len(self.held_out)

    def _tick(self, sequences: int) -> None:
        if self._sign is not None:
            self._sign.tick(sequences)

    def _generate(self, model: Subject, sampling: SamplingSettings) -> list[list[int]]:
        """Completions of all prompts."""
        return model.generate(self._prompts_of(model), sampling, self.conditions, tick=self._tick)

    def _prompts_of(self, model: Subject) -> list[list[int]]:
        """What it answers."""
        own = model == self.teacher and self.teacher_reads is not None
        return list(self.teacher_reads.prompts) if own and self.teacher_reads is not None else self.prompts

    def _against_teacher(self, model: Subject, own: list[list[int]]) -> dict[str, Estimate]:
        """Divergences and agreement with the teacher on the model's own and on the teacher's completions."""
        if self.teacher is None:
            return {}
        mine = self._target_means(model, own)
        theirs = mine if own is self._teacher_text else self._target_means(model, self.teacher_text())
        return {
            "divergence_own": mine["divergence"],
            "divergence_teacher_text": theirs["divergence"],
            "exposure_gap": difference_estimate(mine["divergence"], theirs["divergence"]),
            "forward_kl_own": mine["forward_kl"],
            "forward_kl_teacher_text": theirs["forward_kl"],
            "agreement_own": mine["agreement"],
            "agreement_teacher_text": theirs["agreement"],
            **{f"divergence_own_{name}": mine[name] for name in mine if name not in TARGET_VALUES},
        }

    def _of_each_teacher(self) -> dict[str, Metric]:
        """What is told of each of several teachers."""
        if self.teacher is None or self._of_one_teacher:
            return {}
        plain = METRICS["divergence_own"]
        return {
            f"divergence_own_{share.name}": replace(
                plain, key=f"divergence_own_{share.name}", label=f"{plain.label}, {share.name}"
            )
            for share in self.teacher.shares(self.teachers)
        }

    def _target_means(self, model: Subject, completions: list[list[int]]) -> dict[str, Estimate]:
        """Token means of TARGET_VALUES over the completions; and of the divergence by the name of each of several
        teachers."""
        assert self.teacher is not None
        counts = [len(completion) for completion in completions]
        # The teacher is compared with itself in its own view, so there is but one.
        reads = None if model == self.teacher else self.teacher_reads
        source = "teacher" if completions is self._teacher_text else "student"
        sequences = answered(self._prompts_of(model), completions, reads, source=source, teachers=self.teachers)
        sums = torch.zeros(len(completions), len(TARGET_VALUES) + 1, dtype=torch.float64)
        means: dict[str, Estimate] = {}
        for share in self.teacher.shares([sequence.teacher for sequence in sequences]):
            asked = share.subject if model == self.teacher else model
            loss = self.loss if self._of_one_teacher else loss_against(share.loss or self.loss, share.subject)
            compare = partial(target_values, loss=loss, exchanged=None if reads is None else reads.end_map)
            mine = [sequences[row] for row in share.rows]
            found = asked.compared(share.subject, mine, compare, self.conditions, self._tick)
            if found is None:  # compared with itself
                sums[list(share.rows), 2] = torch.tensor([counts[row] for row in share.rows], dtype=torch.float64)
            else:
                sums[list(share.rows)] = torch.stack([values.sum(dim=0) for values in found])
            if share.name is not None:
                of_share = [counts[row] for row in share.rows]
                means[share.name] = ratio_estimate(sums[list(share.rows), 0].tolist(), of_share)
            elif found is None:
                same = {"divergence": 0.0, "forward_kl": 0.0, "agreement": 1.0}
                return {value: Estimate(same[value], None, len(counts)) for value in TARGET_VALUES}
        told = {value: ratio_estimate(sums[:, i].tolist(), counts) for i, value in enumerate(TARGET_VALUES)}
        if self.tokens_differ:
            told["agreement"] = ratio_estimate(sums[:, 2].tolist(), sums[:, COUNTED].tolist())
        return means | told

    def _perplexity(self, model: Subject) -> dict[str, Estimate]:
        """exp of the mean negative log-likelihood per token of the held-out texts, over the whole vocabulary; and
        their bits per byte. A teacher with other tokens has no perplexity that could stand beside the student's."""
        if not self.held_out:
            return {}
        assert self.held_out_starts is not None
        by_teacher = model == self.teacher
        if by_teacher and not self._of_one_teacher and not self.held_out_teachers:
            return {}  # texts that are nobody's
        rows = held_out(
            self.held_out,
            self.held_out_starts,
            self.teacher_reads,
            by_teacher=by_teacher,
            teachers=self.held_out_teachers,
            respelled=self.tokens_differ,
        )
        rows = model.in_own_tokens(rows)
        nll = model.nll(rows, self.conditions, self._tick)
        found = self._sizes_of(model).bits("bits_per_byte", rows, nll)
        if by_teacher and self.tokens_differ:
            return found
        per_token = ratio_estimate([math.fsum(row) for row in nll], list(map(len, nll)))
        return {"perplexity": exponential_estimate(per_token), **found}

    def _of_teacher_text(self, model: Subject) -> dict[str, Estimate]:
        """Bits per byte of what the teacher has written for the prompts."""
        if self.teacher is None or self._sizes.of_ids is None:
            return {}
        by_teacher = model == self.teacher
        reads = None if by_teacher and not self.tokens_differ else self.teacher_reads
        prompts = self.prompts if self.tokens_differ else self._prompts_of(model)
        written = answered(prompts, self.teacher_text(), reads, source="teacher", teachers=self.teachers)
        rows = model.in_own_tokens(written)
        nll = model.nll(rows, self.conditions, self._tick)
        return self._sizes_of(model).bits("bits_per_byte_teacher_text", rows, nll)

    def _as_draft(self, model: Subject) -> dict[str, Estimate]:
        """What the model is good for as a draft of the teacher's text, sampled plainly and greedy."""
        if self.draft_tokens is None or self.teacher is None:
            return {}
        written, temperature = self._texts_of_the_target(), self._teacher_sampling.temperature
        texts = {
            way: answered(self.prompts, completions, self.teacher_reads, source="teacher")
            for way, completions in written.items()
        }
        if self.costs is None:  # training changes weights, not what they cost
            self.costs = self._costs(model, self.draft_tokens)
        return as_draft(
            model,
            self.teacher,
            texts,
            self.costs,
            tokens=self.draft_tokens,
            temperature=temperature,
            loss=self.loss,
            exchanged=None if self.teacher_reads is None else self.teacher_reads.end_map,
            how=self.conditions,
            tick=self._tick,
        )

    def _texts_of_the_target(self) -> dict[str, list[list[int]]]:
        """What the teacher writes without top-k, top-p and their like, under the names that `as_draft` wants."""
        if not self._target_text:
            assert self.teacher is not None
            own = self._teacher_sampling
            plain = _plain(own)
            if own.temperature > 0:
                sampled = self.teacher_text() if plain == own else self._generate(self.teacher, plain)
                self._target_text[""] = sampled
            self._target_text["_greedy"] = self._generate(self.teacher, replace(plain, temperature=0.0))
        return self._target_text

    def _costs(self, model: Subject, tokens: int) -> Costs | None:
        assert self.teacher is not None
        prompt = max(self.prompts, key=len)
        how = self.conditions
        with model.stepping(prompt, how) as draft, self.teacher.stepping(prompt, how) as target:
            if draft is None or target is None:
                return None
            passes = (partial(draft, 1), partial(target, 1), partial(target, tokens + 1))
            of_draft, of_target, of_check = best_of(passes)
        return Costs(of_draft, of_target, of_check, tokens)

    def _sizes_of(self, model: Subject) -> Sizes:
        return self._teacher_sizes if model == self.teacher else self._sizes

    def _text_measures(self, own: list[list[int]], sampling: SamplingSettings) -> dict[str, Estimate]:
        """What can be seen from the completions alone; lengths count the stop token, as in training."""
        return {
            "ended": mean_estimate([float(bool(ids) and ids[-1] in sampling.stop_ids) for ids in own]),
            "length": mean_estimate([float(len(ids)) for ids in own]),
            "repeated_4grams": mean_estimate([repeated_ngram_share(ids, 4) for ids in own]),
            "distinct_2": Estimate(distinct_ngrams(own, 2), None, len(own)),
        }

    def _scores(self, model: Subject, sampling: SamplingSettings, own: list[list[int]]) -> dict[str, Estimate]:
        """The task score of the greedy completions and of samples from the model's undistorted distribution."""
        if self.score is None:
            return {}
        plain = _undistorted(sampling)
        written = {
            "greedy": self._generate(model, replace(plain, temperature=0.0)),
            "sampled": own if plain == sampling else self._generate(model, plain),
        }
        found: dict[str, Estimate] = {}
        for way, completions in written.items():
            found |= self.score.estimates([self._text(ids, plain=True) for ids in completions], way)
        return found


def _plain(sampling: SamplingSettings) -> SamplingSettings:
    """At the same temperature, without what hides tokens."""
    return replace(sampling, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0)


def _undistorted(sampling: SamplingSettings) -> SamplingSettings:
    """From the model's own distribution."""
    return replace(_plain(sampling), temperature=1.0)
