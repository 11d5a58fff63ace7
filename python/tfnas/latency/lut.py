"""The latency table: one curve over width per block shape, queried by interpolation, never by extrapolation.

A block's latency depends on its shape (`OpKey`) and its width. `LatencyTable` holds one `Curve` per shape, the latency
`base_ms` of everything that is not searched (stem, fixed block, head), and the affine correction that maps the sum of
blocks to the latency of a whole network. Reading and writing files is `lut_io`'s job.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tfnas.fields import describe
from tfnas.space import OpKey, Space

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Milliseconds = TypeVar("Milliseconds", float, FloatArray)

CURVE_KINDS = ("linear", "sawtooth", "steps")
_LISTED = 8


class HasBlocks(Protocol):
    """What a table needs to know of a network (`architecture.Architecture`)."""

    def keys(self) -> list[tuple[OpKey, int]]:
        """Shape and width of every kept searchable layer."""
        ...


class LatencyTableError(ValueError):
    """A latency table is malformed, or does not answer what is asked of it."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Latency of one block shape over width: knots, and how to read between them.

    `widths` int64 [K], strictly increasing, >= 1; `latency_ms` float64 [K], finite and > 0; `rel_stdev` float64 [K],
    standard deviation of one knot's samples over their median; `samples` int64 [K], 0 where the noise is unknown
    (imported tables). Omitted noise arrays are zeros.

    `kind` says how to read a width between knots:
      "linear"    piecewise linear in the width;
      "sawtooth"  multiples of `period` are a class of their own (aligned widths run faster): they interpolate through
                  the knots at multiples, all other widths through the other knots;
      "steps"     latency depends on ceil(width / period) only: piecewise linear in that.
    """

    widths: IntArray
    latency_ms: FloatArray
    rel_stdev: FloatArray = field(default_factory=lambda: np.zeros(0))
    samples: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    kind: str = "linear"
    period: int = 1

    def __post_init__(self) -> None:
        raw = np.asarray(self.widths)
        if raw.ndim != 1 or raw.size == 0 or not np.issubdtype(raw.dtype, np.integer):
            raise LatencyTableError(f"widths: expected a non-empty list of integers, got {self.widths!r}")
        count = raw.size
        set_field = object.__setattr__
        set_field(self, "widths", raw.astype(np.int64))
        set_field(self, "latency_ms", _floats("latency_ms", self.latency_ms, count))
        set_field(self, "rel_stdev", _floats("rel_stdev", self.rel_stdev, count, default=0.0))
        samples = _floats("samples", self.samples, count, default=0.0)
        set_field(self, "samples", samples.astype(np.int64))
        if self.widths[0] < 1:
            raise LatencyTableError(f"widths: expected integers >= 1, got {int(self.widths[0])}")
        if np.any(np.diff(self.widths) <= 0):
            at = int(np.argmax(np.diff(self.widths) <= 0))
            pair = f"{int(self.widths[at])} is followed by {int(self.widths[at + 1])}"
            raise LatencyTableError(f"widths: expected strictly increasing, but {pair}")
        bad = ~(np.isfinite(self.latency_ms) & (self.latency_ms > 0))
        if np.any(bad):
            at = int(np.argmax(bad))
            raise LatencyTableError(
                f"latency_ms: expected finite values above 0, got {self.latency_ms[at]} at width {int(self.widths[at])}"
                f" ({int(bad.sum())} such entries)"
            )
        if np.any(~(np.isfinite(self.rel_stdev) & (self.rel_stdev >= 0))):
            raise LatencyTableError("rel_stdev: expected finite values >= 0")
        if np.any(samples != self.samples) or np.any(self.samples < 0):
            raise LatencyTableError("samples: expected integers >= 0")
        self._check_kind()

    def _check_kind(self) -> None:
        if self.kind not in CURVE_KINDS:
            raise LatencyTableError(f"kind: expected one of {', '.join(CURVE_KINDS)}, got {self.kind!r}")
        if isinstance(self.period, bool) or not isinstance(self.period, int) or self.period < 1:
            raise LatencyTableError(f"period: expected an integer >= 1, got {self.period!r}")
        if self.kind == "linear" and self.period != 1:
            raise LatencyTableError(f"period: a linear curve has period 1, got {self.period}")
        if self.kind != "linear" and self.period < 2:
            raise LatencyTableError(f"period: a {self.kind} curve needs a period of at least 2, got {self.period}")
        if self.kind == "sawtooth":
            aligned = self.widths % self.period == 0
            if aligned.all() or not aligned.any():
                raise LatencyTableError(f"a sawtooth curve needs knots on and beside multiples of {self.period}")
        if self.kind == "steps" and np.any(np.diff(-(-self.widths // self.period)) == 0):
            raise LatencyTableError(f"a steps curve needs its knots on different steps of {self.period}")

    @cached_property
    def _branches(self) -> tuple[tuple[IntArray, FloatArray], ...]:
        """Interpolation abscissae and values: (all,) or, for a sawtooth, (aligned, others)."""
        if self.kind == "sawtooth":
            aligned = self.widths % self.period == 0
            return tuple((self.widths[m], self.latency_ms[m]) for m in (aligned, ~aligned))
        return ((self._abscissa(self.widths), self.latency_ms),)

    def _abscissa(self, widths: IntArray) -> IntArray:
        return -(-widths // self.period) if self.kind == "steps" else widths

    def _branch_of(self, widths: IntArray) -> Iterable[tuple[IntArray, FloatArray, npt.NDArray[np.bool_]]]:
        if self.kind == "sawtooth":
            aligned = widths % self.period == 0
            yield (*self._branches[0], aligned)
            yield (*self._branches[1], ~aligned)
        else:
            yield (*self._branches[0], np.ones(widths.shape, dtype=bool))

    def covers(self, widths: IntArray) -> npt.NDArray[np.bool_]:
        """Which of `widths` (int, any shape) can be answered without extrapolating (bool, same shape)."""
        widths = np.asarray(widths, dtype=np.int64)
        covered = np.zeros(widths.shape, dtype=bool)
        x = self._abscissa(widths)
        for knots, _, mask in self._branch_of(widths):
            covered |= mask & (x >= knots[0]) & (x <= knots[-1])
        return covered

    def latencies_ms(self, widths: IntArray) -> FloatArray:
        """Latency in ms (float64) at integer `widths` of any shape.

        Raises `LatencyTableError` for a width outside the covered range.
        """
        raw = np.asarray(widths)
        if raw.size and not np.issubdtype(raw.dtype, np.integer):
            raise LatencyTableError(f"widths: expected integers, got dtype {raw.dtype}")
        raw = raw.astype(np.int64)
        covered = self.covers(raw)
        if not covered.all():
            missing = int(raw[~covered].flat[0])
            raise LatencyTableError(f"width {missing} is not covered: the knots span {self.describe_range()}")
        result = np.empty(raw.shape)
        x = self._abscissa(raw)
        for knots, values, mask in self._branch_of(raw):
            result[mask] = np.interp(x[mask], knots, values)
        return result

    def describe_range(self) -> str:
        """The covered widths in words, for messages."""
        if self.kind == "sawtooth":
            (on, _), (off, _) = self._branches
            return f"{on[0]}..{on[-1]} (multiples of {self.period}) and {off[0]}..{off[-1]} (other widths)"
        return f"{int(self.widths[0])}..{int(self.widths[-1])}"


def _floats(name: str, values: Any, count: int, default: float | None = None) -> FloatArray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise LatencyTableError(f"{name}: expected {count} numbers, got {describe(values)}") from error
    if default is not None and array.size == 0:
        array = np.full(count, default)
    if array.shape != (count,):
        raise LatencyTableError(f"{name}: expected {count} numbers, one per width, got {array.size}")
    return array


def _check_key(key: OpKey) -> None:
    for name, value in vars(key).items():
        if name == "act":
            continue
        least = 0 if name == "se_channels" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise LatencyTableError(f"curve {key}: {name}: expected an integer of at least {least}, got {value!r}")


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Latencies in ms of everything a network of the space is made of.

    `base_ms` is the latency of what is not searched; `curves` maps block shapes to curves; `header` records what was
    measured and how (device, engine, batch, dtype, layout, threads, mode, versions, date...); `correction` = (offset
    in ms, slope) maps the sum of base and blocks to the latency of the whole network. Queries by key are uncorrected.
    """

    base_ms: float
    curves: Mapping[OpKey, Curve]
    header: Mapping[str, Any] = field(default_factory=dict)
    correction: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if isinstance(self.base_ms, bool) or not isinstance(self.base_ms, (int, float, np.floating)):
            raise LatencyTableError(f"base_ms: expected a number, got {self.base_ms!r}")
        if not 0 <= self.base_ms <= sys.float_info.max:
            raise LatencyTableError(f"base_ms: expected a finite value >= 0, got {self.base_ms}")
        if not self.curves:
            raise LatencyTableError("curves: the table has none")
        for key in self.curves:
            _check_key(key)
        if len(self.correction) != 2 or not all(math.isfinite(c) for c in self.correction) or self.correction[1] <= 0:
            raise LatencyTableError(
                f"correction: expected (offset in ms, slope above 0), both finite, got {tuple(self.correction)}"
            )

    def curve(self, key: OpKey) -> Curve:
        """The curve of a block shape; raises `LatencyTableError` naming the key where the table has none."""
        try:
            return self.curves[key]
        except KeyError:
            raise LatencyTableError(
                f"the latency table has no curve for {key} (it holds {len(self.curves)} curves); "
                "build one for this space with `tfnas lut build`"
            ) from None

    def latencies_ms(self, key: OpKey, widths: IntArray) -> FloatArray:
        """Uncorrected latencies in ms (float64) of block `key` at integer `widths` of any shape.

        Raises `LatencyTableError` naming the key, the width and the covered range where the table has no answer.
        """
        curve = self.curve(key)
        try:
            return curve.latencies_ms(widths)
        except LatencyTableError as error:
            raise LatencyTableError(f"{key}: {error}; a table is never extrapolated") from None

    def latency_ms(self, key: OpKey, width: int) -> float:
        """Uncorrected latency in ms of block `key` at one width; errors as `latencies_ms`."""
        return float(self.latencies_ms(key, np.asarray(width)))

    def total_ms(self, sum_ms: Milliseconds) -> Milliseconds:
        """Latency in ms of whole networks whose base and blocks sum to `sum_ms`: offset + slope * sum."""
        offset_ms, slope = self.correction
        return offset_ms + slope * sum_ms

    def architecture_ms(self, arch: HasBlocks) -> float:
        """Corrected latency in ms of a network: `total_ms` of base plus every kept block."""
        blocks = arch.keys()
        return self.total_ms(self.base_ms + math.fsum(self.latency_ms(key, width) for key, width in blocks))

    def require_space(self, space: Space) -> None:
        """Raise `LatencyTableError`, listing what is missing, unless every width of every candidate is covered."""
        wanted: dict[OpKey, set[int]] = {}
        for layer in space.layers:
            for c, candidate in enumerate(layer.candidates):
                if not candidate.is_skip:
                    wanted.setdefault(layer.key(c), set()).update(range(layer.min_width(c), layer.max_width(c) + 1))
        missing = []
        for key, widths in wanted.items():
            if key not in self.curves:
                missing.append(f"{key} (no curve)")
                continue
            asked = np.array(sorted(widths), dtype=np.int64)
            absent = asked[~self.curves[key].covers(asked)]
            if absent.size:
                span = self.curves[key].describe_range()
                missing.append(f"{key} ({absent.size} widths from {absent[0]} to {absent[-1]}; the knots span {span})")
        if missing:
            more = f"\n  ... and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
            raise LatencyTableError(
                f"the latency table does not cover space {space.name!r}: {len(missing)} of {len(wanted)} curves are "
                "missing or too short:\n  " + "\n  ".join(missing[:_LISTED]) + more
            )
