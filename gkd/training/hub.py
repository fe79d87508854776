"""Pushing to the Hugging Face Hub: a push that fails loses nothing and says how to do it again.

The Trainer pushes at three moments: it makes the repository when it is created, so a wrong token is told before the
first step; after each checkpoint in the background, where a failure must not end the training; and at the end, when
everything has been saved locally.
"""

from __future__ import annotations

import logging
import shlex
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

from gkd.common.errors import DiskFullError, PushError
from gkd.common.redact import redact_value

logger = logging.getLogger(__name__)

# What the client raises: the bases are the HTTP library's own error, which a refused connection is, and OSError.
HUB_ERRORS: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, ValueError, RuntimeError)
_LIMIT = 300  # characters of the client's message


class HubMixin:
    """The Trainer's pushes with their failures told in one line."""

    args: Any
    hub_model_id: str | None
    push_in_progress: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, or find it there.

        Raises:
            PushError: no connection, no permission, or not a repository's name.
        """
        try:
            super().init_hf_repo(token, private)  # type: ignore[misc]
        except HUB_ERRORS as error:
            name = self.args.hub_model_id or "the name of output_dir"
            raise PushError(
                f"push_to_hub=True: cannot make or find the repository ({name}) on the Hub: {_brief(error)}. Log in "
                f"with `hf auth login` or set HF_TOKEN to a token that may write; without push_to_hub nothing is sent"
            ) from error

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`: the model is saved into `output_dir` first, then all of it is pushed.

        Raises:
            PushError: the push failed; what was saved is where it was.
        """
        try:
            return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]
        except (PushError, DiskFullError):
            raise
        except HUB_ERRORS as error:
            raise PushError(
                f"the model is saved in {self.args.output_dir}, but the push to the Hub failed: {_brief(error)}. To "
                f"push it again: {self._upload_command()}"
            ) from error

    def _upload_command(self) -> str:
        """What pushes the same files as the Trainer does."""
        words = ["hf", "upload", self.hub_model_id or "REPOSITORY", str(self.args.output_dir), "."]
        return shlex.join([*words, "--exclude", "_*", "--exclude", "checkpoint-*"])

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._tell_failed_pushes()  # before the base class forgets them
        try:
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]
        except HUB_ERRORS as error:
            logger.warning("a push to the Hub failed, the training goes on: %s", _brief(error))

    def _finish_current_push(self) -> None:
        super()._finish_current_push()  # type: ignore[misc]
        self._tell_failed_pushes()

    def _tell_failed_pushes(self) -> None:
        """A push in the background keeps its exception to itself: tell it, once."""
        jobs = getattr(getattr(self, "push_in_progress", None), "jobs", [])
        for job in [job for job in jobs if job.done() and job.exception() is not None]:
            logger.warning("a push to the Hub failed, the next one sends its files: %s", _brief(job.exception()))
            jobs.remove(job)


def _brief(error: BaseException | None) -> str:
    """The client's message on one line, without secrets, without the link to a page about status codes."""
    text = " ".join(line for line in str(error).splitlines() if not line.startswith("For more information"))
    text = redact_value(" ".join(text.split())) or type(error).__name__
    return text if len(text) <= _LIMIT else text[: _LIMIT - 1] + "…"
