"""What a chat template takes for today, where it writes a date (`strftime_now`: Llama-3.2, gpt-oss and others).

On another day every prompt would have other ids, and all that was kept for it (the teacher's sequences and scores)
would be made again. So the first day is kept beside these, and taken by every later run that uses them.
"""

from __future__ import annotations

import logging
from datetime import date, datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gkd.data.templates import dated

logger = logging.getLogger(__name__)

FILE = "chat_template_day.txt"


def template_day(args: Any, tokenizer: PreTrainedTokenizerBase, write: bool = True) -> str | None:
    """The day, as YYYY-MM-DD; None for a template that writes no date.

    Args:
        args: the fields that say what of the teacher's is kept, and where.
        tokenizer: with its chat template.
        write: whether the day may be kept for later runs.

    Raises:
        ValueError: what is kept there is no day.
    """
    if "strftime_now(" not in str(tokenizer.chat_template):
        return None
    if "strftime_now(" in dated(str(tokenizer.chat_template), datetime.min):
        logger.warning(
            "the chat template writes today's date (strftime_now) in a form that it does not spell out: its prompts "
            "will have other tokens on another day, and what is kept of the teacher's is not found again"
        )
        return None
    kept = [args.teacher_cache_folder] if args.teacher_writes else []
    files = [Path(folder).expanduser() / FILE for folder in (*kept, args.teacher_scores_dir) if folder is not None]
    found = next((file for file in files if file.is_file()), None)
    day = date.today().isoformat() if found is None else _read(found)
    missing = [file for file in files if not file.is_file()] if write else []
    for file in missing:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{day}\n", encoding="utf-8")
        except OSError as error:
            logger.warning("%s cannot be written (%s)", file, error)
    if files:
        told = f"kept in {found or files[0]}, so that what is kept of the teacher's is found on other days, too"
    else:
        told = "its prompts will have other tokens on another day; rows may give it a date in chat_template_kwargs"
        told += " (date_string, where it reads that)"
    logger.warning("the chat template writes today's date (strftime_now), here %s: %s", day, told)
    return day


def _read(file: Path) -> str:
    text = file.read_text(encoding="utf-8").strip()
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise ValueError(
            f"{file} should hold a day as YYYY-MM-DD, holds {text[:40]!r}: mend it, or delete it"
        ) from error
