"""Seeded random search spaces and architectures for sweeps, small enough to build and run in milliseconds."""

from __future__ import annotations

import random

from tfnas.architecture import Architecture, Op
from tfnas.space import ACTIVATIONS, DEPTH_SPACES, KERNEL_SIZES, Candidate, Space, Stage


def random_space(rng: random.Random) -> Space:
    """Any valid space: 1 to 4 stages, odd channel counts and resolutions, every activation and kernel size."""
    act = lambda: rng.choice(ACTIVATIONS)  # noqa: E731
    candidates = []
    for i in range(rng.randint(1, 4)):
        low = rng.choice([1.0, 2.0, 2.5])
        high = low + rng.choice([1.0, 2.0, 3.3])
        start = rng.uniform(low, high)
        candidates.append(Candidate(f"c{i}", rng.choice(KERNEL_SIZES), start, low, high, rng.choice([0.0, 0.5, 1.0])))
    return Space(
        name="random",
        resolution=rng.randint(9, 33),
        image_channels=rng.choice([1, 3, 4]),
        num_classes=rng.randint(2, 12),
        stem_channels=rng.randint(3, 12),
        stem_stride=rng.choice([1, 2]),
        stem_act=act(),
        fixed_channels=rng.randint(3, 12),
        fixed_se_channels=rng.choice([0, 1, 3]),
        stages=tuple(
            Stage(rng.randint(3, 17), rng.randint(1, 3), rng.choice([1, 2]), act()) for _ in range(rng.randint(1, 4))
        ),
        candidates=tuple(candidates),
        head_channels=rng.randint(8, 40),
        head_act=act(),
        depth_space=rng.choice(DEPTH_SPACES),
    )


def random_architecture(rng: random.Random, space: Space) -> Architecture:
    """Any architecture of `space`: random depths, candidates and widths from 1 to the maximum."""
    stages = []
    for layers in space.layers_of_stage:
        ops = []
        for layer in layers[: rng.randint(1, len(layers))]:
            candidate = rng.randrange(len(space.candidates))
            ops.append(Op.of(layer, candidate, rng.randint(1, layer.max_width(candidate))))
        stages.append(tuple(ops))
    return Architecture(space, tuple(stages))
