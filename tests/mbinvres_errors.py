"""Prints the instruction set in use and how far some blocks are from float64, as JSON.

`worst` is the largest float32 error or, with the argument `bfloat16`, the largest excess over the 2x rule.
"""

from __future__ import annotations

import json
import sys

import torch
from mbinvres_cases import BlockCase, bfloat16_excess, make_block, norm_error, run

from tfnas_ext import ops, reference
from tfnas_ext.backends import cpu_capability


def main() -> None:
    worst = 0.0
    shapes = [(2, 16, 14, 14, 70, 24, 3, 2), (2, 24, 9, 8, 50, 24, 5, 1), (3, 40, 7, 7, 96, 40, 7, 1)]
    for seed, shape in enumerate([*shapes, (2, 13, 5, 6, 30, 11, 3, 1)]):
        for design in ("strips", "channels"):
            for act in ("swish", "hard_swish"):
                case = BlockCase(*shape, act=act, se=5 * (seed % 2), design=design, seed=seed)
                if sys.argv[1:] == ["bfloat16"]:
                    worst = max(worst, *(excess for _, excess in bfloat16_excess(case)))
                    continue
                block = make_block(case)
                want = run(reference.mbinvres_with_statistics, block)
                got = run(ops.mbinvres_with_statistics, block.to(torch.float32), backend="cpu", design=design)
                worst = max(worst, *(norm_error(got[name], want[name]) for name in want))
    print(json.dumps({"capability": cpu_capability(), "worst": worst}))


if __name__ == "__main__":
    main()
