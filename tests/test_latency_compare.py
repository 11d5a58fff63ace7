"""Comparing tables, checking conditions, drawing curves."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from latency_tables import synthetic_table
from tfnas.latency.compare import compare_tables, require_conditions
from tfnas.latency.lut import Curve, LatencyTable, LatencyTableError
from tfnas.latency.plot import curves_figure, error_bars, save_plot, sparkline
from tfnas.space_io import load_space


def scaled(table: LatencyTable, factor: float, noise: float = 0.0, seed: int = 0) -> LatencyTable:
    rng = np.random.default_rng(seed)
    curves = {
        key: dataclasses.replace(
            curve, latency_ms=factor * curve.latency_ms * (1 + rng.uniform(-noise, noise, curve.widths.size))
        )
        for key, curve in table.curves.items()
    }
    return dataclasses.replace(table, base_ms=factor * table.base_ms, curves=curves)


def test_a_common_scale_is_found_and_divided_out() -> None:
    table = synthetic_table(load_space("small"))
    found = compare_tables(table, scaled(table, 1.3))
    assert found.scale == pytest.approx(1.3)
    assert found.base_ratio == pytest.approx(1.3)
    assert found.deviation_max < 1e-12
    assert found.curves == len(table.curves)
    assert found.only_first == found.only_second == []
    noisy = compare_tables(table, scaled(table, 1.3, noise=0.04))
    assert noisy.scale == pytest.approx(1.3, rel=0.02)
    assert 0.01 < noisy.deviation_median < 0.03
    assert noisy.deviation_median < noisy.deviation_p95 <= noisy.deviation_max < 0.09


def test_curves_are_compared_where_both_have_widths() -> None:
    table = synthetic_table(load_space("small"))
    first, second, third, *_ = table.curves
    curve = table.curves[first]
    half = Curve(curve.widths[:4], 2 * curve.latency_ms[:4])
    elsewhere = Curve(table.curves[third].widths + 10_000, table.curves[third].latency_ms)
    other = LatencyTable(1.0, {first: half, third: elsewhere})
    found = compare_tables(table, other)
    assert found.curves == 1
    assert found.scale == pytest.approx(2.0)
    assert second in found.only_first
    assert third in found.only_first
    assert found.only_second == [third]
    with pytest.raises(LatencyTableError, match="nothing to compare"):
        compare_tables(LatencyTable(1.0, {third: table.curves[third]}), LatencyTable(1.0, {third: elsewhere}))


def test_conditions_that_differ_are_named() -> None:
    table = dataclasses.replace(
        synthetic_table(load_space("small")), header={"device": "A", "engine": "eager", "batch": 1, "threads": None}
    )
    require_conditions(table, {"device": "A", "batch": 1, "threads": 2, "dtype": "float32"})
    with pytest.raises(LatencyTableError, match="engine is 'eager', wanted 'fused'; batch is 1, wanted 32"):
        require_conditions(table, {"engine": "fused", "batch": 32})
    with pytest.raises(ValueError, match="colour"):
        require_conditions(table, {"colour": "red"})
    other = dataclasses.replace(table, header={"device": "B", "engine": "eager"})
    assert compare_tables(table, other).header == {"device": ("A", "B")}


def test_error_bars_are_those_of_a_median() -> None:
    rng = np.random.default_rng(0)
    sigma, samples = 0.1, 25
    medians = np.median(rng.normal(1.0, sigma, (20_000, samples)), axis=1)
    curve = Curve(np.array([8, 16]), np.array([1.0, 2.0]), np.array([sigma, 0.0]), np.array([samples, 0]))
    half_width, unknown = error_bars(curve)
    assert half_width == pytest.approx(1.96 * medians.std(), rel=0.05)
    assert math.isnan(unknown)


def test_sparkline() -> None:
    assert sparkline(Curve(np.array([1, 8]), np.array([1.0, 8.0])), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(Curve(np.array([5]), np.array([1.0]))) == "▁"


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table = synthetic_table(load_space("small"))
    key = next(iter(table.curves))
    sawtooth = Curve(
        np.array([15, 16, 31, 32]), np.array([2.0, 1.0, 3.0, 2.0]), np.full(4, 0.05), np.full(4, 9), "sawtooth", 16
    )
    save_plot(tmp_path / "curves.png", {**table.curves, key: sawtooth}, "title")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_picture_of_one_panel_has_room_for_a_long_title() -> None:
    pytest.importorskip("matplotlib")
    curves = dict([next(iter(synthetic_table(load_space("small")).curves.items()))])
    figure = curves_figure(
        curves, "a_rather_long_name_of_a_table.json, Some Processor With 64 Cores, onnxruntime, batch 128"
    )
    figure.draw_without_rendering()
    (title,) = figure.texts
    box = title.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"tfnas-ext\[plots\]"):
        save_plot(tmp_path / "curves.png", synthetic_table(load_space("small")).curves)
