"""From architecture parameters to a discrete network: the strongest, or the most probable that meets a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from tfnas.architecture import Architecture, Op
from tfnas.latency.lut import FloatArray, LatencyTable
from tfnas.repair import most_probable_choice
from tfnas.scaling import ScalingResult, check_target, fit_widths, reachable_range_ms, refine_widths
from tfnas.space import Space

Widths = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Derivation:
    """A derived network and how it was found.

    `architecture` has the latency `lut_latency_ms` (corrected, by the table); `kept` are the indices of the supernet
    layers that its layers come from, in network order. `repaired` tells that the strongest network cannot meet the
    target at any width and a less probable one was taken; `unrepaired` is then the strongest network after scaling,
    with its latency `unrepaired_latency_ms`, else both are None. `scaling` is the result of Algorithm 1.
    """

    architecture: Architecture
    lut_latency_ms: float
    kept: tuple[int, ...]
    scaling: ScalingResult
    repaired: bool = False
    unrepaired: Architecture | None = None
    unrepaired_latency_ms: float | None = None

    def is_within(self, target_latency_ms: float, tolerance: float) -> bool:
        """Whether the latency is at most the target and at most the share `tolerance` below it."""
        return (1 - tolerance) * target_latency_ms <= self.lut_latency_ms <= target_latency_ms


def derive(space: Space, log_alpha: Tensor | FloatArray, log_beta: Tensor | FloatArray, widths: Widths) -> Architecture:
    """The seed network: the strongest operation of each layer and the strongest depth of each stage (paper, 3.3).

    `log_alpha` [L, C] and `log_beta` are log-probabilities, -inf where there is no choice: with `sink`, `log_beta`
    [S, D] is that of depth d + 1 in column d; with `skip-out`, [L, 2] is that of (skip, keep) of each layer but a
    stage's first; with `skip-in` the depth follows from `skip` in `log_alpha` and `log_beta` is not read. `widths`
    [L][candidates of the layer] are the supernet's. Ties go to the first candidate, the smallest depth, and to keeping
    a layer. Raises `ValueError` for other shapes, NaN, or a layer or stage without any choice.
    """
    alpha, beta = _checked(space, log_alpha, log_beta)
    return _network(space, _strongest(space, alpha, beta), widths)


def kept_layers(space: Space, log_alpha: Tensor | FloatArray, log_beta: Tensor | FloatArray) -> tuple[int, ...]:
    """Indices of the supernet layers that `derive` keeps, in network order; arguments and errors as for `derive`."""
    return tuple(layer for layer, _ in _strongest(space, *_checked(space, log_alpha, log_beta)))


def derive_within_target(
    space: Space,
    log_alpha: Tensor | FloatArray,
    log_beta: Tensor | FloatArray,
    widths: Widths,
    table: LatencyTable,
    target_latency_ms: float,
    tolerance: float = 0.01,
) -> Derivation:
    """The most probable network with a latency in [(1 - tolerance) target, target] by the table.

    First the seed network of `derive`, its widths fitted by Algorithm 1. If that misses the target because its widths
    cannot reach it, the most probable network (sum of the log alphas of its operations and the log betas of its depths)
    whose range of latencies over all widths contains the target, found by exact search, and fitted likewise. Where
    scaling stops short because a curve jumps, single widths are moved closer (`refine_widths`). Only a table whose
    curves jump by more than the tolerance leaves the result outside it: ask `is_within`. Deterministic.

    Raises `ValueError` for malformed parameters or a target that no network of the space can reach, with the range.
    """
    check_target(target_latency_ms)
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance: expected a share between 0 and 1, got {tolerance}")
    alpha, beta = _checked(space, log_alpha, log_beta)
    seed_choice = _strongest(space, alpha, beta)
    seed = _fitted(space, seed_choice, widths, table, target_latency_ms, tolerance)
    if seed.is_within(target_latency_ms, tolerance):
        return seed
    choice = most_probable_choice(space, alpha, beta, table, target_latency_ms)
    if choice is None:
        low_ms, high_ms = reachable_range_ms(space, table)
        raise ValueError(
            f"target_latency_ms: no network of space {space.name!r} with these probabilities reaches "
            f"{target_latency_ms:g} ms; the space reaches {low_ms:.4f} to {high_ms:.4f} ms by the latency table"
        )
    found = _fitted(space, choice, widths, table, target_latency_ms, tolerance)
    return replace(found, repaired=True, unrepaired=seed.architecture, unrepaired_latency_ms=seed.lut_latency_ms)


def _fitted(
    space: Space,
    choice: list[tuple[int, int]],
    widths: Widths,
    table: LatencyTable,
    target_latency_ms: float,
    tolerance: float,
) -> Derivation:
    """A choice of layers and candidates with widths by Algorithm 1, refined only where that is outside tolerance."""
    scaling = fit_widths(_network(space, choice, widths), table, target_latency_ms)
    kept = tuple(layer for layer, _ in choice)
    found = Derivation(scaling.architecture, scaling.lut_latency_ms, kept, scaling)
    if found.is_within(target_latency_ms, tolerance):
        return found
    refined = refine_widths(scaling.architecture, table, target_latency_ms)
    return Derivation(refined, table.architecture_ms(refined), kept, scaling)


def _network(space: Space, choice: list[tuple[int, int]], widths: Widths) -> Architecture:
    """The network of (supernet layer, candidate) pairs at the supernet's widths."""
    if [len(row) for row in widths] != [len(layer.candidates) for layer in space.layers]:
        raise ValueError(f"widths: expected one width for every candidate of {len(space.layers)} layers")
    stages: list[list[Op]] = [[] for _ in space.stages]
    for index, c in choice:
        ops = stages[space.layers[index].stage]
        # a network lists only what it keeps: layers after a stage's first have one shape and move up
        layer = space.layers_of_stage[space.layers[index].stage][len(ops)]
        ops.append(Op.of(layer, c, int(widths[index][c])))
    return Architecture(space, tuple(tuple(ops) for ops in stages))


