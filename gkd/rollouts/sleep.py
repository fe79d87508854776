"""A vLLM server on the GPUs of the training: its engine sleeps while the step trains, and wakes for a rollout.

Asleep (level 1), the weights wait in the host's memory and the KV cache is gone; what remains on the GPU is the
engine's own context. Only the main process talks to the servers; all ranks make room first.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator

from gkd.rollouts.adapter_upload import agree, from_main
from gkd.servers.client import RefusedError, VLLMClient


class SharedDevice:
    """The memory that trainer and servers take in turns.

    Args:
        client: the servers. accelerator: to wait for the other ranks; None is one process.
    """

    def __init__(self, client: VLLMClient, accelerator: Accelerator | None) -> None:
        self.client, self.accelerator = client, accelerator
        self.awake = True  # a server starts so

    def wake(self) -> None:
        """The servers get the memory; does nothing while they have it. All ranks call this.

        Raises:
            ValueError: a server cannot sleep. ServerError: it does not answer. All ranks raise it.
        """
        if self.awake:
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what PyTorch keeps for later is not free for another process
        self._tell("/wake_up")
        self.awake = True

    def rest(self) -> None:
        """The training gets the memory. All ranks call this, when no request is left.

        Raises:
            ValueError, ServerError: as for `wake`.
        """
        if self.awake:
            self._tell("/sleep?level=1")
            self.awake = False

    def _tell(self, path: str) -> None:
        agree(self.accelerator, "", None)  # until all ranks are here
        from_main(self.accelerator, lambda: self._ask(path))

    def _ask(self, path: str) -> str:
        try:
            for url in self.client.urls:
                self.client.post(path, {}, url=url)
        except RefusedError as error:
            raise ValueError(
                f"{error}. rollout_server_sharing='sleep' needs a server that was started with "
                "VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode, on a GPU; rollout_server='auto' starts one"
            ) from error
        return path
