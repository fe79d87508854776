"""gkd: on-policy knowledge distillation of language models (Generalized Knowledge Distillation, arXiv 2306.13649).

The names below are loaded on first use (PEP 562), so that `import gkd.loss` costs torch and nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gkd._version import __version__

if TYPE_CHECKING:
    from gkd.config.fields import GKDConfig
    from gkd.training.trainer import GKDTrainer

__all__ = ["GKDConfig", "GKDTrainer", "__version__"]

_HOMES = {"GKDConfig": "gkd.config.fields", "GKDTrainer": "gkd.training.trainer"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gkd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
