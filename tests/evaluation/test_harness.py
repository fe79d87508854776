"""The evaluation harness on real tiny models, against float64 computations from the definitions."""

import json
import math
import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from tiny import tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from vllm_server.fake import FakeServer

import gkd.evaluation.subject
from gkd.common.sign_of_life import SignOfLife
from gkd.evaluation.harness import Evaluator
from gkd.evaluation.measures import (
    METRICS,
    Estimate,
    Measures,
    bootstrap_estimate,
    difference_estimate,
    distinct_ngrams,
    mean_estimate,
    ratio_estimate,
)
from gkd.evaluation.subject import Conditions, LocalSubject, subject_of, token_nll
from gkd.evaluation.task_score import TaskScore
from gkd.loss import make_divergence
from gkd.loss.settings import LossSettings
from gkd.models.head import head_of
from gkd.report.comparison import as_dict, as_markdown, compare, format_estimate, samples_table, table
from gkd.rollouts.base import SamplingSettings
from gkd.servers.checks import served_model
from gkd.servers.client import VLLMClient
from gkd.teachers.server import ServerTeacher

TOKENIZER = tiny_tokenizer()
STOP = tuple(range(2, 259, 8))  # many stop tokens, so that random models end at ragged lengths; 258 is one
PROMPTS = [
    TOKENIZER(text)["input_ids"] for text in ("a", "two words", "three whole words", "é!", "the same", "x y z w")
]
HELD_OUT = [TOKENIZER(text)["input_ids"] for text in ("ab", "a longer text that was held out", "short")]
SAMPLING = SamplingSettings(max_new_tokens=9, temperature=0.9, stop_ids=STOP)
JSD = LossSettings(make_divergence("jsd", beta=0.3))


def evaluator(teacher, batch_size=4, **options) -> Evaluator:
    values = {"sampling": SAMPLING, "loss": JSD, "conditions": Conditions(3, batch_size), **options}
    teacher = LocalSubject(teacher) if isinstance(teacher, torch.nn.Module) else teacher
    return Evaluator(teacher, TOKENIZER, PROMPTS, HELD_OUT, **values)


TEACHER = tiny_model(seed=1)
STUDENT = tiny_model(seed=2, hidden=16)


