"""A search space of one's own from Python: a new candidate operation, other stages, and a network fitted to a latency.

Run it with `python examples/custom_space.py`; it takes seconds on a CPU. Its latency table is made up, so that it runs
anywhere: `tfnas lut build` measures a real one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from tfnas.architecture import Architecture, Op, block_multiply_adds, count_multiply_adds, count_parameters
from tfnas.latency.lut import Curve, LatencyTable
from tfnas.network import build_network
from tfnas.scaling import fit_widths, reachable_range_ms
from tfnas.space import Candidate, Space, Stage
from tfnas.space_io import load_space, validate_space

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
        num_classes=5,
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


def main() -> None:
    space = make_space()
    print(f"{space.name}: {len(space.layers)} layers, {len(space.keys)} latency curves")
    table = made_up_table(space)
    lowest_ms, highest_ms = reachable_range_ms(space, table)
    print(f"reachable: {lowest_ms:.2f} to {highest_ms:.2f} ms")

    # a network of the new candidate only, as deep as the space allows, fitted to a target latency (Algorithm 1)
    k7 = len(space.candidates) - 1
    seed = Architecture(
        space,
        tuple(tuple(Op.of(layer, k7, layer.start_width(k7)) for layer in stage) for stage in space.layers_of_stage),
    )
    target_ms = 0.9 * table.architecture_ms(seed)
    fitted = fit_widths(seed, table, target_ms)
    widths = [op.width for _, op in fitted.architecture.layers()]
    print(f"target {target_ms:.3f} ms, fitted {fitted.lut_latency_ms:.3f} ms, widths {widths}")

    network = build_network(fitted.architecture).eval()
    logits = network(torch.randn(2, space.image_channels, space.resolution, space.resolution))
    print(
        f"{count_multiply_adds(fitted.architecture) / 1e6:.2f} M multiply-adds, "
        f"{count_parameters(fitted.architecture) / 1e3:.1f} k parameters, logits {tuple(logits.shape)}"
    )


if __name__ == "__main__":
    main()
