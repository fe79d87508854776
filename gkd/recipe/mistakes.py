"""A user's mistake ends in one line, anybody else's with its traceback.

Light to import: torch is loaded by the recipe, once it is found.
"""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from gkd.common.errors import DiskFullError, PushError
from gkd.common.redact import harmless
from gkd.recipe.capture import _PACKAGE, _HarmlessFormatter
from gkd.recipe.quiet import quiet_libraries
from gkd.servers.client import ServerError

# What goes wrong in a recipe's own lines: told with their place, without the way that led there.
CODE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
)
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def in_the_users_code(error: BaseException) -> str | None:
    """What went wrong and where, in one line, when the user's own code raised the error (a recipe file, its
    `load_data` or `score`, or a module that it imports); None when this package or what it calls did."""
    if isinstance(error, SyntaxError):
        own = error.filename is not None and not _is_ours(error.filename) and not _is_librarys(error.filename)
        return f"{error.filename}, line {error.lineno}: {error.msg}" if own else None
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_librarys(frame.filename)]
    if not frames or _is_ours(frames[-1].filename):
        return None
    last = frames[-1]
    told = " ".join([str(error), *getattr(error, "__notes__", ())])
    return f"{last.filename}, line {last.lineno}, `{last.line}`: {type(error).__name__}: {told}"


def _of_a_library(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and _is_librarys(frames[-1].filename)


def _is_ours(file: str) -> bool:
    return file.startswith(_PACKAGE + os.sep)


def _is_librarys(file: str) -> bool:
    return not _is_ours(file) and file.startswith(("<", *_LIBRARIES))


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """A user's mistake ends in one line on stderr and exit code 2 (the traceback too when GKD_DEBUG=1).

    A training that had to give up (steps that are not finite, a full disk, a server) ends in one line and exit code 1;
    one that a signal stopped with 128 + the signal's number."""
    handler = logging.StreamHandler()
    handler.setFormatter(_HarmlessFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    quiet_libraries()
    logging.getLogger("gkd").setLevel(logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.WARNING)
    try:
        yield
    except (FloatingPointError, DiskFullError, ServerError, PushError) as error:
        print(f"error: {harmless(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, *CODE_ERRORS) as error:
        told = mistake(error)
        if told is None or os.environ.get("GKD_DEBUG"):
            raise
        print(f"error: {harmless(told)}", file=sys.stderr)
        raise SystemExit(2) from None


def mistake(error: BaseException) -> str | None:
    """The line that tells a user's mistake; None when the error is none."""
    if isinstance(error, ValueError) or (isinstance(error, TypeError) and str(error).startswith("args is")):
        return str(error)
    own = in_the_users_code(error)
    if own is None and isinstance(error, ImportError) and _of_a_library(error):
        return " ".join(str(error).split())  # a package that an option needs and that is not here
    return own
