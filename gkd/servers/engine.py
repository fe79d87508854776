"""What a vLLM server is started with: the flags and variables that a run needs of it, as one order."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from itertools import pairwise

# Sizes of adapters that vLLM reserves memory for (its own list; another number is refused by it).
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
ADAPTERS = 2  # on the server at a time: one that still answers, and the next
# Set by launchers for the trainer's own processes; a server that reads them would join, or wait for, their group.
LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
    *("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE"),
)
_TENSOR_PARALLEL = ("--tensor-parallel-size", "-tp")


@dataclass(frozen=True)
class EngineOrder:
    """One server.

    Attributes:
        model: what it serves, a folder or a name on the Hub. revision: its commit; None is the newest.
        python: of the environment that has vLLM. host, port: where it listens.
        dtype: that it computes in.
        max_model_len: tokens of the longest sequence; None is what the model can.
        lora_rank: of the adapters to come; None takes none. whole_weights: all weights are to be replaced.
        top_log_probs: most log-probabilities for a position; None is vLLM's own limit.
        sleeps: gives its memory back when asked.
        memory: share of a GPU's memory that it takes, 0 to 1; None is vLLM's own.
        devices: CUDA devices as CUDA_VISIBLE_DEVICES names them; empty computes on the CPU.
        extra: further flags, as on a command line.
        trust_remote_code: as the model is loaded with.
    """

    model: str
    python: str
    port: int
    host: str = "127.0.0.1"
    revision: str | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    lora_rank: int | None = None
    whole_weights: bool = False
    top_log_probs: int | None = None
    sleeps: bool = False
    memory: float | None = None
    devices: tuple[str, ...] = field(default=())
    extra: str = ""
    trust_remote_code: bool = False

    def flags(self) -> list[str]:
        """After the model's name.

        Raises:
            ValueError: a rank above what vLLM takes; tensor parallelism that the devices do not divide into.
        """
        given = ["--host", self.host, "--port", str(self.port), "--dtype", self.dtype]
        # Without it a model's own generation_config.json fills in sampling options that a request leaves out.
        given += ["--generation-config", "vllm"]
        if self.revision is not None:
            given += ["--revision", self.revision]
        if self.max_model_len is not None:
            given += ["--max-model-len", str(self.max_model_len)]
        if self.lora_rank is not None:
            given += ["--enable-lora", "--max-lora-rank", str(rank_of_server(self.lora_rank))]
            given += ["--max-loras", str(ADAPTERS), "--max-cpu-loras", str(2 * ADAPTERS)]
        if self.top_log_probs is not None:
            given += ["--max-logprobs", str(self.top_log_probs), "--enable-scale-out"]
        if self.sleeps:
            given += ["--enable-sleep-mode"]
        if self.memory is not None:
            given += ["--gpu-memory-utilization", f"{self.memory:g}"]
        if self.trust_remote_code:
            given += ["--trust-remote-code"]
        if self.devices:
            replicas = self._replicas()
            given += ["--data-parallel-size", str(replicas)] if replicas > 1 else []
        else:
            given += ["--enforce-eager"]  # compiling for a CPU takes minutes
        return given + shlex.split(self.extra)

    def _replicas(self) -> int:
        """Copies of the model, side by side on the devices."""
        words = shlex.split(self.extra.replace("=", " "))
        given = [int(value) for name, value in pairwise(words) if name in _TENSOR_PARALLEL]
        split = given[-1] if given else 1
        if "--data-parallel-size" in words:
            return 1  # the user counts
        if len(self.devices) % split:
            raise ValueError(
                f"vllm_args: {_TENSOR_PARALLEL[0]} {split} does not divide the {len(self.devices)} GPUs "
                f"{','.join(self.devices)} of the server: use a divisor"
            )
        return len(self.devices) // split

    def command(self) -> list[str]:
        """The process. The module is what `vllm serve` runs; that command itself looks for a distribution called
        vllm, which builds for CPUs are not."""
        return [self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model, *self.flags()]

    def variables(self) -> dict[str, str]:
        """Environment variables that are set for it, without the key."""
        found: dict[str, str] = {}
        if self.lora_rank is not None:
            found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if self.sleeps or self.whole_weights:
            found["VLLM_SERVER_DEV_MODE"] = "1"  # opens the addresses for sleep, wake-up and weights
        if self.devices:
            found["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices)
        else:
            found |= {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}  # GiB; else requests compile
        return found

    def shown(self) -> str:
        """What starts it by hand, as one line for a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.variables().items()]
        return " ".join([*variables, "vllm serve", shlex.quote(self.model), *map(shlex.quote, self.flags())])


def rank_of_server(rank: int) -> int:
    """The size that a server must be started with for adapters of this rank.

    Raises:
        ValueError: it is above the largest.
    """
    for size in LORA_RANKS:
        if rank <= size:
            return size
    raise ValueError(f"lora_r={rank} is above {LORA_RANKS[-1]}, the largest that a vLLM server takes: use less")


def devices_of_servers(
    visible: list[str], ranks: int, *, rollouts: bool, shared: bool, teacher: bool
) -> dict[str, tuple[str, ...]]:
    """The GPUs of a node's servers of "rollout" and "teacher"; empty for one that there is none of.

    Args:
        visible: the node's, in the order of the ranks that train. ranks: how many train, one GPU each.
        rollouts, teacher: whether such a server is started. With both the teacher's gets half of the GPUs that are
            left, rounded down.
        shared: the server for rollouts sleeps while the ranks train, on the same GPUs.

    Raises:
        ValueError: none is left for one of them.
    """
    left = visible[ranks:]
    needed = [name for name, wanted in (("rollout", rollouts and not shared), ("teacher", teacher)) if wanted]
    if visible and len(left) < len(needed):
        fields = " and ".join(f"{name}_server='auto'" for name in needed)
        raise ValueError(
            f"{fields}: {ranks} of the {len(visible)} GPUs of this node train, {len(left)} are left for {len(needed)} "
            "server(s). Launch fewer processes (--num_processes), or let the server for rollouts share the GPUs that "
            "train (rollout_server_sharing='sleep')"
        )
    of_teacher = len(left) if needed == ["teacher"] else len(left) // 2
    found: dict[str, tuple[str, ...]] = {"rollout": (), "teacher": ()}
    if teacher:
        found["teacher"] = tuple(left[len(left) - of_teacher :])
    if rollouts:
        found["rollout"] = tuple(visible[:ranks] if shared else left[: len(left) - len(found["teacher"])])
    return found