def log_probs(model, ids: list[int]) -> torch.Tensor:
    """[T, V] float64 log-probabilities of the next token, from the model's own logits, one sequence, no padding."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)


def token_values(student, prompt, completion, beta=0.3) -> torch.Tensor:
    """[tokens, 3]: JSD (GKD paper, Eq. 1), KL(teacher || student), agreement, in float64 from whole distributions."""
    ids = prompt + completion
    rows = slice(len(prompt) - 1, len(ids) - 1)
    student_lp, teacher_lp = log_probs(student, ids)[rows], log_probs(TEACHER, ids)[rows]
    p, q = teacher_lp.exp(), student_lp.exp()
    m = (beta * p + (1 - beta) * q).log()
    jsd = beta * (p * (teacher_lp - m)).sum(-1) + (1 - beta) * (q * (student_lp - m)).sum(-1)
    forward_kl = (p * (teacher_lp - student_lp)).sum(-1)
    same = (teacher_lp.argmax(-1) == student_lp.argmax(-1)).double()
    return torch.stack([jsd, forward_kl, same], dim=1)


@pytest.fixture(scope="module")
def measured():
    """One evaluator, three models measured; the completions it sampled are kept beside the measures."""
    harness = evaluator(TEACHER)
    kept = {}
    generate = harness._generate

    def keep(model, sampling):
        completions = generate(model, sampling)
        kept[model] = completions
        return completions

    harness._generate = keep
    measures = {
        "before": harness.measure(LocalSubject(STUDENT), "before"),
        "teacher": harness.measure(LocalSubject(TEACHER), "teacher"),
    }
    return harness, measures, {"student": kept[LocalSubject(STUDENT)], "teacher": kept[LocalSubject(TEACHER)]}


def test_divergences_and_agreement_are_those_of_dense_logits(measured):
    _, measures, completions = measured
    assert len({len(c) for c in completions["student"]}) > 1, "ragged lengths are the point"
    values = measures["before"].values
    for suffix, written in (("own", completions["student"]), ("teacher_text", completions["teacher"])):
        rows = [token_values(STUDENT, p, c) for p, c in zip(PROMPTS, written, strict=True)]
        tokens = torch.cat(rows)
        assert values[f"divergence_{suffix}"].value == pytest.approx(tokens[:, 0].mean().item(), rel=1e-4)
        assert values[f"forward_kl_{suffix}"].value == pytest.approx(tokens[:, 1].mean().item(), rel=1e-4)
        assert values[f"agreement_{suffix}"].value == pytest.approx(tokens[:, 2].mean().item(), abs=1e-9)
        by_sequence = ratio_estimate([row[:, 0].sum().item() for row in rows], [len(row) for row in rows])
        assert values[f"divergence_{suffix}"].residuals == pytest.approx(by_sequence.residuals, rel=1e-3, abs=1e-6)
    gap = values["divergence_own"].value - values["divergence_teacher_text"].value
    assert values["exposure_gap"].value == pytest.approx(gap)
    assert abs(gap) > 1e-4


@pytest.mark.parametrize(
    ("options", "teacher_temperature", "scale"),
    [
        ({"loss_temperature": 5.0}, 5.0, 1.0),
        ({"loss_temperature": 5.0, "scale_by_temperature_squared": True}, 5.0, 25.0),
        ({"loss_temperature": 5.0, "teacher_loss_temperature": 2.0}, 2.0, 1.0),
        ({"teacher_loss_temperature": 2.0, "teacher_top_k": 4, "top_k_tail": "renormalize"}, 2.0, 1.0),
    ],
)
def test_kls_are_those_of_the_models_as_they_are_and_the_divergence_names_all_that_goes_into_it(
    options, teacher_temperature, scale
):
    """Whatever the loss softens, scales or leaves out, runs can be compared by the forward KL."""
    harness = evaluator(TEACHER, loss=LossSettings(make_divergence("forward_kl"), **options))
    found = harness.measure(LocalSubject(STUDENT), "student")
    student_temperature = options.get("loss_temperature", 1.0)
    plain, softened = [], []
    for prompt, completion in zip(PROMPTS, harness.teacher_text(), strict=True):
        plain.append(token_values(STUDENT, prompt, completion)[:, 1])
        rows = slice(len(prompt) - 1, len(prompt + completion) - 1)
        temperatures = ((STUDENT, student_temperature), (TEACHER, teacher_temperature))
        a, b = ((log_probs(m, prompt + completion)[rows] / t).log_softmax(-1) for m, t in temperatures)
        softened.append(scale * (b.exp() * (b - a)).sum(-1))
    assert found.values["forward_kl_teacher_text"].value == pytest.approx(torch.cat(plain).mean().item(), rel=1e-4)
    assert found.values["divergence_teacher_text"].value == pytest.approx(torch.cat(softened).mean().item(), rel=1e-4)
    assert METRICS["forward_kl_own"].label == "Forward KL at T = 1, own completions"
    named = found.settings["divergence"]
    assert f"forward_kl at T = {student_temperature:g}" in named
    assert ("(teacher 2)" in named) == (teacher_temperature == 2.0)
    assert ("times T² = 25" in named) == (scale == 25.0)
    assert ("trained on the teacher's top 4, tail: renormalize" in named) == ("teacher_top_k" in options)
    assert "over the whole vocabulary" in named
    assert named in as_markdown(as_dict(found, found, found))


def test_perplexity_is_the_float64_one(measured):
    _, measures, _ = measured
    nll = [-log_probs(STUDENT, ids)[t, ids[t + 1]].item() for ids in HELD_OUT for t in range(len(ids) - 1)]
    assert measures["before"].values["perplexity"].value == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)


def test_bits_per_byte_are_those_of_the_tokens_that_are_text(measured):
    """A token is a byte here."""
    _, measures, completions = measured
    for name, model in (("before", STUDENT), ("teacher", TEACHER)):
        held_out, written = [], []
        for prompt, ids in [([ids[0]], ids[1:]) for ids in HELD_OUT]:
            held_out += [-row[i].item() for row, i in zip(log_probs(model, prompt + ids), ids, strict=False)]
        for prompt, ids in zip(PROMPTS, completions["teacher"], strict=True):
            rows = log_probs(model, prompt + ids)[len(prompt) - 1 : -1]
            written += [-row[i].item() for row, i in zip(rows, ids, strict=True) if i < 256]
        for key, nats in (("bits_per_byte", held_out), ("bits_per_byte_teacher_text", written)):
            assert measures[name].values[key].value == pytest.approx(np.mean(nats) / math.log(2), rel=1e-4)


def test_tokens_of_unknown_bytes_have_no_bits_per_byte_and_that_is_told():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    unknown = PreTrainedTokenizerFast(tokenizer_object=backend)
    harness = Evaluator(LocalSubject(TEACHER), unknown, PROMPTS, HELD_OUT, SAMPLING, JSD)
    measures = harness.measure(LocalSubject(STUDENT), "student")
    assert "perplexity" in measures.values
    assert not {"bits_per_byte", "bits_per_byte_teacher_text"} & measures.values.keys()
    assert "does not say which bytes" in measures.settings["bits per byte"]


def test_perplexity_after_a_context_counts_only_what_follows():
    harness = evaluator(TEACHER, held_out_starts=[1, 10, 4])
    nll = [
        -log_probs(STUDENT, ids)[t, ids[t + 1]].item()
        for ids, start in zip(HELD_OUT, [1, 10, 4], strict=True)
        for t in range(start - 1, len(ids) - 1)
    ]
    assert harness._perplexity(LocalSubject(STUDENT))["perplexity"].value == pytest.approx(
        math.exp(np.mean(nll)), rel=1e-4
    )
    of_answers, of_texts = (
        harness.measure(LocalSubject(STUDENT), "s"),
        evaluator(TEACHER).measure(LocalSubject(STUDENT), "s"),
    )
    for measures, label in ((of_answers, "Perplexity, held-out answers"), (of_texts, "Perplexity, held-out text")):
        rows = {row["key"]: row["label"] for row in as_dict(measures, measures)["rows"]}
        assert rows["perplexity"] == label


@pytest.mark.parametrize("kind", ["gemma2", "cohere"])
def test_perplexity_with_a_soft_cap_or_a_logit_scale(kind):
    model = tiny_model(kind, **({"final_logit_softcapping": 3.0} if kind == "gemma2" else {}))
    nll = [-log_probs(model, ids)[t, ids[t + 1]].item() for ids in HELD_OUT for t in range(len(ids) - 1)]
    value = evaluator(TEACHER)._perplexity(LocalSubject(model))["perplexity"].value
    assert value == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)


def test_chunks_of_the_perplexity_do_not_matter(monkeypatch):
    hidden, targets = torch.randn(7, 32), torch.randint(0, 259, (7,))
    whole = token_nll(hidden, head_of(TEACHER), targets)
    monkeypatch.setattr(gkd.evaluation.subject, "CHUNK_LOGITS", 2 * 259)
    torch.testing.assert_close(token_nll(hidden, head_of(TEACHER), targets), whole)


def test_text_measures_are_counted_from_the_completions(measured):
    _, measures, completions = measured
    values, own = measures["before"].values, completions["student"]
    assert values["ended"].value == pytest.approx(sum(c[-1] in STOP for c in own) / len(own))
    assert 0 < values["ended"].value < 1
    assert values["length"].value == pytest.approx(sum(map(len, own)) / len(own))
    pairs = [pair for c in own for pair in pairwise(c)]
    assert values["distinct_2"].value == pytest.approx(len(set(pairs)) / len(pairs))


def test_the_teacher_has_no_divergence_from_itself_and_no_gap(measured):
    _, measures, _ = measured
    values = measures["teacher"].values
    for key in ("divergence_own", "divergence_teacher_text", "forward_kl_own", "exposure_gap"):
        assert values[key].value == pytest.approx(0.0, abs=1e-7), key
    assert values["agreement_own"].value == 1.0


def test_a_student_equal_to_the_teacher_writes_what_the_teacher_writes():
    harness = evaluator(TEACHER)
    copy = harness.measure(LocalSubject(tiny_model(seed=1)), "copy")
    for key in ("divergence_own", "divergence_teacher_text", "exposure_gap", "forward_kl_teacher_text"):
        assert copy.values[key].value == pytest.approx(0.0, abs=1e-7), key
    assert copy.values["agreement_teacher_text"].value == 1.0
    assert copy.samples == harness.measure(LocalSubject(TEACHER), "teacher").samples


def test_batches_do_not_matter(measured):
    _, measures, _ = measured
    alone = evaluator(TEACHER, batch_size=1).measure(LocalSubject(STUDENT), "before")
    for key, estimate in measures["before"].values.items():
        assert alone.values[key].value == pytest.approx(estimate.value, rel=1e-4, abs=1e-6), key


def test_measuring_leaves_no_trace():
    """Global random streams, train / eval flags, gradients, generation config: all as before; the numbers repeat."""
    torch.manual_seed(11), random.seed(12), np.random.seed(13)
    student = get_peft_model(
        tiny_model(seed=2, hidden=16), LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"])
    )
    student.train()
    student.base_model.model.model.layers[0].eval()
    flags = {name: module.training for name, module in student.named_modules()}
    own_config = student.generation_config
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state = np.random.get_state()[1].copy()
    first = evaluator(TEACHER).measure(LocalSubject(student), "student")
    second = evaluator(TEACHER).measure(LocalSubject(student), "student")
    assert first == second
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert (np.random.get_state()[1] == numpy_state).all()
    assert {name: module.training for name, module in student.named_modules()} == flags
    assert all(parameter.grad is None for parameter in student.parameters())
    assert student.generation_config is own_config


def test_an_adapter_counts():
    student = get_peft_model(
        tiny_model(seed=2, hidden=16), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.5)
    harness = evaluator(TEACHER)
    with_adapter = harness.measure(LocalSubject(student), "adapter").values["divergence_teacher_text"].value
    text = harness.teacher_text()
    tokens = torch.cat([token_values(student, p, c) for p, c in zip(PROMPTS, text, strict=True)])
    assert with_adapter == pytest.approx(tokens[:, 0].mean().item(), rel=1e-4)
    with student.disable_adapter():
        without = harness.measure(LocalSubject(student), "base").values["divergence_teacher_text"].value
    assert abs(with_adapter - without) > 1e-3


def test_the_teacher_samples_once_with_its_own_stop_ids():
    calls = []
    harness = evaluator(TEACHER, teacher_sampling=replace(SAMPLING, stop_ids=(7, *STOP)))
    generate = harness._generate
    harness._generate = lambda model, sampling: calls.append((model, sampling)) or generate(model, sampling)
    for model, name in ((STUDENT, "before"), (STUDENT, "after"), (TEACHER, "teacher")):
        harness.measure(LocalSubject(model), name)
    assert [sampling.stop_ids for model, sampling in calls if model == LocalSubject(TEACHER)] == [(7, *STOP)]
    assert [sampling.stop_ids for model, sampling in calls if model == LocalSubject(STUDENT)] == [STOP, STOP]


def test_task_scores_are_of_greedy_and_undistorted_samples():
    asked = []

    def score(text: str, row: dict) -> float:
        asked.append((row["index"], text))
        return float(len(text) % 2)

    rows = [{"index": index} for index in range(len(PROMPTS))]
    harness = evaluator(TEACHER, score=TaskScore(rows, score))
    values = harness.measure(LocalSubject(STUDENT), "student").values
    greedy, sampled = asked[: len(PROMPTS)], asked[len(PROMPTS) :]
    assert [index for index, _ in greedy] == [index for index, _ in sampled] == list(range(len(PROMPTS)))
    assert values["score_greedy"].value == np.mean([len(text) % 2 for _, text in greedy])
    assert values["score_sampled"].count == len(PROMPTS)
    ids = list(PROMPTS[1])  # the greedy completion, by hand
    for _ in range(SAMPLING.max_new_tokens):
        ids.append(int(log_probs(STUDENT, ids)[-1].argmax()))
        if ids[-1] in STOP:
            break
    assert greedy[1][1] == TOKENIZER.decode(ids[len(PROMPTS[1]) :], skip_special_tokens=True)


def test_a_corpus_score_is_of_all_completions_at_once():
    def share_of_the_letter(texts: list[str], rows: list[dict]) -> float:
        """A ratio of sums, as corpus BLEU is: not the mean of the texts' ratios."""
        return sum(text.count(row["letter"]) for text, row in zip(texts, rows, strict=True)) / sum(map(len, texts))

    rows = [{"letter": letter} for letter in "aeiouy"]
    values = (
        evaluator(TEACHER, score=TaskScore(rows, None, share_of_the_letter))
        .measure(LocalSubject(STUDENT), "student")
        .values
    )
    assert {"corpus_score_greedy", "corpus_score_sampled"} <= values.keys()
    assert "score_greedy" not in values
    texts = ["aab", "ecc", "idddd", "o", "uuuu", "yz"]
    estimate = TaskScore(rows, None, share_of_the_letter).estimates(texts, "greedy")["corpus_score_greedy"]
    assert estimate.value == pytest.approx(10 / 18)
    counts, hits = np.array([3, 3, 5, 1, 4, 2]), np.array([2, 1, 1, 1, 4, 1])
    draws = np.random.default_rng(0).integers(0, 6, size=(20_000, 6))
    spread = (hits[draws].sum(1) / counts[draws].sum(1)).std()
    assert estimate.error == pytest.approx(spread, rel=0.15)
    assert estimate.count == 6
    same = TaskScore(rows, None, share_of_the_letter).estimates(texts, "greedy")["corpus_score_greedy"]
    assert difference_estimate(same, estimate).error == 0  # the same resampled sets


