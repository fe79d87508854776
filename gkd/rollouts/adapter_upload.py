"""The student's adapter on a vLLM server: written, loaded under a name of its own each time, and taken away again.

The name `gkd-<run>-<step>-<digest of the adapter's file>` is the version stamp: a rollout asks for it, the answer
repeats it, and it cannot mean other weights. A new name and a new folder each time is also what vLLM needs: its prefix
cache is keyed by both, and an adapter that is replaced under its name changes under requests that are still running.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import uuid
from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel, gather_object
from peft import LoraConfig, PeftModel
from torch import nn

from gkd.models.zero import gathered
from gkd.servers.client import RefusedError, ServerError, VLLMClient

_KEPT = 2  # adapters on the server and folders on disk: a request that is still running keeps what it started with

_KINDS: dict[str, type[Exception]] = {"ValueError": ValueError, "ServerError": ServerError, "OSError": OSError}

# Initialisations that leave the base weights alone; the others (PiSSA, OLoRA, LoftQ, ...) change them, which a server
# that has loaded the original base model does not know.
_PLAIN_INITIALISATIONS = ("gaussian", "eva", "orthogonal")


class AdapterUpload:
    """Keeps the servers' adapter equal to the student's.

    Args:
        client: the servers.
        get_model: gives the student as the trainer holds it (bare, DDP, DeepSpeed engine) at the time of the call.
        accelerator: to gather a sharded adapter and to agree with the other ranks; None is one process.
        folder: where the adapters are written, in one folder each; trainer and servers must both see it at this path.

    Raises:
        ValueError: the student's adapter is one that a vLLM server cannot apply.
    """

    def __init__(
        self, client: VLLMClient, get_model: Callable[[], nn.Module], accelerator: Accelerator | None, folder: str
    ) -> None:
        self.client, self.get_model, self.accelerator = client, get_model, accelerator
        self.folder = os.path.abspath(folder)
        self.run = uuid.uuid4().hex[:8]
        self.name: str | None = None  # what is current, on every rank
        self._history: list[str] = []  # main process: names on the servers, oldest first
        self._lock = threading.Lock()
        _lora_config(_peft_model(get_model()))

    def current(self, step: int) -> str:
        """The name of the adapter that holds the student's present weights; loads it when they have moved.

        All ranks call this; the main process writes and uploads, the others wait for the name.

        Raises:
            ValueError: a server refuses the adapter; the message holds its reason and the likely remedies.
            ServerError: a server does not answer. OSError: the folder cannot be written.
        """
        model = _peft_model(self.get_model())
        with gathered(p for key, p in model.named_parameters() if "lora_" in key):
            self.name = from_main(self.accelerator, lambda: self._publish(model, step))
        return self.name

    def asked_as(self, name: str) -> str:
        """What requests call the model that has the stamp `name`."""
        return name

    def lost(self, name: str) -> bool:
        """Never: a server without the adapter refuses the request, and is given it then."""
        return False

    def restore(self, url: str, name: str) -> None:
        """Load an adapter again on a server that has lost it, as one does that was started anew."""
        with self._lock:  # many requests notice at once
            self._load(url, name)

    def _publish(self, model: PeftModel, step: int) -> str:
        draft = os.path.join(self.folder, f"gkd-{self.run}-draft")
        written = _save(model, draft)
        name = f"gkd-{self.run}-{step}-{_digest(os.path.join(written, 'adapter_model.safetensors'))}"
        if name not in self._history:
            os.replace(written, self._path(name))
            self._retire(_KEPT - 1)  # before the new one is loaded, so that it finds a free slot
            self._history.append(name)
            for url in self.client.urls:
                self._load(url, name)
        shutil.rmtree(draft, ignore_errors=True)
        return name

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _load(self, url: str, name: str) -> None:
        payload = {"lora_name": name, "lora_path": self._path(name)}
        try:
            self.client.post("/v1/load_lora_adapter", payload, url=url)
        except RefusedError as error:
            if "already" in error.reason and name in error.reason:
                return  # the answer to an earlier attempt was lost
            if error.status == 500 and "lora" not in error.reason.lower():
                raise  # the engine's own trouble
            raise ValueError(f"{error}. {self._remedy(error)}") from error

    def _remedy(self, error: RefusedError) -> str:
        rank = _lora_config(_peft_model(self.get_model())).r
        if error.status == 404 and error.reason.strip('"') == "Not Found":
            return "Start the server with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment, and --enable-lora"
        if error.status == 404:
            return f"The server cannot read {self.folder}: set rollout_adapter_dir to a folder that both can see"
        return (
            f"Start the server with --enable-lora --max-lora-rank {rank} (or the next size that it knows), and with "
            "the student's own base model"
        )

    def _retire(self, kept: int) -> None:
        """Take all but the `kept` newest adapters from the servers and from disk."""
        while len(self._history) > kept:
            name = self._history.pop(0)
            for url in self.client.urls:
                try:
                    self.client.post("/v1/unload_lora_adapter", {"lora_name": name}, url=url)
                except RefusedError as error:
                    if error.status != 404:  # a server that was started anew has forgotten it
                        raise
            shutil.rmtree(self._path(name), ignore_errors=True)


def version_of(name: str) -> int:
    """The optimizer step that an adapter's name is stamped with."""
    return int(name.split("-")[-2])


