"""Student and teacher of different tokenizers under measurement, against float64 and the bytes of the texts."""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from other_tokens import END, other_model, other_tokenizer
from tiny import TURN_END, tiny_model, tiny_rows, tiny_tokenizer
from training import config
from vllm_server.fake import FakeServer

from gkd.assembly.evaluator import evaluator_of
from gkd.evaluation.subject import LocalSubject
from gkd.training.trainer import GKDTrainer

OWN, OTHER = tiny_tokenizer(), other_tokenizer()
STUDENT_END, TEACHER_END = OWN.convert_tokens_to_ids(TURN_END), OTHER.convert_tokens_to_ids(END)
ROWS = tiny_rows(12)
TEXTS = ["The red one is at 34 degrees.", " three", "Été: they are the others"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return GKDTrainer(
        model=tiny_model(seed=1).double().float(),
        teacher_model=other_model(),
        args=config(
            tmp_path_factory.mktemp("run"),
            teacher_tokenizer_alignment="bytes",
            divergence="forward_kl",
            eval_strategy="steps",
            temperature=0.7,
        ),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
        teacher_processing_class=other_tokenizer(),
    )


@pytest.fixture(scope="module")
def evaluated(run):
    asked = SimpleNamespace(num_eval_prompts=5, lm_eval_tasks=None, lm_eval_limit=None, draft_tokens=None)
    data = {"eval": Dataset.from_list(ROWS)}
    harness = evaluator_of(run, data, asked)
    return harness, [
        harness.measure(LocalSubject(run.model), "student"),
        harness.measure(harness.teacher, "teacher"),
    ]


def log_p(model, context, ids):
    """Log-probabilities [T, V] of what stands behind the context."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*context, *ids]])).logits[0].double()
    return logits[max(0, len(context) - 1) : -1].log_softmax(-1)


def bits(model, pairs, ends=()):
    """Bits of all tokens that are text, over the bytes of the texts."""
    nats, size = 0.0, 0
    for context, ids, text in pairs:
        told = log_p(model, context, ids)
        targets = ids if context else ids[1:]
        nats -= sum(float(told[k, i]) for k, i in enumerate(targets) if i not in ends)
        size += len(text.encode())
    return nats / math.log(2) / size


def prompt(row, tokenizer):
    return list(tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True)["input_ids"])


def ids_of(text, tokenizer):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_bits_per_byte_of_held_out_answers_are_those_of_each_models_own_tokens(run, evaluated):
    student, teacher = evaluated[1]
    texts = [row["messages"][-1]["content"] for row in ROWS]
    for model, tokenizer, end, found in (
        (run.model, OWN, STUDENT_END, student),
        (run.teacher.model, OTHER, TEACHER_END, teacher),
    ):
        pairs = [
            (prompt(row, tokenizer), [*ids_of(text, tokenizer), end], text)
            for row, text in zip(ROWS, texts, strict=True)
        ]
        assert found.values["bits_per_byte"].value == pytest.approx(bits(model, pairs, {end}), rel=1e-5)
        assert found.values["bits_per_byte"].count == len(ROWS)
    assert "perplexity" in student.values
    assert "perplexity" not in teacher.values
    assert student.extra["bits_per_byte"].label == "Bits per byte, held-out answers"


def test_bits_per_byte_of_texts_leave_out_what_nothing_predicts(run):
    asked = SimpleNamespace(num_eval_prompts=1, lm_eval_tasks=None, lm_eval_limit=None, draft_tokens=None)
    rows = Dataset.from_list(ROWS)
    harness = evaluator_of(run, {"eval": rows, "held_out_text": TEXTS}, asked)
    for model, subject, tokenizer in (
        (run.model, LocalSubject(run.model), OWN),
        (run.teacher.model, harness.teacher, OTHER),
    ):
        pairs = []
        for text in TEXTS:
            ids = ids_of(text, tokenizer)
            pairs.append(([], ids, tokenizer.decode(ids[1:])))
        read = [len(text.encode()) for _, _, text in pairs]
        read[-1] = len(TEXTS[-1].encode()) - 1  # its first token is half a character
        nats = sum(
            -float(told[k, i])
            for _, ids, _ in pairs
            for told in [log_p(model, [], ids)]
            for k, i in enumerate(ids[1:])
        )
        found = harness._perplexity(subject)["bits_per_byte"].value
        assert found == pytest.approx(nats / math.log(2) / sum(read), rel=1e-5)


def test_bits_per_byte_of_the_teachers_completions_are_behind_ones_own_prompt(run, evaluated):
    harness, (student, teacher) = evaluated
    written = [ids[:-1] if ids and ids[-1] == STUDENT_END else ids for ids in harness.teacher_text()]
    sizes = sum(map(len, written))  # a token of the student's is a byte
    nats = 0.0
    for row, ids in zip(ROWS, written, strict=False):
        told = log_p(run.model, prompt(row, OWN), [*ids, 0])
        nats -= sum(float(told[k, i]) for k, i in enumerate(ids))
    found = student.values["bits_per_byte_teacher_text"].value
    assert found == pytest.approx(nats / math.log(2) / sizes, rel=1e-5)
    assert teacher.values["bits_per_byte_teacher_text"].value > 0


def outcomes(p, q, pairs, merged):
    """Student's and teacher's probabilities of the common tokens, merged ones counted with their first byte's."""
    s, t = p[[a for a, _ in pairs]], q[[b for _, b in pairs]].clone()
    places = {b: k for k, (_, b) in enumerate(pairs)}
    for token, first in merged.items():
        t[places[first]] += q[token]
    return torch.cat([s, 1 - s.sum()[None]]), torch.cat([t, 1 - t.sum()[None]])


def kl(t, s):
    return float((t * (t / s).log()).nan_to_num().sum())


def divergence(student, teacher, pairs_of_ids, contexts):
    """KL(teacher || student) by the definition of `gkd.loss.aligned`, mean over the student's tokens."""
    theirs = OTHER.get_vocab()
    pairs = sorted((i, theirs[token]) for token, i in OWN.get_vocab().items() if token in theirs and i < 256)
    pairs.append((STUDENT_END, TEACHER_END))
    merged = {i: theirs[token[0]] for token, i in theirs.items() if len(token) > 1 and i not in (0, TEACHER_END)}
    total, number = 0.0, 0
    for (own, their), (before, behind) in zip(pairs_of_ids, contexts, strict=True):
        p, q = log_p(student, before, own).exp(), log_p(teacher, behind, their).exp()
        place = 0
        for k, token in enumerate(their):
            n = 1 if token == TEACHER_END else len(OTHER.convert_ids_to_tokens(token))
            s, t = outcomes(p[place], q[k], pairs, merged)
            if n == 1:
                total += kl(t, s)
            else:
                of_text = math.prod(float(p[place + j, own[place + j]]) for j in range(n)), float(q[k, token])
                both = [torch.tensor([x, 1 - x], dtype=torch.float64) for x in of_text]
                total += min(1, n / 2) * kl(t, s) + (n - min(1, n / 2)) * kl(both[1], both[0])
            place += n
        number += len(own)
        assert place == len(own)
    return total / number


def test_the_divergence_is_that_of_the_training_and_of_its_definition(run, evaluated):
    harness, _ = evaluated
    texts = [row["messages"][-1]["content"].replace("é", "e") for row in ROWS[:5]]
    both = [([*ids_of(text, OWN), STUDENT_END], [*ids_of(text, OTHER), TEACHER_END]) for text in texts]
    contexts = [(prompt(row, OWN), prompt(row, OTHER)) for row in ROWS[:5]]
    wanted = divergence(run.model, run.teacher.model, both, contexts)
    found = harness._target_means(LocalSubject(run.model), [own for own, _ in both])
    assert found["divergence"].value == pytest.approx(wanted, rel=1e-4)
    assert found["forward_kl"].value == pytest.approx(wanted, rel=1e-4)
    answers = [[*ids_of(row["messages"][-1]["content"], OWN), STUDENT_END] for row in ROWS]
    all_of_them = SimpleNamespace(num_eval_prompts=12, lm_eval_tasks=None, lm_eval_limit=0, draft_tokens=None)
    of_all = evaluator_of(run, {"eval": Dataset.from_list(ROWS)}, all_of_them)
    measured = of_all._target_means(LocalSubject(run.model), answers)
    along = run.evaluate()
    assert measured["divergence"].value == pytest.approx(along["eval_loss"], rel=1e-5)
    bits_around = evaluated[1][0].values["bits_per_byte"].value
    assert along["eval_bits_per_byte"] == pytest.approx(bits_around, rel=1e-5)


def test_what_the_teacher_writes_is_counted_in_the_students_tokens(run, evaluated):
    harness, (student, teacher) = evaluated
    texts = harness.teacher_text()
    assert teacher.values["length"].value == pytest.approx(sum(map(len, texts)) / len(texts))
    assert all(i < len(OWN) for ids in texts for i in ids)
    assert teacher.values["divergence_own"].value == 0.0
    assert teacher.samples[0][0] == OTHER.decode(prompt(ROWS[0], OTHER))
    assert student.samples[0][0] == OWN.decode(prompt(ROWS[0], OWN))
    assert "bits per byte" in student.settings["the teacher"]
    assert student.values["agreement_own"].count == 5


@pytest.fixture(scope="module")
def served(run, tmp_path_factory):
    """The same teacher on a server that tells of all its tokens."""
    folder = tmp_path_factory.mktemp("served")
    OTHER.save_pretrained(folder / "model")
    how = {"root": str(folder / "model"), "max_logprobs": 400}
    with FakeServer(run.teacher.model, other_tokenizer(), **how) as server:
        yield GKDTrainer(
            model=run.model,
            args=config(
                folder / "run",
                teacher_tokenizer_alignment="bytes",
                teacher_server_url=server.url,
                teacher_top_k=len(OTHER) + 6,
                divergence="forward_kl",
                eval_strategy="steps",
                max_new_tokens=6,
            ),
            train_dataset=Dataset.from_list(ROWS),
            eval_dataset=Dataset.from_list(ROWS),
            processing_class=tiny_tokenizer(),
        )


@pytest.mark.parametrize("data", [{}, {"held_out_text": TEXTS}], ids=["answers", "texts"])
def test_a_teacher_on_a_server_is_measured_as_one_in_this_process(run, served, data):
    asked = SimpleNamespace(num_eval_prompts=12, lm_eval_tasks=None, lm_eval_limit=None, draft_tokens=None)
    here, there = (evaluator_of(one, {"eval": Dataset.from_list(ROWS), **data}, asked) for one in (run, served))
    found = there._perplexity(there.teacher)
    assert found["bits_per_byte"].value == pytest.approx(
        here._perplexity(here.teacher)["bits_per_byte"].value, rel=1e-5
    )
    if data:
        return
    answers = [[*ids_of(row["messages"][-1]["content"], OWN), STUDENT_END] for row in ROWS]
    means = [harness._target_means(LocalSubject(run.model), answers) for harness in (here, there)]
    for name in ("divergence", "forward_kl", "agreement"):
        assert means[1][name].value == pytest.approx(means[0][name].value, rel=1e-5)
    assert served.evaluate()["eval_loss"] == pytest.approx(run.evaluate()["eval_loss"], rel=1e-5)
    asked.num_eval_prompts = 2
    small = evaluator_of(served, {"eval": Dataset.from_list(ROWS)}, asked)
    measured = small.measure(small.teacher, "teacher")
    assert measured.values["divergence_own"].value == 0.0
    assert measured.values["bits_per_byte_teacher_text"].value > 0
    assert "272 most likely tokens and the rest where the tokens of both meet" in measured.settings["divergence"]
