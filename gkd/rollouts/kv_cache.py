"""A KV cache for rollouts: room to grow, rows that leave, and rows that go on from one prompt.

transformers' `DynamicLayer` copies all keys and values for every new token, and once more when rows are selected. Here
a token is written into a buffer with room to spare, and a row that leaves costs the copy of one other row.

B rows, H heads, T tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, `[B, H, T, D]`, as the front part of larger buffers."""

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the new tokens' states and return all states so far (views into the buffers)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.buffers is None or end > self.buffers[0].shape[-2]:
            # Half as much again: a token is copied about twice in all, and at most a third of the memory is idle.
            room = max(end + 32, end * 3 // 2) if start else end + 32
            self.buffers = (_grown(self.keys, key_states, room), _grown(self.values, value_states, room))
        keys, values = self.buffers
        keys[..., start:end, :] = key_states
        values[..., start:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def keep_rows(self, places: list[int]) -> None:
        """Keep the rows at `places`, which is what `places_to_keep` gives; the others' memory stays in the buffer."""
        if self.buffers is None:
            return
        length = self.get_seq_length()
        moved = [(to, place) for to, place in enumerate(places) if place != to]
        self.buffers = (_moved(self.buffers[0], moved, length), _moved(self.buffers[1], moved, length))
        self.buffers = (self.buffers[0][: len(places)], self.buffers[1][: len(places)])
        self.keys, self.values = (buffer[..., :length, :] for buffer in self.buffers)

    def take_rows(self, index: Tensor) -> None:
        """Take the rows at `index`, in its order; one may be taken several times."""
        if self.buffers is None:
            return
        length = self.get_seq_length()
        keys, values = (buffer.index_select(0, index.to(buffer.device)) for buffer in self.buffers)
        self.buffers = keys, values
        self.keys, self.values = keys[..., :length, :], values[..., :length, :]


def _grown(old: Tensor, new: Tensor, room: int) -> Tensor:
    buffer = new.new_empty((*new.shape[:-2], room, new.shape[-1]))
    if old.numel():
        buffer[..., : old.shape[-2], :] = old
    return buffer


def _moved(buffer: Tensor, moves: list[tuple[int, int]], length: int) -> Tensor:
    for to, place in moves:
        buffer[to, :, :length] = buffer[place, :, :length]
    return buffer


def places_to_keep(size: int, leaving: set[int]) -> list[int]:
    """Which place of the old batch each place of the new one takes: rows from the end fill the holes.

    Every other row stays where it is, so the fewest rows are copied: `places_to_keep(5, {1}) == [0, 4, 2, 3]`.
    """
    count = size - len(leaving)
    behind = iter(place for place in range(count, size) if place not in leaving)
    return [next(behind) if place in leaving else place for place in range(count)]


def use_growing_layers(cache: object) -> None:
    """Replace the still empty plain layers of a `Cache`; sliding-window and recurrent ones stay as they are."""
    if isinstance(cache, Cache):
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]


def can_drop_rows(cache: object) -> bool:
    """Whether a model's state is known row by row: a `Cache` that keeps all of it in its layers.

    One that selects rows in a way of its own holds something beside them (MiniMax: the state of its linear attention).
    """
    return isinstance(cache, Cache) and type(cache).batch_select_indices is Cache.batch_select_indices


def keep_rows(cache: Cache, places: list[int], device: torch.device) -> None:
    """Keep the rows at `places` in every layer of a cache, in place."""
    index: Any = torch.tensor(places, device=device)
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.keep_rows(places)
        else:
            layer.reorder_cache(index)


def take_rows(cache: Cache, index: Tensor) -> None:
    """Take the rows at `index` in every layer of a cache, in place; one may be taken several times."""
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.take_rows(index)
        else:
            layer.reorder_cache(index)
