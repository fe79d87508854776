"""vLLM servers in the place of models: checked first, then made into a rollout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gkd.config import GKDConfig
from gkd.rollout_check import RolloutCheck
from gkd.rollouts import ROLLOUTS, SamplingSettings, VLLMRollout
from gkd.rollouts.upload import agree
from gkd.signals import TeacherSignal
from gkd.teachers import ServerTeacher
from gkd.vllm_answers import ServedModel
from gkd.vllm_checks import check_length, check_tokenizer, served_model
from gkd.vllm_client import ServerError, VLLMClient


@dataclass(frozen=True)
class Server:
    """A connection that has been checked, and the base model at its other end."""

    client: VLLMClient
    served: ServedModel

    @property
    def fingerprint(self) -> str:
        """What identifies the model as far as a server tells; the weights it does not show."""
        return f"vllm:{self.served.root}"


def connect(
    args: GKDConfig, tokenizer: PreTrainedTokenizerBase, whose: tuple[str, ...] = ("student", "teacher")
) -> dict[str, Server | None]:
    """The servers of "student" and "teacher"; None where the model is in this process, or is not asked for.

    Raises:
        ValueError: a server is out of reach, has another tokenizer, or takes sequences that are too short.
    """
    longest = None if args.prompt_limit is None else args.prompt_limit + args.max_new_tokens
    lengths = [length for length in (longest, args.max_length) if length is not None]
    needed = {"student": longest, "teacher": max(lengths) + 1 if lengths else None}
    fields = {"teacher": "teacher_server_url"}
    if args.rollout_backend == "vllm":
        fields["student"] = "rollout_server_url"
    found: dict[str, Server | None] = {"student": None, "teacher": None}
    for who, name in fields.items():
        urls = getattr(args, name)
        if urls is not None and who in whose:
            client = VLLMClient(urls, field=name, timeout=args.rollout_server_timeout, proxy=args.server_proxy)
            server = Server(client, served_model(client))
            check_tokenizer(client, server.served, tokenizer)
            check_length(client, server.served, needed[who])
            found[who] = server
    return found


def rollout_check(args: GKDConfig, rollout: Any, accelerator: Accelerator) -> RolloutCheck | None:
    """What compares the student's rollouts with the student; None where they are not from a server, or not to be."""
    if not isinstance(rollout, VLLMRollout) or args.rollout_logprob_tolerance == 0:
        return None
    return RolloutCheck(rollout.settings, args.rollout_logprob_tolerance, accelerator, rollout.client.field)


def score_together(teacher: Any, batch: dict[str, Tensor], accelerator: Accelerator) -> TeacherSignal:
    """`Teacher.score`; what goes wrong with a server on one rank is raised on all of them, so that no rank is waited
    for and a checkpoint can be saved."""
    if not isinstance(teacher, ServerTeacher):
        signal: TeacherSignal = teacher.score(batch)
        return signal
    found: TeacherSignal | None = None
    failure: Exception | None = None
    try:
        found = teacher.score(batch)
    except (ServerError, ValueError) as error:
        failure = error
    agree(accelerator, None, failure)
    assert found is not None
    return found


def make_server_rollout(
    args: GKDConfig,
    source: str,
    server: Server,
    settings: SamplingSettings,
    get_model: Callable[[], nn.Module],
    accelerator: Accelerator,
    vocabulary: int | None,
) -> VLLMRollout:
    """A rollout on a server; the student's adapter is loaded there at once: a refusal comes before the training.

    Raises:
        ValueError: the student has no plain LoRA adapter, or the server refuses it.
    """
    rollout: VLLMRollout = ROLLOUTS["vllm"](
        server.client,
        server.served,
        settings,
        seed=args.seed,
        source=source,
        get_model=get_model if source == "student" else None,
        adapter_dir=args.rollout_adapter_folder,
        accelerator=accelerator,
        vocabulary=vocabulary,
        log_probs=source == "student" and args.rollout_logprob_tolerance > 0,
    )
    if rollout.upload is not None:
        rollout.upload.current(step=0)
    return rollout
