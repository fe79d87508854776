"""One file for each column: how this package or a peer is asked, by the interface that it documents.

An adapter has `name` (the column), `package` (the distribution, for its version), `sources` (where a failing case
comes from, by the case's name) and of the following what it can: `loss(call)`, the mean over the targets;
`trainer(run)`, a trainer ready for `train()`; `ways()`, the losses that it offers against a teacher with another
tokenizer, by name: functions of a `spelling_cases.Text`; `groups(student, teacher, text, ids, ids)`,
which tokens of two tokenizers it takes together. What it has not raises `NotApplicable`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from conformance.result import NotApplicable, Source

NAMES = ["gkd", "trl_gkd", "trl_distillation", "trl_gold", "trl_gold_bayesian", "ms_swift", "liger"]


class Adapter:
    """What a column has if its file says nothing else: nothing.

    Attributes:
        module: its file. name, package, sources: see above.
        prompts_only: its rows are prompts, without answers.
        otherwise_as: the column that it is but for teachers of another tokenizer; its answers are taken for the rest.
    """

    module: str
    prompts_only = False
    otherwise_as: str | None = None
    name: str
    package: str
    sources: dict[str, Source]

    def version(self) -> str:
        return version(self.package)

    def loss(self, call: Any) -> Any:
        raise NotApplicable("no loss on its own")

    def trainer(self, run: Any) -> Any:
        raise NotApplicable("a loss, no trainer")

    def groups(self, student: Any, teacher: Any, text: str, student_ids: Any, teacher_ids: Any) -> Any:
        raise NotApplicable("no teachers with another tokenizer")

    def ways(self) -> dict[str, Callable[[Any], Any]]:
        raise NotApplicable("no teachers with another tokenizer")


def adapter(name: str) -> Adapter:
    """The adapter of a file."""
    found: Adapter = importlib.import_module(f"conformance.adapters.{name}").ADAPTER
    found.module = name
    return found
