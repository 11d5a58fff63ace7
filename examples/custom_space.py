"""A search space of one's own from Python: a new candidate, other stages, widths fitted to a latency, a tiny search.

Run it with `python examples/custom_space.py`; it takes seconds on a CPU. Its images are random and its latency table is
made up, so that it runs anywhere: `tfnas lut build` measures a real table, and `data` names real images.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import tfnas
import torch
from tfnas.architecture import Architecture, Op, block_multiply_adds, count_multiply_adds, count_parameters
from tfnas.latency.lut import Curve, LatencyTable
from tfnas.latency.lut_io import save_table
from tfnas.network import build_network
from tfnas.scaling import fit_widths, reachable_range_ms
from tfnas.space import Candidate, Space, Stage
from tfnas.space_io import load_space, save_space, validate_space

MULTIPLY_ADDS_PER_MS = 2e6


def make_space() -> Space:
    """`small` with three stages for 32-pixel colour images, and a 7x7 candidate beside the narrow ones of Table 1."""
    small = load_space("small")
    k7 = Candidate("k7_e2_se05", kernel_size=7, expansion=2, min_expansion=1.5, max_expansion=3, se_expansion=0.5)
    space = replace(
        small,
        name="mine",
        resolution=32,
        image_channels=3,
        num_classes=10,
        stages=(
            Stage(out_channels=24, depth=2, stride=2, act="relu"),
            Stage(out_channels=40, depth=3, stride=2, act="hard_swish"),
            Stage(out_channels=80, depth=1, stride=1, act="hard_swish"),
        ),
        candidates=(*small.candidates[:4], k7),
        head_channels=320,
        head_act="hard_swish",
    )
    validate_space(space)
    return space


def made_up_table(space: Space) -> LatencyTable:
    """A table in which time is proportional to multiply-adds, hence linear in the width: two knots a curve."""
    curves = {}
    for layer in space.layers:
        for c, candidate in enumerate(layer.candidates):
            key = layer.key(c)
            widths = np.array([1, layer.max_width(c)])
            multiply_adds = [
                block_multiply_adds(
                    resolution=layer.resolution,
                    in_channels=layer.in_channels,
                    width=int(width),
                    out_channels=layer.out_channels,
                    kernel_size=candidate.kernel_size,
                    stride=layer.stride,
                    se_channels=key.se_channels,
                )
                for width in widths
            ]
            if key not in curves or curves[key].widths[-1] < widths[-1]:
                curves[key] = Curve(widths, np.array(multiply_adds) / MULTIPLY_ADDS_PER_MS)
    return LatencyTable(base_ms=0.5, curves=curves)


def network_of_one_kind(space: Space, candidate: int) -> Architecture:
    """The deepest network of `space` that uses one candidate only, at its widths before the search."""
    return Architecture(
        space,
        tuple(
            tuple(Op.of(layer, candidate, layer.start_width(candidate)) for layer in stage)
            for stage in space.layers_of_stage
        ),
    )


def describe(arch: Architecture) -> None:
    """Print the operations of a network, what it costs, and the shape of what it computes."""
    space = arch.space
    for s, ops in enumerate(arch.stages, start=space.first_stage):
        print(f"  stage {s}: " + ", ".join(f"{op.candidate} x{op.width}" for op in ops))
    logits = build_network(arch).eval()(torch.randn(2, space.image_channels, space.resolution, space.resolution))
    print(
        f"  {count_multiply_adds(arch) / 1e6:.2f} M multiply-adds, {count_parameters(arch) / 1e3:.1f} k parameters, "
        f"logits {tuple(logits.shape)}"
    )


def main() -> None:
    space = make_space()
    table = made_up_table(space)
    lowest_ms, highest_ms = reachable_range_ms(space, table)
    print(f"{space.name}: {len(space.layers)} layers, {len(space.keys)} latency curves")
    print(f"reachable: {lowest_ms:.2f} to {highest_ms:.2f} ms")

    # Algorithm 1 alone: a network of the new candidate only, scaled to a target
    seed = network_of_one_kind(space, len(space.candidates) - 1)
    target_ms = 0.9 * table.architecture_ms(seed)
    fitted = fit_widths(seed, table, target_ms)
    print(f"fitted to {target_ms:.3f} ms: {fitted.lut_latency_ms:.3f} ms")
    describe(fitted.architecture)

    # the whole search, for a few steps: a configuration names files, so space and table become files
    with tempfile.TemporaryDirectory() as folder:
        save_space(Path(folder, "space.yaml"), space)
        save_table(Path(folder, "lut.json"), table)
        config = tfnas.SearchConfig(
            space=str(Path(folder, "space.yaml")),
            lut=str(Path(folder, "lut.json")),
            data="fake",
            target_latency_ms=target_ms,
            epochs=3,
            warmup_epochs=1,
            steps_per_epoch=4,
            batch_size=8,
            device="cpu",
            output=str(Path(folder, "run")),
        )
        result = tfnas.search(config)
    print(f"searched for {target_ms:.3f} ms: {result.lut_latency_ms:.3f} ms, target met: {result.met}")
    describe(result.architecture)


if __name__ == "__main__":
    main()
