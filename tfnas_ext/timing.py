"""The one benchmark loop: samples, stop rule, interleaving, drift. Used by the profiler and by `benchmarks/`.

A *timer* turns a callable into one reading: `CpuTimer` here, `timing_cuda.CudaTimer` on a GPU, a scripted one in the
tests. Everything else (when to stop, what to reject, how to divide the drift out) is the same for all of them, and
noise that stays after the time limit is reported with the samples, never hidden.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from tfnas_ext.timing_host import Clock, SystemClock, flush_cache


@dataclass(frozen=True)
class Reading:
    """One timed call in ms. `disturbed` says that something else ran meanwhile (preemption, a throttled clock)."""

    ms: float
    disturbed: bool = False


class Timer(Protocol):
    """Times one call. `warm_up` runs it untimed first (compilation, primitive caches, clocks)."""

    def warm_up(self, call: Callable[[], object], calls: int) -> None: ...

    def sample(self, call: Callable[[], object]) -> Reading: ...


@lru_cache(maxsize=4096)
def median_interval_rank(count: int) -> int | None:
    """Rank k (from 0) such that the k-th smallest and k-th largest of `count` samples enclose the true median.

    Exact and free of any distribution: the number of samples below the median is Binomial(count, 1/2). None when
    there are fewer than 6, too few for an interval of 95 % confidence.
    """
    tail, allowed = 0.0, 0.025
    rank: int | None = None
    for k in range(count // 2 + 1):
        tail += math.exp(math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2))
        if tail > allowed:
            break
        rank = k
    return rank


@dataclass(frozen=True)
class Samples:
    """Readings of one callable, in ms, in the order taken, with what was thrown away.

    `converged` is False when the time limit came before the stop rule was met: the numbers are then what they are,
    and `relative_half_width` says how good that is.
    """

    values_ms: np.ndarray
    rejected: int = 0
    converged: bool = True
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return int(self.values_ms.size)

    @property
    def median_ms(self) -> float:
        return float(np.median(self.values_ms))

    @property
    def rel_stdev(self) -> float:
        """Standard deviation divided by the median; 0 for a single sample."""
        return float(np.std(self.values_ms, ddof=1) / self.median_ms) if self.count > 1 else 0.0

    @property
    def rel_spread(self) -> float:
        """Like `rel_stdev` for normal samples, but blind to outliers: 1.4826 times the median absolute deviation."""
        return float(1.4826 * np.median(np.abs(self.values_ms - self.median_ms)) / self.median_ms)

    @property
    def interval_ms(self) -> tuple[float, float]:
        """95 % confidence interval of the median from order statistics; infinite with fewer than 6 samples."""
        return median_interval(self.values_ms)

    @property
    def relative_half_width(self) -> float:
        low, high = self.interval_ms
        return (high - low) / 2.0 / self.median_ms


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % confidence interval of the median of `values` (order statistics); (-inf, inf) when there are too few."""
    rank = median_interval_rank(int(values.size))
    if rank is None:
        return -math.inf, math.inf
    ordered = np.sort(values)
    return float(ordered[rank]), float(ordered[values.size - 1 - rank])


@dataclass(frozen=True)
class StopRule:
    """Stop when the median is known to +-`half_width` (a share of it, 95 %), or at a limit of time or samples."""

    half_width: float = 0.005
    min_samples: int = 10
    max_samples: int = 10_000
    time_limit_s: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.half_width < 1:
            raise ValueError(f"half_width must be a share between 0 and 1, got {self.half_width}")
        if not 1 <= self.min_samples <= self.max_samples:
            raise ValueError(
                f"expected 1 <= min_samples <= max_samples, got min_samples={self.min_samples}, "
                f"max_samples={self.max_samples}"
            )
        if not self.time_limit_s > 0:
            raise ValueError(f"time_limit_s must be positive seconds, got {self.time_limit_s}")

    def met(self, values_ms: np.ndarray) -> bool:
        """Whether the samples alone allow to stop (the interval is narrow enough)."""
        if values_ms.size < self.min_samples:
            return False
        low, high = median_interval(values_ms)
        return bool((high - low) / 2.0 <= self.half_width * float(np.median(values_ms)))