def from_main(accelerator: Accelerator | None, do: Callable[[], str]) -> str:
    """What the main process gets by `do`, on every rank. What fails there must not leave the others waiting: it is
    raised on every rank.

    Raises:
        ValueError, OSError, ServerError: as it was on the main process.
    """
    found, failure = None, None
    if accelerator is None or accelerator.is_main_process:
        try:
            found = do()
        except (ServerError, ValueError, OSError) as error:
            failure = error
    return agree(accelerator, found, failure)


def agree(accelerator: Accelerator | None, value: str | None, failure: Exception | None) -> str:
    """The main process's value, on every rank; or the first failure of any rank, raised on every rank.

    Raises:
        ValueError, OSError, ServerError: as it was on the rank that failed.
    """
    if accelerator is None or accelerator.num_processes == 1:
        reports = [(value, failure and (_kind(failure), str(failure)))]
    else:
        reports = gather_object([(value, failure and (_kind(failure), str(failure)))])
    failed = next((report for _, report in reports if report), None)
    if failed is not None:
        error = _KINDS[failed[0]](failed[1])
        if isinstance(error, ServerError):
            error.on_all_ranks = True
        raise error from failure
    return str(reports[0][0])


def _kind(error: Exception) -> str:
    return next(name for name, kind in _KINDS.items() if isinstance(error, kind))


def has_adapter(model: nn.Module) -> bool:
    """Whether the student, as the trainer holds it, trains an adapter."""
    return isinstance(extract_model_from_parallel(model, keep_torch_compile=False), PeftModel)


def _peft_model(model: nn.Module) -> PeftModel:
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    assert isinstance(bare, PeftModel)
    return bare


def _lora_config(model: PeftModel) -> LoraConfig:
    """The one active adapter's configuration, if a vLLM server applies it as PEFT does."""
    names = list(model.active_adapters)
    config = model.peft_config[names[0]]
    bad = None
    if len(names) != 1:
        bad = f"{len(names)} active adapters"
    elif not isinstance(config, LoraConfig):
        bad = f"an adapter of type {config.peft_type}"
    elif isinstance(config.init_lora_weights, str) and config.init_lora_weights not in _PLAIN_INITIALISATIONS:
        bad = f"init_lora_weights={config.init_lora_weights!r}, which changes the base weights"
    else:
        plain = {"use_dora": False, "lora_bias": False, "bias": "none"}
        fields = (*plain, "modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices")
        fields += ("layer_replication", "target_parameters", "alora_invocation_tokens", "use_qalora")
        unlike = {f: getattr(config, f, None) for f in fields if getattr(config, f, None) not in (None, {}, [], False)}
        unlike = {f: value for f, value in unlike.items() if value != plain.get(f)}
        bad = f"LoRA with {unlike}" if unlike else None
    if bad:
        raise ValueError(
            f"rollout_backend='vllm' cannot serve a student with {bad}: use plain LoRA (one rank and alpha, no bias, "
            "no modules_to_save), or roll out in process (rollout_backend='hf')"
        )
    return config


def _save(model: PeftModel, folder: str) -> str:
    """Write the adapter alone; returns the folder that holds its two files."""
    shutil.rmtree(folder, ignore_errors=True)
    name = model.active_adapters[0]
    # False: the vocabulary is not the adapter's, and "auto" would look at the base model's repository to find out.
    model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
    return folder if name == "default" else os.path.join(folder, name)


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.blake2b(file.read(), digest_size=4).hexdigest()
