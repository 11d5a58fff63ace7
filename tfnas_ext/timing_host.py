"""The host as a measuring instrument: clocks, allocator, threads, caches. What it sets it also reports."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import platform
import resource
import sys
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

# glibc's <malloc.h>: numbers of the parameters of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_FLUSH_BYTES = 64 << 20
_HELD_BLOCKS, _HELD_BYTES = 16, (256 << 10, 8 << 20)


class Clock(Protocol):
    """What the CPU timer reads; the tests script it."""

    def wall_ns(self) -> int: ...

    def thread_ns(self) -> int: ...

    def involuntary_switches(self) -> int: ...


class SystemClock:
    """The monotonic clock, this thread's CPU time, and how often the kernel took the CPU away from this thread."""

    _who = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)

    def wall_ns(self) -> int:
        return time.perf_counter_ns()

    def thread_ns(self) -> int:
        return time.thread_time_ns()

    def involuntary_switches(self) -> int:
        return resource.getrusage(self._who).ru_nivcsw


def set_allocator() -> dict[str, int] | None:
    """Tell glibc's malloc to keep freed memory, for the rest of the process. Returns the settings, None without glibc.

    With its defaults, activations above 128 KiB to 32 MiB are mapped afresh and page-faulted in every call: one block
    at 112 x 112 took 10.0 ms instead of 3.1 ms, and no table added up. Deploy with the same settings (environment
    variables `MALLOC_TRIM_THRESHOLD_`, `MALLOC_TOP_PAD_`, `MALLOC_MMAP_MAX_`), or profile without.
    """
    library = ctypes.util.find_library("c")
    if platform.system() != "Linux" or library is None:
        return None
    mallopt = getattr(ctypes.CDLL(library), "mallopt", None)
    if mallopt is None:
        return None
    wanted = {
        "mmap_threshold_bytes": (_MMAP_THRESHOLD, 32 << 20),
        "mmap_max": (_MMAP_MAX, 0),
        "trim_threshold_bytes": (_TRIM_THRESHOLD, 1 << 30),
        "top_pad_bytes": (_TOP_PAD, 64 << 20),
    }
    return {name: value for name, (parameter, value) in wanted.items() if mallopt(parameter, value) == 1}


@contextlib.contextmanager
def displaced_allocations(rng: np.random.Generator) -> Iterator[None]:
    """Hold blocks of random sizes while the body runs, so that what it allocates lies elsewhere than last time.

    A network finds its activations at the same addresses in every pass, and how their physical pages happen to share
    the caches can make a block take twice as long for as long as the process lives (seen at 112 x 112 with
    channels_last). The median over several places is what another process can expect. Sizes are uniform, drawn from
    `rng`; the body's first run touches fresh memory and should not be timed.
    """
    sizes = rng.uniform(*_HELD_BYTES, _HELD_BLOCKS)
    held = [torch.empty(int(size), dtype=torch.uint8) for size in sizes]
    yield
    del held


@contextlib.contextmanager
def pinned_threads(threads: int) -> Iterator[None]:
    """Run the body with `threads` intra-op threads of torch; restores the former number."""
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _flush_buffer() -> torch.Tensor:
    return torch.zeros(_FLUSH_BYTES, dtype=torch.uint8)


def flush_cache() -> None:
    """Push everything out of the CPU caches by writing 64 MiB."""
    _flush_buffer().add_(1)


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """The processor's name as the operating system gives it, with family and model, which the name may leave out."""
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']}, model {facts.get('model', '?')})"
    return name


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident, in bytes.

    On Linux from /proc: `ru_maxrss` there also counts what the parent held when it started this process.
    """
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
