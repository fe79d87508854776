"""`gkd doctor` with a teacher of another tokenizer: groups, shares of the targets, mass of the common tokens."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from other_tokens import END, START, other_model, other_tokenizer
from tiny import TURN_END, save_tiny, tiny_rows, tiny_tokenizer
from vllm_server.fake import FakeServer

import gkd.commands.doctor.alignment as alignment_of_doctor
from gkd.commands.doctor.alignment import alignment_of, common_mass, examine_groups, examine_mass
from gkd.commands.doctor.examine import examine
from gkd.commands.doctor.view import Diagnosis, groups_in_lines
from gkd.data.joined_tokens import joined_tokens
from gkd.data.prepare import prepare_dataset
from gkd.data.sequences import join
from gkd.data.teacher_rows import OwnTemplate
from gkd.evaluation.aligned import AlignedSubject
from gkd.evaluation.subject import Conditions, LocalSubject
from gkd.recipe.capture import capture

RECIPE = """
from gkd.run import dataset_by_name, run, with_held_out

def load_data(settings):
    return with_held_out(dataset_by_name(settings), 4)

run(load_data, defaults={"max_new_tokens": 6, "lmbda": 0.5, "report_to": "none"})
"""
OWN, OTHER = tiny_tokenizer(), other_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("user")
    save_tiny(path / "student", seed=1)
    other_model().save_pretrained(path / "teacher")
    OTHER.save_pretrained(path / "teacher")
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(16)), encoding="utf-8")
    (path / "recipe.py").write_text(RECIPE)
    return path


def doctor(folder, **values):
    names = {"model_name_or_path": "student", "teacher_model_name_or_path": "teacher", "dataset_name": "rows.jsonl"}
    flags = {**{name: folder / file for name, file in names.items()}, **values}
    given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    return examine(capture(str(folder / "recipe.py"), given))


def the(diagnosis, name):
    (check,) = [check for check in diagnosis.checks if check.name == name]
    return check


@pytest.fixture(scope="module")
def diagnosis(folder):
    return doctor(folder, teacher_tokenizer_alignment="bytes")


def ids(text, tokenizer):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_rows_are_shown_with_their_groups(diagnosis):
    assert diagnosis.passed
    assert len(diagnosis.rows) == 3
    for row in diagnosis.rows:
        answer = next(text for kind, text in row.pieces if kind == "target")
        own = [piece for pieces, _ in row.groups for piece in pieces]
        other = [piece for _, pieces in row.groups for piece in pieces]
        assert len(other) == len(ids(answer, OTHER)) + 1
        assert (own[-1], other[-1]) == (TURN_END, END)
        for pieces in (own, other):
            assert "".join(pieces[:-1]).replace("<C3><A9>", "é") == answer
        for pieces, beside in row.groups[:-1]:
            assert "".join(pieces) == "".join(beside)


def test_borders_stand_below_each_other():
    lines = groups_in_lines([(["a", "b"], ["ab"]), ([" "], [" "]), (["x"], []), (["\n"], ["\n"])], width=12)
    assert lines.splitlines() == [
        "  student │a·b│␣│x│⏎│",
        "  teacher │ab │␣│–│⏎│",
    ]
    narrow = groups_in_lines([(["abc"], ["a", "bc"])] * 3, width=9).splitlines()
    assert narrow[:2] == ["  student │abc │abc │", "  teacher │a·bc│a·bc│"]
    assert len(narrow) == 4
    assert groups_in_lines([(["a"], ["a"])] * 50).endswith("  and 10 more groups")


def test_the_shares_are_those_of_the_tokens_and_few_in_full_are_a_warning(diagnosis):
    """A token of the student's is a byte, so a group is a token of the teacher's."""
    levels = []
    for answers in ([row["messages"][-1]["content"] for row in tiny_rows(16)], ["red red", "the the the"]):
        rows = [{"prompt": "x", "completion": text.replace("é", "e")} for text in answers]
        prepared, _ = prepare_dataset(
            Dataset.from_list(rows), OWN, max_length=None, max_prompt_length=None, name="train"
        )
        out = Diagnosis()
        examine_groups(out, prepared, alignment_of(OWN, OwnTemplate(OTHER, foreign=True), (), None))
        lengths = [len(OTHER.decode([i])) for row in rows for i in ids(row["completion"], OTHER)]
        full = lengths.count(1) + len(rows)  # and the ends
        number = sum(lengths) + len(rows)
        told = f"{full / number:.0%} are compared in full, {1 - full / number:.0%} as part"
        assert told in the(out, "Alignment").message
        levels.append((full / number < 0.5, the(out, "Alignment").level))
    assert levels == [(False, "ok"), (True, "warning")]
    assert the(diagnosis, "Alignment").level == "ok"


def test_the_mass_of_the_common_tokens_is_the_teachers_own(diagnosis):
    own, teacher = OwnTemplate(OTHER, foreign=True), other_model()
    alignment = alignment_of(OWN, own, (), None)
    joined = joined_tokens(OWN, OTHER, alignment.common, len(OWN), len(OTHER))[1]
    subject = AlignedSubject(LocalSubject(teacher), replace(alignment, teacher_joined=joined), None, None)
    answers = [row["messages"][-1]["content"] for row in tiny_rows(5)]
    context = ids("[user] x", OTHER)
    sequences = [join([1], ids(text, OWN), "data", 0, teacher_prompt=context) for text in answers]
    found = common_mass(subject, sequences, Conditions(batch_size=2))
    names = OTHER.get_vocab()
    chosen = (
        [i for token, i in names.items() if len(token) == 1] + [names[END]],
        [i for token, i in names.items() if len(token) > 1 and token not in (START, END)],
    )
    wanted = []
    for text in answers:
        read = torch.tensor([[*context, *ids(text, OTHER)]])
        with torch.no_grad():
            p = teacher(read).logits[0, len(context) - 1 : -1].double().softmax(-1)
        wanted.append(torch.stack([p[:, of].sum(-1) for of in chosen]))
    torch.testing.assert_close(torch.stack(found).double(), torch.cat(wanted, dim=1), atol=1e-6, rtol=0)
    out = Diagnosis()
    examine_mass(out, subject, sequences, Conditions(batch_size=2))
    mass = float(torch.cat(wanted, dim=1).sum(0).mean())
    assert f"{mass:.1%} with the tokens" in the(out, "Common tokens").message
    assert the(out, "Common tokens").level == ("ok" if mass >= 0.9 else "warning")
    assert the(diagnosis, "Common tokens")


def test_a_small_mass_is_a_warning(monkeypatch):
    monkeypatch.setattr(alignment_of_doctor, "common_mass", lambda *args: (torch.tensor([0.5]), torch.tensor([0.3])))
    out = Diagnosis()
    examine_mass(out, SimpleNamespace(top_k=None), [], Conditions())
    assert the(out, "Common tokens").level == "warning"
    assert "80.0%" in the(out, "Common tokens").message


def test_without_the_field_the_refusal_names_it(folder):
    refused = the(doctor(folder), "Token maps")
    assert refused.level == "error"
    assert "teacher_tokenizer_alignment" in refused.message


def test_a_teacher_on_a_server(folder, diagnosis):
    """Its tokenizer is read by the name that the server gives; the mass is as far as its K tokens tell."""
    with FakeServer(other_model().eval(), OTHER, root=str(folder / "teacher"), max_logprobs=400) as server:
        flags = {"teacher_server_url": server.url, "teacher_top_k": 272, "teacher_tokenizer_alignment": "bytes"}
        found = doctor(folder, teacher_model_name_or_path=None, **flags)
    assert found.passed, [check.message for check in found.checks if check.level == "error"]
    assert [row.groups for row in found.rows] == [row.groups for row in diagnosis.rows]
    assert the(found, "Alignment").message == the(diagnosis, "Alignment").message
    assert "the teacher's own tokenizer here" in the(found, "Token maps").message
    assert "in its own" in the(found, "Chat templates").message
    of_local = the(diagnosis, "Common tokens").message
    assert the(found, "Common tokens").message == f"of its 272 most likely tokens: {of_local}"
