"""A vLLM server that the run starts itself: found, started, waited for, and gone when the run is."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import requests

from gkd.common.redact import harmless
from gkd.common.sign_of_life import SignOfLife
from gkd.servers import keeper
from gkd.servers.client import ServerError
from gkd.servers.engine import LAUNCHER_VARIABLES, EngineOrder

logger = logging.getLogger(__name__)

START_SECONDS = 1800.0  # to be healthy: a large model from a slow disk, compiled
RESTARTS = 3  # of a server that dies while it is of use
_LOG_TAIL = 1500  # characters of the log in an error
_HAS_VLLM = "import importlib.util; print(importlib.util.find_spec('vllm') is not None)"


@dataclass(frozen=True)
class Address:
    """Where a server of this run is, as every process of the run knows it.

    `url` holds no key. `ended` is the file in which it stands, on the server's machine, when it has died for good.
    """

    url: str
    key: str
    ended: str

    @property
    def with_key(self) -> str:
        """The address for `VLLMClient`."""
        return self.url.replace("://", f"://{self.key}@", 1)

    def gone(self) -> str | None:
        """Why it will never answer again; None as long as it may."""
        try:
            reason = Path(self.ended).read_text()
        except OSError:
            return None
        return f"the server of this run is gone: {reason}, see {Path(self.ended).with_suffix('.log')}"


_known: dict[str, Address] = {}


def remember(addresses: Sequence[Address]) -> str:
    """Let `known` find them, in this process; their addresses, comma separated and without keys."""
    _known.update((one.url, one) for one in addresses)
    return ",".join(one.url for one in addresses)


def known(url: str) -> Address | None:
    """The server of this run at that address; None for one that others look after."""
    return _known.get(url)


class OwnServer:
    """One server process under its keeper.

    Args:
        order: what to start. Its port is taken as it is.
        log: file of all that it prints; what it ended of stands beside it.

    Raises:
        ValueError: no vLLM in the environment that is named.
    """

    def __init__(self, order: EngineOrder, log: Path) -> None:
        check_python(order.python)
        self.order, self.log = order, log.absolute()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        ended = self.log.with_suffix(".ended")
        ended.unlink(missing_ok=True)
        self.log.write_text(order.shown() + "\n\n")
        host = "127.0.0.1" if order.host == "127.0.0.1" else socket.gethostname()
        self.address = Address(f"http://{host}:{order.port}", secrets.token_urlsafe(16), str(ended))
        variables = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        variables |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"} | order.variables()
        variables["VLLM_API_KEY"] = self.address.key
        words = [sys.executable, keeper.__file__, str(self.log), str(ended), str(RESTARTS), *order.command()]
        self.process = subprocess.Popen(words, env=variables, stdin=subprocess.DEVNULL, start_new_session=True)
        atexit.register(self.stop)

    @property
    def alive(self) -> bool:
        """Whether the keeper still keeps it."""
        return self.process.poll() is None

    def wait(self, seconds: float = START_SECONDS) -> None:
        """Until it is healthy.

        Raises:
            ValueError: it died; the end of its log is in the message. ServerError: it takes too long.
        """
        start = time.monotonic()
        logger.info("starting vLLM for %s, see %s", self.order.model, self.log)
        with SignOfLife("starting vLLM"):
            while not self._healthy():
                if not self.alive:
                    raise ValueError(f"the vLLM server did not start. The end of {self.log}:\n{self._tail()}")
                if time.monotonic() - start > seconds:
                    self.stop()
                    raise ServerError(f"the vLLM server was not ready after {seconds:.0f} s, see {self.log}")
                time.sleep(0.5)
        self.process.send_signal(signal.SIGUSR1)
        logger.info("vLLM is ready at %s after %.0f s", self.address.url, time.monotonic() - start)

    def _healthy(self) -> bool:
        try:
            return requests.get(self.address.url + "/health", timeout=5).status_code == 200
        except requests.RequestException:
            return False

    def _tail(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        causes = [line for line in lines if "Error" in line]
        return harmless("\n".join(causes[-3:] or lines[-3:])[-_LOG_TAIL:])

    def stop(self) -> None:
        """End it and all that it has started; does nothing the second time."""
        atexit.unregister(self.stop)
        if self.alive:
            self.process.terminate()
        try:
            self.process.wait(keeper.TERM_SECONDS * 2.5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


_running: dict[EngineOrder, OwnServer] = {}


def server_for(order: EngineOrder, log: Path) -> OwnServer:
    """The one of this process that was started alike, if it still lives, else a new one; ready. A second trainer in
    one process (a notebook, a sweep in one shell) so need not wait again.

    Raises:
        ValueError, ServerError: it does not start.
    """
    kind = replace(order, port=0)
    server = _running.get(kind)
    if server is None or not server.alive:
        server = _running[kind] = OwnServer(order, log)
        server.wait()
    return server


def check_python(python: str) -> None:
    """Whether an environment has vLLM.

    Raises:
        ValueError: there is no such interpreter, or no vLLM in it.
    """
    remedy = (
        "make an environment for it (python -m venv vllm-env; vllm-env/bin/pip install vllm) and name its "
        "interpreter, vllm_python=vllm-env/bin/python"
    )
    try:
        answer = subprocess.run([python, "-c", _HAS_VLLM], capture_output=True, text=True, timeout=120)
    except OSError as error:
        raise ValueError(f"vllm_python={python!r} cannot be run ({error.strerror}): {remedy}") from error
    if answer.returncode != 0:
        raise ValueError(
            f"vllm_python={python!r} is no Python interpreter that works: {harmless(answer.stderr[-300:])}"
        )
    if answer.stdout.strip() != "True":
        raise ValueError(f"vllm_python={python!r} has no vLLM: {remedy}")


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
