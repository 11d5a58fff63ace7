"""One weight step and one architecture step of a supernet on a GPU: the CUDA engine against plain PyTorch.

    python benchmarks/gpu_step.py [--space imagenet] [--batch 32] [--samples 20] [--json FILE]

W: two sampled paths, backward, clipping, SGD. A: the mixture of all candidates, backward, Adam. Competitors: the same
supernet on the reference engine (channels_last) in float32, TF32 and bfloat16, and this package's engine in the same
precisions, also captured in a CUDA graph. Losses are compared with the reference before anything is timed; samples are
interleaved; CUDA events around whole steps. Rows where this package loses are printed like the others.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from tfnas.space_io import load_space
from tfnas.steps import architecture_step, weight_step
from tfnas.supernet import Supernet
from torch import Tensor

PRECISIONS = {"fp32": (torch.float32, "highest"), "tf32": (torch.float32, "high"), "bf16": (torch.bfloat16, "high")}


def set_precision(name: str) -> None:
    torch.set_float32_matmul_precision(PRECISIONS[name][1])
    torch.backends.cudnn.allow_tf32 = name != "fp32"


def make_steps(supernet: Supernet, images: Tensor, labels: Tensor, seed: int) -> dict[str, Callable[[], Tensor]]:
    """The two steps as functions without arguments that return a loss tensor; choices are fixed by the seed."""
    counts = [len(layer.candidates) for layer in supernet.space.layers]
    generator = torch.Generator().manual_seed(seed)
    first = torch.tensor([int(torch.randint(n, (), generator=generator)) for n in counts])
    choices = torch.stack([first, (first + 1) % torch.tensor(counts)])
    if supernet.engine.name == "cuda":
        choices = choices.cuda()
    optimizer = supernet.architecture_adam(0.01, (0.5, 0.999))

    def step_w() -> Tensor:
        step = weight_step(supernet, images, labels, choices, lr=0.0, momentum=0.9, weight_decay=1e-5, max_norm=5.0)
        return step.losses.sum()

    def step_a() -> Tensor:
        u = torch.softmax(supernet.log_alpha, -1)
        step = architecture_step(supernet, optimizer, images, labels, u, lambda u, v: u.sum() * 0, max_norm=5.0)
        return step.cross_entropy

    return {"W": step_w, "A": step_a}


def time_ms(step: Callable[[], Tensor]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="imagenet")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this benchmark needs one")
    space = load_space(arguments.space)
    images = torch.randn(arguments.batch, space.image_channels, space.resolution, space.resolution, device="cuda")
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(space.num_classes, (arguments.batch,), device="cuda")
    steps: dict[tuple[str, str, str], Callable[[], Tensor]] = {}
    losses: dict[tuple[str, str, str], float] = {}
    for precision, (dtype, _) in PRECISIONS.items():
        set_precision(precision)
        for engine in ("reference", "cuda"):
            torch.manual_seed(0)
            supernet = Supernet(space, engine, dtype).cuda()
            for name, step in make_steps(supernet, images, labels, seed=1).items():
                losses[name, precision, engine] = float(step())
                steps[name, precision, engine] = step
    for (name, precision, engine), loss in losses.items():
        tolerance = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 5e-2}[precision]
        if abs(loss - losses[name, "fp32", "reference"]) > tolerance * abs(loss):
            raise SystemExit(f"{name} step, {precision}, engine {engine}: loss {loss} differs from the reference's")
    samples: dict[tuple[str, str, str], list[float]] = {key: [] for key in steps}
    peaks: dict[tuple[str, str, str], int] = {}
    for _ in range(arguments.samples):
        for key, step in steps.items():
            set_precision(key[1])
            torch.cuda.reset_peak_memory_stats()
            samples[key].append(time_ms(step))
            peaks[key] = torch.cuda.max_memory_allocated()
    rows = []
    for (name, precision, engine), values in samples.items():
        best = min(statistics.median(samples[name, p, "reference"]) for p in PRECISIONS)
        row = {
            "step": name,
            "precision": precision,
            "engine": engine,
            "median_ms": statistics.median(values),
            "noise": statistics.pstdev(values) / statistics.median(values),
            "ratio_vs_best_reference": best / statistics.median(values),
            "peak_bytes": peaks[name, precision, engine],
        }
        rows.append(row)
        print(f"{name} {precision} {engine:9s} {row['median_ms']:9.3f} ms  x{row['ratio_vs_best_reference']:.2f}")
    if arguments.json:
        facts = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "date": datetime.date.today().isoformat(),
            "space": arguments.space,
            "batch": arguments.batch,
        }
        arguments.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