def test_a_bootstrap_of_a_mean_is_the_textbook_error():
    values = list(np.random.default_rng(1).normal(size=50))
    estimate = bootstrap_estimate(lambda rows: float(np.mean([values[i] for i in rows])), 50, 2000, random.Random(0))
    assert estimate.error == pytest.approx(np.std(values) / math.sqrt(50), rel=0.06)
    assert bootstrap_estimate(lambda rows: 1.0, 1, 10, random.Random(0)).error is None


@pytest.mark.parametrize("value", ["good", None, [1.0], np.ones(2), torch.ones(2), 10**400, math.nan])
def test_a_score_that_is_no_number_is_told(value):
    with pytest.raises(ValueError, match=r"score (returned|of evaluation prompt 0 is) .* number"):
        TaskScore([{}], lambda text, row: value).estimates(["a"], "greedy")


# ------------------------------------------------------------------------------------------ a teacher on a server


@pytest.fixture(scope="module")
def served():
    """(teacher on a server with K = 20, what the harness measures with it of the student and of the teacher)"""
    with FakeServer(tiny_model(seed=1), TOKENIZER) as server:
        client = VLLMClient(server.url, field="teacher_server_url", timeout=20.0)
        teacher = subject_of(ServerTeacher(client, served_model(client), 20, vocabulary=259))
        harness = evaluator(teacher, score=TaskScore([{}] * len(PROMPTS), lambda text, row: float(len(text))))
        yield harness, harness.measure(LocalSubject(STUDENT), "student"), harness.measure(teacher, "teacher")


