"""Who writes is asked of the config, by its three properties: nobody compares the fields that say so."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "gkd"
FIELDS = {"lmbda", "seq_kd"}


def decided_by(path):
    """Expressions in which a config's `lmbda` or `seq_kd` decides something, as text."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        parts = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.BoolOp):
            parts = node.values
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
            parts = [node.test]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            parts = [node.operand]
        if any(isinstance(part, ast.Attribute) and part.attr in FIELDS for part in parts):
            yield ast.unparse(node)


def test_no_file_outside_the_config_works_out_who_writes():
    found = {
        f"{path.relative_to(PACKAGE)}: {text}"
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "config"
        for text in decided_by(path)
    }
    assert found == {
        # `gkd precompute` lets the teacher write where the field asks for it, whatever share the student has
        "commands/precompute/answers.py: rollout if args.seq_kd else None",
        # what `Mixture` is made of
        "data/sources.py: 'teacher' if self.seq_kd else 'data'",
    }
