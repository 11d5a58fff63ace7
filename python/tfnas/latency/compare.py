"""Two latency tables side by side, and whether a table was measured under the conditions it is to be used for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from tfnas.latency.lut import FloatArray, IntArray, LatencyTable, LatencyTableError
from tfnas.space import OpKey

CONDITIONS = ("device", "device_uuid", "engine", "batch", "resolution", "threads", "dtype", "tf32", "layout", "mode")


@dataclass(frozen=True)
class TableComparison:
    """How the latencies of a second table relate to those of a first, at the widths of either's knots.

    `scale` is the median ratio second / first over `entries` latencies of `curves` common curves, `base_ratio` that of
    the bases (None where the first has none). `deviation_median`, `deviation_p95` and `deviation_max` are what remains
    once the second table is divided by `scale`: |ratio / scale - 1|. `scales` is the median ratio of each common curve;
    `only_first`, `only_second` are curves that one table lacks; `header` names the conditions that differ, as (first,
    second).
    """

    scale: float
    base_ratio: float | None
    entries: int
    curves: int
    deviation_median: float
    deviation_p95: float
    deviation_max: float
    scales: dict[OpKey, float]
    only_first: list[OpKey]
    only_second: list[OpKey]
    header: dict[str, tuple[Any, Any]]

    def as_dict(self) -> dict[str, Any]:
        """The same with curves named by strings, for JSON."""
        facts = {field.name: getattr(self, field.name) for field in fields(self)}
        return facts | {
            "scales": {str(key): scale for key, scale in self.scales.items()},
            "only_first": [str(key) for key in self.only_first],
            "only_second": [str(key) for key in self.only_second],
        }


def compare_tables(first: LatencyTable, second: LatencyTable) -> TableComparison:
    """Compare two tables (uncorrected latencies); raises `LatencyTableError` where they have no width in common."""
    common = [key for key in first.curves if key in second.curves]
    ratios: dict[OpKey, FloatArray] = {}
    for key in common:
        widths = _common_widths(first, second, key)
        if widths.size:
            ratios[key] = second.latencies_ms(key, widths) / first.latencies_ms(key, widths)
    if not ratios:
        raise LatencyTableError(
            f"the tables have nothing to compare: {len(common)} common curves, none with a common width"
        )
    every = np.concatenate(list(ratios.values()))
    scale = float(np.median(every))
    deviation = np.abs(every / scale - 1)
    return TableComparison(
        scale=scale,
        base_ratio=second.base_ms / first.base_ms if first.base_ms else None,
        entries=every.size,
        curves=len(ratios),
        deviation_median=float(np.median(deviation)),
        deviation_p95=float(np.percentile(deviation, 95)),
        deviation_max=float(deviation.max()),
        scales={key: float(np.median(of_curve)) for key, of_curve in ratios.items()},
        only_first=[key for key in first.curves if key not in ratios],
        only_second=[key for key in second.curves if key not in ratios],
        header=header_differences(first.header, second.header),
    )


def _common_widths(first: LatencyTable, second: LatencyTable, key: OpKey) -> IntArray:
    """The widths of either's knots that both tables cover."""
    a, b = first.curves[key], second.curves[key]
    widths = np.union1d(a.widths, b.widths)
    return widths[a.covers(widths) & b.covers(widths)]


def header_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The `CONDITIONS` that both headers state and that differ, as (first, second)."""
    stated = [name for name in CONDITIONS if first.get(name) is not None and second.get(name) is not None]
    return {name: (first[name], second[name]) for name in stated if first[name] != second[name]}


def require_conditions(table: LatencyTable, wanted: Mapping[str, Any]) -> None:
    """Raise `LatencyTableError`, saying what differs, unless a table was measured under the conditions `wanted`.

    `wanted` holds some of `CONDITIONS`. What the table's header does not state, as in imported tables, is not held
    against it.
    """
    unknown = sorted(set(wanted) - set(CONDITIONS))
    if unknown:
        raise ValueError(f"wanted: expected conditions among {', '.join(CONDITIONS)}, got {', '.join(unknown)}")
    differing = header_differences(table.header, wanted)
    if differing:
        said = "; ".join(f"{name} is {theirs!r}, wanted {ours!r}" for name, (theirs, ours) in differing.items())
        raise LatencyTableError(f"the latency table was measured under other conditions: {said}")
