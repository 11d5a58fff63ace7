"""Expected latency: one-hot weights give the derived network's sum, the mixture its expectation, gradients checked."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from latency_tables import synthetic_table
from tfnas.architecture import Architecture, Op
from tfnas.latency.lut import LatencyTable
from tfnas.latency.objective import OBJECTIVES, expected_latency_ms, latency_objective, layer_latencies_ms
from tfnas.space import DEPTH_SPACES, Space
from tfnas.space_io import load_space
from torch import Tensor


def space_of(depth_space: str, name: str = "small") -> Space:
    return dataclasses.replace(load_space(name), depth_space=depth_space)


def corrected_table(space: Space) -> LatencyTable:
    return dataclasses.replace(synthetic_table(space, seed=3), correction=(0.25, 1.07))


def random_widths(space: Space, rng: np.random.Generator) -> list[list[int]]:
    return [
        [int(rng.integers(layer.min_width(c), layer.max_width(c) + 1)) for c in range(len(layer.candidates))]
        for layer in space.layers
    ]


def random_network(
    space: Space, widths: list[list[int]], rng: np.random.Generator
) -> tuple[Architecture, Tensor, Tensor]:
    """A random discrete network with its one-hot weights u and v."""
    u = torch.zeros(len(space.layers), space.max_candidates, dtype=torch.float64)
    v = torch.zeros(len(space.stages), space.max_depth, dtype=torch.float64)
    gates = torch.zeros(len(space.layers), 2, dtype=torch.float64)
    stages = []
    for s, layers in enumerate(space.layers_of_stage):
        depth = int(rng.integers(1, len(layers) + 1))
        v[s, (len(layers) if space.depth_space == "skip-in" else depth) - 1] = 1
        ops = []
        for layer in layers:
            c = int(rng.integers(len(layer.candidates)))
            kept = rng.random() < 0.5 or layer.position == 0
            if space.depth_space != "sink":
                gates[layer.index, int(kept)] = 1
            u[layer.index, c] = 1
            is_in = {"sink": layer.position < depth, "skip-in": not layer.candidates[c].is_skip, "skip-out": kept}
            if is_in[space.depth_space]:
                ops.append(Op.of(layers[len(ops)], c, widths[layer.index][c]))
        stages.append(tuple(ops))
    return Architecture(space, tuple(stages)), u, gates if space.depth_space == "skip-out" else v


@pytest.mark.parametrize("depth_space", DEPTH_SPACES)
@pytest.mark.parametrize("seed", range(5))
def test_one_hot_weights_give_the_derived_networks_latency(depth_space: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    space = space_of(depth_space, ("small", "imagenet")[seed % 2])
    table = corrected_table(space)
    widths = random_widths(space, rng)
    arch, u, v = random_network(space, widths, rng)
    found = expected_latency_ms(space, layer_latencies_ms(space, table, widths), u, v)
    assert float(found) == pytest.approx(table.architecture_ms(arch), rel=1e-14), f"seed {seed}"


def test_expectation_over_all_networks_of_a_stage_equals_the_formula() -> None:
    small = load_space("small")
    space = dataclasses.replace(small, stages=small.stages[1:2], candidates=small.candidates[:3])
    table = corrected_table(space)
    rng = np.random.default_rng(0)
    widths = random_widths(space, rng)
    u = torch.tensor(rng.dirichlet(np.ones(3), len(space.layers)))
    v = torch.tensor(rng.dirichlet(np.ones(space.max_depth), 1))
    expected = 0.0
    for depth in range(1, space.stages[0].depth + 1):
        for choice in itertools.product(range(3), repeat=depth):
            ops = tuple(Op.of(space.layers[m], c, widths[m][c]) for m, c in enumerate(choice))
            probability = float(v[0, depth - 1]) * math.prod(float(u[m, c]) for m, c in enumerate(choice))
            expected += probability * table.architecture_ms(Architecture(space, (ops,)))
    found = expected_latency_ms(space, layer_latencies_ms(space, table, widths), u, v)
    assert float(found) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("depth_space", DEPTH_SPACES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients(depth_space: str, name: str) -> None:
    space = space_of(depth_space)
    latencies = layer_latencies_ms(space, corrected_table(space), random_widths(space, np.random.default_rng(1)))
    generator = torch.Generator().manual_seed(1)
    u = torch.rand(latencies.block_ms.shape, generator=generator, dtype=torch.float64).requires_grad_()
    v_shape = (len(space.layers), 2) if depth_space == "skip-out" else (len(space.stages), space.max_depth)
    v = torch.rand(v_shape, generator=generator, dtype=torch.float64).requires_grad_()
    latency_ms = float(expected_latency_ms(space, latencies, u, v).detach())

    def term(u: Tensor, v: Tensor) -> Tensor:
        return latency_objective(name, expected_latency_ms(space, latencies, u, v), 0.7 * latency_ms, exponent=1.5)

    assert torch.autograd.gradcheck(term, (u, v))


def test_masked_depths_do_not_count() -> None:
    space = space_of("sink")
    latencies = layer_latencies_ms(space, corrected_table(space), random_widths(space, np.random.default_rng(2)))
    log_beta = torch.zeros(len(space.stages), space.max_depth, dtype=torch.float64)
    for s, stage in enumerate(space.stages):
        log_beta[s, stage.depth :] = -torch.inf
    u = torch.full(latencies.block_ms.shape, 1 / space.max_candidates, dtype=torch.float64)
    uniform = expected_latency_ms(space, latencies, u, log_beta.softmax(1))
    mean_ms = latencies.block_ms.mean(1)
    by_hand = 0.25 + 1.07 * (
        latencies.base_ms
        + sum(
            float(mean_ms[layer.index]) * (len(layers) - layer.position) / len(layers)
            for layers in space.layers_of_stage
            for layer in layers
        )
    )
    assert float(uniform) == pytest.approx(by_hand, rel=1e-13)


def test_objectives_by_hand() -> None:
    for latency, hinge, absolute in ((18.0, 0.2, 0.2), (12.0, 0.0, 0.2), (15.0, 0.0, 0.0)):
        x = torch.tensor(latency, dtype=torch.float64)
        assert float(latency_objective("hinge", x, 15.0, weight=2.0)) == pytest.approx(2 * hinge)
        assert float(latency_objective("absolute", x, 15.0, weight=2.0)) == pytest.approx(2 * absolute)
        assert float(latency_objective("c2", x, 15.0, weight=2.0)) == 2 * latency
        c1 = latency_objective("c1", x, 15.0, weight=2.0, exponent=0.6)
        assert float(c1) == pytest.approx(2 * math.log(latency) ** 0.6)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_c1_below_a_millisecond_is_zero_with_a_finite_gradient(exponent: float) -> None:
    x = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    out = latency_objective("c1", x, 1.0, exponent=exponent)
    out.sum().backward()
    assert x.grad is not None
    assert out[:2].tolist() == [0, 0]
    assert x.grad[:2].tolist() == [0, 0]
    assert x.grad[2] > 0


def test_to_follows_dtype_and_result_too() -> None:
    space = space_of("sink")
    latencies = layer_latencies_ms(space, corrected_table(space), random_widths(space, np.random.default_rng(2)))
    assert latencies.block_ms.dtype == torch.float64
    u = torch.full(latencies.block_ms.shape, 0.125)
    v = torch.full((len(space.stages), space.max_depth), 0.25)
    single = expected_latency_ms(space, latencies.to(u), u, v)
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(
        float(expected_latency_ms(space, latencies, u.double(), v.double())), rel=1e-6
    )


def test_bad_input() -> None:
    space = space_of("sink")
    table = corrected_table(space)
    widths = random_widths(space, np.random.default_rng(2))
    with pytest.raises(ValueError, match="widths: expected one row"):
        layer_latencies_ms(space, table, widths[1:])
    with pytest.raises(ValueError, match=r"widths\[0\]"):
        layer_latencies_ms(space, table, [widths[0][1:], *widths[1:]])
    latencies = layer_latencies_ms(space, table, widths)
    u = torch.zeros(latencies.block_ms.shape)
    v = torch.zeros(len(space.stages), space.max_depth)
    with pytest.raises(ValueError, match="u: expected shape"):
        expected_latency_ms(space, latencies, u[1:], v)
    with pytest.raises(ValueError, match="v: expected shape"):
        expected_latency_ms(space, latencies, u, v[1:])
    with pytest.raises(ValueError, match="hinge, absolute, c1, c2"):
        latency_objective("c3", torch.tensor(1.0), 1.0)
    for target in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="target_latency_ms"):
            latency_objective("hinge", torch.tensor(1.0), target)
