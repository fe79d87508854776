"""`Meter`: sums and counts by source, reduced over ranks once per logged step.

Every average is token-weighted (or sequence-weighted) over all ranks: sums travel, means are taken at the end. Ranks
add to their own sums and meet in one collective that all of them enter, `Meter.flush`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gkd.common.devices import sum_dtype
from gkd.data.sequences import TokenSequence
from gkd.data.sources import SOURCES

# Per-target quantities: (log name, attribute of FusedOutput).
TOKEN_METRICS = (
    ("loss", "divergence"),
    ("student/entropy", "student_entropy"),
    ("teacher/entropy", "teacher_entropy"),
    ("student/agreement", "agreement"),
    ("teacher/log_prob", "teacher_log_prob"),
    ("student/cross_entropy", "cross_entropy"),
    ("teacher/top_k_mass", "top_k_mass"),
    ("student/token_weight", "token_weights"),
    ("student/top_k_overlap", "top_k_overlap"),
    ("aligned/in_full", "in_full"),
    ("aligned/in_text", "in_text"),
    ("aligned/not_compared", "not_compared"),
)
_PARTLY = ("top_k_mass", "top_k_overlap")  # NaN where it is not known
# Those that are also told for each of several teachers, as `teacher/<name>/<log name>`.
TEACHER_METRICS = (("divergence", "divergence"), ("agreement", "agreement"))
_MANY_SPANS = 2000  # of phases that wait for the next log
PHASES = ("rollout", "teacher", "student", "alignment")
_SELDOM = ("time/alignment",)  # logged where there is any
_ROLLOUT = ("sequences", "length", "ended", "truncated", "repetitive", "empty")

Reduce = Callable[[Tensor], Tensor]


class Meter:
    """Collects one logging period's metrics on this rank; `flush` reduces them over all ranks and starts anew.

    Args:
        device: where sums of device tensors are kept.
        teachers: names of several teachers, in the order of their numbers.
    """

    def __init__(self, device: torch.device | str = "cpu", teachers: Iterable[str] = ()) -> None:
        self.device = torch.device(device)
        self._dtype = sum_dtype(self.device)
        self.teachers = tuple(teachers)
        self._reset()

    def _reset(self) -> None:
        self._token_sums = [torch.zeros(len(SOURCES), dtype=self._dtype, device=self.device) for _ in TOKEN_METRICS]
        self._token_counts = [torch.zeros_like(sums) for sums in self._token_sums]
        # [metric, teacher]; the last row counts targets
        self._by_teacher = torch.zeros(
            len(TEACHER_METRICS) + 1, len(self.teachers), dtype=self._dtype, device=self.device
        )
        self._rollouts = torch.zeros(len(_ROLLOUT), len(SOURCES), dtype=torch.float64)
        self._longest = torch.zeros(len(SOURCES), dtype=torch.float64)
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._spans: list[tuple[str, str | None, Any, Any]] = []
        self._open: list[str] = []

    def add_targets(self, output: Any, sources: Tensor, teachers: Tensor | None = None) -> None:
        """Add per-target values of a `FusedOutput`; `sources` [N] holds indices into SOURCES, `teachers` [N] the
        numbers of the teachers where there are several."""
        membership = _membership(sources, len(SOURCES)).to(self._dtype)  # [N, 3]
        for i, (_, attribute) in enumerate(TOKEN_METRICS):
            values = getattr(output, attribute)
            if values is not None:  # stays on the device: no synchronisation per micro-batch
                told = membership
                if attribute in _PARTLY:
                    told, values = membership * ~values.isnan()[:, None], values.nan_to_num()
                where = _told_of(output, attribute)
                if where is not None:
                    told = membership * where[:, None]
                self._token_sums[i] = self._token_sums[i] + values.to(self._dtype) @ told
                self._token_counts[i] = self._token_counts[i] + told.sum(dim=0)
        if self.teachers and output.divergence is not None:
            assert teachers is not None
            values = [getattr(output, attribute).to(self._dtype) for _, attribute in TEACHER_METRICS]
            whose = _membership(teachers, len(self.teachers)).to(self._dtype)  # [N, teachers]
            self._by_teacher = self._by_teacher + torch.stack([*values, torch.ones_like(values[0])]) @ whose

    def add_sequence(
        self, sequence: TokenSequence, ended: bool, repetitive: bool = False, empty: bool = False
    ) -> None:
        """Add one sequence after the rollout."""
        j = SOURCES.index(sequence.source)
        length = sequence.completion_length
        values = (1, length, ended, sequence.truncated, repetitive, empty)
        self._rollouts[:, j] += torch.tensor([float(v) for v in values], dtype=torch.float64)
        self._longest[j] = max(float(self._longest[j]), float(length))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to a phase; those of a phase inside this one are that one's alone.

        On CUDA the device keeps the time, and nothing waits for it before the next log.
        """
        outer = self._open[-1] if self._open else None
        self._open.append(name)
        start = _mark(self.device)
        try:
            yield
        finally:
            self._open.pop()
            self._spans.append((name, outer, start, _mark(self.device)))
            if len(self._spans) > _MANY_SPANS:
                self._settle(_MANY_SPANS // 2)  # the older half is long over

    def _settle(self, number: int | None = None) -> None:
        """Turn the first `number` spans into seconds; all of them when None."""
        for name, outer, start, end in self._spans[:number]:
            seconds = _seconds_between(start, end)
            self._seconds[name] += seconds
            if outer is not None:
                self._seconds[outer] -= seconds
        self._spans = [] if number is None else self._spans[number:]

    def flush(self, sum_over_ranks: Reduce, max_over_ranks: Reduce) -> dict[str, float]:
        """Reduce over ranks (every rank calls this), return the means by log name, and start a new period.

        Args:
            sum_over_ranks: elementwise sum of a tensor over ranks.
            max_over_ranks: elementwise maximum.

        Returns:
            `name` over all sources, `name/source` for each source and `teacher/<name>/...` for each of several
            teachers that occurred; seconds are the slowest rank's.
        """
        rollout_sums = self._rollouts.flatten().to(self.device, self._dtype)
        sums = torch.cat([*self._token_sums, *self._token_counts, rollout_sums, self._by_teacher.flatten()])
        sums = sum_over_ranks(sums).cpu().double()
        self._settle()
        peaks = torch.cat([self._longest, torch.tensor([self._seconds[p] for p in PHASES], dtype=torch.float64)])
        peaks = max_over_ranks(peaks.to(self.device, self._dtype)).cpu()
        self._reset()
        n = len(TOKEN_METRICS) * len(SOURCES)
        token_sums, token_counts, rollouts = (
            sums[:n].view(-1, 3),
            sums[n : 2 * n].view(-1, 3),
            sums[2 * n : 2 * n + rollout_sums.numel()].view(-1, 3),
        )
        logs = _token_means(token_sums, token_counts)
        logs.update(self._teacher_means(sums[2 * n + rollout_sums.numel() :]))
        logs.update(_rollout_means(rollouts, peaks[: len(SOURCES)]))
        logs.update(
            {
                f"time/{name}": round(float(s), 4)
                for name, s in zip(PHASES, peaks[len(SOURCES) :], strict=True)
                if s > 0 or f"time/{name}" not in _SELDOM
            }
        )
        return logs

    def _teacher_means(self, sums: Tensor) -> dict[str, float]:
        table = sums.view(len(TEACHER_METRICS) + 1, len(self.teachers))
        return {
            f"teacher/{teacher}/{name}": float(table[i, j] / table[-1, j])
            for j, teacher in enumerate(self.teachers)
            if table[-1, j] > 0
            for i, (name, _) in enumerate(TEACHER_METRICS)
        }


def _token_means(sums: Tensor, counts: Tensor) -> dict[str, float]:
    logs: dict[str, float] = {}
    for i, (name, _) in enumerate(TOKEN_METRICS):
        if name != "loss" and counts[i].sum() > 0:  # the overall loss is the Trainer's own `loss`
            logs[name] = float(sums[i].sum() / counts[i].sum())
        for j, source in enumerate(SOURCES):
            if counts[i, j] > 0:
                logs[f"{name}/{source}"] = float(sums[i, j] / counts[i, j])
    return logs


def _rollout_means(sums: Tensor, longest: Tensor) -> dict[str, float]:
    logs: dict[str, float] = {}
    total = sums[0].sum()
    if total > 0:
        logs["lmbda_realised"] = float(sums[0, SOURCES.index("student")] / total)
    for j, source in enumerate(SOURCES):
        count = sums[0, j]
        if count > 0:
            logs[f"rollout/length_mean/{source}"] = float(sums[1, j] / count)
            logs[f"rollout/length_max/{source}"] = float(longest[j])
            for i, name in enumerate(_ROLLOUT[2:], start=2):
                logs[f"rollout/{name}/{source}"] = float(sums[i, j] / count)
    written = [SOURCES.index("student"), SOURCES.index("teacher")]
    count = sums[0, written].sum()
    if count > 0:  # over everything that was generated
        logs["rollout/length_mean"] = float(sums[1, written].sum() / count)
        logs["rollout/length_max"] = float(longest[written].max())
        for i, name in enumerate(_ROLLOUT[2:], start=2):
            logs[f"rollout/{name}"] = float(sums[i, written].sum() / count)
    return logs


def _told_of(output: Any, attribute: str) -> Tensor | None:
    """[N] bool: the targets that a quantity is told of; None is all. A teacher with other tokens stands at some only,
    and is not compared at others."""
    if output.kinds is None:
        return None
    if attribute in ("agreement", "teacher_entropy"):
        at_border: Tensor | None = output.at_border
        return at_border
    return ~output.not_compared if attribute == "teacher_log_prob" else None


def _membership(numbers: Tensor, size: int) -> Tensor:
    """[N] -> [N, size], true where it is the number. `one_hot` looks at the numbers first, and waits for them."""
    return numbers[:, None] == torch.arange(size, device=numbers.device)


def _mark(device: torch.device) -> Any:
    """A point in time: an event in CUDA's queue, else seconds, for which the CPU waits until the device is idle."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _seconds_between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
