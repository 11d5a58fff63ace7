"""Knot placement: replay on a published table, curves with steps, sawtooth and noise, resuming, budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from latency_tables import published_table_path
from tfnas.latency.knots import KnotPlacement, Measurement, searchable_ranges
from tfnas.latency.lut import Curve, LatencyTable
from tfnas.latency.lut_io import load_table
from tfnas.space import OpKey
from tfnas.space_io import load_space

KEY = OpKey(28, 40, 40, 3, 1, 0, "swish")
Truth = Callable[[int], float]


def relative_errors(
    curves: Mapping[OpKey, Curve], truth: LatencyTable, ranges: Mapping[OpKey, tuple[int, int]]
) -> np.ndarray:
    errors = []
    for key, (low, high) in ranges.items():
        widths = np.arange(low, high + 1)
        errors.append(np.abs(curves[key].latencies_ms(widths) / truth.latencies_ms(key, widths) - 1))
    return np.concatenate(errors)


def place_knots(
    measure: Callable[[OpKey, int], Measurement], placement: KnotPlacement, *, max_queries: int | None = None
) -> dict[OpKey, Curve]:
    """Measure one width at a time, the most telling first, until within tolerance or `max_queries`; the curves."""
    while max_queries is None or placement.query_count < max_queries:
        queries = placement.wanted()
        if not queries:
            break
        key, width = queries[0]
        found = measure(key, width)
        placement.record(key, width, found.latency_ms, rel_stdev=found.rel_stdev, samples=found.samples)
    return placement.curves()


def place(truth: Truth, low: int = 80, high: int = 640, **options: float) -> tuple[Curve, KnotPlacement]:
    placement = KnotPlacement({KEY: (low, high)}, **options)  # type: ignore[arg-type]
    curves = place_knots(lambda _, width: Measurement(truth(width)), placement)
    return curves[KEY], placement


def worst_error(curve: Curve, truth: Truth, low: int = 80, high: int = 640) -> float:
    widths = np.arange(low, high + 1)
    exact = np.array([truth(int(width)) for width in widths])
    return float(np.abs(curve.latencies_ms(widths) / exact - 1).max())


def test_replay_on_the_published_gpu_table() -> None:
    truth = load_table(published_table_path())
    # the upper half of each curve, which is what the published code could search of it: 18,306 widths
    ranges = {key: (high // 2, high) for key, (_, high) in searchable_ranges(load_space("imagenet")).items()}
    assert sum(high - low + 1 for low, high in ranges.values()) == 18306
    placement = KnotPlacement(ranges)
    curves = place_knots(lambda key, width: Measurement(truth.latency_ms(key, width)), placement)
    errors = relative_errors(curves, truth, ranges)
    assert placement.query_count <= 520
    assert errors.mean() <= 0.003
    assert np.percentile(errors, 95) <= 0.01


@pytest.mark.parametrize(
    ("name", "queries"), [("latency_gpu.pkl", 700), pytest.param("latency_cpu.pkl", 850, marks=pytest.mark.slow)]
)
def test_replay_on_every_width_the_space_can_ask(name: str, queries: int) -> None:
    truth = load_table(published_table_path(name))
    space = load_space("imagenet")
    ranges = searchable_ranges(space)
    assert sum(high - low + 1 for low, high in ranges.values()) == 21954
    placement = KnotPlacement(ranges)
    curves = place_knots(lambda key, width: Measurement(truth.latency_ms(key, width)), placement)
    LatencyTable(1.0, curves).require_space(space)
    errors = relative_errors(curves, truth, ranges)
    assert placement.query_count <= queries
    assert errors.mean() <= 0.003
    assert np.percentile(errors, 95) <= 0.01


def test_a_straight_line_needs_few_widths() -> None:
    curve, placement = place(lambda width: 0.1 + 0.002 * width)
    assert placement.query_count <= 6
    assert curve.kind == "linear"
    assert worst_error(curve, lambda width: 0.1 + 0.002 * width) < 1e-9


def test_a_bent_curve_is_within_tolerance() -> None:
    def truth(width: int) -> float:
        return 0.05 + 1e-5 * width**1.7

    curve, _ = place(truth)
    assert worst_error(curve, truth) < 0.01


@pytest.mark.parametrize("edge", [100, 256, 333, 511])
def test_one_step_is_closed_in_on(edge: int) -> None:
    def truth(width: int) -> float:
        return (0.5 if width <= edge else 0.65) + 1e-4 * width

    curve, placement = place(truth)
    widths = np.arange(80, 641)
    wrong = np.abs(curve.latencies_ms(widths) / np.array([truth(int(width)) for width in widths]) - 1) > 0.01
    assert wrong.sum() < 8
    assert placement.query_count <= 24


def test_sawtooth_is_recognised_and_read_at_both_kinds_of_width() -> None:
    def truth(width: int) -> float:
        return (0.1 + 0.001 * width) * (1.0 if width % 16 == 0 else 1.15)

    curve, placement = place(truth)
    assert (curve.kind, curve.period) == ("sawtooth", 16)
    assert worst_error(curve, truth) < 1e-3
    assert placement.query_count <= 14
    plain, _ = place(truth, period=1)
    assert worst_error(plain, truth) > 0.1  # without the kind, one class of widths is 15 % off


def test_steps_are_recognised() -> None:
    def truth(width: int) -> float:
        return 0.1 + 0.032 * math.ceil(width / 32)

    curve, placement = place(truth, period=32)
    assert (curve.kind, curve.period) == ("steps", 32)
    assert worst_error(curve, truth) < 1e-9
    assert placement.query_count <= 14


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_not_chased(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sigma, samples = 0.05, 25

    def noisy(_: OpKey, width: int) -> Measurement:
        draws = (0.1 + 0.002 * width) * rng.normal(1, sigma, samples)
        return Measurement(float(np.median(draws)), float(draws.std() / np.median(draws)), samples)

    placement = KnotPlacement({KEY: (80, 640)})
    curve = place_knots(noisy, placement)[KEY]
    assert placement.query_count <= 16, f"seed {seed}"  # every fourth width at most, were the noise believed: 65
    assert curve.kind == "linear"
    assert curve.samples.tolist() == [samples] * curve.widths.size


@pytest.mark.parametrize("seed", range(2))
def test_order_does_not_matter_and_a_build_resumes(seed: int) -> None:
    space = load_space("small")
    ranges = searchable_ranges(space)
    bends = np.random.default_rng(7).uniform(0.6, 1.8, len(ranges))
    power = dict(zip(ranges, bends, strict=True))

    def truth(key: OpKey, width: int) -> float:
        return (0.05 + 1e-4 * width ** power[key]) * (1.1 if width % 16 and key.resolution > 7 else 1.0)

    straight = KnotPlacement(ranges)
    expected = place_knots(lambda key, width: Measurement(truth(key, width)), straight)

    rng = np.random.default_rng(seed)
    placement = KnotPlacement(ranges)
    while queries := placement.wanted():
        key, width = queries[rng.integers(len(queries))]
        placement.record(key, width, truth(key, width))
        if rng.random() < 0.05:  # interrupted: a new placement is told what was measured
            known = placement.curves()
            placement = KnotPlacement(ranges)
            for known_key, curve in known.items():
                for known_width, latency_ms in zip(curve.widths, curve.latency_ms, strict=True):
                    placement.record(known_key, int(known_width), float(latency_ms))
    found = placement.curves()
    for key, (low, high) in ranges.items():
        widths = np.arange(low, high + 1)
        exact = np.array([truth(key, int(width)) for width in widths])
        for curves in (expected, found):
            error = np.abs(curves[key].latencies_ms(widths) / exact - 1)
            assert error.max() < 0.03, f"seed {seed}, {key}"


def test_a_budget_stops_and_covers_the_ends_first() -> None:
    space = load_space("imagenet")
    ranges = searchable_ranges(space)
    placement = KnotPlacement(ranges)
    curves = place_knots(lambda _, width: Measurement(0.1 + 1e-6 * width**2), placement, max_queries=160)
    assert placement.query_count == 160
    LatencyTable(1.0, curves).require_space(space)


def test_a_single_width_and_narrow_ranges() -> None:
    for low, high in ((7, 7), (7, 8), (15, 17), (16, 16), (1, 40)):
        curve, _ = place(lambda width: 0.1 * width, low, high)
        assert curve.covers(np.arange(low, high + 1)).all()


@pytest.mark.parametrize(
    ("options", "word"),
    [({"tolerance": 0.0}, "tolerance"), ({"period": 0}, "period"), ({"min_gap": 0}, "min_gap")],
)
def test_bad_options(options: dict[str, float], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        KnotPlacement({KEY: (8, 16)}, **options)  # type: ignore[arg-type]


def test_bad_ranges_and_records() -> None:
    for low, high in ((0, 4), (8, 7)):
        with pytest.raises(ValueError, match="ranges"):
            KnotPlacement({KEY: (low, high)})
    placement = KnotPlacement({KEY: (8, 16)})
    with pytest.raises(ValueError, match=r"8\.\.16"):
        placement.record(KEY, 17, 1.0)
    with pytest.raises(ValueError, match="not one of"):
        placement.record(OpKey(1, 1, 1, 3, 1, 0, "relu"), 8, 1.0)
    for latency_ms in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="latency_ms"):
            placement.record(KEY, 8, latency_ms)
