"""Elasticity scaling against Algorithm 1 in exact fractions, ranges against brute force, facts of TF-NAS-A."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from fractions import Fraction

import numpy as np
import pytest
from latency_tables import published_table_path, synthetic_table
from tfnas.architecture import Architecture, Op, load_architecture
from tfnas.latency.lut import LatencyTable, LatencyTableError
from tfnas.latency.lut_io import load_table
from tfnas.scaling import architecture_range_ms, fit_widths, reachable_range_ms, refine_widths
from tfnas.space import Space, Stage
from tfnas.space_io import load_space


def tiny_space(stages: int = 2, depth: int = 2, candidates: int = 3) -> Space:
    small = load_space("small")
    return dataclasses.replace(
        small,
        fixed_channels=4,
        stages=tuple(Stage(4 + s, depth, 1 + s % 2, "relu") for s in range(stages)),
        candidates=small.candidates[:candidates],
    )


def random_architecture(space: Space, rng: np.random.Generator) -> Architecture:
    stages = []
    for layers in space.layers_of_stage:
        ops = []
        for layer in layers[: rng.integers(1, len(layers) + 1)]:
            c = int(rng.integers(len(layer.candidates)))
            ops.append(Op.of(layer, c, int(rng.integers(layer.min_width(c), layer.max_width(c) + 1))))
        stages.append(tuple(ops))
    return Architecture(space, tuple(stages))


def algorithm_1(arch: Architecture, table: LatencyTable, target_ms: float) -> tuple[list[Fraction], Architecture]:
    """The paper's listing: every factor at which any width changes is tried, in exact arithmetic."""
    chosen = []
    for i in range(len(arch.space.stages)):

        def scaled(gamma: Fraction, current: Architecture = arch, first: int = i) -> Architecture:
            stages = []
            for s, ops in enumerate(current.stages):
                new = []
                for layer, op in zip(current.space.layers_of_stage[s], ops, strict=False):
                    c = layer.candidate_index(op.candidate)
                    width = op.width
                    if s >= first:
                        rounded = math.floor(gamma * width + Fraction(1, 2))
                        width = min(max(rounded, layer.min_width(c)), layer.max_width(c))
                    new.append(dataclasses.replace(op, width=width))
                stages.append(tuple(new))
            return Architecture(current.space, tuple(stages))

        factors = {Fraction(1, 10**6)}
        for layer, op in arch.layers():
            if layer.stage >= i:
                factors |= {Fraction(2 * k - 1, 2 * op.width) for k in range(1, 200)}
        networks = {gamma: table.architecture_ms(scaled(gamma)) for gamma in factors}
        fitting = [gamma for gamma, ms in networks.items() if ms <= target_ms]
        if fitting:
            best = max(fitting)
        else:
            least = min(networks.values())
            best = max(gamma for gamma, ms in networks.items() if ms <= least * (1 + 1e-12))
        arch = scaled(best)
        chosen.append(best)
    return chosen, arch


