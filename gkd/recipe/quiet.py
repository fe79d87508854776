"""Libraries that tell of themselves at every start are not heard, so that a log begins with the run's own lines.

Importing this leaves out what they say while they are loaded.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings

from gkd.common.sign_of_life import on_terminal

# Things that nobody has asked for: part of a line, and its logger.
_NOISE = {
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    "DeepSpeed": ("Setting accelerator to CPU",),
    # what stops a rollout, and how it is sampled, is told by lines of our own, and checked
    "transformers.trainer_utils": ("The tokenizer has new PAD/BOS/EOS tokens",),
    "transformers.generation.configuration_utils": ("The following generation flags are not valid",),
}


def _says_something(record: logging.LogRecord) -> bool:
    return not any(part in str(record.msg) for part in _NOISE.get(record.name, ()))


def quiet_libraries() -> None:
    """Leave out a few lines by which libraries tell of themselves; and their bars, where there is no terminal."""
    deprecated = r"`(is_)?gradient_checkpointing` is deprecated"  # in favour of another name of transformers' own
    warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
    if not on_terminal():
        _without_bars()


def _without_bars() -> None:
    """A log holds lines: no bars of libraries, loaded already or later."""
    for library in ("HF_DATASETS", "HF_HUB"):
        os.environ[f"{library}_DISABLE_PROGRESS_BARS"] = "1"
    if "datasets" in sys.modules:
        importlib.import_module("datasets").disable_progress_bars()
    if "transformers" in sys.modules:
        importlib.import_module("transformers.utils.logging").disable_progress_bar()


for _name in _NOISE:
    logging.getLogger(_name).addFilter(_says_something)
