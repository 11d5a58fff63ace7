"""One weight step and one architecture step of a supernet on a GPU: the CUDA engine against plain PyTorch.

    python benchmarks/gpu_step.py [--space imagenet] [--batch 32] [--samples 20] [--compile] [--json FILE]

W: two sampled paths, backward, clipping, SGD. A: the mixture of all candidates, backward, Adam. Competitors: the same
supernet in plain PyTorch, contiguous NCHW and channels_last, in float32, TF32 and bfloat16, with `--compile` its blocks
under `torch.compile`; and this package's engine in the same precisions, kernel by kernel and replayed as a CUDA graph.
Losses are compared with float32's before anything is timed; samples are interleaved, in an order drawn anew; CUDA
events around whole steps. Rows where this package loses are printed like the others.

A row: step, precision, engine, median_ms, noise (relative spread), ratio_vs_best_plain (the fastest plain competitor of
any precision over this row), peak_bytes (more than there was before; a graph holds for good what its step takes kernel
by kernel, which stands in its row), launches and synchronisations of one step on the host (torch.profiler), and
cupyx_ms, the same step timed by `cupyx.profiler.benchmark` where CuPy is installed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import re
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from search_step import CompiledEngine, NchwEngine
from tfnas.files import write_text_atomically
from tfnas.space import Space
from tfnas.space_io import load_space
from tfnas.step_graphs import GraphRunner
from tfnas.steps import architecture_step, weight_step
from tfnas.supernet import Supernet
from torch import Tensor

from tfnas_ext.engine import EngineFactory, register_engine

PRECISIONS = {"fp32": (torch.float32, "highest"), "tf32": (torch.float32, "high"), "bf16": (torch.bfloat16, "high")}
PLAIN = ("nchw", "reference")
OURS, GRAPH = "cuda", "cuda graph"
Key = tuple[str, str, str]  # step, precision, engine
LAUNCH = re.compile(r"cu(da)?(LaunchKernel|LaunchKernelExC?|GraphLaunch|MemsetAsync|MemcpyAsync)")
WAIT = re.compile(r"cuda(Stream|Device|Event)Synchronize|cudaMemcpy$")


def set_precision(name: str) -> None:
    torch.set_float32_matmul_precision(PRECISIONS[name][1])
    torch.backends.cudnn.allow_tf32 = name != "fp32"


def make_steps(supernet: Supernet, images: Tensor, labels: Tensor, seed: int) -> dict[str, Callable[[], Tensor]]:
    """The two steps as functions without arguments that return a loss tensor; choices are fixed by the seed."""
    counts = [len(layer.candidates) for layer in supernet.space.layers]
    generator = torch.Generator().manual_seed(seed)
    first = torch.tensor([int(torch.randint(n, (), generator=generator)) for n in counts])
    choices = torch.stack([first, (first + 1) % torch.tensor(counts)])
    if supernet.engine.capturable:
        choices = choices.cuda()
    adam = supernet.architecture_adam(0.0, (0.5, 0.999))

    def step_w() -> Tensor:
        step = weight_step(supernet, images, labels, choices, lr=0.0, momentum=0.9, weight_decay=1e-5, max_norm=5.0)
        return step.losses.sum()

    def step_a() -> Tensor:
        u = torch.softmax(supernet.log_alpha, -1)
        step = architecture_step(supernet, adam, images, labels, u, lambda u, v: u.sum() * 0, max_norm=5.0)
        return step.cross_entropy

    return {"W": step_w, "A": step_a}


def all_steps(space: Space, images: Tensor, labels: Tensor, plain: tuple[str, ...]) -> dict[Key, Callable[[], Tensor]]:
    steps: dict[Key, Callable[[], Tensor]] = {}
    for precision, (dtype, _) in PRECISIONS.items():
        for engine in (*plain, OURS):
            torch.manual_seed(0)
            supernet = Supernet(space, engine, dtype, images.device)
            for name, step in make_steps(supernet, images, labels, seed=1).items():
                steps[name, precision, engine] = step
        graphs = GraphRunner(images.device)
        for name in ("W", "A"):
            step = steps[name, precision, OURS]
            steps[name, precision, GRAPH] = lambda name=name, step=step, graphs=graphs: graphs.run(name, step, ())
    return steps


def time_ms(step: Callable[[], Tensor]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def host_calls(step: Callable[[], Tensor]) -> tuple[int, int]:
    """Launches and waits of one step, as the host made them."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
    # as they were recorded: profile.events() takes seconds to put those of one plain step in order
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    counts = Counter(event.name() for event in profile.profiler.kineto_results.events())
    launches = sum(count for name, count in counts.items() if LAUNCH.match(name))
    # the profiler itself waits once at its end
    waits = sum(count for name, count in counts.items() if WAIT.match(name) and name != "cudaDeviceSynchronize")
    return launches, waits


