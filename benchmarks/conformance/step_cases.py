"""Cases about optimizer steps: one step of plain SGD at learning rate 1 moves the weights by minus the gradient, which
must be that of the mean over the tokens that the step trained on.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from tiny import VOCABULARY
from torch import Tensor

from conformance import definition, material
from conformance.definition import Trained
from conformance.material import END, Run
from conformance.result import Case, NotApplicable, Result, judged
from conformance.watch import Seen, rows_of, train

SAME = 2e-3  # of two steps, the length of the difference over the length of the step (fp32 against float64)


def compared(change: Tensor, wanted: Tensor) -> tuple[float, float, float]:
    """How much longer a step is than the right one along it, the cosine of the two, and the relative difference."""
    change = change.double()
    size = float(wanted.norm())
    along = float(change @ wanted) / size**2
    cosine = float(change @ wanted) / (size * float(change.norm()) + 1e-30)
    return along, cosine, float((change - wanted).norm()) / size


def targets(rows: Sequence[Trained], stops: Sequence[int] = (END,)) -> list[Trained]:
    """The rows up to and with the first stop token of their answer: what may be trained on."""
    found = []
    for row in rows:
        ends = [i for i, token in enumerate(row.completion) if token in stops]
        length = row.prompt_length + (ends[0] + 1 if ends else len(row.completion))
        found.append(Trained(row.ids[:length], row.prompt_length))
    return found


def one_step(adapter: Any, stops: Sequence[int] = (END,), **options: Any) -> tuple[Seen, list[Trained], Tensor, str]:
    """What was seen of a step, the rows it trained on, the step by its definition, and what is wrong with the rows."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder=folder, **options)
        student, teacher = copy.deepcopy(run.student).eval(), copy.deepcopy(run.teacher).eval()
        seen = train(adapter, run)
        rows, wrong = rows_of(seen, run)
        rows = targets(rows, stops)
        if not wrong and len(rows) != run.batch * run.accumulation:
            wrong = f"{len(rows)} rows in a step of {run.batch * run.accumulation}"
        wanted = definition.step(student, teacher, rows, run.beta) if rows else torch.zeros_like(seen.change)
    return seen, rows, wanted, wrong


def judged_step(change: Tensor, rows: list[Trained], wanted: Tensor, wrong: str, direction: bool = False) -> Result:
    """Whether a step is the right one; with `direction` its length is not asked."""
    if wrong:
        return Result("fail", wrong)
    along, cosine, error = compared(change, wanted)
    number = sum(len(row.completion) for row in rows)
    if direction:
        return judged(cosine > 1 - SAME**2, f"{number} targets, cosine {cosine:.5f}")
    words = f"{number} targets" if error < SAME else f"{along:.3g} times the right step, cosine {cosine:.4f}"
    return judged(error < SAME, words)


def fixed_answers(adapter: Any) -> Result:
    """The rows' own answers, in one micro-batch: the mean over their tokens, the end of the turn among them."""
    seen, rows, wanted, wrong = one_step(adapter, share=0.0)
    run = Run(folder="")
    answers = sorted(tuple(run.ids(row)) for row in run.conversations)
    if not wrong and sorted(row.ids for row in rows) != answers:
        wrong = "other tokens than those of the rows"
    return judged_step(seen.change, rows, wanted, wrong)


def fixed_answers_cut(adapter: Any) -> Result:
    """The same rows in four micro-batches of one: the same step."""
    seen, rows, wanted, wrong = one_step(adapter, share=0.0, batch=1, accumulation=4)
    return judged_step(seen.change, rows, wanted, wrong)


def own_answers(adapter: Any) -> Result:
    """Answers that the student writes: the mean over the tokens that it wrote."""
    seen, rows, wanted, wrong = one_step(adapter)
    return judged_step(seen.change, rows, wanted, wrong)


def own_answers_cut(adapter: Any) -> Result:
    """The same in four micro-batches."""
    seen, rows, wanted, wrong = one_step(adapter, batch=1, accumulation=4)
    return judged_step(seen.change, rows, wanted, wrong)


