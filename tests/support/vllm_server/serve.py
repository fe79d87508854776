"""A real vLLM server on CPU, from the environment that `make test-vllm` builds: tiny model, one core, about 2 GB.

It lends itself to both roles: student (adapters) and teacher (scores of the base model). Not at the same moment,
though: on CPU, vLLM 0.32 computes base requests wrongly when they are batched with adapter requests.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from gkd.servers.own import free_port

ENVIRONMENT = Path(__file__).resolve().parents[3] / ".venv-vllm"
PYTHON = ENVIRONMENT / "bin" / "python"
INSTALLED = ENVIRONMENT / ".installed"
START_SECONDS = 600.0

OPTIONS = {
    "--host": "127.0.0.1",
    "--dtype": "float32",
    "--max-model-len": "256",
    "--max-num-seqs": "32",
    "--kv-cache-memory-bytes": str(64 * 2**20),
    "--generation-config": "vllm",
    "--served-model-name": "base",
    "--max-logprobs": "32",
    "--max-lora-rank": "8",
    "--max-loras": "2",
    "--max-cpu-loras": "4",
}
SWITCHES = ["--enforce-eager", "--enable-lora", "--enable-scale-out"]
# Without this, scoring several sequences at a time on a server with adapters ends the engine (vLLM 0.32, CPU only).
TARGETS = ["--lora-target-modules", "qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
VARIABLES = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "TORCHDYNAMO_DISABLE": "1",  # else the first request compiles
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class Server:
    """One server process; `url` answers once `wait` returns."""

    def __init__(self, model: str, log: Path, port: int | None = None) -> None:
        self.log, self.port = log, port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        # `vllm serve` itself asks for a package called vllm, which the CPU wheel is not.
        command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(self.port)]
        command += [part for option in OPTIONS.items() for part in option] + SWITCHES + TARGETS
        with log.open("w") as file:
            self.process = subprocess.Popen(command, env=os.environ | VARIABLES, stdout=file, stderr=file)

    def wait(self) -> None:
        """Until it is healthy; RuntimeError with the end of its log when it dies or takes too long."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        self.stop()
        raise RuntimeError(f"the vLLM server did not start:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        """SIGTERM, which its child processes follow; SIGKILL when it does not."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
