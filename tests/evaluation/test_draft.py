"""The student as a draft model: what is predicted is what transformers' assisted generation does."""

import math
import random

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import GenerationConfig
from transformers.generation.candidate_generator import AssistedCandidateGenerator
from user import flags, user_folder

from gkd.cli import main
from gkd.commands.doctor.draft import examine_draft
from gkd.commands.doctor.view import Diagnosis
from gkd.evaluation.draft import Costs, block_efficiency
from gkd.evaluation.harness import Evaluator
from gkd.evaluation.measures import Estimate, Measures
from gkd.evaluation.subject import Conditions, LocalSubject
from gkd.loss.registry import make_divergence
from gkd.loss.settings import LossSettings
from gkd.rollouts.base import SamplingSettings

PROMPTS, LENGTH, GAMMA = 64, 16, 4


def near(model, share, seed=9):
    """A draft: the model's weights mixed with another one's."""
    draft, other = tiny_model(seed=1), tiny_model(seed=seed)
    with torch.no_grad():
        for mine, its, strange in zip(draft.parameters(), model.parameters(), other.parameters(), strict=True):
            mine.copy_(its * (1 - share) + strange * share)
    return draft


@pytest.fixture(scope="module")
def target():
    return tiny_model(seed=1, initializer_range=0.1)


@pytest.fixture(scope="module")
def draft(target):
    return near(target, 0.05)


@pytest.fixture(scope="module")
def prompts():
    drawn = random.Random(0)
    return [[257, *(drawn.randrange(256) for _ in range(drawn.randint(2, 9)))] for _ in range(PROMPTS)]


def evaluator(target, prompts, temperature=1.0, tokens=GAMMA, **changes):
    sampling = SamplingSettings(max_new_tokens=LENGTH, temperature=temperature, stop_ids=(258,), pad_id=256, **changes)
    loss = LossSettings(make_divergence("jsd"))
    conditions = Conditions(seed=3, batch_size=16)
    subject = LocalSubject(target)
    return Evaluator(
        subject, tiny_tokenizer(), prompts, [], sampling, loss, conditions=conditions, draft_tokens=tokens
    )


@pytest.fixture(scope="module")
def measured(target, draft, prompts):
    harness = evaluator(target, prompts)
    return harness, harness.measure(LocalSubject(draft), "student").values


def test_acceptance_is_its_definition(target, draft, measured):
    """sum_v min(p, q) and the same likeliest token, in float64, over the teacher's own text."""
    harness, found = measured
    written = harness._texts_of_the_target()
    for way, texts in written.items():
        taken = []
        for prompt, completion in zip(harness.prompts, texts, strict=True):
            ids, at = torch.tensor([prompt + completion]), slice(len(prompt) - 1, -1)
            with torch.no_grad():
                p, q = (model(input_ids=ids).logits[0, at].double().softmax(-1) for model in (target, draft))
            same = (p.argmax(-1) == q.argmax(-1)).double()
            taken += (same if way else torch.minimum(p, q).sum(-1)).tolist()
        assert found[f"acceptance{way}"].value == pytest.approx(sum(taken) / len(taken), abs=1e-5)
        a = found[f"acceptance{way}"].value
        assert 0.2 < a < 0.95, "a draft that is taken at times"
        expected = (1 - a ** (GAMMA + 1)) / (1 - a)
        assert found[f"block_efficiency{way}"].value == pytest.approx(expected)
        costs = harness.costs
        gain = expected * costs.target / (GAMMA * costs.draft + costs.check)
        assert found[f"speedup{way}"].value == pytest.approx(gain)


class Counted:
    """Candidates that were looked at up to the first that was not taken, and those that were taken, by prompt."""

    def __init__(self, monkeypatch):
        self.rows, self._proposed = [], 0
        propose, update = (
            getattr(AssistedCandidateGenerator, n) for n in ("get_candidates", "update_candidate_strategy")
        )

        def get_candidates(own, input_ids, *args, **kwargs):
            candidates = propose(own, input_ids, *args, **kwargs)
            self._proposed = candidates[0].shape[1] - input_ids.shape[1]
            return candidates

        def update_candidate_strategy(own, input_ids, scores, num_matches):
            taken = min(int(num_matches), self._proposed)
            self.rows[-1][0] += taken
            self.rows[-1][1] += taken + (taken < self._proposed)
            return update(own, input_ids, scores, num_matches)

        monkeypatch.setattr(AssistedCandidateGenerator, "get_candidates", get_candidates)
        monkeypatch.setattr(AssistedCandidateGenerator, "update_candidate_strategy", update_candidate_strategy)


def assisted(target, draft, prompts, sampled):
    """What transformers writes with a draft of a constant number of tokens."""
    draft.generation_config.num_assistant_tokens = GAMMA
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    how = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {}
    config = GenerationConfig(max_new_tokens=LENGTH, do_sample=sampled, eos_token_id=258, pad_token_id=256, **how)
    torch.manual_seed(11)
    written = []
    for prompt in prompts:
        yield None
        ids = torch.tensor([prompt])
        out = target.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, assistant_model=draft
        )
        written.append(out[0, len(prompt) :].tolist())
    yield written


