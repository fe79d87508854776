"""An evaluation whose teacher reads prompts of its own: each model answers its own, and is measured behind its own."""

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from gkd.evaluation.harness import Evaluator
from gkd.evaluation.subject import Conditions, LocalSubject
from gkd.evaluation.view import TeacherReads
from gkd.loss.registry import make_divergence
from gkd.loss.settings import LossSettings
from gkd.rollouts.base import SamplingSettings

STUDENT_END, TEACHER_END = 256, 258
STOPS = range(0, 200, 8)  # so many that untrained models stop
PROMPTS = [[5, 6], [7], [9, 10, 11]]
TEACHER_PROMPTS = [[20, 21, 22, 23, 5, 6], [7], [30]]
HELD_OUT, STARTS = [[1, 2, 3, 4, STUDENT_END], [5, 6, 7]], [2, 1]
CONTEXTS = [[40, 41, 42], [5]]
STUDENT, TEACHER = tiny_model(seed=1), tiny_model(seed=2, hidden=48)


def sampling(end):
    return SamplingSettings(max_new_tokens=9, stop_ids=(*STOPS, end))


def log_probs(model, context, text):
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *text]])).logits[0].double()
    return logits[len(context) - 1 : -1].log_softmax(-1)


def nll(model, context, text):
    return -log_probs(model, context, text).gather(1, torch.tensor(text)[:, None])


@pytest.fixture(scope="module", params=[None, (STUDENT_END, TEACHER_END)], ids=["one template", "two"])
def measured(request):
    pair = request.param
    harness = Evaluator(
        LocalSubject(TEACHER), tiny_tokenizer(), PROMPTS, HELD_OUT, sampling(STUDENT_END),
        LossSettings(make_divergence("forward_kl")), teacher_sampling=sampling(TEACHER_END),
        conditions=Conditions(3, 2), held_out_starts=STARTS,
        teacher_reads=TeacherReads(TEACHER_PROMPTS, CONTEXTS, pair),
    )  # fmt: skip
    written, generate = {}, harness._generate

    def keep(model, settings):
        written[model] = generate(model, settings)
        return written[model]

    harness._generate = keep
    if pair is not None:  # an answer that the teacher ended, whatever it draws
        harness._teacher_text = [*generate(LocalSubject(TEACHER), sampling(TEACHER_END))[:2], [50, 51, TEACHER_END]]
        written[LocalSubject(TEACHER)] = harness._teacher_text
    found = {name: harness.measure(LocalSubject(model), name) for name, model in (("s", STUDENT), ("t", TEACHER))}
    return found, [written[LocalSubject(model)] for model in (STUDENT, TEACHER)], pair


def last(text, pair, back=False):
    """The text as the teacher ends it, or (back) as the student does."""
    if pair is None:
        return text
    own, other = reversed(pair) if back else pair
    return [*text[:-1], other] if text[-1] == own else text


def test_the_student_is_compared_behind_its_prompt_with_the_teacher_behind_its_own(measured):
    found, (by_student, by_teacher), pair = measured
    for name, texts in (("own", by_student), ("teacher_text", [last(text, pair, back=True) for text in by_teacher])):
        kls = []
        for prompt, teacher_prompt, text in zip(PROMPTS, TEACHER_PROMPTS, texts, strict=True):
            a = log_probs(STUDENT, prompt, text)
            b = log_probs(TEACHER, teacher_prompt, last(text, pair))
            if pair is not None:
                b[:, list(pair)] = b[:, [pair[1], pair[0]]]
            kls.append((b.exp() * (b - a)).sum(-1))
        wanted = torch.cat(kls).mean().item()
        assert found["s"].values[f"divergence_{name}"].value == pytest.approx(wanted, rel=1e-5)


def test_the_teacher_is_itself_in_its_own_view(measured):
    values = measured[0]["t"].values
    assert abs(values["divergence_own"].value) < 1e-9
    assert values["agreement_own"].value == 1.0


def test_each_perplexity_is_behind_ones_own_prompt(measured):
    found, _, pair = measured
    parts = [(ids[:start], ids[start:]) for ids, start in zip(HELD_OUT, STARTS, strict=True)]
    student = torch.cat([nll(STUDENT, context, text) for context, text in parts]).mean().exp().item()
    read = [(context, last(text, pair)) for context, (_, text) in zip(CONTEXTS, parts, strict=True)]
    teacher = torch.cat([nll(TEACHER, context, text) for context, text in read]).mean().exp().item()
    assert found["s"].values["perplexity"].value == pytest.approx(student, rel=1e-5)
    assert found["t"].values["perplexity"].value == pytest.approx(teacher, rel=1e-5)


def test_samples_show_what_each_was_asked(measured):
    found, _, _ = measured
    tokenizer = tiny_tokenizer()
    for name, prompts in (("s", PROMPTS), ("t", TEACHER_PROMPTS)):
        assert [prompt for prompt, _ in found[name].samples] == [tokenizer.decode(ids) for ids in prompts]
    assert found["s"].settings["the teacher reads"] == "prompts of its own"
