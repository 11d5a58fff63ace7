"""A scripted machine for the profiler's tests: blocks take a known time, the clock moves only when they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from tfnas.architecture import Architecture
from tfnas.latency.chain import HostChainTimer, Section
from tfnas.latency.engine import Conditions
from tfnas.space import OpKey

from tfnas_ext.timing import CpuTimer

STEM_MS, HEAD_MS = 0.3, 0.2


def smooth_ms(key: OpKey, width: int) -> float:
    """A plausible latency: affine in the width with a bend, larger for larger kernels and SE."""
    area = (key.resolution / 28) ** 2
    bend = 0.4 * max(0, width - 5 * key.in_channels) * 1e-3
    return 0.02 + (1e-3 * width * (1 + 0.1 * key.kernel_size) + bend) * (0.2 + area) + 1e-4 * key.se_channels


@dataclass
class Machine:
    """Its clock, its noise (relative standard deviation), drift per second and share of disturbed passes."""

    noise: float = 0.0
    drift_per_s: float = 0.0
    disturbed_share: float = 0.0
    wall: float = 0.0
    cpu: float = 0.0
    switches: int = 0
    speed: float = 1.0
    calls: int = 0
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(11))

    def work(self, ms: float) -> None:
        self.calls += 1
        slow = self.speed * (1 + self.drift_per_s * self.wall / 1e3) * (1 + self.noise * self.rng.standard_normal())
        self.wall += ms * max(slow, 0.1)
        self.cpu += ms * max(slow, 0.1)
        if self.disturbed_share and self.rng.random() < self.disturbed_share:
            self.wall += ms
            self.switches += 1

    def wall_ns(self) -> int:
        return round(self.wall * 1e6)

    def thread_ns(self) -> int:
        return round(self.cpu * 1e6)

    def involuntary_switches(self) -> int:
        return self.switches

    def now_s(self) -> float:
        return self.wall / 1e3

    def timer(self) -> HostChainTimer:
        return HostChainTimer(CpuTimer(threads=1, clock=self))


@dataclass
class FakeEngine:
    """Sections take `latency_ms(key, width)` on the machine, whole networks `overhead` * sum + `offset_ms`."""

    machine: Machine
    latency_ms: Callable[[OpKey, int], float] = smooth_ms
    overhead: float = 1.0
    offset_ms: float = 0.0
    conditions: Conditions = field(default_factory=Conditions)
    blocks_made: list[tuple[OpKey, int]] = field(default_factory=list)
    limit: int | None = None

    def input(self) -> torch.Tensor:
        return torch.zeros(1)

    def section(self, ms: float) -> Section:
        def run(x: torch.Tensor) -> torch.Tensor:
            if self.limit is not None and self.machine.calls >= self.limit:
                raise KeyboardInterrupt
            self.machine.work(ms)
            return x

        return run

    def stem(self) -> Section:
        return self.section(STEM_MS)

    def head(self) -> Section:
        return self.section(HEAD_MS)

    def block(self, key: OpKey, width: int) -> Section:
        self.blocks_made.append((key, width))
        return self.section(self.latency_ms(key, width))

    def network(self, arch: Architecture) -> list[Section]:
        def sections() -> Iterator[Section]:
            yield self.section(self.offset_ms + self.overhead * STEM_MS)
            for key, width in arch.keys():  # noqa: SIM118
                yield self.section(self.overhead * self.latency_ms(key, width))
            yield self.section(self.overhead * HEAD_MS)

        return list(sections())