def cupyx_ms(step: Callable[[], Tensor]) -> float | None:
    """The same step by another timer, on torch's stream; None without CuPy."""
    try:
        import cupy
        from cupyx.profiler import benchmark
    except ImportError:
        return None
    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        return float(benchmark(step, n_repeat=10, n_warmup=2).gpu_times.mean() * 1e3)


def require_equal_losses(losses: dict[Key, float]) -> None:
    for (name, precision, engine), loss in losses.items():
        tolerance = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 5e-2}[precision]
        want = losses[name, "fp32", "reference"]
        if not abs(loss - want) <= tolerance * abs(want):
            raise SystemExit(f"{name} step, {precision}, engine {engine}: loss {loss}, plain float32 {want}")


def write(path: Path | None, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    if path is not None:
        write_text_atomically(path, json.dumps({**facts, "rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="imagenet")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="blocks under torch.compile too: minutes of compilation")
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this benchmark needs one")
    for plain_engine in (NchwEngine, CompiledEngine):
        register_engine(plain_engine.name, EngineFactory(plain_engine, lambda spec, layers: None))
    space = load_space(arguments.space)
    images = torch.randn(arguments.batch, space.image_channels, space.resolution, space.resolution, device="cuda")
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(space.num_classes, (arguments.batch,), device="cuda")
    plain = (*PLAIN, "compiled") if arguments.compile else PLAIN
    steps = all_steps(space, images, labels, plain)
    losses: dict[Key, float] = {}
    for key, step in steps.items():
        set_precision(key[1])
        losses[key] = float(step())  # chooses algorithms
        step()  # captures
    require_equal_losses(losses)
    samples: dict[Key, list[float]] = {key: [] for key in steps}
    peaks: dict[Key, int] = {}
    order = list(steps)
    for _ in range(arguments.samples):
        random.shuffle(order)
        for key in order:
            set_precision(key[1])
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            samples[key].append(time_ms(steps[key]))
            peaks[key] = torch.cuda.max_memory_allocated() - before
    rows: list[dict[str, Any]] = []
    for (name, precision, engine), values in samples.items():
        best = min(statistics.median(samples[name, p, e]) for p in PRECISIONS for e in plain)
        row = {
            "step": name,
            "precision": precision,
            "engine": engine,
            "median_ms": statistics.median(values),
            "noise": statistics.pstdev(values) / statistics.median(values),
            "ratio_vs_best_plain": best / statistics.median(values),
            "peak_bytes": peaks[name, precision, OURS if engine == GRAPH else engine],
            "launches": None,
            "synchronisations": None,
            "cupyx_ms": None,
        }
        rows.append(row)
    facts = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.date.today().isoformat(),
        "space": arguments.space,
        "batch": arguments.batch,
    }
    write(arguments.json, facts, rows)  # what was measured stays, whatever comes after it
    for row in rows:
        set_precision(row["precision"])
        row["launches"], row["synchronisations"] = host_calls(steps[row["step"], row["precision"], row["engine"]])
        print(
            f"{row['step']} {row['precision']} {row['engine']:10s} {row['median_ms']:9.3f} ms, best plain "
            f"{row['ratio_vs_best_plain']:.2f} times that; {row['launches']} launches, {row['synchronisations']} waits"
        )
    write(arguments.json, facts, rows)
    for row in rows:  # last: another timer may fail
        if row["engine"] == GRAPH:
            set_precision(row["precision"])
            row["cupyx_ms"] = cupyx_ms(steps[row["step"], row["precision"], GRAPH])
    write(arguments.json, facts, rows)


if __name__ == "__main__":
    main()
