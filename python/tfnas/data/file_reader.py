"""Batches from image files: decoded by PIL, changed by torchvision's transforms, in worker processes if wanted."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from tfnas.data.decode import decode
from tfnas.data.errors import DataError
from tfnas.data.images import FileImages
from tfnas.data.keyed_random import sample_seeds
from tfnas.data.options import NO_JITTER, Crop

Transform = Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class FileTransform:
    """Describes a chain of torchvision transforms.

    `crop`: `resized` (random resized crop), `pad` (stretched to the resolution, then shifted by up to `padding`),
    `none` (shorter side to `shorter_side`, central crop: the evaluation's).
    """

    resolution: int
    shorter_side: int
    crop: Crop
    padding: int = 0
    flip: bool = False
    color_jitter: tuple[float, float, float, float] = NO_JITTER

    def build(self) -> Transform:
        """PIL image -> uint8 `[C, resolution, resolution]`; draws from torch's global CPU generator.

        Raises:
            DataError: torchvision does not import.
        """
        v2 = _transforms()
        chain: list[Any] = []
        if self.crop == "resized":
            chain.append(v2.RandomResizedCrop(self.resolution))
        elif self.crop == "pad":
            chain += [
                v2.Resize((self.resolution, self.resolution)),
                v2.RandomCrop(self.resolution, padding=self.padding),
            ]
        else:
            chain += [v2.Resize(self.shorter_side), v2.CenterCrop(self.resolution)]
        if self.flip:
            chain.append(v2.RandomHorizontalFlip())
        if any(self.color_jitter):
            chain.append(v2.ColorJitter(*self.color_jitter))
        chain.append(v2.PILToTensor())
        transform: Transform = v2.Compose(chain)
        return transform


def _transforms() -> Any:
    try:
        from torchvision.transforms import v2
    except Exception as error:  # torchvision beside another torch raises RuntimeError or OSError, not only ImportError
        raise DataError(
            f"image files need torchvision, which does not import ({type(error).__name__}: {error}); install the "
            f"torchvision that belongs to torch {torch.__version__}, or use arrays (IDX, .npz)"
        ) from error
    return v2


class _Batches(Dataset[Any]):
    """One item per batch. The error of an unreadable file is handed back: a worker's traceback would hide it."""

    def __init__(
        self,
        images: FileImages,
        channels: int,
        transform: Transform,
        seed: int,
        epoch: int,
        batches: Sequence[NDArray[np.int64]],
    ) -> None:
        self._images, self._channels, self._transform = images, channels, transform
        self._seed, self._epoch, self._batches = seed, epoch, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, position: int) -> torch.Tensor | DataError:
        indices = self._batches[position]
        out: list[torch.Tensor] = []
        # torchvision draws from the global generator, which belongs to the caller when there are no workers.
        kept = torch.default_generator.get_state()
        try:
            for index, seed in zip(indices, sample_seeds(self._seed, self._epoch, indices), strict=True):
                torch.default_generator.manual_seed(int(seed))
                out.append(self._transform(decode(self._images.path(int(index)), self._channels)))
        except DataError as error:
            return error
        finally:
            torch.default_generator.set_state(kept)
        return torch.stack(out)


@dataclass(frozen=True)
class FileReader:
    """Decodes and transforms; every image is seeded by (seed, epoch, index), whichever process takes it."""

    images: FileImages
    channels: int
    transform: FileTransform
    seed: int
    workers: int
    device: torch.device

    def read(self, epoch: int, batches: Sequence[NDArray[np.int64]]) -> Iterator[torch.Tensor]:
        """uint8 `[n, C, resolution, resolution]` on `device` for each array of indices.

        Raises:
            DataError: naming the file that cannot be decoded.
        """
        dataset = _Batches(self.images, self.channels, self.transform.build(), self.seed, epoch, batches)
        on_gpu = self.device.type == "cuda"
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=None,
            num_workers=min(self.workers, len(batches)),
            collate_fn=_as_is,
            pin_memory=on_gpu,
            worker_init_fn=_ignore_interrupts,
            # Without it the loader draws its workers' seed from the global generator.
            generator=torch.Generator(),
        )
        for images in loader:
            if isinstance(images, DataError):
                raise images
            yield images.to(self.device, non_blocking=True)


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C reaches every process; whether to stop, and what to save first, is the main one's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_is(item: Any) -> Any:
    return item
