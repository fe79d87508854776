"""Training with a teacher of another tokenizer against two dense float64 passes and the definition of each term."""

import copy
import functools
import logging

import pytest
import torch
from aligned_training import (
    ASCII,
    BYTES,
    OTHER,
    OWN,
    ROWS,
    check,
    expected,
    in_their_ids,
    prompt_of,
    trainer_of,
)
from other_tokens import other_model, other_tokenizer
from tiny import tiny_model, tiny_tokenizer
from training import Remember, change, config, logged, losses

from gkd.data import aligned_view
from gkd.data.aligned_view import as_the_teacher_reads_it, collate_aligned
from gkd.data.sequences import TokenSequence
from gkd.loss.settings import FusedOutput
from gkd.loss.signals import IN_FULL, IN_TEXT, NOT_COMPARED
from gkd.loss.token_weights import TokenGroups
from gkd.training.token_weights import _of_places
from gkd.training.trainer import GKDTrainer

# ------------------------------------------------------------------------------------------------------ a training


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"swapped": True},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "teacher_placement": "cpu_offload"},
        {"lmbda": 1.0, "generation_kwargs": ASCII},
    ],
    ids=["data", "swapped", "offloaded", "student"],
)
def test_the_gradient_is_that_of_the_definition(tmp_path, monkeypatch, values):
    remembered = Remember(monkeypatch)
    student, teacher = tiny_model(seed=1), other_model()
    models, tokenizers = [copy.deepcopy(student).double(), copy.deepcopy(teacher).double()], (OWN, OTHER)
    trainer = trainer_of(tmp_path, student=student, teacher=teacher, **values)
    moved = change(trainer)
    if "swapped" in values:
        models, tokenizers = models[::-1], tokenizers[::-1]
    loss, in_full = check(moved, models, remembered.windows[0], tokenizers=tokenizers)
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-4)
    assert logged(trainer, "aligned/in_full")[0] == pytest.approx(in_full)
    assert 0.1 < in_full < 1
    assert logged(trainer, "aligned/in_text")[0] == pytest.approx(1 - in_full)
    assert logged(trainer, "aligned/not_compared") == [0.0]
    assert len(logged(trainer, "time/alignment")) == 1


def test_what_the_teacher_wrote_it_reads_as_it_wrote_it(tmp_path, monkeypatch):
    """Letter by letter, where its tokenizer would have joined some: so does no other way of its text."""
    letters = {i for i, text in enumerate(BYTES[OTHER]) if text and text in b"34"} - set(range(258, 270)) | {1}
    silent = [i for i in range(len(OTHER)) if i not in letters]
    remembered = Remember(monkeypatch)
    student, teacher = tiny_model(seed=1), other_model()
    models = [copy.deepcopy(student).double(), copy.deepcopy(teacher).double()]
    values = {"seq_kd": True, "max_new_tokens": 20, "generation_kwargs": {"suppress_tokens": silent}}
    trainer = trainer_of(tmp_path, student=student, teacher=teacher, **values)
    moved = change(trainer)
    window, store = remembered.windows[0], trainer.rollouts["teacher"].store
    assert {sequence.source for sequence in window} == {"teacher"}
    for sequence in window:
        prompt = prompt_of(ROWS[sequence.row], OTHER)
        assert sequence.teacher_ids == store.get(prompt)
        assert as_the_teacher_reads_it(sequence, trainer.alignment)[0].input_ids == [*prompt, *store.get(prompt)]
    otherwise = [in_their_ids(s.input_ids[s.prompt_length :], OWN, OTHER) != s.teacher_ids for s in window]
    assert any(otherwise)
    assert check(moved, models, window)[1] == 1.0 == logged(trainer, "aligned/in_full/teacher")[0]


def test_each_source_may_have_a_divergence_of_its_own(tmp_path, monkeypatch):
    remembered = Remember(monkeypatch)
    student, teacher = tiny_model(seed=1), other_model()
    models = [copy.deepcopy(student).double(), copy.deepcopy(teacher).double()]
    values = {"lmbda": 0.5, "divergence_data": "forward_kl", "generation_kwargs": ASCII}
    moved = change(trainer_of(tmp_path, student=student, teacher=teacher, **values))
    loss, number = torch.zeros((), dtype=torch.float64), 0
    for source, name in (("data", "forward_kl"), ("student", "jsd")):
        own = [sequence for sequence in remembered.windows[0] if sequence.source == source]
        targets = sum(sequence.num_targets for sequence in own)
        loss, number = loss + targets * expected(models, own, name=name)[0], number + targets
    wanted = -torch.cat([g.flatten() for g in torch.autograd.grad(loss / number, list(models[0].parameters()))])
    assert float((moved.double() - wanted).norm() / wanted.norm()) < 1e-4