def test_a_served_teachers_divergence_is_that_of_k_and_the_rest(served):
    harness, student, _ = served
    text = harness.teacher_text()
    total = []
    for prompt, completion in zip(PROMPTS, text, strict=True):
        rows = slice(len(prompt) - 1, len(prompt + completion) - 1)
        a, b = (log_probs(m, prompt + completion)[rows].exp() for m in (STUDENT, TEACHER))
        top = b.topk(20, dim=-1).indices
        q, p = (torch.cat([x.gather(1, top), 1 - x.gather(1, top).sum(-1, keepdim=True)], -1) for x in (a, b))
        m = 0.3 * p + 0.7 * q
        total.append(0.3 * (p * (p / m).log()).sum(-1) + 0.7 * (q * (q / m).log()).sum(-1))
    assert student.values["divergence_teacher_text"].value == pytest.approx(torch.cat(total).mean().item(), rel=1e-4)
    exact = evaluator(TEACHER)._target_means(LocalSubject(STUDENT), text)["divergence"].value
    assert student.values["divergence_teacher_text"].value < exact  # merging outcomes never adds divergence
    assert "20 most likely" in student.settings["divergence"]
    assert "lower bound" in student.settings["divergence"]


def test_what_a_server_tells_exactly_is_what_the_model_gives(served):
    _, student, teacher = served
    local = evaluator(TEACHER, score=TaskScore([{}] * len(PROMPTS), lambda text, row: float(len(text))))
    of_student, of_teacher = (
        local.measure(LocalSubject(STUDENT), "student").values,
        local.measure(LocalSubject(TEACHER), "teacher").values,
    )
    for key in ("perplexity", "score_greedy"):
        assert teacher.values[key].value == pytest.approx(of_teacher[key].value, rel=1e-4), key
    for key in ("perplexity", "ended", "length", "distinct_2", "score_greedy", "agreement_own"):
        assert student.values[key].value == pytest.approx(of_student[key].value, rel=1e-4), key
    assert teacher.values["divergence_own"].value == 0.0
    assert teacher.values["agreement_teacher_text"].value == 1.0
    (row,) = compare(student, student, teacher, ["exposure_gap"])
    assert row.verdict == "same"


