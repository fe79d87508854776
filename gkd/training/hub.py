"""Pushing to the Hugging Face Hub: a push that fails loses nothing and says how to do it again.

The Trainer pushes at three moments: it makes the repository when it is created, so a wrong token is refused before the
first step; after each checkpoint in the background, where a failure must not end the training; and at the end, when
everything has been saved locally.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

from gkd.common.errors import DiskFullError, PushError
from gkd.common.redact import redact_value

logger = logging.getLogger(__name__)

# What the client raises: the bases are the HTTP library's own error, which a refused connection is, and OSError.
HUB_ERRORS: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, ValueError, RuntimeError)
_LIMIT = 300  # characters of the client's message


@contextmanager
def repository_made(args: Any) -> Iterator[None]:
    """Inside, the repository is made, or found.

    Raises:
        PushError: no connection, no permission, or not a repository's name.
    """
    try:
        yield
    except HUB_ERRORS as error:
        name = args.hub_model_id or "the name of output_dir"
        raise PushError(
            f"push_to_hub=True: cannot make or find the repository ({name}) on the Hub: {_brief(error)}. Log in "
            f"with `hf auth login` or set HF_TOKEN to a token that may write; without push_to_hub nothing is sent"
        ) from error


@contextmanager
def pushed(args: Any, repository: Callable[[], str | None]) -> Iterator[None]:
    """Inside, the model is saved into `output_dir` and pushed to the repository, whose name is asked for at the end.

    Raises:
        PushError: the push failed; what was saved is where it was.
    """
    try:
        yield
    except (PushError, DiskFullError):
        raise
    except HUB_ERRORS as error:
        raise PushError(
            f"the model is saved in {args.output_dir}, but the push to the Hub failed: {_brief(error)}. To "
            f"push it again: {_upload_command(repository(), args.output_dir)}"
        ) from error


@contextmanager
def pushed_if_possible() -> Iterator[None]:
    """Inside, a checkpoint is pushed; where that fails, a warning says so, and the training goes on."""
    try:
        yield
    except HUB_ERRORS as error:
        logger.warning("a push to the Hub failed, the training goes on: %s", _brief(error))


def warn_of_failed_pushes(in_progress: Any) -> None:
    """A push in the background (`push_in_progress`) keeps its exception to itself: warn of it, once."""
    jobs = getattr(in_progress, "jobs", [])
    for job in [job for job in jobs if job.done() and job.exception() is not None]:
        logger.warning("a push to the Hub failed, the next one sends its files: %s", _brief(job.exception()))
        jobs.remove(job)


def _upload_command(repository: str | None, folder: str) -> str:
    """What pushes the same files as the Trainer does."""
    words = ["hf", "upload", repository or "REPOSITORY", str(folder), "."]
    return shlex.join([*words, "--exclude", "_*", "--exclude", "checkpoint-*"])


def _brief(error: BaseException | None) -> str:
    """The client's message on one line, without secrets, without the link to a page about status codes."""
    text = " ".join(line for line in str(error).splitlines() if not line.startswith("For more information"))
    text = redact_value(" ".join(text.split())) or type(error).__name__
    return text if len(text) <= _LIMIT else text[: _LIMIT - 1] + "…"