def group_weights(rule, z, zt, answer, theirs, found, values):
    """From the rules' papers, token by token; a group has the mean of its tokens'."""
    z = z.detach()
    entropy = -(z * z.log()).sum(-1)
    d, gap, group = [], [], []
    for number, ((i, j, n, m), value) in enumerate(zip(found, values, strict=True)):
        p = sum(float(z[i + a][answer[i + a]].log()) for a in range(n))
        q = sum(float(zt[j + a][theirs[j + a]].log()) for a in range(m))
        d += [float(value.detach()) / n] * n
        gap += [abs(q - p) / n] * n
        group += [number] * n
    d, gap, group = torch.tensor(d), torch.tensor(gap), torch.tensor(group)
    if rule == "iw_opd":
        weights = 1 + 0.5 * (1 - (gap.cumsum(0) - gap) / gap.sum())
    elif rule == "disagreement":
        h, d = entropy / entropy.max(), d / d.max()
        kept = (h + d - h * d).argsort(descending=True)[: -(-len(d) // 2)]
        weights = torch.zeros(len(d)).index_fill(0, kept, 1.0)
    else:
        of_border = torch.tensor([float(-(zt[j] * zt[j].log()).sum()) for _, j, _, _ in found])
        weights = (-of_border).exp().clamp_min(0.1)[group]
        if rule == "own":
            weights = torch.arange(1.0, len(d) + 1) + of_border[group]
    return [float(weights[group == number].mean()) for number in range(len(found))]


@pytest.mark.parametrize(
    ("rule", "frozen"), [("iw_opd", True), ("teacher_entropy", False), ("disagreement", True), ("own", False)]
)
def test_what_is_compared_together_has_one_weight(tmp_path, monkeypatch, rule, frozen):
    """A frozen head's gradient takes the weights afterwards, token by token."""
    remembered = Remember(monkeypatch)
    student, teacher = tiny_model(seed=1), other_model(initializer_range=0.2)
    student.lm_head.requires_grad_(not frozen)
    models = [copy.deepcopy(student).double(), copy.deepcopy(teacher).double()]
    own = {"token_weights": lambda view: view.places + view.teacher_entropy.double()} if rule == "own" else {}
    values = own or {"token_weights": rule}
    letters = {i for i, text in enumerate(BYTES[OWN]) if text and text in b"threone d34"} | {258}
    silent = {"suppress_tokens": [i for i in range(student.config.vocab_size) if i not in letters]}
    trainer = trainer_of(tmp_path, student=student, teacher=teacher, lmbda=1.0, generation_kwargs=silent, **values)
    moved = change(trainer)
    _, in_full = check(moved, models, remembered.windows[0], weigh=functools.partial(group_weights, rule))
    assert 0 < in_full < 1
    loss, _ = expected(models, remembered.windows[0], weigh=functools.partial(group_weights, rule))
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-4)


def test_what_is_not_compared_is_taken_as_said_by_both():
    output = FusedOutput(
        loss=torch.zeros(()),
        student_entropy=torch.ones(4),
        cross_entropy=torch.tensor([1.0, 2.0, 3.0, 4.0]),
        teacher_log_prob=torch.tensor([-0.5, 0.0, -2.0, -2.0]),
        teacher_entropy=torch.tensor([0.3, 0.0, 0.7, 0.0]),
        agreement=torch.tensor([1.0, 0.0, 1.0, 0.0]),
        kinds=torch.tensor([IN_FULL, NOT_COMPARED, IN_TEXT, IN_TEXT]),
    )
    said = _of_places(output, TokenGroups(torch.tensor([0, -1, 1, 1]), torch.device("cpu")))
    assert {name: values.tolist() for name, values in said.items()} == {
        "student_log_prob": [-1.0, -2.0, -3.5, -3.5],
        "teacher_log_prob": [-0.5, -2.0, -2.0, -2.0],
        "teacher_entropy": pytest.approx([0.3, 0.0, 0.7, 0.7]),
        "agreement": [1.0, 0.0, 1.0, 1.0],
    }


def test_a_teacher_of_8_bits(tmp_path):
    """Another model by a little: its loss is near the whole one's."""
    pytest.importorskip("bitsandbytes")
    other_model().save_pretrained(tmp_path / "teacher")
    other_tokenizer().save_pretrained(tmp_path / "teacher")
    found = []
    for name, kwargs in (("whole", None), ("small", {"load_in_8bit": True})):
        trainer = trainer_of(tmp_path / name, teacher=str(tmp_path / "teacher"), teacher_model_init_kwargs=kwargs)
        trainer.train()
        found.append(losses(trainer)[0])
    assert found[1] != found[0]
    assert found[1] == pytest.approx(found[0], rel=0.02)


def test_an_evaluation_is_the_same_mean(tmp_path):
    evaluates = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3}
    trainer = trainer_of(tmp_path, eval_dataset=ROWS, **evaluates)
    models = [copy.deepcopy(model).double() for model in (trainer.model, trainer.teacher_model)]
    found = trainer.evaluate()
    sequences = trainer.data_collator.sequences(list(trainer.eval_dataset))
    loss, in_full = expected(models, sequences)
    assert found["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["eval_aligned/in_full"] == pytest.approx(in_full)


def test_a_resumed_run_is_the_run(tmp_path):
    values = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "lmbda": 0.5, "seq_kd": True}
    values["per_device_train_batch_size"] = 4
    whole = change(trainer_of(tmp_path, **values))
    resumed = trainer_of(tmp_path, **values)
    before = torch.cat([p.detach().flatten().clone() for p in resumed.model.parameters()])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    after = torch.cat([p.detach().flatten() for p in resumed.model.parameters()])
    torch.testing.assert_close(after - before, whole)


