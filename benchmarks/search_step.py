"""How long is a step of the search? The native engine against the same supernet in plain PyTorch, interleaved.

    python benchmarks/search_step.py --json result.json             # all cases below, about 20 minutes on two cores
    python benchmarks/search_step.py --cases 64x32 --steps W
    python benchmarks/search_step.py --cases 64x32 --steps W --compile

A case is [SPACE:]BATCHxRESOLUTION, the space being `imagenet` where none is named; `small:16x28` is the quickstart's.
Step W is a weight step (two sampled paths, one backward, clipping, SGD), step A an architecture step (mixture, backward
to alpha and beta, Adam). Competitors: eager NCHW, eager channels_last (the engine `reference`), bfloat16 autocast over
that, and with `--compile` blocks under `torch.compile`. Every block of every layer is compiled for its shapes, forward
and backward: over three minutes on two busy cores for step W of `small:16x28`, seconds once torch has it in its cache;
step A and `imagenet` have several times as many blocks and have not been tried. Losses are compared before anything is
timed. Every sample times all competitors, in an order drawn anew.

`--json` has a row for each case, step and dtype of the native engine (float32, bfloat16):

  space, step, batch, resolution, dtype, ours_ms, eager_nchw_ms, eager_channels_last_ms, eager_autocast_ms, best_eager,
  ratio_vs_best_eager, ratio_vs_flop_floor, samples, noise, ours_peak_bytes, eager_peak_bytes
  and with --compile: compiled_ms (may be the `best_eager`)

`ratio_vs_best_eager`: the fastest competitor of any precision over ours. `ratio_vs_flop_floor`: ours over the time of
the step's multiplications at the rate of a large matrix product of the same dtype. `noise`: relative spread of our
samples. Peaks are those of fresh processes that do nothing but a few steps of one competitor (eager: channels_last).
Rows that the file has already, from the same machine, software and options, are kept: a run that was stopped goes on.

All processes keep freed memory (`ALLOCATOR`), since fresh pages cost every competitor more than its work on them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tfnas.bench.measure import matmul_flops
from tfnas.files import write_text_atomically
from tfnas.latency.header import device_name
from tfnas.space import Space
from tfnas.space_io import load_space
from tfnas.steps import architecture_step, weight_step
from tfnas.supernet import Supernet
from tfnas.versions import software_versions
from torch import Tensor

from tfnas_ext import engine_reference
from tfnas_ext.backends import cpu_capability
from tfnas_ext.engine import EngineFactory, register_engine
from tfnas_ext.engine_reference import ReferenceEngine
from tfnas_ext.reference import mbinvres
from tfnas_ext.timing import CpuTimer, ProcessTimer, StopRule, measure_interleaved
from tfnas_ext.timing_host import peak_resident_bytes

ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "1000000000000",
    "MALLOC_TOP_PAD_": "67108864",
    "MALLOC_ARENA_MAX": "1",
}
DEFAULT_CASES = ("8x224", "64x64", "64x32", "small:16x28")
OURS = {"ours": torch.float32, "ours_bfloat16": torch.bfloat16}
EAGER = {"eager_nchw": "nchw", "eager_channels_last": "reference", "eager_autocast": "reference"}
COMPILED = {"compiled": "compiled"}


class NchwEngine(ReferenceEngine):
    """The reference engine as most code runs it: contiguous NCHW."""

    name = "nchw"
    memory_format = torch.contiguous_format


class CompiledEngine(ReferenceEngine):
    """The reference engine with every block compiled for its shapes."""

    name = "compiled"

    def _op(self, index: int, candidate: int, x: Tensor, weights: list[Tensor]) -> Tensor:
        plain, engine_reference.mbinvres = engine_reference.mbinvres, compiled_block()
        try:
            return super()._op(index, candidate, x, weights)
        finally:
            engine_reference.mbinvres = plain


@cache
def compiled_block() -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = 1000  # a block has a shape of its own in every layer
    return torch.compile(mbinvres, dynamic=False)


class Case(NamedTuple):
    space: str
    batch: int
    resolution: int

    @staticmethod
    def parse(text: str) -> Case:
        space, _, size = text.rpartition(":")
        try:
            batch, resolution = (int(part) for part in size.split("x"))
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected [SPACE:]BATCHxRESOLUTION, got {text!r}") from None
        return Case(space or "imagenet", batch, resolution)

    def __str__(self) -> str:
        return f"{self.space}:{self.batch}x{self.resolution}"


class Steps:
    """One competitor: a supernet of its own with the same weights, inputs and choices as the others."""

    def __init__(self, competitor: str, space: Space, batch: int, resolution: int) -> None:
        torch.manual_seed(0)
        self.autocast = competitor == "eager_autocast"
        engine = {**EAGER, **COMPILED}.get(competitor, "native")
        self.supernet = Supernet(space, engine=engine, dtype=OURS.get(competitor, torch.float32))
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
            no_latency = torch.zeros(())
            result = architecture_step(self.supernet, self.adam, self.images, self.labels, u, lambda u, v: no_latency)
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


def run_alone(competitor: str, case: Case, step: str) -> int:
    """Largest resident bytes of this process after a few steps."""
    steps = Steps(competitor, load_space(case.space), case.batch, case.resolution)
    for _ in range(3):
        steps.run(step)
    return peak_resident_bytes()


def peak_bytes(threads: int, competitor: str, case: Case, step: str) -> int:
    """`run_alone` in a fresh process."""
    command = [sys.executable, __file__, "--cases", str(case), "--steps", step]
    command += ["--threads", str(threads), "--peak-of", competitor]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def measure_case(args: argparse.Namespace, case: Case, step: str) -> list[dict[str, Any]]:
    """The rows of one case and step, one for each dtype of ours."""
    space = load_space(case.space)
    names = [*OURS, *EAGER, *(COMPILED if args.compile else ())]
    competitors = {name: Steps(name, space, case.batch, case.resolution) for name in names}
    losses = {name: steps.run(step) for name, steps in competitors.items()}
    for name, loss in losses.items():
        allowed = 0.1 if name in ("eager_autocast", "ours_bfloat16") else 1e-3
        if not abs(loss - losses["ours"]) <= allowed * abs(losses["ours"]):
            raise SystemExit(f"results differ, nothing was timed: {losses}")
    calls = {name: partial(steps.run, step) for name, steps in competitors.items()}
    rule = StopRule(0.01, args.samples, time_limit_s=args.seconds)
    timer = ProcessTimer() if args.clock == "process" else CpuTimer()
    samples = measure_interleaved(calls, timer=timer, rule=rule, warm_up=1, rejection=False)
    times = {name: result.median_ms for name, result in samples.items()}
    theirs = {name: ms for name, ms in times.items() if name not in OURS}
    best = min(theirs, key=theirs.__getitem__)
    passes = 3 if step == "W" else 2  # forward and gradients of inputs and, in W, of weights
    flops = 2 * passes * case.batch * multiply_adds(space, competitors["ours"], step, case.resolution)
    rows: list[dict[str, Any]] = []
    for name, dtype in OURS.items():
        row: dict[str, Any] = {"space": case.space, "step": step, "batch": case.batch, "resolution": case.resolution}
        row |= {"dtype": str(dtype).removeprefix("torch."), "ours_ms": round(times[name], 2)}
        row |= {f"{eager}_ms": round(ms, 2) for eager, ms in theirs.items()}
        row |= {"best_eager": best, "ratio_vs_best_eager": round(times[best] / times[name], 3)}
        row |= {"ratio_vs_flop_floor": round(times[name] * matmul_flops(timer, dtype=dtype) / flops / 1e3, 2)}
        row |= {"samples": samples[name].count, "noise": round(samples[name].rel_spread, 3)}
        if args.peak:
            row["ours_peak_bytes"] = peak_bytes(args.threads, name, case, step)
            row["eager_peak_bytes"] = (
                rows[0]["eager_peak_bytes"] if rows else peak_bytes(args.threads, "eager_channels_last", case, step)
            )
        rows.append(row)
    return rows


def kept_rows(path: Path | None, header: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run with the same header."""
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text())
    rows = found.pop("rows")
    return rows if found == header else []


