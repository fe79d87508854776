"""Teachers, rollouts and subjects say what they can by their attributes and methods; nobody asks for their type."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "gkd"
FAMILIES = {"Teacher", "Rollout", "Subject"}
# `as_absent`: a teacher that is not loaded stands where a model does, until the teacher is made of it.
MOST = 1
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def names_in(node: ast.AST) -> set[str]:
    return {
        n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute)
    }


def members() -> set[str]:
    """The base classes, all classes below them, and teachers that are none yet (`AbsentTeacher`)."""
    classes = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found = FAMILIES | {c.name for c in classes if c.name.endswith(("Teacher", "Rollout", "Subject"))}
    while more := {c.name for c in classes if any(names_in(base) & found for base in c.bases)} - found:
        found |= more
    return found


def type_tests(tree: ast.AST, members: set[str]) -> list[int]:
    """Lines of isinstance, issubclass, `type(x) is X` and patterns of `match` that name one of the members."""
    lines = []
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            asked = names_in(node.args[1])
        elif isinstance(node, ast.Compare) and any("type" in names_in(s) for s in (node.left, *node.comparators)):
            asked = names_in(node)
        elif isinstance(node, ast.MatchClass):
            asked = names_in(node.cls)
        else:
            continue
        if asked & members:
            lines.append(node.lineno)
    return lines


def test_nobody_asks_a_teacher_or_a_rollout_for_its_type():
    known = members()
    assert {"LocalTeacher", "AbsentTeacher", "KeptTeacher", "VLLMRollout", "ServedSubject"} <= known
    found = [f"{path.relative_to(PACKAGE)}:{line}" for path, tree in TREES.items() for line in type_tests(tree, known)]
    assert len(found) <= MOST, found


@pytest.mark.parametrize(
    "line",
    [
        "isinstance(x, LocalTeacher)",
        "isinstance(x, (int, a.LocalTeacher | str))",
        "issubclass(t, LocalTeacher)",
        "type(x) is LocalTeacher",
        "match x:\n    case LocalTeacher():\n        pass",
    ],
)
def test_every_way_of_asking_is_seen(line):
    assert type_tests(ast.parse(line), {"LocalTeacher"})
    assert not type_tests(ast.parse(line), {"Rollout"})
