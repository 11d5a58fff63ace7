"""How slow the machine was in each pass of a chain, told by the sections of that very pass.

A reading is (latency of what was timed) x (slowness of its pass) x noise. Every pass times some twenty sections, each
of which is timed in many other passes with other company, so that both factors can be told apart: a robust two-way fit
in logarithms. A reference pass beside the timed one tells less: it comes later, and its own noise is divided in.
"""

from __future__ import annotations

import numpy as np

from tfnas.latency.lut import FloatArray, IntArray

# Residuals beyond this many standard deviations pull no harder than those at it (95 % efficient for normal noise).
_HUBER = 1.345
_ROUNDS = 30
_CLOSE = 1e-4


def pass_slowness(ms: FloatArray, what: IntArray, passes: IntArray, count: int) -> FloatArray:
    """Slowness of each of `count` passes, float64 [count], median 1; NaN for a pass without readings.

    `ms` float64 [N], the readings; `what` int64 [N] numbers what each of them timed from 0; `passes` int64 [N] the pass
    it was taken in. Deterministic. Things that never meet in a pass, not even through others, are not comparable: their
    passes keep the level that the medians of their own readings give.
    """
    logs = np.log(ms)
    level, slow = _medians(logs, what), np.zeros(count)
    for _ in range(_ROUNDS):
        before = slow
        slow = _robust_means(logs - level[what], passes, slow, count)
        slow = slow - np.median(slow[passes])
        level = _robust_means(logs - slow[passes], what, level, level.size)
        if np.abs(slow - before).max() < _CLOSE:
            break
    seen = np.bincount(passes, minlength=count) > 0
    return np.where(seen, np.exp(slow - np.median(slow[seen])), np.nan)


def _medians(values: FloatArray, groups: IntArray) -> FloatArray:
    """Median of each group, 0 for an empty one."""
    counts = np.bincount(groups)
    ordered = values[np.lexsort((values, groups))]
    first = np.cumsum(counts) - counts
    lower, upper = (np.minimum(first + half, ordered.size - 1) for half in ((counts - 1).clip(0) // 2, counts // 2))
    return np.where(counts > 0, (ordered[lower] + ordered[upper]) / 2, 0.0)


def _robust_means(values: FloatArray, groups: IntArray, centre: FloatArray, count: int) -> FloatArray:
    """One step towards each group's Huber mean, from `centre`."""
    residual = np.abs(values - centre[groups])
    bound = _HUBER * 1.4826 * float(np.median(residual))
    weight = np.minimum(1.0, bound / np.maximum(residual, 1e-300)) if bound > 0 else np.ones_like(values)
    total = np.bincount(groups, weight, count)
    return np.bincount(groups, weight * values, count) / np.where(total > 0, total, 1.0)