def both_ends_of_beta(adapter: Any) -> Result:
    """A trainer's beta 0 and 1 go to the loss as they are: judged by the direction of the step."""
    for beta in (0.0, 1.0):
        seen, rows, wanted, wrong = one_step(adapter, beta=beta)
        found = judged_step(seen.change, rows, wanted, wrong, direction=True)
        if found.verdict == "fail":
            return Result("fail", f"beta {beta:g}: {found.detail}")
    return Result("pass", "the directions of beta 0 and 1")


def unused_answers(adapter: Any) -> Result:
    """Answers that the rows carry and nobody reads, because the student writes its own, change nothing."""
    if adapter.prompts_only:
        raise NotApplicable("rows carry no answers")
    seen = [one_step(adapter, conversations=material.rows(4, repeats)) for repeats in (1, 3)]
    written = [sorted(row.ids for row in rows) for _, rows, _, _ in seen]
    if written[0] != written[1]:
        return Result("fail", "the student wrote something else")
    along, _, error = compared(seen[1][0].change, seen[0][0].change.double())
    return judged(error < SAME, f"with answers three times as long {along:.3g} times the step")


def whole_prompts(adapter: Any) -> Result:
    """A long answer that is not used does not cut the prompt that the student answers, which has room by itself."""
    if adapter.prompts_only:
        raise NotApplicable("rows carry no answers")
    rows = material.rows()
    for row in rows:
        row[1]["content"] = "no" * 40
    _, trained, _, wrong = one_step(adapter, conversations=rows, max_length=110)
    return Result("fail", wrong) if wrong else judged(len(trained) == 4, "four whole prompts")


def padding_is_a_stop(adapter: Any) -> Result:
    """The padding token is the one that ends a turn: trained where the student wrote it, nowhere else."""
    seen, rows, wanted, wrong = one_step(adapter, tokenizer=material.tokenizer(pad_is_end=True), new_tokens=16)
    ended = sum(row.completion[-1] == END for row in rows)
    if not wrong and not ended > 0:
        wrong = "no answer ended"
    return judged_step(seen.change, rows, wanted, wrong, direction=True)


def tokenizers_stop(adapter: Any) -> Result:
    """A student whose generation config ends texts with another token than its chat template: an answer ends where
    its turn does."""
    model = material.ends_with(material.student(), 256)
    seen, rows, wanted, wrong = one_step(adapter, student=model, new_tokens=24)
    behind = _behind(seen, rows)
    if not wrong and behind:
        return Result("fail", f"{behind} of {len(rows)} answers go on behind the end of the turn")
    return judged_step(seen.change, rows, wanted, wrong, direction=True)


def two_stops(adapter: Any) -> Result:
    """A student with two stop tokens: either ends an answer and is trained."""
    other = material.TURN_START_ID
    model = material.ends_with(material.likes(material.student(), other), END, other)
    seen, rows, wanted, wrong = one_step(adapter, stops=(END, other), student=model, new_tokens=24)
    if not wrong and _behind(seen, rows):
        return Result("fail", f"{_behind(seen, rows)} of {len(rows)} answers go on behind a stop token")
    return judged_step(seen.change, rows, wanted, wrong, direction=True)


def _behind(seen: Seen, rows: list[Trained]) -> int:
    return sum(len(ids) > len(row.ids) for ids, row in zip(seen.sequences, rows, strict=False))


def _greedy(model: Any, prompts: list[list[int]], number: int) -> list[tuple[int, ...]]:
    """What a model writes if it always takes the likeliest token."""
    found = []
    with torch.no_grad():
        for prompt in prompts:
            ids = list(prompt)
            while len(ids) < len(prompt) + number and (len(ids) == len(prompt) or ids[-1] != END):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            found.append(tuple(ids))
    return sorted(found)


