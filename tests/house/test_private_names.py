"""The private names of other libraries that the package leans on: docs/design.md lists each, and each is there.

An upgrade breaks here first. Read out of the code: attributes of `self` and `super()` that no class of ours defines,
attributes of other objects under a name that is nowhere ours, such names in `getattr` and as keywords, imports, and
what a class of ours overrides.
"""

import ast
import importlib
import inspect
import pkgutil
import re
from collections import defaultdict
from pathlib import Path

import pytest

import gkd

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## Private names of other libraries")[1].split("\n## ")[0]
TABLE = re.findall(r"^\| `([\w.]+)` \|", SECTION, flags=re.MULTILINE)
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "gkd").rglob("*.py")}
LIBRARIES = ("transformers", "trl", "peft", "accelerate", "deepspeed", "datasets")
# Private by their look only: the documentation of Python has them.
DOCUMENTED = {"_exit", "_replace", "_asdict", "_fields"}


def is_private(name):
    return name.startswith("_") and not name.endswith("__") and name != "_" and name not in DOCUMENTED


def of_self(node):
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def own_names():
    """Class -> (names that it defines or sets on `self`, its bases); classes of one name are taken together."""
    found = defaultdict(lambda: (set(), []))
    for cls in (node for tree in TREES.values() for node in ast.walk(tree)):
        if not isinstance(cls, ast.ClassDef):
            continue
        names = {n.name for n in ast.walk(cls) if isinstance(n, ast.FunctionDef)}
        names |= {
            n.attr
            for n in ast.walk(cls)
            if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and of_self(n)
        }
        names |= {n.target.id for n in cls.body if isinstance(n, ast.AnnAssign)}
        names |= {t.id for n in cls.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
        found[cls.name][0].update(names)
        found[cls.name][1].extend([re.split(r"[.\[]", ast.unparse(base))[-1] for base in cls.bases])
    return found


OWN = own_names()
EVERY_OWN = set().union(*(names for names, _ in OWN.values()))
EVERY_OWN |= {n.name for tree in TREES.values() for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


def names_of(cls):
    names, bases = OWN[cls]
    return names.union(*(names_of(base) for base in bases if base in OWN))


def foreign(node, cls):
    """The private names of others in this one node."""
    if isinstance(node, ast.Attribute):
        if ast.unparse(node.value) == "super()":
            return {node.attr}
        return {node.attr} - (names_of(cls) if cls and of_self(node) else EVERY_OWN)
    if isinstance(node, ast.Call):
        names = {keyword.arg for keyword in node.keywords if keyword.arg}
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr", "setattr", "delattr"):
            names |= {node.args[1].value} if isinstance(node.args[1], ast.Constant) else set()
        return names - EVERY_OWN
    if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("gkd"):
        return {*node.module.split("."), *(alias.name for alias in node.names)}
    if isinstance(node, ast.Import):
        return {part for alias in node.names for part in alias.name.split(".")}
    return set()


def used(node, cls=None):
    for child in ast.iter_child_nodes(node):
        yield from (name for name in foreign(child, cls) if is_private(name))
        yield from used(child, child.name if isinstance(child, ast.ClassDef) else cls)


def sources_of(cls):
    """The source of a class and of all that it inherits from."""
    return "\n".join(inspect.getsource(c) for c in inspect.getmro(cls) if c.__module__ not in ("builtins", "typing"))


def overridden():
    """Private names that a class of ours and a library's class that it inherits from both have, or set on `self`."""
    for module in pkgutil.walk_packages(gkd.__path__, "gkd."):
        if module.name.endswith("__main__"):
            continue
        for cls in vars(importlib.import_module(module.name)).values():
            if not inspect.isclass(cls) or not cls.__module__.startswith("gkd."):
                continue
            theirs = [base for base in cls.__mro__ if base.__module__.split(".")[0] in LIBRARIES]
            names = {name for base in theirs for name in vars(base)}
            names |= {
                n for base in theirs for n in re.findall(r"\bself\.(\w+)(?:: [^=\n]+)? = ", inspect.getsource(base))
            }
            yield from (name for name in names_of(cls.__name__) & names if is_private(name))


def test_the_table_is_what_the_code_leans_on():
    found = {name for tree in TREES.values() for name in used(tree)} | set(overridden())
    listed = {part for name in TABLE for part in name.split(".") if is_private(part)}
    assert found - listed == set(), "add them to the table of docs/design.md"
    texts = {n.value for t in TREES.values() for n in ast.walk(t) if isinstance(n, ast.Constant)}
    assert {name for name in listed - found if name not in texts} == set(), "nobody uses them any more"


@pytest.mark.parametrize("name", TABLE)
def test_a_private_name_is_there(name):
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        break
    for part in parts[end:-1]:
        found = getattr(found, part)
    if hasattr(found, parts[-1]):
        return
    if inspect.isclass(found):  # set on its objects
        assert re.search(rf"\b{parts[-1]}\b", sources_of(found))
    else:
        assert parts[-1] in inspect.signature(found).parameters
