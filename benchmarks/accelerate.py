"""A network of timm's or torchvision's before and after `tfnas_ext.accelerate`: training step, inference, memory.

    python benchmarks/accelerate.py --json result.json            # timm efficientnet_b0, batch 16, 224 x 224, 2 threads
    python benchmarks/accelerate.py --model torchvision:mobilenet_v2 --batch 8

Competitors are the same network in eager mode, NCHW and channels_last; each ratio is against the better of the two.
Logits and gradients are compared before anything is timed, then all competitors are timed interleaved. `--json` has

  training_ratio    eager time / ours of forward, cross entropy, backward and SGD
  inference_ratio   eager time / ours of a forward pass in evaluation mode without gradients
  memory_ratio      ours / eager bytes held for backward: every tensor that autograd keeps after the forward pass of a
                    training step (parameters, buffers and the input aside), each storage counted once
  peak_ratio        the same of the largest resident size that a training step adds in a process of its own

and the times (`training_ms`, `inference_ms`), bytes and relative spread of the samples (`noise`) behind them. For
stable figures give all competitors the allocator settings that keep memory, for instance
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 MALLOC_ARENA_MAX=1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tfnas.files import write_text_atomically
from tfnas.latency.header import device_name
from tfnas.versions import software_versions
from torch import Tensor, nn

import tfnas_ext
from tfnas_ext.backends import cpu_capability
from tfnas_ext.timing import CpuTimer, ProcessTimer, StopRule, measure_interleaved
from tfnas_ext.timing_host import peak_resident_bytes

COMPETITORS = ("ours", "eager_nchw", "eager_channels_last")


def build(name: str) -> nn.Module:
    package, _, model = name.partition(":")
    torch.manual_seed(0)
    if package == "timm":
        import timm

        return timm.create_model(model)
    if package == "torchvision":
        from torchvision import models

        return models.get_model(model, weights=None)
    raise SystemExit(f"--model: expected timm:NAME or torchvision:NAME, got {name!r}")


class Competitor:
    """One network with the same weights and images as the others."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        layout = torch.contiguous_format if name == "eager_nchw" else torch.channels_last
        self.model = build(args.model).to(memory_format=layout)
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(args.batch, 3, args.size, args.size, generator=generator)
        self.images = images.contiguous(memory_format=layout)
        self.labels = torch.randint(1000, (args.batch,), generator=generator)
        self.report = tfnas_ext.accelerate(self.model) if name == "ours" else None
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6, momentum=0.9)  # weights barely move

    def loss(self) -> Tensor:
        return nn.functional.cross_entropy(self.model(self.images), self.labels)

    def train(self) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    @torch.no_grad()
    def infer(self) -> Tensor:
        return self.model.eval()(self.images)

    def gradients(self) -> Tensor:
        """All gradients of one step as a vector, and running statistics that are no longer at their start."""
        torch.manual_seed(2)
        self.model.train()
        self.optimizer.zero_grad()
        self.loss().backward()
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])

    def held_bytes(self) -> int:
        """What autograd keeps between the forward and the backward pass of a training step."""
        known = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers(), self.images)}
        held: dict[int, int] = {}
        kept: list[Tensor] = []  # alive, so that no address is met twice

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                held[storage.data_ptr()] = storage.nbytes()
                kept.append(tensor)
            return tensor

        self.model.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        del loss
        return sum(held.values())


def check(competitors: dict[str, Competitor]) -> None:
    gradients = {name: competitor.gradients() for name, competitor in competitors.items()}
    logits = {name: competitor.infer() for name, competitor in competitors.items()}
    for kind, values, allowed in (("gradients", gradients, 2e-2), ("logits", logits, 1e-3)):
        want = values["eager_nchw"].double()
        for name, value in values.items():
            error = ((value.double() - want).norm() / want.norm()).item()
            if not error < allowed:
                raise SystemExit(f"{kind} of {name} differ by {error:.2e}; nothing was timed")


def peak_of(args: argparse.Namespace, name: str) -> int:
    """Bytes by which two training steps raise the largest resident size of a fresh process."""
    command = [sys.executable, __file__, "--peak-of", name, "--model", args.model, "--batch", str(args.batch)]
    command += ["--size", str(args.size), "--threads", str(args.threads)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    competitors = {name: Competitor(name, args) for name in COMPETITORS}
    report = competitors["ours"].report
    print(report)
    check(competitors)
    held = {name: competitor.held_bytes() for name, competitor in competitors.items()}
    timer = ProcessTimer() if args.clock == "process" else CpuTimer()
    rule = StopRule(0.01, args.samples, time_limit_s=args.seconds)
    result: dict[str, Any] = {"model": args.model, "batch": args.batch, "size": args.size, "dtype": "float32"}
    result |= {"replaced": len(report.replaced), "left": len(report.left), "noise": {}}
    for kind in ("training", "inference"):
        calls: dict[str, Callable[[], object]] = {
            name: competitor.train if kind == "training" else competitor.infer
            for name, competitor in competitors.items()
        }
        samples = measure_interleaved(calls, timer=timer, rule=rule, warm_up=1, rejection=False)
        times = {name: sample.median_ms for name, sample in samples.items()}
        result[f"{kind}_ms"] = {name: round(value, 2) for name, value in times.items()}
        result["noise"][kind] = {name: round(sample.rel_stdev, 4) for name, sample in samples.items()}
        result[f"{kind}_ratio"] = best_of_eager(times) / times["ours"]
    result["held_bytes"] = held
    result["memory_ratio"] = held["ours"] / best_of_eager(held)
    if not args.no_peak:
        peaks = {name: peak_of(args, name) for name in COMPETITORS}
        result["peak_bytes"] = peaks
        result["peak_ratio"] = peaks["ours"] / best_of_eager(peaks)
    result |= {"clock": args.clock, "threads": args.threads, "device": device_name("cpu")}
    return result | {"capability": cpu_capability(), "versions": software_versions()}


def best_of_eager(values: dict[str, Any]) -> float:
    return min(value for name, value in values.items() if name != "ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="timm:efficientnet_b0", help="timm:NAME or torchvision:NAME")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=12, help="at least, of each competitor, if time allows")
    parser.add_argument("--seconds", type=float, default=30, help="at most, of each competitor and kind")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall", help="process: CPU time, all threads")
    parser.add_argument("--no-peak", action="store_true", help="leave out the resident sizes of processes of their own")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-of", choices=COMPETITORS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        competitor = Competitor(args.peak_of, args)
        before = peak_resident_bytes()
        for _ in range(2):
            competitor.train()
        print(peak_resident_bytes() - before)
        return
    result = measure(args)
    for key in ("training", "inference"):
        times = "  ".join(f"{name} {value:.0f} ms" for name, value in result[f"{key}_ms"].items())
        print(f"{key}: {times}  ratio {result[f'{key}_ratio']:.2f}")
    print(f"held for backward: {result['memory_ratio']:.2f} of eager", end="")
    print(f", peak {result['peak_ratio']:.2f}" if "peak_ratio" in result else "")
    if args.json:
        write_text_atomically(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