def test_without_a_teacher_the_student_is_measured_by_itself():
    measures = evaluator(None).measure(LocalSubject(STUDENT), "student")
    of_student = {"perplexity", "bits_per_byte", "ended", "length", "repeated_4grams", "distinct_2"}
    assert of_student == measures.values.keys()
    assert "not measured" in measures.settings["divergence"]


def test_a_smaller_shared_vocabulary_is_honoured():
    wide = tiny_model(seed=2, hidden=16, vocab=272)
    wide.lm_head.weight.data[259:] = 0.0
    wide.lm_head.weight.data[259:, 0] = -50.0  # whatever the padded rows say, it is cut off
    harness = evaluator(TEACHER, loss=replace(JSD, shared_vocab=259))
    text = harness.teacher_text()
    ours = harness._target_means(LocalSubject(wide), text)["divergence"].value
    total = []
    for prompt, completion in zip(PROMPTS, text, strict=True):
        ids = prompt + completion
        a = torch.log_softmax(log_probs(wide, ids)[len(prompt) - 1 : -1, :259], dim=-1)
        b = log_probs(TEACHER, ids)[len(prompt) - 1 : -1]
        m = (0.3 * b.exp() + 0.7 * a.exp()).log()
        total.append(0.3 * (b.exp() * (b - m)).sum(-1) + 0.7 * (a.exp() * (a - m)).sum(-1))
    assert ours == pytest.approx(torch.cat(total).mean().item(), rel=1e-4)


