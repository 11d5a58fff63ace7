"""Batches in a fixed order, from any step of any epoch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tfnas.data.errors import DataError
from tfnas.data.keyed_random import Purpose, shuffled
from tfnas.data.normalisation import Normalisation

Batch = tuple[torch.Tensor, torch.Tensor]


class Reader(Protocol):
    """Delivers the images of index arrays, a function of (epoch, index) alone."""

    def read(self, epoch: int, batches: Sequence[NDArray[np.int64]]) -> Iterator[torch.Tensor]:
        """uint8 or float32 (0..255) `[n, C, H, W]` on the loader's device for each array of indices."""
        ...


class Loader:
    """Images and labels of a set, batch by batch.

    Order and augmentation depend on (seed, epoch, sample) only: not on the number of workers, the batch size of another
    loader, or what was read before. With `world_size` processes each step's images are shared out in order.
    """

    def __init__(
        self,
        reader: Reader,
        labels: NDArray[np.int64],
        samples: NDArray[np.int64],
        normalisation: Normalisation,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        training: bool,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`labels` int64 of every image of the source, `samples` the indices of those in this set."""
        self.batch_size, self.samples, self.normalisation = batch_size, samples, normalisation
        self._reader, self._labels, self._seed, self._device = reader, labels, seed, device
        self._shuffle, self._rank, self._world_size = shuffle, rank, world_size
        # Batch norm cannot take statistics from one value; somebody who asks for batches of one gets them.
        self._least = min(2, batch_size) if training else 0

    @property
    def num_images(self) -> int:
        """Images in the set, dropped ones included."""
        return len(self.samples)

    def __len__(self) -> int:
        """Steps an epoch. In training a last batch is dropped where a process would get one image; otherwise never."""
        step = self.batch_size * self._world_size
        full, rest = divmod(len(self.samples), step)
        return full + (rest > 0 and rest // self._world_size >= self._least)

    def for_batch_norm(self) -> Loader:
        """The same batches, but as in training without a last one of which a process would get one image.

        For batch norms that use batch statistics in evaluation, too. Raises `DataError` where none is left.
        """
        loader = copy.copy(self)
        loader._least = min(2, self.batch_size)
        if not len(loader):
            raise DataError(
                f"held-out images: expected at least {2 * self._world_size} for {self._world_size} process(es), got "
                f"{self.num_images}; raise held_out_fraction or start fewer processes"
            )
        return loader

    def indices(self, epoch: int, start_step: int = 0) -> list[NDArray[np.int64]]:
        """This process's sample indices of every step from `start_step` on."""
        steps = len(self)
        if not 0 <= start_step <= steps:
            raise DataError(f"start_step: expected 0..{steps} (steps in an epoch), got {start_step}")
        order = shuffled(self._seed, Purpose.ORDER, epoch, self.samples) if self._shuffle else self.samples
        step = self.batch_size * self._world_size
        whole = (order[k * step : (k + 1) * step] for k in range(start_step, steps))
        return [np.array_split(batch, self._world_size)[self._rank] for batch in whole]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of epoch `epoch` from `start_step` on: what an uninterrupted epoch gives from there, bit for bit.

        Yields:
            images float32 `[n, C, H, W]`, channels last in memory, normalised, and labels int64 `[n]`, on the device.
            In evaluation with several processes some may get one batch less: they get no empty ones.

        Raises:
            DataError: `start_step` outside the epoch; an image file that cannot be decoded.
        """
        batches = [batch for batch in self.indices(epoch, start_step) if len(batch)]
        return self._read(epoch, batches)

    def _read(self, epoch: int, batches: list[NDArray[np.int64]]) -> Iterator[Batch]:
        for indices, images in zip(batches, self._reader.read(epoch, batches), strict=True):
            labels = torch.from_numpy(self._labels[indices]).to(self._device, non_blocking=True)
            yield self.normalisation.apply(images), labels

    def stream(self, start_step: int = 0) -> Iterator[Batch]:
        """Endless batches, epoch after epoch from 0, beginning at the `start_step`-th of them."""
        epoch, step = divmod(start_step, len(self))
        while True:
            yield from self.epoch(epoch, step)
            epoch, step = epoch + 1, 0