@pytest.mark.parametrize("seq_kd", [False, True], ids=["data", "the teacher's text"])
def test_what_the_teacher_says_is_kept_and_it_is_not_loaded_again(tmp_path, caplog, seq_kd):
    """Its rows are its own ids, which are the keys; the second run finds all of them before it begins."""
    other_model().save_pretrained(tmp_path / "teacher")
    other_tokenizer().save_pretrained(tmp_path / "teacher")
    values = {"seq_kd": seq_kd, "max_steps": 2, "teacher_scores_dir": str(tmp_path / "kept")}
    values |= {"teacher_cache_dir": str(tmp_path / "written")} if seq_kd else {}
    values |= {"lmbda": 0.0, "teacher_tokenizer_alignment": "bytes", "per_device_train_batch_size": 8}

    def trainer(folder, **fields):
        args = config(tmp_path / folder, teacher_model_name_or_path=str(tmp_path / "teacher"), **fields)
        return GKDTrainer(tiny_model(seed=1), args=args, train_dataset=ROWS, processing_class=tiny_tokenizer())

    without = change(trainer("a", **{name: value for name, value in values.items() if "scores" not in name}))
    torch.testing.assert_close(change(trainer("b", **values)), without)
    with caplog.at_level(logging.INFO, "gkd"):
        third = trainer("c", **values)
    assert "the teacher is not loaded" in caplog.text
    torch.testing.assert_close(change(third), without)
    assert not third.teacher.loaded


# ------------------------------------------------------------------------------------------------- rows and batches


@pytest.fixture(scope="module")
def alignment(tmp_path_factory):
    return trainer_of(tmp_path_factory.mktemp("run")).alignment


def sequence_of(text, prompt="a", context=(), ended=True):
    ids = [*OWN(text).input_ids, *([258] if ended else [])]
    start = OWN(prompt).input_ids if prompt else []
    labels = [*[-100] * len(start), *ids]
    return TokenSequence([*start, *ids], labels, len(start), teacher_context=list(context))


def test_a_teacher_that_ended_with_another_of_its_stop_tokens_ended(alignment):
    sequence = sequence_of("the 34", context=[5])
    sequence.teacher_ids = [*OTHER("the").input_ids, *OTHER(" 34").input_ids, 0]
    read, groups = as_the_teacher_reads_it(sequence, alignment)
    assert read.input_ids == [5, *sequence.teacher_ids[:-1], 1]
    assert (groups[-1].student_last, groups[-1].teacher_last) == (6, len(sequence.teacher_ids) - 1)


