"""From conditions to the things that measure: the state of the process, the engine, the timers and the profiler."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from tfnas.latency.chain import ChainTimer, HostChainTimer
from tfnas.latency.chain_cuda import CudaChainTimer
from tfnas.latency.chain_profiler import ChainProfiler
from tfnas.latency.engine import Conditions, Engine, EngineUnavailable, require_device
from tfnas.latency.engine_fused import FusedEngine
from tfnas.latency.engine_onnxruntime import OnnxruntimeEngine
from tfnas.latency.engine_torch import TorchEngine
from tfnas.latency.measurements import Measurements
from tfnas.latency.slope_profiler import SlopeProfiler
from tfnas.space import Space
from tfnas_ext.backends import BackendUnavailableError
from tfnas_ext.timing import CpuTimer, Timer
from tfnas_ext.timing_cuda import CudaDevice, CudaTimer
from tfnas_ext.timing_host import pinned_threads, set_allocator


@contextlib.contextmanager
def prepared_process(conditions: Conditions) -> Iterator[dict[str, int] | None]:
    """Run the body as everything that is measured must run: allocator, threads, and on a GPU a stream of its own.

    Yields the allocator's settings, which stay. Torch's default stream has no handle: what is told to work on it, as
    onnxruntime is, makes one of its own, which no time stamp would see. Raises `EngineUnavailable` without the device.
    """
    require_device(conditions.device)
    device = torch.device(conditions.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(pinned_threads(conditions.threads))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
        yield set_allocator()


def make_engine(space: Space, conditions: Conditions) -> Engine:
    """The engine that `conditions.engine` names. `EngineUnavailable` says why it cannot run here."""
    require_device(conditions.device)
    if conditions.engine in ("eager", "compile"):
        return TorchEngine(space, conditions)
    if conditions.engine == "fused":
        return FusedEngine(space, conditions)
    return OnnxruntimeEngine(space, conditions)


def make_timer(conditions: Conditions) -> ChainTimer:
    """The chain timer of the conditions' device. `EngineUnavailable` says why a GPU cannot be timed here."""
    if torch.device(conditions.device).type != "cuda":
        return HostChainTimer(CpuTimer(threads=conditions.threads))
    try:
        return CudaChainTimer(CudaTimer(CudaDevice(torch.device(conditions.device).index)))
    except BackendUnavailableError as error:
        raise EngineUnavailable(
            f"device {conditions.device!r}: {error}; measure on cpu, or use a table that was measured elsewhere"
        ) from None


def make_section_timer(conditions: Conditions, timer: ChainTimer) -> Timer:
    """The timer of single sections in mode `slope`, with the device and the clock guard of `timer`.

    On a GPU captured graphs, where torch runs them, with a cold L2.
    """
    if isinstance(timer, CudaChainTimer):
        shared = timer.timer
        return CudaTimer(shared.device, cold=True, graph=conditions.engine != "onnxruntime", guard=shared.guard)
    return CpuTimer(threads=conditions.threads)


def mode_of(device: str) -> str:
    """How blocks are put in context on a device: "chain" on a CPU, "slope" on a GPU."""
    return "slope" if torch.device(device).type == "cuda" else "chain"


def make_profiler(
    space: Space,
    conditions: Conditions,
    measurements: Measurements,
    *,
    mode: str = "auto",
    seed: int = 0,
    engine: Engine | None = None,
    timer: ChainTimer | None = None,
    section_timer: Timer | None = None,
    now_s: Callable[[], float] = time.monotonic,
) -> ChainProfiler:
    """What takes the samples: `ChainProfiler` in mode "chain", `SlopeProfiler` in "slope", "auto" by the device.

    To be made and used within `prepared_process`. Engine, timers and clock that are not given are the conditions'.
    """
    engine = engine or make_engine(space, conditions)
    timer = timer or make_timer(conditions)
    if (mode_of(conditions.device) if mode == "auto" else mode) == "chain":
        return ChainProfiler(space, engine, timer, measurements, seed=seed, now_s=now_s)
    section_timer = section_timer or make_section_timer(conditions, timer)
    return SlopeProfiler(space, engine, timer, measurements, section_timer=section_timer, seed=seed, now_s=now_s)