def test_wrong_use_says_what_is_wrong():
    def make(prompts=PROMPTS, held_out=HELD_OUT, **options):
        return Evaluator(LocalSubject(TEACHER), TOKENIZER, prompts, held_out, SAMPLING, JSD, **options)

    with pytest.raises(ValueError, match="0 given"):
        make(prompts=[])
    with pytest.raises(ValueError, match=r"empty ones at \[1\]"):
        make(prompts=[[1], []])
    with pytest.raises(ValueError, match=r"held_out texts \[0\]"):
        make(held_out=[[5], [5, 6]])
    with pytest.raises(ValueError, match="2 entries for 3 texts"):
        make(held_out_starts=[1, 1])
    assert "perplexity" not in make(held_out=[])._perplexity(LocalSubject(STUDENT))


# ------------------------------------------------------------------------------------- estimates and the table


def test_standard_errors_are_those_of_repeated_drawing():
    """A ratio of sums over sequences of ragged length: its stated error is the spread over many drawn sets."""
    draw = np.random.default_rng(5)

    def one_set() -> Estimate:
        counts = draw.integers(1, 30, size=40)
        level = draw.normal(1.0, 0.3, size=40)  # tokens of one sequence hang together
        return ratio_estimate(list(level * counts), list(counts))

    sets = [one_set() for _ in range(600)]
    spread = np.std([estimate.value for estimate in sets])
    assert np.mean([estimate.error for estimate in sets]) == pytest.approx(spread, rel=0.1)


def test_a_plain_mean_has_the_textbook_error():
    values = [1.0, 2.0, 4.0, 8.0]
    estimate = mean_estimate(values)
    assert estimate.value == 3.75
    assert estimate.error == pytest.approx(np.std(values, ddof=1) / 2)
    assert mean_estimate([5.0]).error is None
    assert math.isnan(mean_estimate([]).value)
    assert math.isnan(distinct_ngrams([[1]], 2))