def say(row: dict[str, Any]) -> None:
    theirs = "  ".join(f"{key} {value:.1f}" for key, value in row.items() if key.endswith("_ms") and key != "ours_ms")
    what = f"{row['step']} {row['space']} {row['batch']}x{row['resolution']} {row['dtype']}"
    ratios = (
        f"{row['ratio_vs_best_eager']:.2f} times {row['best_eager']}, {row['ratio_vs_flop_floor']:.2f} times the floor"
    )
    print(f"{what}: ours_ms {row['ours_ms']:.1f}  {theirs}: {ratios}", flush=True)
    if "ours_peak_bytes" in row:
        print(f"  peak {row['ours_peak_bytes'] / 1e9:.2f} GB, eager {row['eager_peak_bytes'] / 1e9:.2f} GB", flush=True)
    if row["space"] == "small":
        gain = row["eager_channels_last_ms"] / row["ours_ms"]
        print(f"  quickstart: {gain:.2f} times `reference`, {row['ratio_vs_best_eager']:.2f} times the best eager")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", type=Case.parse, default=[Case.parse(case) for case in DEFAULT_CASES])
    parser.add_argument("--steps", nargs="+", default=["W", "A"], choices=["W", "A"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=["wall", "process"], default="wall", help="process: CPU time, on a busy machine, one thread"
    )
    parser.add_argument("--samples", type=int, default=10, help="at least this many each, time permitting")
    parser.add_argument("--seconds", type=float, default=30.0, help="time limit of each competitor")
    parser.add_argument("--compile", action="store_true", help="blocks under torch.compile compete too")
    parser.add_argument("--peak", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory too")
    parser.add_argument("--peak-of", choices=[*OURS, *EAGER], help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    if args.clock == "process" and args.threads != 1:
        parser.error("--clock process adds up the time of all threads: give --threads 1 with it")
    return args


def main() -> None:
    args = parse_arguments()
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    torch.set_num_threads(args.threads)
    register_engine("nchw", EngineFactory(NchwEngine, lambda spec, layers: None))
    register_engine("compiled", EngineFactory(CompiledEngine, lambda spec, layers: None))
    if args.peak_of:
        print(run_alone(args.peak_of, args.cases[0], args.steps[0]))
        return
    header: dict[str, Any] = {"benchmark": "search_step", "device": device_name("cpu"), "capability": cpu_capability()}
    header |= {"threads": args.threads, "clock": args.clock, "versions": software_versions()}
    rows = kept_rows(args.json, header)
    for case in args.cases:
        for step in args.steps:
            key = {"space": case.space, "step": step, "batch": case.batch, "resolution": case.resolution}
            done = [row for row in rows if key.items() <= row.items() and ("compiled_ms" in row or not args.compile)]
            if len(done) < len(OURS):
                done = measure_case(args, case, step)
                rows = [row for row in rows if not key.items() <= row.items()] + done
                if args.json:  # after every step: long runs may be stopped
                    write_text_atomically(args.json, json.dumps(header | {"rows": rows}, indent=2) + "\n")
            for row in done:
                say(row)


if __name__ == "__main__":
    main()
