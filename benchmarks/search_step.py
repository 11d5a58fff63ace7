"""How long is a step of the search? The native engine against the same supernet in plain PyTorch, interleaved.

    python benchmarks/search_step.py --json result.json                     # imagenet, batch 8, 224 x 224
    python benchmarks/search_step.py --cases 64x64 64x32 --space small

Step W is a weight step (two sampled paths, one backward, clipping, SGD), step A an architecture step (mixture, backward
to alpha and beta, Adam). Competitors: eager NCHW, eager channels_last, bfloat16 autocast; the ratio
is against the fastest of them. Losses are compared before anything is timed. Every row of `--json` has

  step, batch, resolution, dtype, ours_ms, eager_nchw_ms, eager_channels_last_ms, eager_autocast_ms,
  ratio_vs_best_eager, ratio_vs_flop_floor, ours_peak_bytes, eager_peak_bytes, noise

`ratio_vs_flop_floor`: our time over that of the step's multiplications at the rate of a large float32 matrix product
measured in the same run. Peaks are those of whole processes that do nothing but a few steps. `noise` is the relative
spread of our samples. For stable figures give all competitors the allocator settings that keep memory, for instance
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 MALLOC_ARENA_MAX=1.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tfnas.bench.measure import matmul_flops
from tfnas.files import write_text_atomically
from tfnas.latency.header import device_name
from tfnas.space import Space
from tfnas.space_io import load_space
from tfnas.steps import architecture_step, weight_step
from tfnas.supernet import Supernet
from tfnas.versions import software_versions

from tfnas_ext.backends import cpu_capability
from tfnas_ext.engine import EngineFactory, register_engine
from tfnas_ext.engine_reference import ReferenceEngine
from tfnas_ext.timing import CpuTimer, ProcessTimer, StopRule, measure_interleaved


class NchwEngine(ReferenceEngine):
    """The reference engine as most code runs it: contiguous NCHW."""

    name = "nchw"
    memory_format = torch.contiguous_format


COMPETITORS = ("ours", "eager_nchw", "eager_channels_last", "eager_autocast")
ENGINES = {"ours": "native", "eager_nchw": "nchw"}


class Steps:
    """One competitor: a supernet of its own with the same weights, inputs and choices as the others."""

    def __init__(self, competitor: str, space: Space, batch: int, resolution: int) -> None:
        torch.manual_seed(0)
        self.autocast = competitor == "eager_autocast"
        self.supernet = Supernet(space, engine=ENGINES.get(competitor, "reference"))
        self.adam = self.supernet.architecture_adam(1e-3, (0.5, 0.999))
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(batch, space.image_channels, resolution, resolution, generator=generator)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(space.num_classes, (batch,), generator=generator)
        layers, candidates = self.supernet.log_alpha.shape
        self.choices = torch.randint(candidates, (2, layers), generator=generator)

    def run(self, step: str) -> float:
        """One step; weights barely move, so that every sample times the same. Returns the loss."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            if step == "W":
                return weight_step(self.supernet, self.images, self.labels, self.choices, lr=1e-6).losses.sum().item()
            u = self.supernet.log_alpha.exp()
            result = architecture_step(self.supernet, self.adam, self.images, self.labels, u, lambda u, v: u.sum() * 0)
            return result.cross_entropy.item()