def _judged_writing(adapter: Any, model: Any) -> Result:
    """Whether a student at temperature 0.001 writes what is likeliest for it as it is at inference: in two steps that
    leave it as it is."""
    wanted = _greedy(copy.deepcopy(model).eval(), Run(folder="").prompts(), 8)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder=folder, student=model, temperature=0.001, new_tokens=8, steps=2, learning_rate=1e-12)
        rows, wrong = rows_of(train(adapter, run), run)
    same = sum(row.ids in wanted for row in targets(rows))
    return Result("fail", wrong) if wrong else judged(same == 8, f"{same} of 8 answers as at inference")


def no_dropout_in_answers(adapter: Any) -> Result:
    """A student with dropout writes without it."""
    return _judged_writing(adapter, material.student(resid_pdrop=0.5, embd_pdrop=0.5))


def _with_rules(**rules: Any) -> Any:
    model = material.student()
    model.generation_config.update(**rules)
    bent = model.generate(torch.tensor(Run(folder="").prompts()[:1]), max_new_tokens=8, do_sample=False)
    assert tuple(bent[0].tolist()) not in _greedy(model, Run(folder="").prompts()[:1], 8), "the rules must matter"
    return model


def no_repetition_penalty(adapter: Any) -> Result:
    """The repetition penalty that a chat model's generation config carries does not bend what the student writes: its
    answers are drawn from the model that the loss is about."""
    return _judged_writing(adapter, _with_rules(repetition_penalty=1.5, top_k=20, top_p=0.8, temperature=0.7))


def no_leftover_rules(adapter: Any) -> Result:
    """The same of a rarer rule."""
    return _judged_writing(adapter, _with_rules(no_repeat_ngram_size=1))


def teachers_dropout(adapter: Any) -> Result:
    """A teacher with dropout, handed over in training mode, is asked without it."""
    model = material.teacher(resid_pdrop=0.5, embd_pdrop=0.5).train()
    seen, rows, wanted, wrong = one_step(adapter, teacher=model)
    return judged_step(seen.change, rows, wanted, wrong, direction=True)


def _padded(model: Any) -> Any:
    """The same model, whose padding rows have probability 0."""
    with torch.no_grad():
        model.lm_head.bias[VOCABULARY:] = -1e4
    return model


def _padded_step(adapter: Any, **models: Any) -> Result:
    try:
        seen, rows, wanted, wrong = one_step(adapter, share=1.0 if adapter.prompts_only else 0.0, **models)
    except ValueError as error:
        if "vocab" not in str(error):
            raise
        raise NotApplicable("refuses heads of different sizes") from error
    return judged_step(seen.change, rows, wanted, wrong)


def padded_teacher(adapter: Any) -> Result:
    """The teacher's head has padding rows, of probability 0, that the student's has not."""
    return _padded_step(adapter, teacher=_padded(material.teacher(vocab=VOCABULARY + 8)))


def padded_student(adapter: Any) -> Result:
    """The student's head has padding rows, of probability 0, that the teacher's has not."""
    return _padded_step(adapter, student=_padded(material.student(vocab=VOCABULARY + 8)))


GROUP = "One optimizer step"
CASES = [
    Case("the rows' answers", GROUP, fixed_answers),
    Case("the rows' answers, four micro-batches", GROUP, fixed_answers_cut),
    Case("own answers", GROUP, own_answers),
    Case("own answers, four micro-batches", GROUP, own_answers_cut),
    Case("beta of 0 and 1 reaches the loss", GROUP, both_ends_of_beta, cheap=False),
    Case("answers that nobody reads have no say", GROUP, unused_answers),
    Case("answers that nobody reads leave prompts whole", GROUP, whole_prompts),
    Case("a teacher's padding rows", GROUP, padded_teacher),
    Case("a student's padding rows", GROUP, padded_student),
    Case("padding that is the stop token", GROUP, padding_is_a_stop),
    Case("the end of the turn stops, not only the config's token", GROUP, tokenizers_stop),
    Case("two stop tokens", GROUP, two_stops),
    Case("the student writes without dropout", GROUP, no_dropout_in_answers),
    Case("no repetition penalty left over from the model's config", GROUP, no_repetition_penalty),
    Case("no other sampling rule left over from it", GROUP, no_leftover_rules),
    Case("the teacher is asked without dropout", GROUP, teachers_dropout),
]