def test_rows_without_a_target_ask_nothing_of_the_teacher(alignment):
    """Fillers hold an id of the student's, which the teacher may have no row for."""
    silent = TokenSequence([10**6, 3], [-100, -100], 1)
    batch = collate_aligned([silent, silent], alignment, 0)
    assert batch["teacher_input_ids"].tolist() == [[alignment.pad_id]] * 2
    assert [batch[name].shape for name in ("aligned_group", "aligned_border", "aligned_teacher_group")] == [(0,)] * 3
    assert batch["teacher_target_ids"].shape == (0,)


def test_a_text_without_a_prompt_begins_as_the_teachers_texts_do(alignment):
    """Its first token is predicted by nothing on the student's side, and where there is no beginning on neither."""
    text = sequence_of("a red", prompt="", ended=False)
    read, groups = as_the_teacher_reads_it(text, alignment)
    assert read.input_ids == OTHER("a red").input_ids
    assert groups[0].student_first == 1


def test_what_the_teacher_has_no_positions_for_is_not_compared(alignment, caplog):
    aligned_view._warn_of_room.cache_clear()
    short = aligned_view.replace(alignment, room=5)
    sequence = sequence_of("one the red", context=[7, 8])
    with caplog.at_level(logging.WARNING):
        read, groups = as_the_teacher_reads_it(sequence, short)
        as_the_teacher_reads_it(sequence, short)
    whole, every = as_the_teacher_reads_it(sequence, alignment)
    assert read.input_ids == whole.input_ids[:5]
    assert groups == [group for group in every if group.teacher_last < 3]
    assert caplog.text.count("its 5 positions") == 1
    assert len(as_the_teacher_reads_it(sequence_of("one", context=range(9)), short)[0].input_ids) == 5


def test_groups_with_a_token_that_is_not_trained_on_do_not_count(alignment):
    sequence = sequence_of("the the", context=[5])
    sequence.labels[2] = -100  # the first "h"
    batch = collate_aligned([sequence], alignment, 0)
    assert batch["aligned_group"].tolist() == [-1, -1, 0, 1, 1, 1, 2]
    assert batch["aligned_teacher_group"].tolist() == [0, 1, 2]
    assert batch["aligned_border"].tolist() == [-1, -1, 0, 1, -1, -1, 2]


# -------------------------------------------------------------------------------------------------------- refusals


def test_it_is_refused_where_the_tokens_are_the_same_or_not_known(tmp_path):
    with pytest.raises(ValueError, match=r"alignment='bytes' has no effect: .* same tokens, .*leave it out"):
        GKDTrainer(
            model=tiny_model(seed=1),
            teacher_model=tiny_model(seed=2),
            args=config(tmp_path, teacher_tokenizer_alignment="bytes"),
            train_dataset=ROWS,
            processing_class=tiny_tokenizer(),
            teacher_processing_class=tiny_tokenizer(),
        )
    with pytest.raises(ValueError, match=r"alignment='bytes' needs the teacher's tokenizer.*teacher_processing_class"):
        GKDTrainer(
            model=tiny_model(seed=1),
            teacher_model=other_model(),
            args=config(tmp_path, teacher_tokenizer_alignment="bytes"),
            train_dataset=ROWS,
            processing_class=tiny_tokenizer(),
        )


def test_a_foreign_collator_and_a_teacher_without_the_field_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"teacher_tokenizer_alignment='bytes' does not go with a data_collator"):
        trainer_of(tmp_path, data_collator=lambda rows: {})
    with pytest.raises(ValueError, match=r"different tokenizers.*teacher_tokenizer_alignment='bytes'"):
        trainer_of(tmp_path, teacher_tokenizer_alignment=None)


def test_the_end_of_a_turn_may_be_said(tmp_path):
    with pytest.raises(ValueError, match=r"teacher_end_of_turn='a=</s>' has no effect"):
        trainer_of(tmp_path, teacher_end_of_turn="a=</s>")
    assert trainer_of(tmp_path, teacher_end_of_turn="<|im_end|>=<s>").alignment.end_of_turn == (258, 0)
