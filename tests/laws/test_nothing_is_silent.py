"""Law 5: what cannot be honoured raises before the first step; rows that cannot be used are counted and named.

Here for any value of a field, any YAML, any flags and any row; each single refusal is tested beside what refuses.
"""

import dataclasses
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepared import (
    ANSWER,
    GOOD,
    TOKENIZER,
    USER,
    prepare,
)

from gkd.config.fields import GKDConfig
from gkd.data.encode import RowEncoder
from gkd.data.encoded import Limits
from gkd.data.prepared_row import Preparation, prepared_row, read_row
from gkd.data.row_report import UNREAD
from gkd.data.row_values import RowPlace
from gkd.data.teacher_rows import TeacherReading, TeacherRows
from gkd.recipe.settings import parse

OWN = sorted(vars(GKDConfig)["__annotations__"].keys() - {"_VALID_DICT_FIELDS"})


FIELDS = sorted(field.name for field in dataclasses.fields(GKDConfig) if field.init)


def bounded(examples):
    of_fixtures = [HealthCheck.function_scoped_fixture]
    return settings(derandomize=True, max_examples=examples, deadline=None, suppress_health_check=of_fixtures)


# Dictionaries, files and objects that only transformers reads.
OBJECTS = {"accelerator_config", "fsdp", "fsdp_config", "deepspeed", "parallelism_config", "debug"}


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.just(10**400),
    st.floats(),
    st.sampled_from(
        ["", "no", "false", "1", "0.5", "jsd", "nan", "{", "{}", "[]", "null", ' {"a": 1}', "a\nb", "\ud800"]
    ),
    st.text(max_size=4),
)


VALUES = st.one_of(
    SCALARS,
    st.binary(max_size=3),
    st.lists(SCALARS, max_size=2),
    st.dictionaries(st.one_of(st.text(max_size=3), st.integers(0, 2)), SCALARS, max_size=2),
    st.sampled_from([object(), int, np.float32(0.5), np.int64(2), np.bool_(True), Fraction(1, 2), 1j, len, Path("x")]),
)


def outcome(make):
    """The error's text; None when there is none. Anything but a ValueError goes on."""
    try:
        make()
    except ValueError as error:
        return str(error)


@bounded(600)
@given(st.sampled_from(OWN), VALUES)
def test_any_value_of_an_own_field_builds_or_is_refused_by_name(tmp_path, name, value):
    told = outcome(lambda: GKDConfig(output_dir=str(tmp_path), report_to=[], **{name: value}))
    if told is not None:
        assert name in told
        assert "\n" not in told


@bounded(400)
@given(st.sampled_from(FIELDS), VALUES)
def test_any_value_of_any_field_builds_or_is_refused(tmp_path, name, value):
    if name not in OBJECTS:
        outcome(lambda: GKDConfig(**{"output_dir": str(tmp_path), "report_to": [], name: value}))


@bounded(150)
@given(
    st.dictionaries(st.sampled_from([*OWN, "num_eval_prompts", "lora_r", "seed", "warmup_steps"]), VALUES, max_size=2)
)
def test_any_yaml_is_settings_or_one_line(tmp_path_factory, values):
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    try:
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
    except (yaml.YAMLError, UnicodeEncodeError):
        return
    told = outcome(lambda: parse({"report_to": "none"}, ["--output_dir", "out", "--config", str(file)]))
    assert told is None or ("\n" not in told and any(name in told for name in values))


@bounded(150)
@given(st.lists(st.one_of(st.sampled_from([f"--{name}" for name in OWN]), SCALARS.map(str)), max_size=3))
def test_any_flags_are_settings_or_one_line(argv):
    told = outcome(lambda: parse({"report_to": "none"}, ["--output_dir", "out", *argv]))
    assert told is None or "\n" not in told


texts = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), max_size=8)


odd = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats(allow_nan=True) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=4,
)


roles = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "function_call", "narrator"])


turn = st.fixed_dictionaries(
    {},
    optional={
        "role": roles,
        "content": texts | odd,
        "from": roles,
        "value": texts,
        "weight": st.sampled_from([0, 1, 0.5]),
        "tool_calls": odd,
        "mood": texts,
    },
)


chat = st.lists(turn, max_size=3) | st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts}), max_size=3
)


value = odd | texts | chat


names = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "history", "text")


names += ("system", "tools", "functions", "input_ids", "labels", "assistant_masks", "images", "chat_template_kwargs")
any_row = st.dictionaries(st.sampled_from(names), value, min_size=1, max_size=4)


def leaves(value):
    """The texts in a value, roles and calls aside."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() if key not in NO_TEXT for leaf in leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value.strip()] if isinstance(value, str) else []


NO_TEXT = ("role", "from", "type", "tool_calls", "tools", "functions", "chat_template_kwargs")


READERS = TeacherRows(TeacherReading(), RowEncoder(TOKENIZER))


ANY = Preparation("train", Limits(), prompt_only_ok=True, prompts_needed=False, formatting_func=lambda row: row)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(row=any_row)
def test_any_row_is_prepared_with_all_of_its_text_or_named(row):
    try:
        prepared, problem = prepared_row(read_row(row, RowPlace("train", 0), READERS, ANY), READERS, ANY), ""
    except ValueError as error:
        prepared, problem = None, str(error)
    if prepared is None:
        assert problem.startswith("train data set, row 0")
        return
    said = TOKENIZER.decode(prepared.input_ids)
    lost = {column for column, item in row.items() if any(leaf not in said for leaf in leaves({column: item}))}
    notes = {note.removeprefix(UNREAD) for note in prepared.notes}
    # what is lost of turns is told by their keys, or by the notes on answers that are left out
    assert not lost - notes - ({"messages", "conversations", "prompt", "completion"} if notes else set())


def test_empty_answers_are_dropped_and_named():
    rows, report = prepare([{"prompt": "a", "completion": " "}, {"prompt": "a", "completion": "b"}])
    assert (rows["row"], report.rows_with) == ([1], {"empty_answer": [0]})
    chats = [{"messages": [USER, {**ANSWER, "content": text}]} for text in ("", "b")]
    assert prepare(chats)[1].rows_with == {"empty_answer": [0]}


def test_prompt_only_rows_are_counted_and_need_rollouts():
    rows = [{"messages": [USER]}, GOOD, {"messages": [USER]}]
    prepared, report = prepare(rows, prompt_only_ok=True)
    assert (report.kept, report.prompt_only) == (3, 2)
    assert prepared[0]["labels"] == [-100] * prepared[0]["prompt_length"]
    assert "2 of them prompts only" in str(report)
    with pytest.raises(ValueError, match=r"2 of the 3 rows of the train data set .*rows 0, 2.*lmbda=1 or seq_kd=True"):
        prepare(rows)


@pytest.mark.parametrize(
    "text",
    [
        "a: 2024-99-99",
        "[" * 5000,
        "env: 3",
        "env: {1: 2}",
        "{[1]: 2}",
        "temperature: !!python/name:os.system",
        "\x00",
        "- 1",
    ],
)
def test_a_file_that_is_no_settings_is_named(tmp_path, text):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    told = outcome(lambda: parse({}, ["--output_dir", "out", "--config", str(file)]))
    assert "a.yaml" in told
    assert "\n" not in told
