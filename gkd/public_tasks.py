"""Named public tasks through lm-eval (EleutherAI's lm-evaluation-harness), beside what the harness measures itself.

lm-eval is not installed with this package: `pip install lm-eval` where it is wanted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gkd.measures import Estimate, Metric, finite, mean_estimate

_INSTALL = "lm_eval_tasks needs the package lm-eval: pip install lm-eval"


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
        if find_spec("lm_eval") is None:
            raise ValueError(_INSTALL)
        from lm_eval.tasks import TaskManager

        known = TaskManager()
        unknown = [name for name in self._split() if not (os.path.isfile(name) or known.match_tasks([name]))]
        if unknown or not self._split():
            raise ValueError(
                f"lm_eval_tasks={self.names!r}: lm-eval knows no task {', '.join(unknown) or ''}; `lm-eval ls tasks` "
                "lists its names"
            )

    def _split(self) -> list[str]:
        return [name.strip() for name in self.names.split(",") if name.strip()]

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[dict[str, Estimate], dict[str, Metric]]:
        """Each task's metrics, keyed `lm_eval/<task>/<metric>`, and what these are.

        Raises:
            ValueError: a task's data set cannot be had.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.utils import load_yaml_config

        tasks = [load_yaml_config(name) if os.path.isfile(name) else name for name in self._split()]
        try:
            found = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size),
                tasks=tasks,
                limit=self.limit,
                bootstrap_iters=100,
                random_seed=self.seed,
                numpy_random_seed=self.seed,
                torch_random_seed=self.seed,
                fewshot_random_seed=self.seed,
            )
        except (OSError, ConnectionError) as error:
            raise ValueError(f"lm_eval_tasks={self.names!r}: a task's data set cannot be loaded: {error}") from error
        values, metrics = {}, {}
        for task, name, value, error, scores in _numbers(found):
            key = f"lm_eval/{task}/{name}"
            values[key] = _estimate(value, error, scores)
            higher = found["higher_is_better"].get(task, {}).get(name, True)
            metrics[key] = Metric(key, f"{task}, {name}", "", "higher" if higher else "lower")
        return values, metrics


def _numbers(found: dict[str, Any]) -> Iterator[tuple[str, str, float, float | None, list[float]]]:
    """Task, metric, value, standard error, and the items' own scores, of all that lm-eval gives back."""
    for task, numbers in found["results"].items():
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
