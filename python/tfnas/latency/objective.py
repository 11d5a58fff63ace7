"""Expected latency of a mixture, differentiable in its weights, and the latency term of the search's loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tfnas.latency.lut import LatencyTable
from tfnas.space import Space


@dataclass(frozen=True)
class LayerLatencies:
    """Latencies of all candidates of all layers at their widths: what an epoch's expected latencies are made of.

    `block_ms` [L, C], uncorrected, 0 for `skip` and where a layer has fewer candidates; `base_ms` of what is not
    searched; `correction` (offset in ms, slope) as in `LatencyTable`.
    """

    block_ms: Tensor
    base_ms: float
    correction: tuple[float, float] = (0.0, 1.0)

    def to(self, like: Tensor) -> LayerLatencies:
        """The same with `block_ms` of the device and dtype of `like`."""
        return replace(self, block_ms=self.block_ms.to(like))


def layer_latencies_ms(space: Space, table: LatencyTable, widths: Sequence[Sequence[int]]) -> LayerLatencies:
    """Look up every candidate of every layer at `widths` [L][C of the layer] (float64, CPU).

    Build once an epoch: widths change only between epochs. The width of `skip` is ignored. Raises `ValueError` where
    `widths` has another shape than the space, `LatencyTableError` where the table has no answer.
    """
    if len(widths) != len(space.layers):
        raise ValueError(f"widths: expected one row for each of the {len(space.layers)} layers, got {len(widths)}")
    block_ms = np.zeros((len(space.layers), space.max_candidates))
    for layer, row in zip(space.layers, widths, strict=True):
        if len(row) != len(layer.candidates):
            raise ValueError(f"widths[{layer.index}]: expected {len(layer.candidates)} candidates, got {len(row)}")
        for c, candidate in enumerate(layer.candidates):
            if not candidate.is_skip:
                block_ms[layer.index, c] = table.latency_ms(layer.key(c), int(row[c]))
    return LayerLatencies(torch.from_numpy(block_ms), table.base_ms, table.correction)


def expected_latency_ms(space: Space, latencies: LayerLatencies, u: Tensor, v: Tensor) -> Tensor:
    """Expected latency in ms (0-d, dtype and device of `u`) of the mixture; differentiable in `u` and `v`.

    `u` [L, C] are the candidates' weights (Eq. 3), 0 where there is none. With depth spaces `sink` and `skip-in`, `v`
    [S, D] weighs the depths 1..D of each stage and LAT = base + sum_s sum_l v_l sum_{m <= l} sum_i u_i^m LAT(op_i^m):
    a depth costs every layer up to it. (Eq. 6 as printed weighs a layer's own latency only; one-hot weights would not
    give the derived network's.) With `skip-out`, `v` [L, 2] are the weights (skip, keep) of each layer. The correction
    of the table is applied. Deterministic; raises `ValueError` for other shapes.
    """
    depth_shape = (len(space.layers), 2) if space.depth_space == "skip-out" else (len(space.stages), space.max_depth)
    for name, weights, shape in (("u", u, tuple(latencies.block_ms.shape)), ("v", v, depth_shape)):
        if tuple(weights.shape) != shape:
            raise ValueError(
                f"{name}: expected shape {shape} for a {space.depth_space} space, got {tuple(weights.shape)}"
            )
    layer_ms = (u * latencies.block_ms.to(u)).sum(1)
    keep = v[:, 1] if space.depth_space == "skip-out" else _keep_weights(space, v)
    offset_ms, slope = latencies.correction
    return offset_ms + slope * (latencies.base_ms + (keep * layer_ms).sum())


def _keep_weights(space: Space, v: Tensor) -> Tensor:
    """Weight [L] with which each layer runs: the sum of the weights of its stage's depths that include it."""
    at_least = v.flip(1).cumsum(1).flip(1)
    return torch.cat([at_least[s, : len(layers)] for s, layers in enumerate(space.layers_of_stage)])


def hinge(latency_ms: Tensor, target_latency_ms: float, exponent: float) -> Tensor:
    """Eq. 9: max(LAT / target - 1, 0)."""
    return (latency_ms / target_latency_ms - 1).clamp_min(0)


def absolute(latency_ms: Tensor, target_latency_ms: float, exponent: float) -> Tensor:
    """The published code's variant: |LAT / target - 1|."""
    return (latency_ms / target_latency_ms - 1).abs()


def c1(latency_ms: Tensor, target_latency_ms: float, exponent: float) -> Tensor:
    """C1 of Table 5, read as (log LAT)^exponent with LAT in ms; 0 below 1 ms, where powers of the log may not exist."""
    log = latency_ms.log()
    positive = log > 0
    # the inner `where` keeps the gradient of the unused branch finite
    return torch.where(positive, torch.where(positive, log, torch.ones_like(log)) ** exponent, torch.zeros_like(log))


def c2(latency_ms: Tensor, target_latency_ms: float, exponent: float) -> Tensor:
    """C2 of Table 5: LAT in ms."""
    return latency_ms


OBJECTIVES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "hinge": hinge,
    "absolute": absolute,
    "c1": c1,
    "c2": c2,
}


def latency_objective(
    name: str, latency_ms: Tensor, target_latency_ms: float, *, weight: float = 0.1, exponent: float = 1.0
) -> Tensor:
    """The latency term `weight` * C(LAT) of Eq. 7 (0-d, differentiable in `latency_ms`).

    `name` is a key of `OBJECTIVES`; `weight` is lambda (lambda_1 of C1 and C2), `exponent` is lambda_2 of C1, which the
    others do not use. Raises `ValueError` for an unknown name or a target that is not above 0.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {name!r}")
    if not (math.isfinite(target_latency_ms) and target_latency_ms > 0):
        raise ValueError(f"target_latency_ms: expected a finite number of ms above 0, got {target_latency_ms}")
    return weight * OBJECTIVES[name](latency_ms, target_latency_ms, exponent)
