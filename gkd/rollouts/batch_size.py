"""How many rows are decoded at a time: a check of what is given, and a choice where nothing is."""

from __future__ import annotations

from gkd.common.ranges import whole

_OF_THE_CARD = 8  # one part in so many for keys and values, where rollout_batch_size says nothing


def check_batch_size(size: object) -> None:
    """Refuse a `rollout_batch_size` below 1; None leaves the choice to `rollout_rows`.

    Raises:
        ValueError: it is.
    """
    if size is not None:
        whole("rollout_batch_size", size, 1)


def rollout_rows(batch: int, window: int, row_bytes: int, room: int | None) -> int:
    """Rows to decode at a time, where `rollout_batch_size` says nothing.

    On a CPU four micro-batches are the quickest (measured). On a GPU a step of decoding costs about the same for any
    number of rows (not measured): all of the window, as long as their keys and values fit into a part of the card.

    Args:
        batch: rows of a micro-batch. window: of the optimizer steps that a rollout is for, on this rank.
        row_bytes: keys and values of one row. room: bytes of the GPU; None on a CPU.
    """
    least = 4 * batch
    rows = least if room is None else max(least, window)
    while rows > least and rows * row_bytes > (room or 0) // _OF_THE_CARD:
        rows = max(least, rows // 2)
    return rows
