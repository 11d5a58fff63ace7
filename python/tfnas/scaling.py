"""Elasticity scaling (paper, Algorithm 1) and the range of latencies that can be reached.

Widths are integers, so a scaling factor gamma matters only at the values where some width changes: a few thousand
breakpoints. All of them are tried, which makes "the largest gamma that fits" exact, for tables that are not monotone
too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tfnas.architecture import Architecture, Op
from tfnas.latency.lut import FloatArray, LatencyTable
from tfnas.space import Layer, OpKey, Space

# Sums of the same latencies in another order differ by less than this share; exact sums decide within it.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class ScalingResult:
    """A network after elasticity scaling.

    `lut_latency_ms` is its corrected latency by the table. `gammas` holds the factor of every step (stages i..last for
    i = first, first + 1, ...), each from the middle of the interval of factors that give the same widths. `binding`
    names the bound that keeps the network from its target: "minimum" where even the least latency that scaling can
    give is above it, "maximum" where all widths are at their maximum; None where neither holds.
    """

    architecture: Architecture
    lut_latency_ms: float
    gammas: tuple[float, ...]
    binding: Literal["minimum", "maximum"] | None


def fit_widths(
    arch: Architecture, table: LatencyTable, target_latency_ms: float, *, first_stage: int = Space.first_stage
) -> ScalingResult:
    """Algorithm 1: scale the widths of `arch` so that its latency comes up to `target_latency_ms` from below.

    For i = `first_stage` .. the last stage: multiply the current widths of stages i.. by the largest gamma whose
    latency is at most the target; a width is clamp(round half up(gamma * w), min_width, max_width) of its candidate.
    Where no gamma fits, the one with the least latency is taken (the larger of equals), and `binding` says "minimum".
    Exact and deterministic. Raises `ValueError` for a target that is not above 0 or an unknown stage,
    `LatencyTableError` where the table does not cover a width.
    """
    check_target(target_latency_ms)
    space = arch.space
    last_stage = space.first_stage + len(space.stages) - 1
    if not space.first_stage <= first_stage <= last_stage:
        raise ValueError(f"first_stage: expected {space.first_stage}..{last_stage}, got {first_stage}")
    layers = [_ElasticLayer.of(layer, op, table) for layer, op in arch.layers()]
    widths = [op.width for _, op in arch.layers()]
    gammas = []
    for stage in range(first_stage - space.first_stage, len(space.stages)):
        scaled = [n for n, layer in enumerate(layers) if layer.stage >= stage]
        gamma, widths = _largest_fitting(layers, widths, scaled, table, target_latency_ms)
        gammas.append(gamma)
    lut_latency_ms = _latency_ms(layers, widths, table)
    at_maximum = all(width == layer.max_width for layer, width in zip(layers, widths, strict=True))
    binding: Literal["minimum", "maximum"] | None = None
    if lut_latency_ms > target_latency_ms:
        binding = "minimum"
    elif at_maximum:
        binding = "maximum"
    return ScalingResult(with_widths(arch, widths), lut_latency_ms, tuple(gammas), binding)


def refine_widths(arch: Architecture, table: LatencyTable, target_latency_ms: float) -> Architecture:
    """Come closer to the target from below by changing one width at a time (not part of Algorithm 1).

    Scaling all widths alike can stop short of the target where a curve jumps. In sweeps from the last layer to the
    first, a layer takes the width that brings the network's latency closest to the target without exceeding it, until a
    sweep changes nothing. A network above the target starts from the widths of least latency; where these are above it
    too, or nothing comes closer, the network is returned as it is. Errors as for `fit_widths`.
    """
    check_target(target_latency_ms)
    layers = [_ElasticLayer.of(layer, op, table) for layer, op in arch.layers()]
    widths = [op.width for _, op in arch.layers()]
    best_ms = _latency_ms(layers, widths, table)
    if best_ms > target_latency_ms:
        fastest = [layer.min_width + int(np.argmin(layer.latency_ms)) for layer in layers]
        best_ms = _latency_ms(layers, fastest, table)
        if best_ms > target_latency_ms:
            return arch
        widths = fastest
    improved = True
    while improved:
        improved = False
        for n in reversed(range(len(layers))):
            layer = layers[n]
            rest_ms = math.fsum(table.latency_ms(layers[m].key, widths[m]) for m in range(len(layers)) if m != n)
            totals_ms = table.total_ms(table.base_ms + rest_ms + layer.latency_ms)
            for at in np.argsort(-totals_ms, kind="stable"):
                if totals_ms[at] > target_latency_ms:
                    continue
                if totals_ms[at] <= best_ms * (1 + _ROUNDING):
                    break
                trial = [*widths[:n], layer.min_width + int(at), *widths[n + 1 :]]
                trial_ms = _latency_ms(layers, trial, table)
                if best_ms < trial_ms <= target_latency_ms:
                    widths, best_ms, improved = trial, trial_ms, True
                    break
    return with_widths(arch, widths)


def reachable_range_ms(space: Space, table: LatencyTable) -> tuple[float, float]:
    """Least and greatest corrected latency in ms of all networks of the space: all depths, candidates and widths.

    Raises `LatencyTableError`, listing what is missing, where the table does not cover the space.
    """
    table.require_space(space)
    low_ms, high_ms = [], []
    for layers in space.layers_of_stage:
        bounds = [candidate_range_ms(layer, table) for layer in layers]
        # a layer's latency is above 0, so that depth 1 is the least and full depth the greatest
        low_ms.append(min(low for low, _ in bounds[0]))
        high_ms += [max(high for _, high in of_layer) for of_layer in bounds]
    return table.total_ms(table.base_ms + math.fsum(low_ms)), table.total_ms(table.base_ms + math.fsum(high_ms))


def architecture_range_ms(arch: Architecture, table: LatencyTable) -> tuple[float, float]:
    """Least and greatest corrected latency in ms of a network over all widths, operations and depths as they are."""
    bounds = [_ElasticLayer.of(layer, op, table).latency_ms for layer, op in arch.layers()]
    low_ms = math.fsum(latencies.min() for latencies in bounds)
    high_ms = math.fsum(latencies.max() for latencies in bounds)
    return table.total_ms(table.base_ms + low_ms), table.total_ms(table.base_ms + high_ms)


def candidate_range_ms(layer: Layer, table: LatencyTable) -> list[tuple[float, float]]:
    """Least and greatest uncorrected latency in ms over the widths of each candidate of a layer, `skip` left out."""
    ranges = []
    for c, candidate in enumerate(layer.candidates):
        if not candidate.is_skip:
            widths = np.arange(layer.min_width(c), layer.max_width(c) + 1)
            latencies_ms = table.latencies_ms(layer.key(c), widths)
            ranges.append((float(latencies_ms.min()), float(latencies_ms.max())))
    return ranges


def with_widths(arch: Architecture, widths: Sequence[int]) -> Architecture:
    """The same operations and depths with one new width for each kept layer, in network order."""
    remaining = iter(widths)
    stages = tuple(tuple(replace(op, width=next(remaining)) for op in ops) for ops in arch.stages)
    return Architecture(arch.space, stages)


def check_target(target_latency_ms: float) -> None:
    """Raise `ValueError` unless a target is a finite number of milliseconds above 0."""
    if not (math.isfinite(target_latency_ms) and target_latency_ms > 0):
        raise ValueError(f"target_latency_ms: expected a finite number of ms above 0, got {target_latency_ms}")


@dataclass(frozen=True, eq=False)
class _ElasticLayer:
    """A kept layer: latency in ms (uncorrected) of each of its widths `min_width` .. `max_width`."""

    stage: int
    key: OpKey
    min_width: int
    max_width: int
    latency_ms: FloatArray

    @classmethod
    def of(cls, layer: Layer, op: Op, table: LatencyTable) -> _ElasticLayer:
        c = layer.candidate_index(op.candidate)
        key, low, high = layer.key(c), layer.min_width(c), layer.max_width(c)
        return cls(layer.stage, key, low, high, table.latencies_ms(key, np.arange(low, high + 1)))

    def breakpoints(self, width: int) -> FloatArray:
        """The factors at which round half up(gamma * width) becomes min_width + 1, ..., max_width."""
        return (2 * np.arange(self.min_width + 1, self.max_width + 1) - 1) / (2 * width)


def _latency_ms(layers: Sequence[_ElasticLayer], widths: Sequence[int], table: LatencyTable) -> float:
    """As `LatencyTable.architecture_ms`, to the last bit."""
    blocks = zip(layers, widths, strict=True)
    return table.total_ms(table.base_ms + math.fsum(table.latency_ms(layer.key, width) for layer, width in blocks))


def _largest_fitting(
    layers: Sequence[_ElasticLayer],
    widths: Sequence[int],
    scaled: Sequence[int],
    table: LatencyTable,
    target_latency_ms: float,
) -> tuple[float, list[int]]:
    """The largest gamma for the layers `scaled` whose latency fits, and all widths it gives.

    State 0 has all scaled layers at their minimum, state j > 0 is reached at the j-th smallest breakpoint; latencies of
    all states are running sums. Equal quotients of integers are equal floats and distinct ones are far apart, so that
    sorting floats sorts the breakpoints exactly.
    """
    own = [layers[n].breakpoints(widths[n]) for n in scaled]
    gammas = np.concatenate(own)
    order = np.argsort(gammas, kind="stable")
    gammas = gammas[order]
    steps_ms = np.concatenate([np.diff(layers[n].latency_ms) for n in scaled])[order]
    start = list(widths)
    for n in scaled:
        start[n] = layers[n].min_width
    start_ms = math.fsum(table.latency_ms(layer.key, width) for layer, width in zip(layers, start, strict=True))
    sums_ms = start_ms + np.concatenate([[0.0], np.cumsum(steps_ms)])
    totals_ms = table.total_ms(table.base_ms + sums_ms)
    # widths that change at the same gamma change together: only the last of equal breakpoints is a state
    is_last = np.append(gammas[1:] != gammas[:-1], np.ones(min(gammas.size, 1), dtype=bool))
    states = np.append(0, 1 + np.flatnonzero(is_last))

    def widths_at(state: int) -> list[int]:
        result = list(start)
        if state > 0:
            for n, breakpoints in zip(scaled, own, strict=True):
                result[n] += int(np.searchsorted(breakpoints, gammas[state - 1], side="right"))
        return result

    def factor_of(state: int) -> float:
        if 0 < state < gammas.size:
            return float((gammas[state - 1] + gammas[state]) / 2)
        bounds = [layers[n].max_width if state else layers[n].min_width for n in scaled]
        factors = [bound / widths[n] for bound, n in zip(bounds, scaled, strict=True)]
        return max(factors) if state else min(factors)

    near = states[totals_ms[states] <= target_latency_ms * (1 + _ROUNDING)]
    for state in near[::-1]:
        found = widths_at(int(state))
        if _latency_ms(layers, found, table) <= target_latency_ms:
            return factor_of(int(state)), found
    least = totals_ms[states].min()
    state = int(states[totals_ms[states] <= least * (1 + _ROUNDING)][-1])
    return factor_of(state), widths_at(state)
