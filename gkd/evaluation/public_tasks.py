"""Named public tasks through lm-eval (EleutherAI's lm-evaluation-harness), beside what the harness measures itself.

lm-eval is not installed with this package: `pip install lm-eval` where it is wanted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gkd.evaluation.measures import Estimate, Metric, finite, mean_estimate


def check_installed() -> None:
    """Before any model is loaded.

    Raises:
        ValueError: lm-eval is not there.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("lm_eval_tasks needs the package lm-eval: pip install lm-eval")


@dataclass(frozen=True)
class PublicTasks:
    """Which tasks, and how much of them.

    Attributes:
        names: comma separated: lm-eval's tasks and groups (`lm-eval ls tasks` lists them), or .yaml files of tasks.
        limit: most items of a task; None = all.
        batch_size: sequences per forward pass. seed: of what a task draws, its few-shot examples say.

    Raises:
        ValueError: lm-eval is not installed; a task that it does not know.
    """

    names: str
    limit: int | None = None
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_installed()
        known = set(self._manager().all_tasks)
        unknown = [name for name in self.tasks if name not in known]
        if unknown or not self.tasks:
            raise ValueError(
                f"lm_eval_tasks={self.names!r}: lm-eval knows no task {', '.join(unknown)!r}; `lm-eval ls tasks` has "
                "the names"
            )

    def _split(self) -> list[str]:
        return [name.strip() for name in self.names.split(",") if name.strip()]

    @property
    def tasks(self) -> list[str]:
        """The tasks' names; for a file what its entry `task` says."""
        return [_task_of(Path(name)) if name.endswith((".yaml", ".yml")) else name for name in self._split()]

    def _manager(self) -> Any:
        from lm_eval.tasks import TaskManager

        folders = [str(Path(name).resolve().parent) for name in self._split() if name.endswith((".yaml", ".yml"))]
        return TaskManager(include_path=folders or None)

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[dict[str, Estimate], dict[str, Metric]]:
        """Each task's metrics, keyed `lm_eval/<task>/<metric>`, and what these are.

        Raises:
            ValueError: a task's data set cannot be had.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        try:
            found = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size),
                tasks=self.tasks,
                task_manager=self._manager(),
                limit=self.limit,
                bootstrap_iters=100,
                random_seed=self.seed,
                numpy_random_seed=self.seed,
                torch_random_seed=self.seed,
                fewshot_random_seed=self.seed,
            )
        except OSError as error:  # ConnectionError among them
            raise ValueError(f"lm_eval_tasks={self.names!r}: a task's data set cannot be loaded: {error}") from error
        values, metrics = {}, {}
        for task, name, value, stderr, scores in _numbers(found, self.tasks):
            key = f"lm_eval/{task}/{name}"
            values[key] = _estimate(value, stderr, scores)
            higher = found["higher_is_better"].get(task, {}).get(name, True)
            metrics[key] = Metric(key, f"{task}, {name}", "", "higher" if higher else "lower")
        return values, metrics


def _task_of(path: Path) -> str:
    """The name that a task's file gives it.

    Raises:
        ValueError: there is no such file, or it names no task.
    """
    if not path.is_file():
        raise ValueError(f"lm_eval_tasks: there is no file {str(path)!r}")
    named = re.search(r"^task:\s*['\"]?([^\s'\"]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    if named is None:
        raise ValueError(f"lm_eval_tasks: {str(path)!r} has no line `task: NAME`")
    return named.group(1)


def _numbers(found: dict[str, Any], asked: list[str]) -> Iterator[tuple[str, str, float, float | None, list[float]]]:
    """Task, metric, value, standard error, and the items' own scores, of the tasks that were asked for (of all there
    are, when these are names for several)."""
    for task in [task for task in found["results"] if task in asked] or list(found["results"]):
        numbers = found["results"][task]
        for key, value in numbers.items():
            name, _, way = key.partition(",")
            if not isinstance(value, float) or name.endswith("_stderr"):
                continue
            error = numbers.get(f"{name}_stderr,{way}")
            samples = found.get("samples", {}).get(task, [])
            scores = [sample.get(name) for sample in samples if sample.get("filter", way) == way]
            plain = [float(score) for score in scores if isinstance(score, int | float)]
            yield task, name, value, error if isinstance(error, float) else None, plain


def _estimate(value: float, error: float | None, scores: list[float]) -> Estimate:
    """With the items' own scores where the value is their mean: two models are then compared item by item."""
    mean = mean_estimate(scores)
    if math.isclose(mean.value, value, rel_tol=1e-9, abs_tol=1e-12):
        return mean
    return Estimate(value, finite(error), len(scores))