def test_a_paired_difference_is_judged_by_the_pairs():
    hard = [10.0, 1.0, 5.0, 7.0, 3.0]
    before, after = mean_estimate(hard), mean_estimate([value - 0.5 for value in hard])
    assert difference_estimate(after, before).error == pytest.approx(0.0, abs=1e-12)
    assert before.error > 1
    (row,) = compare(Measures("b", {"perplexity": before}), Measures("a", {"perplexity": after}))
    assert (row.verdict, row.improved, row.clear) == ("better", True, True)


@pytest.mark.parametrize(
    ("key", "before", "after", "teacher", "verdict"),
    [
        ("perplexity", 9.0, 8.0, 5.0, "better"),
        ("perplexity", 8.0, 9.0, 5.0, "worse"),
        ("agreement_own", 0.5, 0.6, 1.0, "better"),
        ("length", 100.0, 60.0, 50.0, "better"),
        ("length", 100.0, 10.0, 60.0, "worse"),
        ("ended", 0.9, 0.7, 0.6, "better"),
        ("ended", 0.9, 0.7, None, "unknown"),
        ("exposure_gap", 0.2, -0.1, 0.0, "better"),
        ("perplexity", 8.0, 8.0, 5.0, "same"),
        ("perplexity", 8.0, math.nan, 5.0, "unknown"),
        ("perplexity", math.inf, 8.0, 5.0, "unknown"),
        ("perplexity", None, 8.0, 5.0, "unknown"),
    ],
)
def test_what_counts_as_improved(key, before, after, teacher, verdict):
    def measures(value):
        return Measures("m", {} if value is None else {key: Estimate(value)})

    (row,) = compare(measures(before), measures(after), measures(teacher))
    assert row.verdict == verdict
    assert row.improved is {"better": True, "worse": False, "same": False, "unknown": None}[verdict]


@pytest.mark.parametrize(
    ("ended", "length", "green"),
    [
        ((0.417, 0.0, 0.125), (30.0, 32.0, 31.5), set()),  # both models stand at the cap
        ((0.9, 0.2, 0.6), (20.0, 31.0, 30.0), set()),  # the student's length is the cap's
        ((0.9, 0.8, 0.3), (20.0, 25.0, 31.0), set()),  # the teacher's is
        ((0.4, 0.8, 0.9), (30.0, 22.0, 20.0), {"ended", "length"}),
    ],
)
def test_no_improvement_where_the_cap_decides(ended, length, green):
    def measures(i):
        values = {
            "ended": Estimate(ended[i]),
            "length": Estimate(length[i]),
            "distinct_2": Estimate([0.1, 0.3, 0.4][i]),
        }
        return Measures("m", values)

    before, after, teacher = (measures(i) for i in range(3))
    plain = as_dict(before, after, teacher)
    assert {row["key"] for row in plain["rows"] if row["improved"]} == green | {"distinct_2"}
    assert ("reach max_new_tokens" in as_markdown(plain)) == (green == set())


def test_a_student_that_does_not_stop_any_more_is_worse_cap_or_not():
    before, after, teacher = (Measures("m", {"ended": Estimate(value)}) for value in (0.8, 0.1, 0.9))
    assert compare(before, after, teacher)[0].verdict == "worse"


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.1234, 0.01, "0.123 ± 0.010"),
        (9999.0, 12.3, "9999 ± 12"),
        (150709.9, 1234.5, "150.7k ± 1.2k"),
        (150709.9, 12345.6, "151k ± 12k"),
        (3.214e6, None, "3.21M"),
        (1.5e12, 2e10, "1.5e+12 ± 2e+10"),
        (math.inf, math.inf, "inf"),
    ],
)
def test_large_numbers_are_shortened(value, error, text):
    assert format_estimate(METRICS["perplexity"], Estimate(value, error)) == text


