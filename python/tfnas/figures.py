"""Figures of steps on their way from the device to the host, which never waits for a step to fetch them."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import torch
from torch import Tensor

Tag = TypeVar("Tag")


class _Parcel(Generic[Tag]):
    """Copied together: one transfer, one event that tells when it is there."""

    def __init__(self, tags: list[Tag], figures: list[Tensor]) -> None:
        self._tags, self._sizes = tags, [len(row) for row in figures]
        together = torch.cat(figures)
        self._arrived: torch.cuda.Event | None = None
        if together.device.type == "cuda":
            self._values = torch.empty(together.shape, dtype=together.dtype, pin_memory=True)
            self._values.copy_(together, non_blocking=True)
            self._arrived = torch.cuda.Event()
            # where the copy is: without a stream it would be the current device's
            self._arrived.record(torch.cuda.current_stream(together.device))
        else:
            self._values = together

    def ready(self) -> bool:
        return self._arrived is None or self._arrived.query()

    def rows(self) -> list[tuple[Tag, list[float]]]:
        if self._arrived is not None:
            self._arrived.synchronize()
        rows = [row.tolist() for row in self._values.split(self._sizes)]
        return list(zip(self._tags, rows, strict=True))


class Figures(Generic[Tag]):
    """A queue: `add` tensors as steps give them, `send` them together, `take` what has arrived, in order.

    On the CPU what was sent has arrived. On a GPU it arrives when the device gets there: usually by the next `take`.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Tag, Tensor]] = []
        self._sent: deque[_Parcel[Tag]] = deque()

    def add(self, tag: Tag, figures: Tensor) -> None:
        """Remember `figures` (float64 1-D) on their device."""
        self._kept.append((tag, figures))

    def send(self) -> None:
        """Begin to copy all that was added since the last call."""
        if self._kept:
            self._sent.append(_Parcel([tag for tag, _ in self._kept], [row for _, row in self._kept]))
        self._kept = []

    def take(self, wait: bool) -> list[tuple[Tag, list[float]]]:
        """(tag, figures) of what was sent and has arrived and was not taken yet; `wait`: of all that was sent."""
        rows: list[tuple[Tag, list[float]]] = []
        while self._sent and (wait or self._sent[0].ready()):
            rows += self._sent.popleft().rows()
        return rows
