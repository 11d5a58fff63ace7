"""How near to memory's own speed each kernel of a layer runs on a GPU.

    python benchmarks/gpu_kernels.py [--space imagenet] [--batch 32] [--samples 10] [--json FILE]

Every searchable layer of the space at its start widths, as the architecture step runs it (all candidates) and as a
weight step does (the last candidate, with weight gradients). A kernel's floor is what it must read and write once, by
the sizes of the tensors; its time is the device's own (torch.profiler), the median over samples after one call that
warms up. Printed for each kernel, summed over layers: time, bytes, GB/s, and the share of the bandwidth of a copy
measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tfnas.files import write_text_atomically
from tfnas.space_io import load_space
from tfnas.supernet import Supernet
from torch import Tensor

from tfnas_ext.engine_cuda import CudaEngine


class LayerBytes(NamedTuple):
    """Sizes of a layer's tensors in bytes: narrow x and out, wide at the output's resolution, all candidates' y3."""

    x: int
    out: int
    wide_out: int
    y3: int
    parts: int  # of dx, before its corrections: float32 or wider
    dh1: int  # wide at the input's resolution where weight gradients are wanted, else 0: it is not written


# Reads and writes of the kernels that touch activations, by their names in csrc/kernels.
FLOORS: dict[str, Callable[[LayerBytes], int]] = {
    "channel_sums": lambda b: b.x,
    "gram<.*Centred": lambda b: b.x,
    "expand_dw": lambda b: b.x + b.wide_out,
    "se_pool": lambda b: b.wide_out,
    "narrow_product<.*NormActivateGate": lambda b: b.wide_out + b.y3,
    "finish<": lambda b: b.y3 + b.out,
    "output_sums": lambda b: b.out + b.y3,
    "project_grad": lambda b: b.out + 2 * b.y3,
    "project_backward<.*0>": lambda b: b.y3 + b.wide_out,  # gradient of the gates
    "project_backward<.*1>": lambda b: b.y3 + 2 * b.wide_out,
    "outer_product<.*NormActivateGate": lambda b: b.wide_out + b.y3,
    "depthwise_backward": lambda b: b.x + 2 * b.wide_out + b.parts + b.dh1,
    "outer_product<.*AsIs": lambda b: b.dh1 + b.x,
    "input_grad": lambda b: b.parts + 2 * b.x,
}


def floor_of(kernel: str) -> str | None:
    """The entry of `FLOORS` for a kernel's name as the profiler gives it."""
    name = re.sub(r"\(tfnas::cuda::\w+\)", "", kernel).replace("tfnas::cuda::", "").removeprefix("void ")
    return next((pattern for pattern in FLOORS if re.match(pattern, name)), None)


def layer_bytes(x: Tensor, out: Tensor, widths: list[int], weight_gradients: bool) -> LayerBytes:
    size = x.element_size()
    wide = sum((width + 7) // 8 * 8 for width in widths) * size
    pixels_in, pixels_out = x.numel() // x.shape[1], out.numel() // out.shape[1]
    return LayerBytes(
        x=x.numel() * size,
        out=out.numel() * size,
        wide_out=pixels_out * wide,
        y3=out.numel() * size * len(widths),
        parts=x.numel() * max(4, size),
        dh1=pixels_in * wide if weight_gradients else 0,
    )


def kernel_times_us(call: Callable[[], object], samples: int) -> dict[str, float]:
    """Device microseconds of each kernel in one `call`: the median of its launches times their number.

    One profile of all samples, since starting and reading one takes longer than the calls.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(samples):
            call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        found[event.name].append(event.time_range.elapsed_us())
    return {name: statistics.median(times) * len(times) / samples for name, times in found.items()}


def copy_bytes_per_s() -> float:
    """Bytes read and written per second by a copy far larger than the caches."""
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    rates = []
    for _ in range(10):
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        rates.append(2 * source.numel() * 4 / (start.elapsed_time(end) * 1e-3))
    return max(rates)


def measure_layers(engine: CudaEngine, images: Tensor, mixture: bool, samples: int) -> dict[str, list[float]]:
    """[microseconds, bytes] of every entry of `FLOORS`, summed over the layers."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    x = images
    for index, spec in enumerate(engine.spec.layers):
        count = len(spec.candidates)
        choice = None if mixture else torch.full((1,), count - 1, dtype=torch.int32, device="cuda")
        u = torch.full((count,), 1 / count, device="cuda") if mixture else None
        arguments = engine._arguments(index, choice, u)
        out, saved = torch.ops.tfnas._layer_forward(x, *arguments)
        grads = [] if mixture else engine._gradients[0][index]
        dout = torch.randn_like(out)

        def both(x=x, arguments=arguments, dout=dout, saved=saved, grads=grads) -> None:
            torch.ops.tfnas._layer_forward(x, *arguments)
            torch.ops.tfnas._layer_backward(x, dout, saved, *arguments, True, grads)

        both()
        widths = engine._widths[index] if mixture else engine._widths[index][-1:]
        sizes = layer_bytes(x, out, widths, weight_gradients=not mixture)
        for kernel, microseconds in kernel_times_us(both, samples).items():
            pattern = floor_of(kernel)
            if pattern is not None:
                totals[pattern][0] += microseconds
                totals[pattern][1] += FLOORS[pattern](sizes)
        x = out
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="imagenet")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this benchmark needs one")
    torch.set_float32_matmul_precision("high")
    space = load_space(arguments.space)
    bandwidth = copy_bytes_per_s()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        engine = Supernet(space, "cuda", dtype, "cuda").engine
        assert isinstance(engine, CudaEngine)
        side = space.resolution // space.stem_stride
        x = torch.randn(arguments.batch, space.fixed_channels, side, side, device="cuda", dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        engine._prepare(x.device)
        for mixture in (True, False):
            for kernel, (microseconds, count) in measure_layers(engine, x, mixture, arguments.samples).items():
                row = {
                    "step": "A" if mixture else "W",
                    "dtype": str(dtype).removeprefix("torch."),
                    "kernel": kernel,
                    "us": microseconds,
                    "floor_bytes": count,
                    "gb_per_s": count / microseconds * 1e-3,
                    "share_of_copy": count / microseconds * 1e6 / bandwidth,
                }
                rows.append(row)
                print(
                    f"{row['step']} {row['dtype']:8s} {kernel:36s} {microseconds:9.1f} us {row['gb_per_s']:7.0f} GB/s, "
                    f"{100 * row['share_of_copy']:5.1f} % of a copy's {bandwidth * 1e-9:.0f} GB/s"
                )
    if arguments.json:
        facts = {"device": torch.cuda.get_device_name(), "space": arguments.space, "batch": arguments.batch}
        write_text_atomically(arguments.json, json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
