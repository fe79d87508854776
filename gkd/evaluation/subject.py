"""A model under measurement: batches of (context, text), hidden states of their targets, -log p of tokens; in this
process or on a server.

What a server tells exactly: its completions, the log-probability of a given token (so its perplexity), and its K most
likely tokens with the mass of the rest. So a divergence is that of K + 1 outcomes, a lower bound of the one over the
whole vocabulary (`gkd.teachers.server`), and the table's footnote says so.

B rows, T tokens, N targets, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd.data.sequences import collate, join
from gkd.data.targets import select_targets, targets_of
from gkd.loss.signals import Head, TeacherSignal
from gkd.models.head import output_layer
from gkd.models.hidden import last_hidden
from gkd.rollouts.base import SamplingSettings
from gkd.rollouts.vllm import VLLMRollout
from gkd.teachers.server import ServerTeacher

CHUNK_LOGITS = 2**25  # numbers in one chunk of logits for the perplexity: 128 MiB in fp32


def token_nll(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """-log p(target) [N] in nats, fp32, of hidden states [N, D]; only one chunk of logits exists at a time."""
    rows = max(1, CHUNK_LOGITS // head.weight.shape[0])
    chunks = zip(hidden.to(head.weight.dtype).split(rows), targets.split(rows), strict=True)
    with torch.autocast(hidden.device.type, enabled=False):
        parts = [nn.functional.cross_entropy(head.logits(h).float(), t, reduction="none") for h, t in chunks]
    return torch.cat(parts)


def hidden_of_targets(model: PreTrainedModel, batch: dict[str, Tensor], device: torch.device | None = None) -> Tensor:
    """Hidden states [N, D] that predict the batch's targets, on `device`."""
    inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
    hidden, _ = last_hidden(model, output_layer(model), inputs)
    return select_targets(hidden, targets_of(batch)).to(device or hidden.device)


def collated(sequences: Sequence[tuple[list[int], list[int]]], device: torch.device) -> dict[str, Tensor]:
    """(context, completion) pairs as one right-padded batch; the id of the padding does not matter."""
    rows = [join(context, text, "data", row, False, True) for row, (context, text) in enumerate(sequences)]
    return {key: value.to(device) for key, value in collate(rows, pad_id=0).items()}


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Row numbers in batches of `size`, longest first, so that rows of like length share their padding."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    yield from (order[start : start + size] for start in range(0, len(order), size))


class ServedTeacher:
    """Stands where the harness has a model.

    Args:
        teacher: the training's own.
        seed: of the sampling.
        vocabulary: ids from here on are an error, since the student could not read them.
    """

    def __init__(self, teacher: ServerTeacher, *, seed: int, vocabulary: int) -> None:
        self.teacher, self.seed, self.vocabulary = teacher, seed, vocabulary

    @property
    def top_k(self) -> int:
        return self.teacher.top_k

    def generate(self, prompts: list[list[int]], sampling: SamplingSettings) -> list[list[int]]:
        """One completion of each prompt; the random numbers belong to no training step."""
        rollout = VLLMRollout(
            self.teacher.client,
            self.teacher.served,
            sampling,
            seed=self.seed,
            source="evaluation",
            vocabulary=self.vocabulary,
        )
        return rollout.generate(prompts, step=0)

    def score(self, batch: dict[str, Tensor]) -> TeacherSignal:
        """As `gkd.teachers.base.Teacher.score`."""
        return self.teacher.score(batch)

    def nll(self, sequences: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
        """-log p in nats of the tokens of each (context, text)'s text."""
        starts = [(context + text, len(context)) for context, text in sequences]
        return [[-value for value in values] for values in self.teacher.log_probs(starts)]
