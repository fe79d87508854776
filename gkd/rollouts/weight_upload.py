"""All weights of a student without an adapter on a vLLM server: written to a folder, read from there into the engine.

The name `gkd-<run>-<step>-<digest of the weights>` is the version stamp. The engine is told it after it has read the
folder, and forgets it when it starts anew; so a server that answers with the stamp before and after a rollout has
sampled from these weights. It needs vLLM's addresses for development (VLLM_SERVER_DEV_MODE=1), which a server that the
run starts itself has, and which no other machine should reach.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from gkd.models.zero import gathered
from gkd.rollouts.adapter_upload import from_main
from gkd.servers.client import RefusedError, ServerError, VLLMClient

_INFO_SECONDS = 60.0
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class WeightUpload:
    """Keeps the servers' weights equal to the student's.

    Args:
        client: the servers.
        served: the name that requests ask for, which stays the same.
        get_model: gives the student as the trainer holds it at the time of the call.
        accelerator: to agree with the other ranks; its mixed precision is what the weights are written in.
        folder: where they are written; trainer and servers must both see it at this path.

    Raises:
        ValueError: a server that takes no new weights.
    """

    def __init__(
        self,
        client: VLLMClient,
        served: str,
        get_model: Callable[[], nn.Module],
        accelerator: Accelerator | None,
        folder: str,
    ) -> None:
        self.client, self.served, self.get_model, self.accelerator = client, served, get_model, accelerator
        self.folder = os.path.join(os.path.abspath(folder), "weights")
        self.run = uuid.uuid4().hex[:8]
        self.name: str | None = None
        for url in client.urls:
            self._version(url)

    def asked_as(self, name: str) -> str:
        """What requests call the model that has the stamp `name`."""
        return self.served

    def current(self, step: int) -> str:
        """The stamp of the student's present weights, which the servers hold when this returns. All ranks call it.

        Raises:
            ValueError: a server refuses the weights. ServerError: it does not answer. OSError: they cannot be written.
        """
        state = self._state()
        self.name = from_main(self.accelerator, lambda: self._publish(state, step))
        return self.name

    def lost(self, name: str) -> bool:
        """Whether a server holds other weights than those with the stamp, that is, was started anew. All ranks call
        this, and get the same answer.

        Raises:
            ServerError: a server does not answer.
        """
        found = from_main(self.accelerator, lambda: str([self._version(url) for url in self.client.urls]))
        return found != str([name for _ in self.client.urls])

    def _state(self) -> dict[str, Tensor]:
        """The weights in CPU memory, on the main process; one parameter at a time is whole on the other ranks, which
        get none."""
        model: Any = extract_model_from_parallel(self.get_model(), keep_torch_compile=False)
        main = self.accelerator is None or self.accelerator.is_main_process
        dtype = _DTYPES.get("no" if self.accelerator is None else str(self.accelerator.mixed_precision))
        state: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            with gathered([parameter]):
                if main:
                    whole = parameter.detach()
                    state[name] = whole.to("cpu", dtype if whole.is_floating_point() else None, copy=True)
        if main:
            buffers = {name for name, _ in model.named_buffers()}
            state |= {name: value.detach().cpu() for name, value in model.state_dict().items() if name in buffers}
        return state

    def _publish(self, state: dict[str, Tensor], step: int) -> str:
        digest = _digest(state)
        name = f"gkd-{self.run}-{step}-{digest}"
        if self.name is not None and self.name.endswith(f"-{digest}"):  # the same weights, asked for again
            for url in self.client.urls:
                if self._version(url) == self.name:
                    self._stamp(url, name)
                else:  # started anew since then
                    self._load(url, name)
            return name
        shutil.rmtree(self.folder, ignore_errors=True)
        model: Any = extract_model_from_parallel(self.get_model(), keep_torch_compile=False)
        model.save_pretrained(self.folder, state_dict=state)
        for url in self.client.urls:
            self._load(url, name)
        return name

    def _load(self, url: str, name: str) -> None:
        payload = {"method": "reload_weights", "kwargs": {"weights_path": self.folder}}
        try:
            self.client.post("/collective_rpc", payload, url=url)
            # What was computed with the old weights must not be continued with the new ones.
            answer = self.client.post("/reset_prefix_cache", {}, url=url)
            if isinstance(answer, dict) and answer.get("success") is False:
                raise ServerError(f"{url} keeps what it has computed with old weights: requests are still running")
        except RefusedError as error:
            raise ValueError(
                f"{error}. The server cannot take the weights in {self.folder}: set rollout_adapter_dir to a folder "
                "that trainer and server both see, and serve the model that the student was loaded from"
            ) from error
        self._stamp(url, name)

    def _stamp(self, url: str, name: str) -> None:
        self.client.post("/update_weight_version", {"new_version": name}, url=url)

    def _version(self, url: str) -> str:
        try:
            answer = self.client.get("/weight_info", url, min(self.client.timeout, _INFO_SECONDS))
        except RefusedError as error:
            raise ValueError(
                f"{self.client.field}={url!r} takes no new weights (GET /weight_info answers {error.status}), and "
                "this student has no LoRA adapter that could be sent instead: start it with VLLM_SERVER_DEV_MODE=1 "
                "(vLLM 0.30 or newer), let the run start it (rollout_server='auto'), train with LoRA (use_peft), or "
                "roll out in process (rollout_backend='hf')"
            ) from error
        found = answer.get("weight_version") if isinstance(answer, dict) else None
        if not isinstance(found, str):
            raise ServerError(f"{url}/weight_info names no weight_version ({self.client.field})")
        return found


def _digest(state: dict[str, Tensor]) -> str:
    found = hashlib.blake2b(digest_size=4)
    for name, tensor in state.items():
        found.update(name.encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
