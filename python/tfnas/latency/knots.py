"""Which widths to measure: knots by bisection, where interpolation is still wrong, and the kind of each curve.

`KnotPlacement` is a pure function of the measurements it has been told: it can be asked at any time which widths are
worth measuring next, in which order they come does not matter, and a build is resumed by telling it again what was
measured before. It measures nothing and draws nothing at random.

An interval is bisected as long as the deviation at its parent's middle (the latest evidence of how straight the curve
is there), or what curves of the same shape showed in that place, is above the tolerance. Long intervals have more room
to hide something, so they are held to a tighter one. Curves of one shape (same resolution, channels and stride) share
their kind, because it comes from how the pointwise convolutions are vectorised: at two places of one of them a multiple
of the alignment is measured together with its neighbours. Faster than both makes the curves "sawtooth", as fast as the
one before and a step faster than the one after "steps" (see `Curve`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tfnas.latency.lut import Curve, IntArray
from tfnas.space import OpKey, Space

Shape = tuple[int, int, int, int]
Query = tuple[OpKey, int]

# An interval of this many widths is held to the tolerance itself; longer ones to less, by a power of their length.
_REFERENCE_GAP = 64
_GAP_POWER = 0.75
# The standard error of a median is about 1.25 standard deviations / sqrt(samples); two of them are called noise.
_NOISE = 2 * 1.25

# Suspicion of what nothing is known about yet: above any deviation, below the ends of a curve.
_PROBE = 1e6


@dataclass(frozen=True)
class Measurement:
    """Median latency of one width in ms; `rel_stdev` of its samples relative to the median; number of samples."""

    latency_ms: float
    rel_stdev: float = 0.0
    samples: int = 1

    @property
    def noise_ms(self) -> float:
        return _NOISE * self.rel_stdev * self.latency_ms / math.sqrt(max(self.samples, 1))


@dataclass(frozen=True)
class _Interval:
    key: OpKey
    left: int
    right: int
    middle: int
    suspicion: float  # relative deviation to be expected at the middle
    deviation: float | None  # the one found there, beyond noise; None before the middle is measured


def searchable_ranges(space: Space) -> dict[OpKey, tuple[int, int]]:
    """Smallest and largest width that a search of `space` can ask of each curve, over all candidates that share it."""
    ranges: dict[OpKey, tuple[int, int]] = {}
    for layer in space.layers:
        for c, candidate in enumerate(layer.candidates):
            if candidate.is_skip:
                continue
            low, high = ranges.get(layer.key(c), (layer.min_width(c), layer.max_width(c)))
            ranges[layer.key(c)] = (min(low, layer.min_width(c)), max(high, layer.max_width(c)))
    return ranges


class KnotPlacement:
    """Adaptive choice of the widths to measure for a set of curves.

    `ranges` gives the smallest and largest width of every curve (both are always measured: curves are never
    extrapolated). `tolerance` is the relative interpolation error aimed at; `period` the width alignment that may run
    faster (1: do not look for sawtooth or steps); intervals shorter than `2 * min_gap` are not split.

    Usage: measure the first queries of `wanted()` in any order, `record` each, until `wanted()` is empty or the budget
    is spent; then `curves()`.
    """

    def __init__(
        self,
        ranges: Mapping[OpKey, tuple[int, int]],
        *,
        tolerance: float = 0.01,
        period: int = 16,
        min_gap: int = 4,
    ) -> None:
        for key, (low, high) in ranges.items():
            if not 1 <= low <= high:
                raise ValueError(f"ranges[{key}]: expected 1 <= smallest <= largest width, got ({low}, {high})")
        if not tolerance > 0:
            raise ValueError(f"tolerance: expected a relative error above 0, got {tolerance}")
        if period < 1 or min_gap < 1:
            raise ValueError(f"period and min_gap: expected integers >= 1, got {period} and {min_gap}")
        self._ranges = dict(ranges)
        self._tolerance = tolerance
        self._period = period
        self._min_gap = min_gap
        self._measured: dict[OpKey, dict[int, Measurement]] = {key: {} for key in ranges}
        self._groups: dict[Shape, list[OpKey]] = {}
        for key in ranges:
            self._groups.setdefault(_shape(key), []).append(key)
        self._queries: dict[Shape, list[tuple[float, OpKey, int]]] = {}

    def record(self, key: OpKey, width: int, latency_ms: float, *, rel_stdev: float = 0.0, samples: int = 1) -> None:
        """Tell the placement a measurement; one of a width already measured replaces it. Any width is welcome.

        Raises `ValueError` for an unknown key, a width outside its range or a latency that is not above 0.
        """
        if key not in self._ranges:
            raise ValueError(f"key: {key} is not one of the {len(self._ranges)} curves of this placement")
        low, high = self._ranges[key]
        if not low <= width <= high:
            raise ValueError(f"width: expected {low}..{high} for {key}, got {width}")
        if not (math.isfinite(latency_ms) and latency_ms > 0):
            raise ValueError(
                f"latency_ms: expected a finite value above 0 for {key} at width {width}, got {latency_ms}"
            )
        self._measured[key][int(width)] = Measurement(float(latency_ms), float(rel_stdev), int(samples))
        self._queries.pop(_shape(key), None)

    def wanted(self) -> list[Query]:
        """Every width worth measuring now, the most telling first; empty when all curves are within tolerance."""
        for shape in self._groups:
            if shape not in self._queries:
                self._queries[shape] = list(self._group_queries(shape))
        queries = [query for shape in self._groups for query in self._queries[shape]]
        queries.sort(key=lambda query: -query[0])
        return [(key, width) for _, key, width in queries]

    def curves(self) -> dict[OpKey, Curve]:
        """The curves of everything recorded so far; one without any measurement is left out."""
        return {key: self._curve(key) for key in self._ranges if self._measured[key]}

    @property
    def query_count(self) -> int:
        """Widths measured so far."""
        return sum(len(known) for known in self._measured.values())

    def _group_queries(self, shape: Shape) -> Iterator[tuple[float, OpKey, int]]:
        keys = self._groups[shape]
        kind = self._kind(shape)
        probes: list[int] = [] if isinstance(kind, str) else kind
        for key in keys:
            for width in self._ranges[key]:
                if width not in self._measured[key]:
                    yield math.inf, key, width
        for width in probes:
            yield _PROBE, self._probed(shape), width
        if not isinstance(kind, str):
            return
        for track in range(2 if kind == "sawtooth" else 1):
            intervals = [interval for key in keys for interval in self._intervals(key, kind, track)]
            tested = [interval for interval in intervals if interval.deviation is not None]
            for interval in intervals:
                if interval.deviation is not None:
                    continue
                length = max(interval.right - interval.left, 1)
                # a bend seen inside the same place of a curve alike: as large here, spread over this interval
                alike = [
                    2 * other.deviation * (other.right - other.left) / length
                    for other in tested
                    if other.deviation
                    and other.key is not interval.key
                    and other.left >= interval.left - self._min_gap
                    and other.right <= interval.right + self._min_gap
                ]
                suspicion = max([interval.suspicion, *alike]) * (length / _REFERENCE_GAP) ** _GAP_POWER
                if suspicion > self._tolerance:
                    yield suspicion, interval.key, interval.middle

    def _intervals(self, key: OpKey, kind: str, track: int) -> Iterator[_Interval]:
        """The bisection tree of one track of a curve, as far as it is measured; its ends come first."""
        widths = self._track(key, kind, track)
        if widths.size == 0:
            return
        known = self._measured[key]
        first, last = int(widths[0]), int(widths[-1])
        missing = [width for width in {first, last} if width not in known]
        for width in missing:
            yield _Interval(key, first, last, width, _PROBE, None)
        if missing:
            return
        stack = [(first, last, _PROBE)]
        while stack:
            left, right, suspicion = stack.pop()
            middle = _middle(kind, track, self._period, left, right) if right - left >= 2 * self._min_gap else None
            if middle is None:
                continue
            if middle not in known:
                yield _Interval(key, left, right, middle, suspicion, None)
                continue
            deviation = _deviation(known, left, middle, right)
            yield _Interval(key, left, right, middle, suspicion, deviation)
            stack += [(left, middle, deviation), (middle, right, deviation)]

    def _track(self, key: OpKey, kind: str, track: int) -> IntArray:
        """All widths of a track of a curve; its ends are measured first."""
        low, high = self._ranges[key]
        widths = np.arange(low, high + 1)
        on_track = _on_track(kind, track, self._period, widths)
        return widths[on_track | (widths == low) | (widths == high)] if kind == "steps" else widths[on_track]

    def _probed(self, shape: Shape) -> OpKey:
        """The curve of a shape that is probed for its kind: the one over the widest range (the first of equals)."""
        return max(self._groups[shape], key=lambda key: self._ranges[key][1] - self._ranges[key][0])

    def _kind(self, shape: Shape) -> str | list[int]:
        """The kind of the curves of one shape, or the widths of `_probed` that must be measured to tell."""
        key, period = self._probed(shape), self._period
        low, high = self._ranges[key]
        places = [round((low + share * (high - low)) / period) * period for share in (0.5, 0.25)]
        if period < 2 or places[1] <= low or places[0] >= high or places[0] == places[1]:
            return "linear"
        known = self._measured[key]
        kinds: list[str] = []
        for place in places:
            unknown = [width for width in (low, high, place - 1, place, place + 1) if width not in known]
            if unknown:
                return unknown
            per_period_ms = (known[high].latency_ms - known[low].latency_ms) / (high - low) * period
            kinds.append(self._kind_at(known, place, per_period_ms))
            if kinds[-1] == "linear":
                return "linear"
        return kinds[0] if kinds[0] == kinds[1] else "linear"

    def _kind_at(self, known: Mapping[int, Measurement], place: int, per_period_ms: float) -> str:
        """What a multiple of the period looks like among its neighbours: a dip, the last width of a step, or neither.

        `per_period_ms` is what the whole curve gains over one period: the height that steps must have.
        """
        before, here, after = (known[width] for width in (place - 1, place, place + 1))
        least_ms = max(self._tolerance * here.latency_ms, math.hypot(here.noise_ms, before.noise_ms, after.noise_ms))
        fall_ms, rise_ms = before.latency_ms - here.latency_ms, after.latency_ms - here.latency_ms
        if min(fall_ms, rise_ms) > 0 and (fall_ms + rise_ms) / 2 > least_ms:
            return "sawtooth"
        if rise_ms > max(least_ms, 4 * abs(fall_ms)) and 0.5 * per_period_ms <= rise_ms <= 2 * per_period_ms:
            return "steps"
        return "linear"

    def _curve(self, key: OpKey) -> Curve:
        known = self._measured[key]
        kind = self._kind(_shape(key))
        kind = kind if isinstance(kind, str) else "linear"
        if kind != "linear":
            ends = [w for track in range(2) for w in self._track(key, kind, track)[[0, -1]]]
            if any(int(width) not in known for width in ends):
                kind = "linear"  # the budget ended before this curve's two kinds of width were measured
        knots = sorted(known)
        if kind == "steps":
            # all widths of a step take as long: its knots are samples of one value, kept at the last of them
            steps: dict[int, list[int]] = {}
            for width in knots:
                steps.setdefault(-(-width // self._period), []).append(width)
            merged = [_pooled([known[width] for width in widths]) for widths in steps.values()]
            knots = [widths[-1] for widths in steps.values()]
        else:
            merged = [known[width] for width in knots]
        return Curve(
            np.array(knots),
            np.array([m.latency_ms for m in merged]),
            np.array([m.rel_stdev for m in merged]),
            np.array([m.samples for m in merged]),
            kind,
            1 if kind == "linear" else self._period,
        )


def _on_track(kind: str, track: int, period: int, widths: IntArray) -> npt.NDArray[np.bool_]:
    """Which widths a track of a curve interpolates through: multiples, the others, the last of each step, or all."""
    if kind == "linear":
        return np.ones(widths.shape, dtype=bool)
    return (widths % period == 0) == (track == 0)


@lru_cache(maxsize=8192)
def _middle(kind: str, track: int, period: int, left: int, right: int) -> int | None:
    """The width of a track that splits (left, right): in its middle half, well aligned; None where there is none."""
    exact, reach = (left + right) / 2, (right - left) / 4
    first, last = max(left + 1, math.ceil(exact - reach)), min(right - 1, math.floor(exact + reach))
    inside = np.arange(first, last + 1)
    inside = inside[_on_track(kind, track, period, inside)]
    for step in (period, max(period // 2, 1), 1):
        candidates = inside[inside % step == 0]
        if candidates.size:
            return int(candidates[np.argmin(np.abs(candidates - exact))])
    return None


def _shape(key: OpKey) -> Shape:
    return key.resolution, key.in_channels, key.out_channels, key.stride


def _deviation(known: Mapping[int, Measurement], left: int, middle: int, right: int) -> float:
    """Relative error of interpolating `middle` between its neighbours, less what noise explains."""
    share = (middle - left) / (right - left)
    a, m, b = known[left], known[middle], known[right]
    error_ms = abs((1 - share) * a.latency_ms + share * b.latency_ms - m.latency_ms)
    noise_ms = math.sqrt(m.noise_ms**2 + ((1 - share) * a.noise_ms) ** 2 + (share * b.noise_ms) ** 2)
    return max(0.0, error_ms - noise_ms) / m.latency_ms


def _pooled(measurements: list[Measurement]) -> Measurement:
    samples = sum(m.samples for m in measurements)
    latency_ms = sum(m.latency_ms * m.samples for m in measurements) / max(samples, 1)
    variance = sum(m.samples * (m.rel_stdev * m.latency_ms) ** 2 for m in measurements) / max(samples, 1)
    return Measurement(latency_ms, math.sqrt(variance) / latency_ms, samples)
