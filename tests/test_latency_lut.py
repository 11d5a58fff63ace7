"""The latency table: interpolation against by-hand values, coverage, and a space it does not cover."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from latency_tables import synthetic_table
from tfnas.latency.lut import Curve, LatencyTable, LatencyTableError
from tfnas.space import DEPTH_SPACES, OpKey
from tfnas.space_io import load_space

KEY = OpKey(28, 40, 40, 3, 1, 0, "swish")


def curve(widths: list[int], latency_ms: list[float], **more: object) -> Curve:
    return Curve(np.array(widths), np.array(latency_ms), **more)  # type: ignore[arg-type]


def test_linear_curve_interpolates_between_knots() -> None:
    c = curve([10, 20, 40], [1.0, 2.0, 3.0])
    assert c.latencies_ms(np.array([[10, 15], [30, 40]])).tolist() == [[1.0, 1.5], [2.5, 3.0]]
    assert c.samples.tolist() == [0, 0, 0]


def test_sawtooth_curve_reads_aligned_and_other_widths_apart() -> None:
    c = curve([17, 32, 47, 64], [2.0, 1.0, 3.0, 2.0], kind="sawtooth", period=16)
    assert c.latencies_ms(np.array([32, 48, 64])).tolist() == [1.0, 1.5, 2.0]
    assert c.latencies_ms(np.array([17, 32 - 0, 33])).tolist() == [2.0, 1.0, 2.0 + 16 / 30]
    assert c.covers(np.array([16, 17, 31, 32, 47, 49, 64])).tolist() == [False, True, True, True, True, False, True]


def test_steps_curve_depends_on_the_step_only() -> None:
    c = curve([8, 20, 40], [1.0, 2.0, 4.0], kind="steps", period=8)
    assert c.latencies_ms(np.array([1, 8, 17, 24, 25, 32, 33, 40])).tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert not c.covers(np.array([41])).any()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"widths": []}, "non-empty"),
        ({"widths": [1.5, 2.5, 3.5]}, "integers"),
        ({"widths": [0, 2, 3]}, ">= 1"),
        ({"widths": [3, 2, 5]}, "3 is followed by 2"),
        ({"widths": [2, 2, 5]}, "2 is followed by 2"),
        ({"latency_ms": [1.0, float("nan"), 2.0]}, "nan at width 2"),
        ({"latency_ms": [1.0, float("inf"), 2.0]}, "inf at width 2"),
        ({"latency_ms": [1.0, 0.0, -2.0]}, "2 such entries"),
        ({"latency_ms": [1.0, 2.0]}, "expected 3 numbers"),
        ({"latency_ms": ["fast", 2.0, 3.0]}, "expected 3 numbers"),
        ({"rel_stdev": [0.1, -0.1, 0.1]}, "rel_stdev"),
        ({"samples": [1, 1.5, 2]}, "samples"),
        ({"kind": "spline"}, "linear, sawtooth, steps"),
        ({"kind": "sawtooth", "period": 1}, "at least 2"),
        ({"kind": "sawtooth", "period": 8}, "beside"),
        ({"kind": "steps", "period": 8}, "different steps"),
        ({"period": 4}, "period 1"),
    ],
)
def test_malformed_curves_are_refused(change: dict[str, object], word: str) -> None:
    fields: dict[str, object] = {"widths": [1, 2, 3], "latency_ms": [1.0, 2.0, 3.0]} | change
    with pytest.raises(LatencyTableError, match=word):
        Curve(**fields)  # type: ignore[arg-type]


def test_never_extrapolates_and_names_key_width_and_range() -> None:
    table = LatencyTable(1.0, {KEY: curve([10, 20], [1.0, 2.0])})
    assert table.latency_ms(KEY, 15) == 1.5
    for width in (9, 21):
        with pytest.raises(LatencyTableError, match=rf"{KEY}: width {width} .* 10\.\.20"):
            table.latency_ms(KEY, width)
    with pytest.raises(LatencyTableError, match="no curve for mbinvres_r28_i40_o40_k5"):
        table.latency_ms(dataclasses.replace(KEY, kernel_size=5), 15)


@pytest.mark.parametrize("base_ms", [float("nan"), -1.0, "fast", True, None])
def test_bad_base(base_ms: object) -> None:
    with pytest.raises(LatencyTableError, match="base_ms"):
        LatencyTable(base_ms, {KEY: curve([1], [1.0])})  # type: ignore[arg-type]


def test_correction_is_affine_and_checked() -> None:
    assert LatencyTable(1.0, {KEY: curve([1], [1.0])}, {}, (0.5, 2.0)).total_ms(3.0) == 6.5
    for correction in ((float("nan"), 1.0), (0.0, 0.0), (0.0, -1.0)):
        with pytest.raises(LatencyTableError, match="correction"):
            LatencyTable(1.0, {KEY: curve([1], [1.0])}, {}, correction)


@pytest.mark.parametrize("depth_space", DEPTH_SPACES)
def test_require_space_knows_every_depth_space(depth_space: str) -> None:
    space = dataclasses.replace(load_space("small"), depth_space=depth_space)
    synthetic_table(space).require_space(space)


def test_require_space_lists_missing_keys_and_widths() -> None:
    space = load_space("small")
    curves = {key: curve([1, 4096], [1.0, 2.0]) for key in space.keys}
    LatencyTable(1.0, curves).require_space(space)
    short, absent = space.keys[1], space.keys[3]
    curves[short] = curve([1, 33], [1.0, 2.0])
    del curves[absent]
    with pytest.raises(LatencyTableError) as caught:
        LatencyTable(1.0, curves).require_space(space)
    message = str(caught.value)
    assert f"{absent} (no curve)" in message
    assert str(short) in message
    assert "1..33" in message
    assert f"2 of {len(space.keys)}" in message
