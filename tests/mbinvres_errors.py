"""Prints the instruction set in use and the largest float32 error of some blocks against float64, as JSON."""

from __future__ import annotations

import json

import torch
from mbinvres_cases import BlockCase, make_block, norm_error, run

from tfnas_ext import ops, reference
from tfnas_ext.backends import cpu_capability


def main() -> None:
    worst = 0.0
    shapes = [(2, 16, 14, 14, 70, 24, 3, 2), (2, 24, 9, 8, 50, 24, 5, 1), (3, 40, 7, 7, 96, 40, 7, 1)]
    for seed, shape in enumerate([*shapes, (2, 13, 5, 6, 30, 11, 3, 1)]):
        for design in ("strips", "channels"):
            for act in ("swish", "hard_swish"):
                block = make_block(BlockCase(*shape, act=act, se=5 * (seed % 2), design=design, seed=seed))
                want = run(reference.mbinvres_with_statistics, block)
                got = run(ops.mbinvres_with_statistics, block.to(torch.float32), backend="cpu", design=design)
                worst = max(worst, *(norm_error(got[name], want[name]) for name in want))
    print(json.dumps({"capability": cpu_capability(), "worst": worst}))


if __name__ == "__main__":
    main()