def _strongest(space: Space, log_alpha: FloatArray, log_beta: FloatArray) -> list[tuple[int, int]]:
    choice = []
    for layers in space.layers_of_stage:
        depth = int(np.argmax(log_beta[layers[0].stage])) + 1 if space.depth_space == "sink" else len(layers)
        for layer in layers[:depth]:
            c = int(np.argmax(log_alpha[layer.index, : len(layer.candidates)]))
            gated = space.depth_space == "skip-out" and layer.position > 0
            if layer.candidates[c].is_skip or (gated and log_beta[layer.index, 0] > log_beta[layer.index, 1]):
                continue
            choice.append((layer.index, c))
    return choice


def _checked(
    space: Space, log_alpha: Tensor | FloatArray, log_beta: Tensor | FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Both as float64 arrays, -inf where the space has no choice."""
    alpha = _array("log_alpha", log_alpha, (len(space.layers), space.max_candidates))
    for layer in space.layers:
        alpha[layer.index, len(layer.candidates) :] = -np.inf
        if not np.any(alpha[layer.index] > -np.inf):
            raise ValueError(f"log_alpha[{layer.index}]: every candidate is -inf")
    if space.depth_space == "skip-in":
        return alpha, np.zeros((len(space.stages), space.max_depth))
    if space.depth_space == "skip-out":
        beta = _array("log_beta", log_beta, (len(space.layers), 2))
        rows = [layer.index for layer in space.layers if layer.position > 0]
    else:
        beta = _array("log_beta", log_beta, (len(space.stages), space.max_depth))
        for s, stage in enumerate(space.stages):
            beta[s, stage.depth :] = -np.inf
        rows = list(range(len(space.stages)))
    for row in rows:
        if not np.any(beta[row] > -np.inf):
            raise ValueError(f"log_beta[{row}]: every choice is -inf")
    return alpha, beta


def _array(name: str, values: Tensor | FloatArray, shape: tuple[int, int]) -> FloatArray:
    raw = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values
    array = np.array(raw, dtype=np.float64)
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    if np.any(np.isnan(array)) or np.any(array == np.inf):
        raise ValueError(f"{name}: expected log-probabilities, got NaN or infinity")
    return array
