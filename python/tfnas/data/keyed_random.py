"""Counter-based random numbers: Philox4x32-10 keyed by (seed, purpose, epoch, sample).

Nothing is carried from one draw to the next, so order and augmentation of any sample in any epoch can be computed on
their own: that is what makes a run restartable in the middle of an epoch and independent of the number of workers.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


class Purpose(IntEnum):
    """Keeps the streams of one seed apart. Never 0: path sampling's counters have 0 in that word."""

    ORDER = 1
    AUGMENTATION = 2
    SPLIT = 3
    CLASSES = 4
    FAKE_CLASS = 5
    FAKE_IMAGE = 6


def philox4x32(counter: tuple[NDArray[np.uint64], ...], key: tuple[int, int]) -> tuple[NDArray[np.uint64], ...]:
    """Ten rounds of Philox on four counter words (arrays of values below 2**32); four words of the same shape."""
    c0, c1, c2, c3 = counter
    for i in range(10):
        k0, k1 = (np.uint64((k + i * w) & 0xFFFFFFFF) for k, w in zip(key, _WEYL, strict=True))
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (product1 >> _HALF) ^ c1 ^ k0, product1 & _LOW, (product0 >> _HALF) ^ c3 ^ k1, product0 & _LOW
    return c0, c1, c2, c3


def words(seed: int, purpose: Purpose, epoch: int, samples: NDArray[np.int64], count: int) -> NDArray[np.uint64]:
    """`count` random 32-bit words per sample: uint64 `[len(samples), count]`, a function of the arguments alone."""
    blocks = -(-count // 4)
    shape = (len(samples), blocks)
    counter = (
        np.broadcast_to(samples.astype(np.uint64)[:, None] & _LOW, shape),
        np.full(shape, epoch & 0xFFFFFFFF, dtype=np.uint64),
        np.broadcast_to(np.arange(blocks, dtype=np.uint64)[None, :], shape),
        np.full(shape, int(purpose), dtype=np.uint64),
    )
    drawn = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return np.stack(drawn, axis=-1).reshape(len(samples), 4 * blocks)[:, :count]


def uniforms(seed: int, purpose: Purpose, epoch: int, samples: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """Uniform numbers in [0, 1) with 24 random bits each: float32 `[len(samples), count]`."""
    drawn = words(seed, purpose, epoch, samples, count) >> np.uint64(8)
    return drawn.astype(np.float32) * np.float32(2.0**-24)


def shuffled(seed: int, purpose: Purpose, epoch: int, samples: NDArray[np.int64]) -> NDArray[np.int64]:
    """`samples` in random order: sorted by a 64-bit key of each, so that it depends on no library's generator."""
    high, low = words(seed, purpose, epoch, samples, 2).T
    return samples[np.argsort((high << _HALF) | low, kind="stable")]


def sample_seeds(seed: int, epoch: int, samples: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One 64-bit seed per sample, for libraries that bring a generator of their own."""
    high, low = words(seed, Purpose.AUGMENTATION, epoch, samples, 2).T
    return (high << _HALF) | low
