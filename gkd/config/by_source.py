"""Fields that hold for the sequences of one source: another divergence, another beta, another top-k."""

from __future__ import annotations

import inspect
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from gkd.config.schedules import of_a_schedule
from gkd.data.sources import SOURCES
from gkd.loss import DIVERGENCES, Divergence, make_divergence

if TYPE_CHECKING:
    from gkd.config.fields import GKDConfig

KINDS = ("divergence", "beta", "teacher_top_k")  # each with _data, _student and _teacher behind it
_PARAMETERS = ("beta", "skew_lambda", "ab_alpha", "ab_beta", "akl_mu", "symmetric_kl_weight")


def of_source(config: Any, kind: str, source: str) -> Any:
    """What a field says for one source; None is as for all."""
    return getattr(config, f"{kind}_{source}")


def own_divergence(config: GKDConfig, source: str, beta: float) -> Divergence | None:
    """The divergence of a source that has one of its own; None is as for all.

    Args:
        config: the fields. beta: the common one, as it is now.

    Raises:
        ValueError: an unknown name, a parameter out of range, or one that it does not have.
    """
    name, own_beta = of_source(config, "divergence", source), of_source(config, "beta", source)
    if name is None and own_beta is None:
        return None
    chosen = config.divergence if name is None else name
    if own_beta is not None and "beta" not in _takes(chosen):
        raise ValueError(
            f"beta_{source}={own_beta} has no effect on the divergence {chosen!r} of these rows: leave it out, or set "
            f"divergence_{source}='jsd'"
        )
    values = {"beta": beta if own_beta is None else own_beta} | {n: getattr(config, n) for n in _PARAMETERS[1:]}
    taken = tuple((parameter, values[parameter]) for parameter in _PARAMETERS if parameter in _takes(chosen))
    try:
        if isinstance(config.beta, str) and own_beta is None and "beta" in _takes(chosen):
            return of_a_schedule(lambda: _made(chosen, taken))
        return _made(chosen, taken)  # one object for equal values: what is compiled for it is kept
    except ValueError as error:
        text = str(error)
        for kind in ("divergence", "beta"):
            if of_source(config, kind, source) is not None:
                text = re.sub(rf"\b{kind}\b", f"{kind}_{source}", text, count=1)
        raise ValueError(text) from error


def common_divergence(config: GKDConfig, beta: float) -> Divergence:
    """The divergence of all sources that have none of their own, and of evaluations.

    Raises:
        ValueError: an unknown name, a parameter out of range, or one that no divergence of the run has.
    """
    values = {"beta": beta} | {name: getattr(config, name) for name in _PARAMETERS[1:]}
    others = [name for source in SOURCES if (name := of_source(config, "divergence", source)) in DIVERGENCES]
    elsewhere = {parameter for name in others for parameter in _takes(name)} - _takes(config.divergence)
    return make_divergence(config.divergence, **{n: value for n, value in values.items() if n not in elsewhere})


def overrides(config: GKDConfig, beta: float) -> tuple[dict[str, Any], ...] | None:
    """Of every source in the order of SOURCES, what of the loss's settings is not as for all; None where nothing
    is."""
    found = []
    for source in SOURCES:
        divergence, top_k = own_divergence(config, source, beta), of_source(config, "teacher_top_k", source)
        one: dict[str, Any] = {} if divergence is None else {"divergence": divergence}
        found.append(one if top_k is None else {**one, "teacher_top_k": top_k})
    return tuple(found) if any(found) else None


def _takes(name: str) -> set[str]:
    return set(inspect.signature(DIVERGENCES[name]).parameters) if name in DIVERGENCES else set()


@lru_cache(maxsize=64)
def _made(name: str, parameters: tuple[tuple[str, float], ...]) -> Divergence:
    return make_divergence(name, **dict(parameters))


def check_by_source(config: GKDConfig) -> None:
    """Refuse a field of one source that would have no effect, or whose value is none.

    Raises:
        ValueError: naming the field, the value and the remedy.
    """
    occurs = {"data": config.reads_answers, "student": config.student_writes, "teacher": config.teacher_writes}
    for source in SOURCES:
        given = [f"{kind}_{source}" for kind in KINDS if of_source(config, kind, source) is not None]
        if not given:
            continue
        said = ", ".join(f"{name}={getattr(config, name)!r}" for name in given)
        if not occurs[source]:
            raise ValueError(
                f"{said} has no effect with lmbda={config.lmbda} and seq_kd={config.seq_kd}, where no sequence is of "
                f"source {source!r}: leave it out, or change these"
            )
        if source == "teacher" and config.seq_kd_loss == "nll":
            raise ValueError(f"{said} has no effect with seq_kd_loss='nll': leave it out, or set 'divergence'")
        _check_top_k(config, source)


def _check_top_k(config: GKDConfig, source: str) -> None:
    k, most = of_source(config, "teacher_top_k", source), config.teacher_top_k
    if k is None:
        return
    name = f"teacher_top_k_{source}"
    if config.teachers is not None:
        raise ValueError(f"{name}={k} does not go with teachers, which say top_k each: leave one of them out")
    if config.teacher_server_url is not None and most is not None and k > most:
        raise ValueError(f"{name}={k} is more than teacher_top_k={most}, which the server is asked for: raise that")