@pytest.mark.parametrize("way", ["", "_greedy"])
def test_the_prediction_is_what_assisted_generation_accepts(target, draft, prompts, measured, monkeypatch, way):
    """64 prompts; the two estimates are independent at T = 1, so their errors add up."""
    harness, found = measured
    counted, written = Counted(monkeypatch), None
    for step in assisted(target, draft, prompts, sampled=not way):
        written = step
        counted.rows.append([0, 0])
    counted.rows.pop()
    if way:
        assert written == harness._texts_of_the_target()[way], "greedily it writes what the target writes alone"
    taken, looked_at = (sum(column) for column in zip(*counted.rows, strict=True))
    share = taken / looked_at
    residuals = [(t - share * n) / looked_at for t, n in counted.rows]
    error = math.sqrt(PROMPTS / (PROMPTS - 1) * sum(r * r for r in residuals))
    predicted = found[f"acceptance{way}"]
    assert error < 0.05
    assert abs(share - predicted.value) < 2 * math.hypot(error, predicted.error), (share, predicted, error)


def test_at_another_temperature_it_is_that_ones(target, draft, prompts):
    found = evaluator(target, prompts[:6], temperature=0.5, top_k=3).measure(LocalSubject(draft), "student").values
    harness = evaluator(target, prompts[:6], temperature=0.5)
    plain = harness.measure(LocalSubject(draft), "student").values
    assert found["acceptance"].value == plain["acceptance"].value, "what top-k hides is served all the same"
    text, taken = harness.teacher_text(), []
    for prompt, completion in zip(harness.prompts, text, strict=True):
        ids, at = torch.tensor([prompt + completion]), slice(len(prompt) - 1, -1)
        with torch.no_grad():
            p, q = ((model(input_ids=ids).logits[0, at].double() / 0.5).softmax(-1) for model in (target, draft))
        taken += torch.minimum(p, q).sum(-1).tolist()
    assert plain["acceptance"].value == pytest.approx(sum(taken) / len(taken), abs=1e-5)


def test_equal_models_take_all_and_greedy_runs_are_told_of_greedily(target, prompts):
    harness = evaluator(target, prompts[:4], temperature=0.0, tokens=3)
    found = harness.measure(LocalSubject(near(target, 0.0)), "student").values
    assert "acceptance" not in found
    assert (found["acceptance_greedy"].value, found["block_efficiency_greedy"].value) == (1.0, 4.0)
    costs = harness.costs
    assert harness.measure(LocalSubject(near(target, 0.0)), "again").values["speedup_greedy"].value == pytest.approx(
        costs.speedup(4.0)
    )
    assert "acceptance_greedy" not in harness.measure(harness.teacher, "teacher").values
    assert harness.costs is costs, "training changes weights, not what they cost"


def test_costs_make_the_speed_up_and_the_best_number_of_tokens():
    free = Costs(draft=0.0, target=1.0, check=1.0, tokens=5)
    assert free.speedup(block_efficiency(0.8, 5)) == pytest.approx((1 - 0.8**6) / 0.2)
    assert free.best(0.8)[0] == 16, "what costs nothing is always worth it"
    dear = Costs(draft=0.9, target=1.0, check=1.5, tokens=5)
    assert dear.best(0.5)[1] < 1
    # Theorem 3.8 of the paper: (1 - a^(g + 1)) / ((1 - a) (g c + 1))
    plain = Costs(draft=0.1, target=1.0, check=1.0, tokens=4)
    assert plain.speedup(block_efficiency(0.7, 4)) == pytest.approx((1 - 0.7**5) / (0.3 * 1.4))
    gains = [plain.speedup(block_efficiency(0.7, n), n) for n in range(1, 17)]
    assert plain.best(0.7) == (gains.index(max(gains)) + 1, max(gains))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"draft_tokens": 0}, "draft_tokens=0 is out of range"),
        ({"draft_tokens": 3, "evaluate_before_and_after": "false"}, "draft_tokens=3 has no effect with evaluate"),
        ({"draft_tokens": 3, "objective": "sft", "teacher_model_name_or_path": None}, "needs one teacher in this"),
    ],
)
def test_where_nothing_is_drafted_it_is_refused(given, told, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["run", "gkd_qwen2", *flags(user_folder(tmp_path), tmp_path / "out", **given)])
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("costs", "level", "told"),
    [
        (Costs(0.05, 1.0, 1.1, 4), "ok", "times as fast"),
        (Costs(0.45, 1.0, 1.2, 12), "warning", "draft_tokens=2 would make it"),
        (Costs(0.95, 1.0, 2.0, 4), "warning", "no number of tokens gains"),
    ],
)
def test_the_doctor_says_when_it_would_lose(costs, level, told):
    a = Estimate(0.8, 0.01, 8)
    gain = costs.speedup(block_efficiency(0.8, costs.tokens))
    out = Diagnosis()
    examine_draft(out, Measures("student", {"acceptance": a, "speedup": Estimate(gain)}), costs)
    (check,) = out.checks
    assert check.level == level
    assert told in f"{check.message} {check.remedy}"