def multiply_adds(space: Space, steps: Steps, step: str, resolution: int) -> int:
    """Of the searchable layers, forward, one image: the two sampled paths or all candidates, at the widths in use."""
    total, size = 0, -(-resolution // space.stem_stride)
    for layer in space.layers:
        out = -(-size // layer.stride)
        chosen = steps.choices[:, layer.index].tolist() if step == "W" else range(len(layer.candidates))
        for index in chosen:
            width, kernel = steps.supernet.widths[layer.index][index], layer.candidates[index].kernel_size
            total += width * (size**2 * layer.in_channels + out**2 * (kernel**2 + layer.out_channels))
        size = out
    return total


def peak_bytes(args: argparse.Namespace, competitor: str, step: str, case: str) -> int:
    """Largest resident size of a fresh process that runs a few steps."""
    command = [sys.executable, __file__, "--space", args.space, "--cases", case, "--steps", step]
    command += ["--threads", str(args.threads), "--peak-of", competitor]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_case(args: argparse.Namespace, space: Space, step: str, case: str) -> dict[str, Any]:
    batch, resolution = (int(part) for part in case.split("x"))
    competitors = {name: Steps(name, space, batch, resolution) for name in COMPETITORS}
    losses = {name: steps.run(step) for name, steps in competitors.items()}
    for name, loss in losses.items():
        allowed = 0.1 if name == "eager_autocast" else 1e-3
        if not abs(loss - losses["ours"]) <= allowed * abs(losses["ours"]):
            raise SystemExit(f"results differ, nothing was timed: {losses}")
    calls: dict[str, Callable[[], object]] = {name: (lambda s=s: s.run(step)) for name, s in competitors.items()}
    rule = StopRule(0.01, args.samples, time_limit_s=args.seconds)
    timer = ProcessTimer() if args.clock == "process" else CpuTimer()
    samples = measure_interleaved(calls, timer=timer, rule=rule, warm_up=1, rejection=False)
    times = {name: result.median_ms for name, result in samples.items()}
    best = min((name for name in times if name != "ours"), key=times.__getitem__)
    passes = 3 if step == "W" else 2  # forward and gradients of inputs and, in W, of weights
    floor_ms = (
        1e3 * passes * 2 * batch * multiply_adds(space, competitors["ours"], step, resolution) / matmul_flops(timer)
    )
    row: dict[str, Any] = {"space": space.name, "step": step, "batch": batch, "resolution": resolution}
    row |= {"dtype": "float32", **{f"{name}_ms": round(ms, 2) for name, ms in times.items()}}
    row |= {"best_eager": best, "ratio_vs_best_eager": round(times[best] / times["ours"], 3)}
    row |= {"ratio_vs_flop_floor": round(times["ours"] / floor_ms, 2), "samples": samples["ours"].count}
    row["noise"] = round(samples["ours"].rel_spread, 3)
    if args.peak:
        row["ours_peak_bytes"] = peak_bytes(args, "ours", step, case)
        row["eager_peak_bytes"] = peak_bytes(args, "eager_channels_last", step, case)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="imagenet")
    parser.add_argument("--cases", nargs="+", default=["8x224"], help="batch x resolution")
    parser.add_argument("--steps", nargs="+", default=["W", "A"], choices=["W", "A"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=["wall", "process"], default="wall", help="process: CPU time, on a busy machine, one thread"
    )
    parser.add_argument("--samples", type=int, default=10, help="at least this many each")
    parser.add_argument("--seconds", type=float, default=20.0, help="time limit of each competitor")
    parser.add_argument("--peak", action="store_true", help="measure peak memory too, in processes of their own")
    parser.add_argument("--peak-of", choices=COMPETITORS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    if args.clock == "process" and args.threads != 1:
        parser.error("--clock process adds up the time of all threads: give --threads 1 with it")
    torch.set_num_threads(args.threads)
    register_engine("nchw", EngineFactory(NchwEngine, lambda spec, layers: None))
    space = load_space(args.space)
    if args.peak_of:
        batch, resolution = (int(part) for part in args.cases[0].split("x"))
        steps = Steps(args.peak_of, space, batch, resolution)
        for _ in range(3):
            steps.run(args.steps[0])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    machine = {"device": device_name("cpu"), "capability": cpu_capability(), "threads": args.threads}
    result: dict[str, Any] = {"benchmark": "search_step", **machine, "clock": args.clock}
    result |= {"versions": software_versions(), "rows": []}
    for case in args.cases:
        for step in args.steps:
            result["rows"].append(measure_case(args, space, step, case))
            print(json.dumps(result["rows"][-1]), flush=True)
            if args.json:  # after every row: long runs may be stopped
                write_text_atomically(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
