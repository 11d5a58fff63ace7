"""One block at a time: the fused kernels against eager channels_last, forward and backward apart, interleaved.

    python benchmarks/mbinvres.py --json result.json
    python benchmarks/mbinvres.py --threads 1 --clock process          # on a machine that is not quiet

Shapes are layers of the `imagenet` space at batch 8, and of small images at batch 64. Each row has the block, the phase
("forward": training forward, "step": forward and all gradients), ms of both, their ratio, and our GFLOP/s beside the
rate of a large float32 matrix product measured in the same run. Outputs are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from search_step import ProcessTimer, matmul_flops
from tfnas.files import write_text_atomically
from tfnas.latency.header import device_name
from tfnas.versions import software_versions
from torch import Tensor

from tfnas_ext import ops, reference
from tfnas_ext.backends import cpu_capability
from tfnas_ext.reference import SqueezeExcite
from tfnas_ext.timing import CpuTimer, StopRule, measure_interleaved


class Shape(NamedTuple):
    batch: int
    in_channels: int
    size: int
    mid: int
    out_channels: int
    kernel: int
    stride: int
    act: str
    se: int = 0

    def flops(self) -> int:
        """Of the forward's three convolutions."""
        out = -(-self.size // self.stride)
        wide = self.size**2 * self.in_channels + out**2 * (self.kernel**2 + self.out_channels)
        return 2 * self.batch * self.mid * wide


SHAPES = (
    Shape(8, 16, 112, 96, 24, 3, 2, "relu"),
    Shape(8, 24, 56, 144, 24, 5, 1, "relu"),
    Shape(8, 40, 28, 240, 40, 5, 1, "swish"),
    Shape(8, 80, 14, 480, 80, 3, 1, "swish"),
    Shape(8, 112, 14, 672, 112, 5, 1, "swish", 224),
    Shape(8, 192, 7, 1152, 192, 5, 1, "swish"),
    Shape(64, 24, 16, 144, 24, 3, 1, "relu"),
    Shape(64, 40, 8, 240, 40, 5, 1, "swish", 80),
    Shape(64, 80, 4, 480, 80, 3, 1, "swish"),
)


class Block:
    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=generator) * scale).requires_grad_()

        n, cin, size, mid, cout, k, stride, act, se = shape
        x = torch.randn(n, cin, size, size, generator=generator)
        self.x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        self.weights = [normal(mid, cin, 1, 1, scale=cin**-0.5), normal(mid, 1, k, k, scale=1 / k)]
        self.weights.append(normal(cout, mid, 1, 1, scale=mid**-0.5))
        self.se = None
        if se:
            reduce, expand = normal(se, mid, 1, 1, scale=mid**-0.5), normal(mid, se, 1, 1, scale=se**-0.5)
            self.se = SqueezeExcite(reduce, normal(se), expand, normal(mid))
        self.leaves = [self.x, *self.weights, *(self.se or ())]
        self.options: dict[str, Any] = {"stride": stride, "act": act, "residual": stride == 1 and cin == cout}
        self.dout = torch.randn_like(self.forward("ours"))

    def forward(self, which: str) -> Tensor:
        function = ops.mbinvres if which == "ours" else reference.mbinvres
        return function(self.x, *self.weights, se=self.se, **self.options)

    def step(self, which: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(which), self.leaves, self.dout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "process"], default="wall")
    parser.add_argument("--seconds", type=float, default=2.0, help="time limit of each measurement")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    timer = ProcessTimer() if args.clock == "process" else CpuTimer()
    rows = []
    for shape in SHAPES:
        block = Block(shape)
        error = (block.forward("ours") - block.forward("eager")).norm() / block.forward("eager").norm()
        if not error < 1e-4:
            raise SystemExit(f"results differ by {error:.1e} for {shape}, nothing was timed")
        for phase, run, passes in (("forward", block.forward, 1), ("step", block.step, 3)):
            calls = {which: (lambda run=run, which=which: run(which)) for which in ("ours", "eager")}
            rule = StopRule(0.01, 10, time_limit_s=args.seconds)
            samples = measure_interleaved(calls, timer=timer, rule=rule, warm_up=2, rejection=False)
            ours, eager = samples["ours"].median_ms, samples["eager"].median_ms
            row = {
                **shape._asdict(),
                "phase": phase,
                "ours_ms": round(ours, 3),
                "eager_channels_last_ms": round(eager, 3),
            }
            row |= {"ratio": round(eager / ours, 2), "gflops": round(passes * shape.flops() / ours / 1e6, 1)}
            row |= {"matmul_gflops": round(matmul_flops(timer) / 1e9, 1), "noise": round(samples["ours"].rel_spread, 3)}
            rows.append(row)
            print(json.dumps(row), flush=True)
    if args.json:
        facts = {"device": device_name("cpu"), "capability": cpu_capability(), "threads": args.threads}
        result = {"benchmark": "mbinvres", **facts, "clock": args.clock, "versions": software_versions(), "rows": rows}
        write_text_atomically(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
