"""What the peers are asked, asked of this package: its column of the conformance table is green."""

import json
from pathlib import Path

import pytest
from conformance import adapters
from conformance.cases import CASES
from conformance.result import FAIL, NOT_APPLICABLE, PASS, Result, Source, judged
from conformance.table import PAGE, RESULTS, section, with_section

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("case", [case for case in CASES if case.cheap], ids=lambda case: case.name)
def test_our_column_is_green(case):
    found = case.verdict(adapters.adapter("gkd"))
    assert found.verdict == PASS, found.detail


def test_the_table_is_what_the_runs_gave():
    results = json.loads(RESULTS.read_text())
    page = PAGE.read_text(encoding="utf-8")
    assert with_section(page, section(results)) == page, "run python benchmarks/conformance/table.py"


def test_every_case_was_asked_of_every_column():
    results = json.loads(RESULTS.read_text())
    assert list(results) == adapters.NAMES
    for column in results.values():
        assert [(name, cell["group"]) for name, cell in column["cells"].items()] == [(c.name, c.group) for c in CASES]


def test_a_failure_has_its_line_and_a_reason():
    for name, column in json.loads(RESULTS.read_text()).items():
        for case, cell in column["cells"].items():
            assert cell["detail"], (name, case)
            if cell["verdict"] == FAIL:
                assert cell.get("source", "").split(":")[-1].isdigit(), (name, case)
                assert cell["why"], (name, case)
    ours = json.loads(RESULTS.read_text())["gkd"]["cells"]
    assert {cell["verdict"] for cell in ours.values()} == {PASS}


@pytest.mark.parametrize("name", ["trl_gkd", "trl_distillation", "trl_gold", "trl_gold_bayesian"])
def test_the_lines_are_those_of_the_installed_version(name):
    """The sources of TRL, which is here: a line that moved has its new number, one that is gone is an error."""
    peer, column = adapters.adapter(name), json.loads(RESULTS.read_text())[name]
    if peer.version() != column["version"]:
        pytest.skip(f"the table is about {column['version']}: run make conformance")
    found, known = column["cells"], {case.name for case in CASES}
    for case, source in peer.sources.items():
        assert case in known, case
        where = source.where(peer.package)
        assert found[case]["verdict"] != FAIL or found[case]["source"] == where
    with pytest.raises(LookupError, match="no line of"):
        Source("trl/__init__.py", "a line that nobody wrote", "").where("trl")


def test_a_wrong_implementation_is_told_from_a_right_one():
    """Each loss case fails for a loss that is off: by a factor, by its neighbours, by a direction."""
    ours = adapters.adapter("gkd")

    class Wrong(adapters.Adapter):
        def __init__(self, change):
            self.change = change

        def loss(self, call):
            return self.change(ours.loss(call), call)

    cases = {case.name: case for case in CASES}
    beta = cases["beta: both ends and between"]
    assert beta.verdict(Wrong(lambda loss, call: loss * 1.01)).verdict == FAIL
    masks = cases["prompts and padding have no say"]
    assert masks.verdict(Wrong(lambda loss, call: loss + call.student_hidden.mean())).verdict == FAIL
    empty = cases["a micro-batch without targets"]
    assert empty.verdict(Wrong(lambda loss, call: loss + 1)).verdict == FAIL
    assert cases["own answers"].verdict(Wrong(None)) == Result(NOT_APPLICABLE, "a loss, no trainer")
    assert judged(True, "x").verdict == PASS


def test_the_section_is_put_where_it_belongs():
    page = "# Evidence\n\ntext\n"
    once = with_section(page, "## Conformance\n\none\n")
    assert once == "# Evidence\n\ntext\n\n## Conformance\n\none\n"
    more = once + "\n## Later\n\nend\n"
    assert (
        with_section(more, "## Conformance\n\ntwo\n")
        == "# Evidence\n\ntext\n\n## Conformance\n\ntwo\n\n## Later\n\nend\n"
    )
    assert with_section(more, "## Conformance\n\none\n") == more
