"""Another divergence for each source, token weights, and the reward term, through a whole step of the trainer."""

import itertools
import math

import oracle
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import VOCABULARY, tiny_model, tiny_rows, tiny_tokenizer
from training import Remember, change, config, logged, trainer_of

from gkd.loss import make_divergence
from gkd.loss.fused import fused_divergence
from gkd.loss.settings import LossSettings
from gkd.loss.signals import DenseSignal, Head
from gkd.training.reward import advantage, clipped_ratio
from gkd.training.trainer import GKDTrainer

TOKENIZER = tiny_tokenizer()


def tables(model, sequence, ids=None):
    """Probabilities [n, V] at the targets and the targets."""
    row = torch.tensor([sequence.input_ids])
    at = torch.tensor([label != -100 for label in sequence.labels[1:]])
    logits = model(input_ids=row).logits[0, :-1].double()
    return logits.log_softmax(-1)[at], row[0, 1:][at]


def moved(trainer, loss, student):
    """The step that the gradient of the loss makes."""
    return -torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))])


def pair():
    return tiny_model(seed=1), tiny_model(hidden=48, layers=3, seed=2)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_source_has_its_divergence(tmp_path, monkeypatch, accumulate):
    remembered = Remember(monkeypatch)
    student, teacher = pair()
    trainer = trainer_of(
        tmp_path, lmbda=0.5, divergence="jsd", divergence_student="reverse_kl", beta_data=0.2, max_new_tokens=5,
        per_device_train_batch_size=8 // accumulate, gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    step = change(trainer)
    total, number, seen = 0.0, 0, set()
    for sequence in remembered.windows[0]:
        (log_p, _), (log_q, _) = tables(student, sequence), tables(teacher, sequence)
        name, parameters = ("reverse_kl", {}) if sequence.source == "student" else ("jsd", {"beta": 0.2})
        total = total + oracle.divergence(name, log_p.exp(), log_q.exp().detach(), **parameters).sum()
        number, seen = number + len(log_p), seen | {sequence.source}
    assert seen == {"data", "student"}
    wanted = moved(trainer, total / number, student)
    assert float((step - wanted).norm() / wanted.norm()) < 1e-4
    assert logged(trainer, "loss")[0] == pytest.approx(float(total.detach()) / number, rel=1e-4)


def test_the_same_divergence_by_name_is_the_common_one(tmp_path):
    plain = change(trainer_of(tmp_path / "a", lmbda=0.5))
    named = change(trainer_of(tmp_path / "b", lmbda=0.5, divergence_student="jsd", beta_data=0.5))
    torch.testing.assert_close(named, plain, rtol=1e-4, atol=1e-7)


def test_the_evaluation_has_the_common_divergence(tmp_path):
    rows = Dataset.from_list(tiny_rows(4))
    values = [
        trainer_of(tmp_path / str(i), eval_dataset=rows, **fields).evaluate()["eval_loss"]
        for i, fields in enumerate(({}, {"divergence_data": "reverse_kl", "lmbda": 0.5}))
    ]
    assert values[0] == values[1]


def test_the_first_tokens_are_left_out(tmp_path, monkeypatch):
    remembered = Remember(monkeypatch)
    student, teacher = pair()
    trainer = trainer_of(tmp_path, lmbda=0.5, skip_first_tokens=3)
    step = change(trainer)
    total, number = 0.0, 0
    for sequence in remembered.windows[0]:
        start = sequence.prompt_length
        assert sequence.labels[start : start + 3] == [-100] * min(3, sequence.completion_length)
        assert sequence.labels[start + 3 :] == sequence.input_ids[start + 3 :]
        (log_p, _), (log_q, _) = tables(student, sequence), tables(teacher, sequence)
        total = total + oracle.divergence("jsd", log_p.exp(), log_q.exp().detach()).sum()
        number += len(log_p)
    wanted = moved(trainer, total / number, student)
    assert float((step - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("how", ["iw_opd", "own"])
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
def test_the_students_tokens_are_weighed(tmp_path, monkeypatch, how, lora):
    remembered = Remember(monkeypatch)
    student, teacher = pair()
    own = {"token_weights": lambda view: view.places.double()} if how == "own" else {}
    trainer = GKDTrainer(
        model=tiny_model(seed=1), teacher_model=teacher, train_dataset=Dataset.from_list(tiny_rows(16)),
        processing_class=tiny_tokenizer(), **own,
        args=config(tmp_path, lmbda=0.5, token_weights=None if own else how, gradient_accumulation_steps=2),
        peft_config=LoraConfig(r=2, target_modules="all-linear") if lora else None,
    )  # fmt: skip
    change(trainer)
    total, number = 0.0, 0
    for sequence in remembered.windows[0]:
        (log_p, ids), (log_q, _) = tables(student, sequence), tables(teacher, sequence)
        n = len(ids)
        gap = (log_q - log_p).detach().gather(1, ids[:, None])[:, 0].abs()
        weights = torch.arange(1.0, n + 1) if own else 1 + 0.5 * (1 - (gap.cumsum(0) - gap) / gap.sum())
        if not own and sequence.source != "student":
            weights = torch.ones(n)
        total = total + (weights * oracle.divergence("jsd", log_p.exp(), log_q.exp())).sum()
        number += n
    assert logged(trainer, "loss")[0] == pytest.approx(float(total.detach()) / number, rel=1e-4)
    assert logged(trainer, "student/token_weight/student")[0] > 1


# ------------------------------------------------------------------------------------------------- the reward


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("trained_head", [False, True])
def test_the_mean_gradient_is_exact(alpha, trained_head):
    """Three tokens, three steps, two completions a step: the mean over all 27 x 27 pairs, with a leave-one-out
    baseline, against the gradient of (1 - alpha) D - alpha E[r] by enumeration."""
    generator = torch.Generator().manual_seed(4)
    sequences = list(itertools.product(range(3), repeat=3))
    prefixes = {
        p: i for i, p in enumerate(itertools.chain(*(itertools.product(range(3), repeat=k) for k in range(3))))
    }
    hidden = torch.randn(len(prefixes), 5, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_(trained_head)
    teacher = DenseSignal(torch.randn(13, 4, generator=generator, dtype=torch.float64), Head(torch.eye(3, 4).double()))
    reward = {y: math.sin(1 + 5 * i) for i, y in enumerate(sequences)}
    leaves = [hidden, weight] if trained_head else [hidden]
    settings, rows = LossSettings(make_divergence("forward_kl")), {}
    for y in sequences:
        rows[y] = torch.tensor([prefixes[y[:k]] for k in range(3)])

    def log_p():
        return (hidden @ weight.t()).log_softmax(-1)

    chance = {y: float(log_p()[rows[y], torch.tensor(y)].sum().exp()) for y in sequences}
    mean = [torch.zeros_like(leaf) for leaf in leaves]
    for first, second in itertools.product(sequences, repeat=2):
        at, ids, earned = torch.cat([rows[first], rows[second]]), torch.tensor([*first, *second]), []
        for y in (first, second):
            found = advantage(reward[y], reward[first] + reward[second], 2, None, running=False)
            earned += [alpha * found / 2] * 3
        loss = fused_divergence(
            hidden[at], Head(weight), teacher.at(at), ids, torch.full((6,), (1 - alpha) / 6, dtype=torch.float64),
            settings, ce_weights=torch.tensor(earned, dtype=torch.float64),
        ).loss  # fmt: skip
        for total, gradient in zip(mean, torch.autograd.grad(loss, leaves), strict=True):
            total += chance[first] * chance[second] * gradient
    p, log_q = log_p(), teacher.head.logits(teacher.hidden).log_softmax(-1)
    d = (log_q.exp() * (log_q - p)).sum(-1)
    exact = sum((1 - alpha) * chance[y] * d[rows[y]].mean() for y in sequences)
    exact = exact - alpha * sum(p[rows[y], torch.tensor(y)].sum().exp() * reward[y] for y in sequences)
    for mine, true in zip(mean, torch.autograd.grad(exact, leaves), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-9)


def share_of_small_bytes(completion, row):
    return sum(ord(letter) < 100 for letter in completion) / 8 + len(row["messages"])


REWARD = {"temperature": 1.0, "reward_weight": 0.25, "max_new_tokens": 6}


def rewarded(folder, reward=share_of_small_bytes, rows=None, **fields):
    return GKDTrainer(
        model=tiny_model(seed=1), teacher_model=tiny_model(hidden=48, layers=3, seed=2), reward=reward,
        train_dataset=rows or Dataset.from_list(tiny_rows(16)), processing_class=tiny_tokenizer(),
        args=config(folder, **{**REWARD, **fields}),
    )  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_with_a_reward_is_the_definition(tmp_path, monkeypatch, accumulate):
    remembered = Remember(monkeypatch)
    student, teacher = pair()
    rows = tiny_rows(16)
    trainer = rewarded(
        tmp_path, lmbda=0.5, per_device_train_batch_size=8 // accumulate, gradient_accumulation_steps=accumulate
    )
    step = change(trainer)
    window = remembered.windows[0]
    written = [s for s in window if s.source == "student"]
    text = [TOKENIZER.decode(s.input_ids[s.prompt_length :], skip_special_tokens=True) for s in written]
    values = [share_of_small_bytes(t, rows[s.row]) for t, s in zip(text, written, strict=True)]
    assert len(written) == 4
    assert len(set(values)) > 1
    total, number = 0.0, sum(s.num_targets for s in window)
    for sequence in window:
        (log_p, ids), (log_q, _) = tables(student, sequence), tables(teacher, sequence)
        total = total + 0.75 * oracle.divergence("jsd", log_p.exp(), log_q.exp().detach()).sum() / number
        if sequence.source == "student":
            r = values[written.index(sequence)]
            others = [v for s, v in zip(written, values, strict=True) if s is not sequence]
            total = total - 0.25 * (r - sum(others) / 3) / 8 * log_p.gather(1, ids[:, None]).sum()
    wanted = moved(trainer, total, student)
    assert float((step - wanted).norm() / wanted.norm()) < 1e-4
    assert logged(trainer, "reward/mean")[0] == pytest.approx(sum(values) / 4)


def test_the_running_mean_is_kept_in_a_checkpoint(tmp_path):
    fields = {"reward_baseline": "running", "lmbda": 1.0, "save_strategy": "steps", "save_steps": 2}
    whole = rewarded(tmp_path / "a", max_steps=4, **fields)
    whole.train()
    first = rewarded(tmp_path / "b", max_steps=4, **fields)
    first.args.max_steps = 4
    first.train()
    again = rewarded(tmp_path / "b", max_steps=4, **fields)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert again.record.reward_mean == whole.record.reward_mean is not None
    for mine, true in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, true)


@pytest.mark.parametrize("value", [float("nan"), "good", None, float("inf"), torch.ones(2), 10**400])
def test_a_reward_that_is_no_number_names_the_row(tmp_path, value):
    rows = Dataset.from_list(tiny_rows(16))
    with pytest.raises(ValueError, match=r"row \d+: the reward is"):
        rewarded(tmp_path, lambda completion, row: value, rows, lmbda=1.0).train()


def test_a_reward_that_raises_names_the_row(tmp_path):
    with pytest.raises(ZeroDivisionError) as caught:
        rewarded(tmp_path, lambda completion, row: 1 / 0, lmbda=1.0).train()
    assert any("the reward of row" in note for note in caught.value.__notes__)


def test_the_clipped_ratio():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=generator) for n in (6, VOCABULARY))
    ids = torch.arange(6)
    now = (hidden @ weight.t()).log_softmax(-1)[ids, ids]
    said = now - torch.tensor([0.0, 0.3, 0.3, -0.3, -0.3, torch.nan])
    signs = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    settings = LossSettings(make_divergence("jsd"))
    found = clipped_ratio(hidden, Head(weight), ids, said, signs, settings)
    up, down = math.exp(0.3), math.exp(-0.3)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, up, down, 0.0, 1.0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"lmbda": 0.0}, "reward_weight=0.25 has no effect with lmbda=0"),
        ({"temperature": 0.9}, "set temperature to 1"),
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"token_weights": "iw_opd"}, "leave one of them out"),
        ({"reward_weight": 1.5}, "reward_weight=1.5"),
        ({"reward_weight": 0.0, "reward_baseline": "running"}, "has no effect with reward_weight=0"),
    ],
)
def test_what_a_reward_does_not_go_with(tmp_path, fields, text):
    with pytest.raises(ValueError, match=text):
        config(tmp_path, **{**REWARD, **fields})


def test_a_weight_without_a_reward_and_the_other_way_round(tmp_path):
    with pytest.raises(ValueError, match="needs a reward"):
        rewarded(tmp_path, None)
    with pytest.raises(ValueError, match="reward has no effect with reward_weight=0"):
        rewarded(tmp_path, reward_weight=0.0)
