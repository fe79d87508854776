"""The parser below `parse`: names that are no fields, values that are no texts, YAML, and whose arguments they are."""

import sys

import pytest
from trl import ModelConfig, ScriptArguments

from gkd.config.fields import GKDConfig
from gkd.recipe.command_line import RENAMED, Parser, arguments, read_config, refuse_unknown


def parser_of():
    return Parser((ScriptArguments, GKDConfig, ModelConfig), allow_abbrev=False)


@pytest.mark.parametrize(
    ("name", "dashes", "message"),
    [
        ("lmda", "", "the place: there is no field 'lmda'; did you mean lmbda?"),
        ("--lmda", "--", "the place: there is no field '--lmda'; did you mean --lmbda?"),
        ("--max-seq-length", "--", "the place: there is no field '--max-seq-length'; did you mean --max_length?"),
        ("lr", "", "the place: there is no field 'lr'; did you mean learning_rate?"),
        ("zzzzzz", "", "the place: there is no field 'zzzzzz'; --help lists the fields"),
        ("lmbda", "--", "the place: there is no field 'lmbda'; did you mean --lmbda?"),  # a flag without dashes
    ],
)
def test_a_name_that_is_no_field_is_told_with_what_may_have_been_meant(name, dashes, message):
    known = ["lmbda", "max_length", "learning_rate"]
    with pytest.raises(ValueError) as error:
        refuse_unknown([name], known, "the place", dashes)
    assert str(error.value) == message
    refuse_unknown([dashes + field for field in known], known, "the place", dashes)


def test_what_a_field_was_called_leads_to_a_field():
    known = {action.dest for action in parser_of()._actions}
    assert set(RENAMED.values()) <= known
    assert not set(RENAMED) & known


def test_arguments_are_the_users_and_a_kernels_are_nobodys(monkeypatch):
    assert arguments(["--config=a=b.yaml", "--lmbda=1"]) == ["--config", "a=b.yaml", "--lmbda=1"]
    monkeypatch.setattr(sys, "argv", ["/x/recipe.py", "--lmbda", "1"])
    assert arguments(None) == ["--lmbda", "1"]
    monkeypatch.setattr(sys, "argv", ["/x/colab_kernel_launcher.py", "-f", "c.json"])
    assert arguments(None) == []


def test_a_file_of_settings_is_a_mapping(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("lmbda: 0.5\nenv: {A: 1}\n")
    assert read_config(["--config", str(file)]) == {"lmbda": 0.5, "env": {"A": 1}}
    assert read_config(["--lmbda", "1"]) == {}
    for argv, message in ((["--config"], "needs a YAML file"), (["--config", "no.yaml"], "no.yaml: no such file")):
        with pytest.raises(ValueError, match=message):
            read_config(argv)


def test_values_that_are_no_texts_are_brought_to_their_types():
    fine = parser_of().fitting(
        {"lmbda": 1, "max_new_tokens": 4, "seq_kd": True, "beta": "0.2", "unknown": [1]}, "here"
    )
    assert fine == {"lmbda": 1.0, "max_new_tokens": 4, "seq_kd": True, "beta": "0.2", "unknown": [1]}
    assert (type(fine["lmbda"]), type(fine["max_new_tokens"])) == (float, int)
    with pytest.raises(ValueError, match=r"^here: .*lmbda"):
        parser_of().fitting({"lmbda": [0.5]}, "here")
    with pytest.raises(ValueError, match=r"^here: .*max_new_tokens=4.5"):
        parser_of().fitting({"max_new_tokens": 4.5}, "here")
    with pytest.raises(ValueError, match=r"^here: .*lmbda"):
        parser_of().fitting({"lmbda": None}, "here")


def test_a_text_that_is_no_value_is_told_in_one_line():
    with pytest.raises(ValueError, match=r"^--ce_weight 'a\\nb': it should be a number$"):
        parser_of().parse_args_and_config(["--output_dir", "x", "--ce_weight", "a\nb"])


@pytest.mark.parametrize(
    ("argv", "given"), [(["--output-dir=x"], {}), (["--output_dir", "x"], {}), ([], {"output_dir"})]
)
def test_a_default_is_made_unless_it_is_given_in_any_spelling(argv, given):
    parser, made = parser_of(), []
    action = next(action for action in parser._actions if action.dest == "output_dir")
    for arguments_, fields, expected in ((argv, given, (None, [])), (["--lmbda", "1"], {}, ("made", [1]))):
        action.default = lambda: made.append(1) or "made"
        parser.call_defaults(arguments_, dict.fromkeys(fields))
        assert (action.default, made) == expected
