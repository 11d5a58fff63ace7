"""Marginal cost of a call inside a chain of its like: the slope of time over the chain's length.

Launch, events, synchronisation and whatever else happens once a chain are in the intercept, which is discarded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tfnas_ext.timing import Timer

FloatArray = npt.NDArray[np.float64]

_REPEATS = 3
_ATTEMPTS = 3


@dataclass(frozen=True)
class Slope:
    """T(R) = intercept + slope * R, in ms. `stderr_ms` is the standard error of the slope.

    `rejected` readings were taken again; `disturbed` says that one could not be had undisturbed and was used all the
    same.
    """

    slope_ms: float
    intercept_ms: float
    stderr_ms: float
    rejected: int = 0
    disturbed: bool = False


def fit_slope(lengths: FloatArray, times_ms: FloatArray) -> Slope:
    """Theil-Sen slope of `times_ms` over chain `lengths` (both [n]): the median of all pairwise slopes.

    Robust: up to 29 % of the readings may be wrong. Raises `ValueError` with fewer than two different lengths.
    """
    lengths, times_ms = np.asarray(lengths, dtype=np.float64), np.asarray(times_ms, dtype=np.float64)
    i, j = np.triu_indices(lengths.size, 1)
    apart = lengths[i] != lengths[j]
    if not apart.any():
        raise ValueError(f"lengths: expected at least two different chain lengths, got {lengths.tolist()}")
    slope = float(np.median((times_ms[j] - times_ms[i])[apart] / (lengths[j] - lengths[i])[apart]))
    residual = times_ms - slope * lengths
    intercept = float(np.median(residual))
    spread = 1.4826 * float(np.median(np.abs(residual - intercept)))
    return Slope(slope, intercept, spread / float(np.sqrt(np.sum((lengths - lengths.mean()) ** 2))))


def measure_slope(
    timer: Timer,
    chains: dict[int, Callable[[], object]],
    *,
    rng: np.random.Generator,
) -> Slope:
    """Time `chains` (by their length) in random order, three times each, and fit the slope.

    Every copy in a chain should have weights and buffers of its own, so that nothing is found in cache that a real
    network would have to load. A disturbed reading is taken again, up to three are taken in all.
    """
    lengths: list[int] = []
    times_ms: list[float] = []
    rejected, disturbed = 0, False
    for _ in range(_REPEATS):
        for length in rng.permutation(list(chains)):
            for _ in range(_ATTEMPTS):
                reading = timer.sample(chains[int(length)])
                if not reading.disturbed:
                    break
                rejected += 1
            disturbed |= reading.disturbed
            lengths.append(int(length))
            times_ms.append(reading.ms)
    fit = fit_slope(np.asarray(lengths), np.asarray(times_ms))
    return Slope(fit.slope_ms, fit.intercept_ms, fit.stderr_ms, rejected, disturbed)