def test_the_table_keeps_its_words_whole_on_80_columns():
    values = {"divergence_own": Estimate(0.0), "perplexity": Estimate(123456.7, 12345.6)}
    values |= {key: Estimate(0.333, 0.123) for key in ("agreement_own", "ended")}
    measures = Measures("student before", values, settings={"prompts": 32, "divergence": "jsd(beta=0.5) at T = 1"})
    noisy = [Estimate(0.333 + i / 1000, 0.123, 2, (0.1 * (-1) ** i, -0.1 * (-1) ** i)) for i in range(2)]
    before, after = (replace(measures, values={**values, "divergence_own": estimate}) for estimate in noisy)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(before, after, measures))
    text = console.export_text()
    assert "…" not in text
    assert "noise)" in text
    lines = text[text.index("┏") : text.index("┘") + 1].splitlines()
    assert {len(line) for line in lines} == {len(lines[0])}
    assert all(line[-1] in "┓┃┩│┘" for line in lines)
    for key in values:
        for word in METRICS[key].label.split():
            assert word in text
    assert "divergence jsd(beta=0.5) at T = 1" in text


def test_the_table_in_every_form(measured):
    harness, measures, _ = measured
    before, teacher = measures["before"], measures["teacher"]
    after = harness.measure(LocalSubject(tiny_model(seed=1)), "after")
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(before, after, teacher))
    console.print(samples_table(before, after))
    text = console.export_text()
    plain = json.loads(json.dumps(as_dict(before, after, teacher), allow_nan=False))
    markdown = as_markdown(plain)
    expected = [key for key in METRICS if key in before.values]
    assert [row["key"] for row in plain["rows"]] == expected
    for key in expected:
        assert METRICS[key].label in text
        assert METRICS[key].label in markdown
    value = f"{before.values['perplexity'].value:.1f}"
    assert value in text
    assert value in markdown
    assert plain["settings"]["prompts"] == len(PROMPTS)
    assert len(plain["samples"]) == 3
    assert set(plain["samples"][0]) == {"prompt", "before", "after", "teacher"}
    assert [row["key"] for row in as_dict(before, after, keys=["ended", "perplexity"])["rows"]] == [
        "ended",
        "perplexity",
    ]
    assert "better" in {row["verdict"] for row in plain["rows"]}
    with pytest.raises(ValueError, match="no metrics"):
        as_dict(before, after, keys=["perplexty"])


def test_the_sample_table_shows_the_question_the_card_the_prompt():
    tokenizer = tiny_tokenizer()
    turns = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "Why so?"}]
    prompt = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))["input_ids"]
    measures = Evaluator(None, tokenizer, [prompt], [], SAMPLING, JSD).measure(LocalSubject(STUDENT), "student")
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(samples_table(measures, measures))
    text = console.export_text()
    assert "Why so?" in text
    assert "helpful" not in text
    assert "helpful" in as_dict(measures, measures)["samples"][0]["prompt"]


def test_each_model_that_is_measured_is_named_in_the_log(caplog):
    with caplog.at_level("INFO", logger="gkd"):
        evaluator(TEACHER).measure(LocalSubject(STUDENT), "student before")
    assert "measuring the student before on 6 prompts" in caplog.text


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("with_teacher", [False, True])
def test_the_bar_of_a_model_ends_where_it_says(scored, with_teacher, monkeypatch):
    signs = []

    class Kept(SignOfLife):
        def __enter__(self):
            signs.append(self)
            return super().__enter__()

    monkeypatch.setattr("gkd.evaluation.harness.SignOfLife", Kept)
    score = TaskScore([{}] * len(PROMPTS), lambda text, row: 1.0) if scored else None
    harness = evaluator(TEACHER if with_teacher else None, score=score)
    harness.measure(LocalSubject(STUDENT), "student")
    if with_teacher:
        harness.measure(harness.teacher, "teacher")
    assert [(sign.what, sign.done) for sign in signs] == [(sign.what, sign.total) for sign in signs]
    assert [sign.what for sign in signs] == ["student", "teacher"][: 1 + with_teacher]
    assert all(sign.total > len(PROMPTS) for sign in signs)


def test_log_values_are_finite_numbers():
    measures = Measures("s", {"perplexity": Estimate(3.0), "length": Estimate(math.nan), "ended": Estimate(math.inf)})
    assert measures.as_log("after") == {"after/perplexity": 3.0}
