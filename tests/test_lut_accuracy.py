"""The accuracy benchmark's own arithmetic: which widths it holds out, how it compares tables."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from profile_fakes import FakeEngine, Machine, smooth_ms
from tfnas.latency.knots import searchable_ranges
from tfnas.latency.lut import Curve, LatencyTable
from tfnas.latency.measure import measure_blocks_ms
from tfnas.space_io import load_space

PATH = Path(__file__).parent.parent / "benchmarks" / "lut_accuracy.py"
SPEC = importlib.util.spec_from_file_location("lut_accuracy", PATH)
assert SPEC is not None
assert SPEC.loader is not None
lut_accuracy = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(lut_accuracy)

SMALL = load_space("small")


def table(scale: float = 1.0, wiggle: float = 0.0, knots: int = 5) -> LatencyTable:
    curves = {}
    for i, (key, (low, high)) in enumerate(searchable_ranges(SMALL).items()):
        widths = np.unique(np.linspace(low, high, knots).astype(int))
        ms = np.array([smooth_ms(key, int(w)) for w in widths]) * scale * (1 + wiggle * (-1) ** i)
        curves[key] = Curve(widths, ms)
    return LatencyTable(0.5, curves)


def test_agreement_takes_one_scale_out() -> None:
    result = lut_accuracy.agreement(table(), table(1.1, 0.01))
    assert result["scale"] == pytest.approx(1.1, rel=0.011)
    assert result["median"] == pytest.approx(0.01, abs=0.011)
    same = lut_accuracy.agreement(table(), table(1.1))
    assert same["median"] == pytest.approx(0.0, abs=1e-12)


def test_held_out_widths_are_no_knots_and_half_aligned() -> None:
    chosen = lut_accuracy.held_out_widths(table(), SMALL, 60, seed=1)
    assert len(set(chosen)) == 60
    for key, width in chosen:
        low, high = searchable_ranges(SMALL)[key]
        assert low <= width <= high
        assert width not in table().curves[key].widths
    assert 25 <= sum(width % 16 == 0 for _, width in chosen) <= 40
    assert chosen == lut_accuracy.held_out_widths(table(), SMALL, 60, seed=1)


def test_blocks_are_measured_as_a_build_measures_them() -> None:
    machine = Machine(noise=0.003)
    configs = lut_accuracy.held_out_widths(table(), SMALL, 20, seed=1)
    samples = measure_blocks_ms(SMALL, configs, engine=FakeEngine(machine), timer=machine.timer(), now_s=machine.now_s)
    for (key, width), got in zip(configs, samples, strict=True):
        assert got.median_ms == pytest.approx(smooth_ms(key, width), rel=0.02)
    assert samples[0].facts["reference_ms"]
    with pytest.raises(ValueError, match="configs"):
        measure_blocks_ms(SMALL, [])


def test_a_table_agrees_with_itself() -> None:
    assert lut_accuracy.agreement(table(), replace(table()))["p95"] == 0.0