class CpuTimer:
    """Wall-clock time of a call on the host, with interference noticed.

    A reading is marked as disturbed when the thread was preempted (involuntary context switches) or, with one
    thread, when its CPU time falls short of the wall time by more than `gap_share` and 5 us. `cold` evicts the
    caches before every reading (not timed).
    """

    def __init__(
        self, *, cold: bool = False, threads: int | None = None, gap_share: float = 0.02, clock: Clock | None = None
    ) -> None:
        self.cold = cold
        self.threads = torch.get_num_threads() if threads is None else threads
        self.gap_share = gap_share
        self.clock: Clock = SystemClock() if clock is None else clock

    def warm_up(self, call: Callable[[], object], calls: int) -> None:
        for _ in range(calls):
            call()

    def sample(self, call: Callable[[], object]) -> Reading:
        if self.cold:
            flush_cache()
        clock = self.clock
        switches, cpu_start = clock.involuntary_switches(), clock.thread_ns()
        start = clock.wall_ns()
        call()
        wall = clock.wall_ns() - start
        cpu = clock.thread_ns() - cpu_start
        preempted = clock.involuntary_switches() != switches
        return Reading(wall / 1e6, preempted or self.is_gap(wall, cpu))

    def is_gap(self, wall_ns: int, cpu_ns: int) -> bool:
        """Whether CPU time falls short of wall time; with several threads waiting is normal and says nothing."""
        return self.threads == 1 and wall_ns - cpu_ns > max(5_000, self.gap_share * wall_ns)


class ProcessTimer:
    """CPU time of the process: with one thread, nearly that of a quiet machine even where other programs run."""

    def warm_up(self, call: Callable[[], object], calls: int) -> None:
        for _ in range(calls):
            call()

    def sample(self, call: Callable[[], object]) -> Reading:
        start = time.process_time_ns()
        call()
        return Reading((time.process_time_ns() - start) / 1e6)


def measure(
    call: Callable[[], object],
    *,
    timer: Timer | None = None,
    rule: StopRule | None = None,
    warm_up: int = 3,
    elapsed_s: Callable[[], float] = time.monotonic,
) -> Samples:
    """Time `call` until the stop rule is met. Returns its samples (ms); disturbed readings are rejected and counted.

    When more readings were rejected than kept by the time limit, all of them are returned: a machine that is never
    quiet still gets a number, with `converged=False` and its noise.
    """
    return measure_interleaved(
        {"call": call}, timer=timer, rule=rule, warm_up=warm_up, elapsed_s=elapsed_s, rejection=True
    )["call"]


def measure_interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    timer: Timer | None = None,
    rule: StopRule | None = None,
    reference: Callable[[], object] | None = None,
    warm_up: int = 3,
    seed: int = 0,
    rejection: bool = True,
    elapsed_s: Callable[[], float] = time.monotonic,
) -> dict[str, Samples]:
    """Time several callables in one go, in an order drawn anew every round (seeded), so that drift hits all alike.

    With a `reference` callable, it is timed after every reading, and each reading is divided by the drift around it
    (reference now over its median of the whole run). The time limit of `rule` holds per callable. A callable whose rule
    is met leaves the rounds.

    Errors: ValueError when `calls` is empty. Whatever a callable raises passes through.
    """
    if not calls:
        raise ValueError("calls is empty: expected at least one named callable to time")
    timer = CpuTimer() if timer is None else timer
    rule = StopRule() if rule is None else rule
    for call in calls.values():
        timer.warm_up(call, warm_up)
    if reference is not None:
        timer.warm_up(reference, warm_up)
    rng = np.random.default_rng(seed)
    kept: dict[str, list[int]] = {name: [] for name in calls}
    dropped: dict[str, list[int]] = {name: [] for name in calls}
    values: list[float] = []
    references: list[float] = []
    converged: set[str] = set()
    open_names = list(calls)
    start = elapsed_s()
    limit_s = rule.time_limit_s * len(calls)
    while open_names:
        for index in rng.permutation(len(open_names)):
            name = open_names[index]
            reading = timer.sample(calls[name])
            (dropped if rejection and reading.disturbed else kept)[name].append(len(values))
            values.append(reading.ms)
            if reference is not None:
                references.append(timer.sample(reference).ms)
        drift = smoothed_drift(np.asarray(references)) if references else np.ones(len(values))
        corrected = np.asarray(values) / drift
        out_of_time = elapsed_s() - start >= limit_s
        for name in list(open_names):
            if rule.met(corrected[kept[name]]):
                converged.add(name)
                open_names.remove(name)
            elif out_of_time or len(kept[name]) + len(dropped[name]) >= rule.max_samples:
                open_names.remove(name)
    result: dict[str, Samples] = {}
    for name in calls:
        use, rejected = kept[name], len(dropped[name])
        if name not in converged and len(use) < rejected:
            use, rejected = sorted(use + dropped[name]), 0
        result[name] = Samples(corrected[use], rejected, name in converged)
    return result


def smoothed_drift(reference_ms: np.ndarray | Sequence[float], window: int = 5) -> np.ndarray:
    """How much slower the machine was than usual at each reference reading: running median over the whole median.

    `reference_ms` is [n] or [n, slots] in ms, in the order taken; the result has its shape, 1 meaning "as usual".
    """
    reference = np.asarray(reference_ms, dtype=np.float64)
    half = window // 2
    padded = np.concatenate([reference[:1].repeat(half, axis=0), reference, reference[-1:].repeat(half, axis=0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1, axis=0)
    return np.median(windows, axis=-1) / np.median(reference, axis=0)
