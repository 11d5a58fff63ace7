"""GPUs of the tests: devices for `CudaTimer` that keep their own time, and an engine that works on one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from profile_fakes import FakeEngine
from tfnas.latency.chain import Section


@dataclass
class ScriptedDevice:
    """A stream with its own time; work queued behind a closed gate starts when the gate opens."""

    clocks_mhz: list[float | None] = field(default_factory=lambda: [1700.0])
    log: list[str] = field(default_factory=list)
    now_ms: float = 0.0
    closed: bool = False
    slept_s: float = 0.0
    timed_out: bool = False
    captures: int = 0
    event_ms: float = 0.0
    reads: int = 0

    def work(self, ms: float) -> None:
        self.log.append("work")
        assert self.closed or "closed" not in self.log, "timed work must be queued behind the gate"
        self.now_ms += ms

    def close_gate(self) -> None:
        self.log.append("closed")
        self.closed = True

    def open_gate(self) -> None:
        self.log.append("opened")
        self.closed = False

    def record(self) -> float:
        self.log.append("event")
        self.now_ms += self.event_ms
        return self.now_ms

    def elapsed_ms(self, start: float, stop: float) -> float:
        return stop - start

    def synchronize(self) -> None:
        if self.closed:
            self.timed_out = True
        self.log.append("sync")

    def flush_l2(self) -> None:
        self.log.append("flush")

    def gate_timed_out(self) -> bool:
        return self.timed_out

    def sm_clock_mhz(self) -> float | None:
        self.reads += 1
        return self.clocks_mhz[min(self.reads, len(self.clocks_mhz)) - 1]

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        """As a real graph: what `call` does is repeated, `call` itself is neither called again nor kept."""
        self.captures += 1
        before_ms = self.now_ms
        call()
        took_ms, self.now_ms = self.now_ms - before_ms, before_ms
        return lambda: self.work(took_ms)

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds


@dataclass
class StrictDevice(ScriptedDevice):
    """Behind the closed gate it holds `queue_depth` kernels or graphs, and never gets through what it has not yet run.

    As a real one, on which first runs load code and allocate memory, which may wait for the device.
    """

    queue_depth: int = 1000
    queued: int = 0
    capturing: bool = False
    timeouts: int = 0

    def close_gate(self) -> None:
        self.closed, self.queued, self.timed_out = True, 0, False

    def gate_timed_out(self) -> bool:
        self.timeouts += self.timed_out
        return self.timed_out

    def launch(self, ms: float, kernels: int, ran_before: bool) -> None:
        self.now_ms += ms
        if self.closed and not self.capturing:
            self.queued += kernels
            self.timed_out |= self.queued > self.queue_depth or not ran_before
        assert ran_before or not self.capturing

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        before_ms, self.capturing = self.now_ms, True
        call()
        took_ms, self.now_ms, self.capturing = self.now_ms - before_ms, before_ms, False
        self.captures += 1
        return lambda: self.launch(took_ms, 1, True)

    def now_s(self) -> float:
        return self.now_ms / 1e3


@dataclass
class DeviceEngine(FakeEngine):
    """Every section is `kernels` launches on `device`."""

    device: StrictDevice = field(default_factory=StrictDevice)
    kernels: int = 20

    def section(self, ms: float) -> Section:
        ran = False

        def run(x: torch.Tensor) -> torch.Tensor:
            nonlocal ran
            self.device.launch(ms, self.kernels, ran)
            ran = True
            return x

        return run