@pytest.mark.parametrize("monotone", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_equals_algorithm_1_in_exact_arithmetic(seed: int, monotone: bool) -> None:
    rng = np.random.default_rng(seed)
    space = tiny_space(stages=3)
    table = synthetic_table(space, seed=seed, monotone=monotone)
    arch = random_architecture(space, rng)
    low, high = architecture_range_ms(arch, table)
    target_ms = rng.uniform(0.9 * low, 1.1 * high)
    result = fit_widths(arch, table, target_ms)
    _, expected = algorithm_1(arch, table, target_ms)
    assert result.architecture == expected, f"seed {seed}"
    assert result.lut_latency_ms == table.architecture_ms(expected)


@pytest.mark.parametrize("seed", range(5))
def test_reported_gammas_reproduce_the_widths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    space = load_space("small")
    table = synthetic_table(space, seed=seed)
    arch = random_architecture(space, rng)
    low, high = architecture_range_ms(arch, table)
    result = fit_widths(arch, table, rng.uniform(low, high))
    widths = [op.width for _, op in arch.layers()]
    for stage, gamma in enumerate(result.gammas):
        for n, (layer, op) in enumerate(arch.layers()):
            if layer.stage >= stage:
                c = layer.candidate_index(op.candidate)
                rounded = math.floor(gamma * widths[n] + 0.5)
                widths[n] = min(max(rounded, layer.min_width(c)), layer.max_width(c))
    assert widths == [op.width for _, op in result.architecture.layers()], f"seed {seed}"


def test_bounds_that_bind() -> None:
    space = load_space("small")
    table = synthetic_table(space)
    arch = random_architecture(space, np.random.default_rng(0))
    low, high = architecture_range_ms(arch, table)
    below = fit_widths(arch, table, 0.9 * low)
    assert below.binding == "minimum"
    assert below.lut_latency_ms == pytest.approx(low)
    above = fit_widths(arch, table, 1.1 * high)
    assert above.binding == "maximum"
    assert above.lut_latency_ms == pytest.approx(high)
    between = fit_widths(arch, table, (low + high) / 2)
    assert between.binding is None
    assert between.lut_latency_ms <= (low + high) / 2


def test_first_stage_leaves_the_others_alone() -> None:
    space = load_space("small")
    table = synthetic_table(space)
    arch = random_architecture(space, np.random.default_rng(1))
    low, high = architecture_range_ms(arch, table)
    result = fit_widths(arch, table, (low + high) / 2, first_stage=6)
    assert result.architecture.stages[:3] == arch.stages[:3]
    assert result.architecture.stages[3:] != arch.stages[3:]
    assert len(result.gammas) == len(space.stages) - 3


def test_widths_outside_the_bounds_are_brought_inside() -> None:
    space = load_space("small")
    table = synthetic_table(space)
    stages = tuple((Op.of(layers[0], 4, 1),) for layers in space.layers_of_stage)
    result = fit_widths(Architecture(space, stages), table, 1000.0)
    for layer, op in result.architecture.layers():
        assert op.width == layer.max_width(4)


def test_tf_nas_a_at_15_and_18_ms() -> None:
    table = load_table(published_table_path())
    arch, _ = load_architecture("tf-nas-a")
    assert table.architecture_ms(arch) == pytest.approx(17.9995, abs=5e-5)
    at_15 = fit_widths(arch, table, 15.0)
    assert 14.998 <= at_15.lut_latency_ms <= 15.0
    at_18 = fit_widths(arch, table, 18.0)
    for (_, op), (_, published) in zip(at_18.architecture.layers(), arch.layers(), strict=True):
        assert abs(op.width - published.width) <= 1
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        fit_widths(arch, table, 15.0)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.2  # about 0.015 on a quiet machine


@pytest.mark.parametrize(
    ("name", "expected"), [("latency_gpu.pkl", (4.0881, 27.0626)), ("latency_cpu.pkl", (19.9809, 135.9076))]
)
def test_published_ranges(name: str, expected: tuple[float, float]) -> None:
    table = load_table(published_table_path(name))
    assert reachable_range_ms(load_space("imagenet"), table) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("depth_space", ["sink", "skip-in", "skip-out"])
def test_reachable_range_is_that_of_all_networks(depth_space: str) -> None:
    space = dataclasses.replace(tiny_space(candidates=2), depth_space=depth_space)
    table = dataclasses.replace(synthetic_table(space, seed=5, monotone=False), correction=(0.1, 0.9))
    extremes = []
    for depths in itertools.product((1, 2), repeat=2):
        for choice in itertools.product(range(2), repeat=sum(depths)):
            remaining = iter(choice)
            stages = tuple(
                tuple(Op.of(layer, c := next(remaining), layer.min_width(c)) for layer in layers[:depth])
                for layers, depth in zip(space.layers_of_stage, depths, strict=True)
            )
            arch = Architecture(space, stages)
            sums = [0.0, 0.0]
            for layer, op in arch.layers():
                c = layer.candidate_index(op.candidate)
                by_width = [
                    table.latency_ms(layer.key(c), w) for w in range(layer.min_width(c), layer.max_width(c) + 1)
                ]
                sums = [sums[0] + min(by_width), sums[1] + max(by_width)]
            exact = tuple(table.total_ms(table.base_ms + ms) for ms in sums)
            assert architecture_range_ms(arch, table) == pytest.approx(exact, rel=1e-12)
            extremes += exact
    assert reachable_range_ms(space, table) == pytest.approx((min(extremes), max(extremes)), rel=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_refining_comes_closer_from_below(seed: int) -> None:
    rng = np.random.default_rng(seed)
    space = load_space("small")
    table = synthetic_table(space, seed=seed, monotone=False)
    arch = random_architecture(space, rng)
    low, _ = architecture_range_ms(arch, table)
    target_ms = table.architecture_ms(arch) * rng.uniform(1.0, 1.05)
    refined = refine_widths(arch, table, target_ms)
    assert table.architecture_ms(arch) <= table.architecture_ms(refined) <= target_ms
    between_ms = low + 0.5 * (table.architecture_ms(arch) - low)
    assert low < table.architecture_ms(refine_widths(arch, table, between_ms)) <= between_ms
    assert refine_widths(arch, table, 0.99 * low) == arch


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_bad_targets(target: float) -> None:
    space = load_space("small")
    arch = random_architecture(space, np.random.default_rng(0))
    with pytest.raises(ValueError, match="target_latency_ms"):
        fit_widths(arch, synthetic_table(space), target)


def test_other_bad_input() -> None:
    space = load_space("small")
    arch = random_architecture(space, np.random.default_rng(0))
    for stage in (2, 8):
        with pytest.raises(ValueError, match=r"first_stage: expected 3\.\.7"):
            fit_widths(arch, synthetic_table(space), 1.0, first_stage=stage)
    with pytest.raises(LatencyTableError, match="no curve"):
        fit_widths(arch, synthetic_table(load_space("imagenet")), 1.0)
    with pytest.raises(LatencyTableError, match="missing"):
        reachable_range_ms(space, synthetic_table(load_space("imagenet")))
