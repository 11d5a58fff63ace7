"""The CUDA twin of `timing.CpuTimer`: event pairs behind a closed gate, cold or hot L2, captured graphs, clock guard.

The host closes a gate (a kernel that waits), queues start event, work and stop event behind it, and opens it: how long
the host takes to queue the work is then outside the measured time. All logic talks to a `Device`, which the tests
script; `CudaDevice` is the real one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch

from tfnas_ext.backends import BackendUnavailableError, build_info, missing_cuda_code
from tfnas_ext.timing import Reading

_RECENT = 51  # readings of the clock that say what is usual
_TRIES = 2  # of a reading whose gate did not wait to the end


class Device(Protocol):
    """The few things a GPU timer asks of its device; times in ms, clocks in MHz."""

    def close_gate(self) -> None: ...

    def open_gate(self) -> None: ...

    def record(self) -> Any:
        """Queue a time stamp on the current stream."""

    def elapsed_ms(self, start: Any, stop: Any) -> float: ...

    def synchronize(self) -> None: ...

    def flush_l2(self) -> None:
        """Queue the eviction of everything in the L2 cache."""

    def gate_timed_out(self) -> bool: ...

    def sm_clock_mhz(self) -> float | None:
        """The SM clock right now; None where it cannot be read."""

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        """`call`, which has run before, as a captured graph, ready to be replayed."""

    def sleep(self, seconds: float) -> None: ...


class GateTimeout(RuntimeError):
    """The timed work waited for the device while it was held back, or took too long to queue."""


@dataclass
class ClockGuard:
    """Notices throttling: a reading counts only where the SM clock is at least `floor` of what has been usual lately.

    After a rejection the device gets a pause, doubled each time up to `longest_pause_s`. A clock that stays low, of a
    GPU grown warm, becomes the usual one. Where the clock cannot be read every reading counts, and `known` stays False.
    """

    floor: float = 0.98
    pause_s: float = 0.05
    longest_pause_s: float = 1.0
    clocks_mhz: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    rejected: int = 0
    _pause_s: float = field(default=0.0, repr=False)

    @property
    def known(self) -> bool:
        return bool(self.clocks_mhz)

    @property
    def usual_mhz(self) -> float:
        """Median of the clocks seen lately."""
        return float(np.median(self.clocks_mhz))

    def accepts(self, clock_mhz: float | None) -> bool:
        """Judge a reading taken at `clock_mhz` and remember it."""
        if clock_mhz is None:
            return True
        self.clocks_mhz.append(clock_mhz)
        good = clock_mhz >= self.floor * self.usual_mhz
        if good:
            self._pause_s = 0.0
        else:
            self.rejected += 1
            self._pause_s = min(self.longest_pause_s, max(self.pause_s, 2 * self._pause_s))
        return good

    @property
    def wanted_pause_s(self) -> float:
        """How long to let the device rest before the next reading; 0 after a good one."""
        return self._pause_s


class CudaTimer:
    """Times a call on the GPU; a `timing.Timer`.

    `cold` flushes the L2 cache before every reading (hot otherwise). `graph` captures the call once and replays it,
    for work of many short kernels. `batch` calls share one event pair, because events resolve about 0.5 us only: a
    reading is their mean. A reading is disturbed when the SM clock had dropped (`ClockGuard`).
    """

    def __init__(
        self,
        device: Device | None = None,
        *,
        cold: bool = False,
        graph: bool = False,
        batch: int = 1,
        guard: ClockGuard | None = None,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch: expected at least 1 call an event pair, got {batch}")
        if cold and batch > 1:
            raise ValueError(f"batch: with a cold cache each call needs an event pair of its own, got {batch}")
        self.device: Device = CudaDevice() if device is None else device
        self.cold, self.graph, self.batch = cold, graph, batch
        self.guard = ClockGuard() if guard is None else guard
        self._graphs: dict[int, tuple[Callable[[], object], Callable[[], object]]] = {}

    def warm_up(self, call: Callable[[], object], calls: int) -> None:
        for _ in range(max(calls, 1)):
            call()
        self.device.synchronize()
        if self.graph:
            self.replayed(call)()
            self.device.synchronize()

    def sample(self, call: Callable[[], object]) -> Reading:
        run = self.replayed(call) if self.graph else call
        (elapsed_ms,), disturbed = self.stamped([run] * self.batch, stamps_every=self.batch)
        return Reading(elapsed_ms / self.batch, disturbed)

    def stamped(self, calls: list[Callable[[], object]], stamps_every: int = 1) -> tuple[list[float], bool]:
        """Run `calls` in order behind the gate with a time stamp after every `stamps_every` of them.

        Returns the ms between stamps and whether the reading is disturbed. A gate that gave up waiting (this process
        was stopped for seconds, or something in `calls` ran for the first time) is closed again for another try; then
        raises `GateTimeout`. So `calls` must begin anew each time.
        """
        for _ in range(_TRIES):
            times_ms = self._behind_gate(calls, stamps_every)
            if not self.device.gate_timed_out():
                return times_ms, not self.guard.accepts(self.device.sm_clock_mhz())
        raise GateTimeout(
            "the timed work waited for the device (a copy to the host, .item(), a synchronisation), or was more than "
            "the device's queue holds, about a thousand kernels; time it without that, or with graph=True"
        )

    def _behind_gate(self, calls: list[Callable[[], object]], stamps_every: int) -> list[float]:
        device = self.device
        device.sleep(self.guard.wanted_pause_s)
        if self.cold:
            device.flush_l2()
        device.synchronize()
        device.close_gate()
        try:
            events = [device.record()]
            for i, call in enumerate(calls, start=1):
                call()
                if i % stamps_every == 0:
                    events.append(device.record())
        finally:
            device.open_gate()
        device.synchronize()
        return [device.elapsed_ms(a, b) for a, b in pairwise(events)]

    def forget(self, calls: Iterable[Callable[[], object]]) -> None:
        """Free the captured graphs of `calls`."""
        for call in calls:
            self._graphs.pop(id(call), None)

    def replayed(self, call: Callable[[], object]) -> Callable[[], object]:
        """The captured graph of `call`, which must have run before; it is kept until `forget`, and so is the call."""
        if id(call) not in self._graphs:
            self._graphs[id(call)] = (call, self.device.capture(call))
        return self._graphs[id(call)][1]


class CudaDevice:
    """The real device: torch's events on its current stream; gate and clock from the native module.

    Raises `BackendUnavailableError` where that was built without CUDA, or not for this device.
    """

    gate_timeout_ms = 5000.0

    def __init__(self, index: int | None = None) -> None:
        self.index = torch.cuda.current_device() if index is None else index
        self._ops = torch.ops.tfnas
        if not hasattr(self._ops, "timing_close_gate"):
            raise BackendUnavailableError(
                "the CUDA timer needs tfnas_ext's native module built with CUDA, and this one is not "
                f"({build_info().cuda_reason or 'see `tfnas info`'})"
            )
        if problem := missing_cuda_code(f"cuda:{self.index}"):
            raise BackendUnavailableError(f"the CUDA timer cannot run: {problem}")
        # Graphs are replayed one at a time and keep nothing: all can use the same memory.
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(self.index)
        bytes_ = torch.cuda.get_device_properties(self.index).L2_cache_size
        self._flush = torch.empty(2 * max(bytes_, 1 << 20), dtype=torch.uint8, device=f"cuda:{self.index}")

    def close_gate(self) -> None:
        self._ops.timing_close_gate(self.index, self.gate_timeout_ms)

    def open_gate(self) -> None:
        self._ops.timing_open_gate(self.index)

    def record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.index))
        return event

    def elapsed_ms(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        return float(start.elapsed_time(stop))

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.index)

    def flush_l2(self) -> None:
        self._flush.zero_()

    def gate_timed_out(self) -> bool:
        return bool(self._ops.timing_gate_timed_out(self.index))

    def sm_clock_mhz(self) -> float | None:
        return float(self._ops.timing_sm_clock_mhz(self.index, 20.0))

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.index):
            current = torch.cuda.current_stream()
            self._side.wait_stream(current)
            with torch.cuda.stream(self._side):
                call()  # what libraries keep for each stream must exist before
            # thread_local: what other threads allocate and copy meanwhile is none of the graph's business
            with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
                call()
        return graph.replay

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            time.sleep(seconds)
