"""vLLM servers in the place of models: checked first, then made into a rollout."""

from __future__ import annotations

from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gkd.assembly.own_servers import gone_of
from gkd.config.fields import GKDConfig
from gkd.config.servers import longest_sequences
from gkd.loss.parts import SplitSignal
from gkd.loss.signals import TeacherSignal
from gkd.rollouts.adapter_upload import agree
from gkd.rollouts.against_the_student import RolloutCheck
from gkd.rollouts.base import Rollout
from gkd.servers.chat import ChatServer
from gkd.servers.checks import Server, check_length, check_tokenizer, served_model
from gkd.servers.client import ServerError, VLLMClient
from gkd.servers.own import known
from gkd.teachers.base import Teacher


def connect(
    args: GKDConfig,
    tokenizer: PreTrainedTokenizerBase,
    whose: tuple[str, ...] = ("student", "teacher"),
    teacher: str | None = None,
    own: str | None = None,
) -> dict[str, Server | None]:
    """The servers of "student" and "teacher"; None where the model is in this process, or is not asked for. `teacher`
    is its name, of several; `own` are the addresses of servers that this run has started for the student.

    Raises:
        ValueError: a server is out of reach, has another tokenizer, or takes sequences that are too short.
    """
    needed = longest_sequences(args)
    if args.teacher_tokenizer_alignment is not None:
        needed["teacher"] = None  # these count the student's tokens; what is too long in the teacher's is not compared
    fields = {"teacher": "teacher_server_url"}
    if args.rollout_backend == "vllm":
        fields["student"] = "rollout_server_url" if own is None else "rollout_server"
    found: dict[str, Server | None] = {"student": None, "teacher": None}
    for who, name in fields.items():
        urls = own if who == "student" and own is not None else getattr(args, name)
        if urls is not None and who in whose:
            shown = name if who == "student" or teacher is None else f"teachers[{teacher!r}].server"
            client = client_of(args, urls, shown)
            server = Server(client, served_model(client))
            check_tokenizer(client, server.served, tokenizer)
            check_length(client, server.served, needed[who])
            found[who] = server
    return found


def client_of(args: GKDConfig, urls: str, field: str) -> VLLMClient:
    """Talks to vLLM servers; to those of this run with their key, past any proxy, and no longer than they live.

    Raises:
        ValueError: no address.
    """
    found = [url.strip() for url in urls.split(",")]
    mine = [address for url in found if (address := known(url)) is not None]
    if len(mine) < len(found):
        return VLLMClient(urls, field=field, timeout=args.rollout_server_timeout, proxy=args.server_proxy)
    with_keys = ",".join(one.with_key for one in mine)
    return VLLMClient(with_keys, field=field, timeout=args.rollout_server_timeout, gone=gone_of(mine))


def connect_chat(args: GKDConfig) -> ChatServer | None:
    """The teacher's chat address; None where it is none. Nothing is asked of it yet: each answer may cost."""
    if args.teacher_chat_url is None:
        return None
    assert args.teacher_chat_model is not None
    return ChatServer(
        args.teacher_chat_url, args.teacher_chat_model, timeout=args.rollout_server_timeout, proxy=args.server_proxy
    )


def rollout_check(args: GKDConfig, rollout: Rollout, accelerator: Accelerator) -> RolloutCheck | None:
    """What compares the student's rollouts with the student; None where they are not from a server, or not to be."""
    if rollout.server_field is None or args.rollout_logprob_tolerance == 0:
        return None
    return RolloutCheck(rollout.settings, args.rollout_logprob_tolerance, accelerator, rollout.server_field)


def score_together(
    teacher: Teacher, batch: dict[str, Tensor], accelerator: Accelerator
) -> TeacherSignal | SplitSignal:
    """`Teacher.score`; what goes wrong with a server on one rank is raised on all of them, so that no rank is waited
    for and a checkpoint can be saved."""
    if not teacher.remote:
        return teacher.score(batch)
    found: TeacherSignal | SplitSignal | None = None
    failure: Exception | None = None
    try:
        found = teacher.score(batch)
    except (ServerError, ValueError) as error:
        failure = error
    agree(accelerator, None, failure)
    assert found is not None
    return found
