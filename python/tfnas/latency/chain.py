"""Timing a network section by section, in context: stem, blocks in network order, head, a time stamp between any two.

A block timed alone and hot is 13-32 % faster than the same block inside a network (caches, allocator). In a chain it
meets the conditions of the real network, and the sections of one pass add up to the whole by construction.
*Reference networks*, always the same few, run in turn every few passes: their speed in another process tells how fast
the machine is then, and beside whole networks it takes the machine's drift out. They are several, because where its
weights lie makes a single network one or two percent faster or slower for as long as its process lives.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from tfnas.latency.lut import FloatArray, IntArray
from tfnas_ext.timing import CpuTimer, smoothed_drift
from tfnas_ext.timing_host import flush_cache

BoolArray = npt.NDArray[np.bool_]
Section = Callable[[torch.Tensor], torch.Tensor]
Sections = Sequence[Section]


@torch.inference_mode()
def run_through(sections: Sections, x: torch.Tensor) -> torch.Tensor:
    """What the sections, one after the other, make of `x`, untimed.

    The first time kernels are chosen, compiled and loaded and memory is allocated: not to be done in a timed pass, and
    on a GPU not behind a closed gate, where some of it would wait for ever.
    """
    for section in sections:
        x = section(x)
    return x


@dataclass(frozen=True)
class Pass:
    """One run of a chain: milliseconds per section (float64 [sections]), and which of them something disturbed."""

    sections_ms: FloatArray
    disturbed: BoolArray

    @property
    def total_ms(self) -> float:
        return float(self.sections_ms.sum())


class ChainTimer(Protocol):
    """Runs a chain once on input `x` and times every section."""

    def run(self, sections: Sections, x: torch.Tensor) -> Pass: ...


class HostChainTimer:
    """Chain timer on the host's clocks; `timer` judges, section by section, whether the CPU was taken away.

    Of a disturbed section the thread's CPU time is given instead of the wall time: without interference the two agree,
    and a machine that is never quiet still yields a latency without the others' share (but with their caches' traffic).
    """

    def __init__(self, timer: CpuTimer | None = None) -> None:
        self.timer = CpuTimer() if timer is None else timer

    def run(self, sections: Sections, x: torch.Tensor) -> Pass:
        with _no_garbage_collection():
            return self._run(sections, x)

    def _run(self, sections: Sections, x: torch.Tensor) -> Pass:
        clock = self.timer.clock
        wall_ns, cpu_ns = clock.wall_ns, clock.thread_ns
        if self.timer.cold:
            flush_cache()
        switches = clock.involuntary_switches()
        stamps: list[tuple[int, int, int, int]] = []
        with torch.inference_mode():
            for section in sections:
                cpu_start, start = cpu_ns(), wall_ns()
                x = section(x)
                stamps.append((start, wall_ns(), cpu_start, cpu_ns()))
        preempted = clock.involuntary_switches() != switches
        walls = [end - start for start, end, _, _ in stamps]
        cpus = [cpu_end - cpu_start for _, _, cpu_start, cpu_end in stamps]
        gaps = np.array([self.timer.is_gap(wall, cpu) for wall, cpu in zip(walls, cpus, strict=True)])
        # with several threads nothing tells which section lost the CPU: then all are in doubt
        disturbed = gaps | (preempted and self.timer.threads > 1)
        return Pass(np.where(gaps, cpus, walls) / 1e6, disturbed)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Python's collector, which takes its time with a build's many samples, waits until the pass is over."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass
class ReferenceLog:
    """Every pass of a reference network so far, in the order taken.

    Of each pass its time in ms, which of the networks it was, and how many other passes had been numbered when it ran
    (`Measurements.next_pass`).
    """

    passes: list[tuple[float, int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.passes)

    def add(self, total_ms: float, which: int = 0, after: int = 0) -> int:
        """Append one pass; returns its number."""
        self.passes.append((round(total_ms, 6), which, after))
        return len(self) - 1

    def after(self) -> IntArray:
        """How many other passes had been numbered before each, int64 [passes]."""
        return np.array([after for _, _, after in self.passes], dtype=np.int64)

    def medians_ms(self) -> dict[int, float]:
        """Median time in ms of every reference network that ran."""
        seen = sorted({which for _, which, _ in self.passes})
        return {i: float(np.median([ms for ms, which, _ in self.passes if which == i])) for i in seen}

    def drift(self) -> FloatArray:
        """Slowness of the machine in every pass, float64 [passes]; 1 is the median of the log."""
        if not self.passes:
            return np.ones(0)
        medians = self.medians_ms()
        return smoothed_drift([ms / medians[which] for ms, which, _ in self.passes], window=3)


def speed_ratio(now_ms: Mapping[int, float], then_ms: Mapping[int, float]) -> float | None:
    """How much longer the reference networks take now than then, in the geometric mean; None without a common one."""
    logs = [np.log(now_ms[i] / then_ms[i]) for i in now_ms if i in then_ms]
    return float(np.exp(np.mean(logs))) if logs else None
