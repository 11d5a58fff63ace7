"""From conditions to the things that measure: the engine and the timer of a device."""

from __future__ import annotations

import torch

from tfnas.latency.chain import ChainTimer, HostChainTimer
from tfnas.latency.chain_cuda import CudaChainTimer
from tfnas.latency.engine import Conditions, Engine, require_device
from tfnas.latency.engine_fused import FusedEngine
from tfnas.latency.engine_onnxruntime import OnnxruntimeEngine
from tfnas.latency.engine_torch import TorchEngine
from tfnas.space import Space
from tfnas_ext.timing import CpuTimer, Timer
from tfnas_ext.timing_cuda import CudaDevice, CudaTimer


def make_engine(space: Space, conditions: Conditions) -> Engine:
    """The engine that `conditions.engine` names. `EngineUnavailable` says why it cannot run here."""
    require_device(conditions.device)
    if conditions.engine in ("eager", "compile"):
        return TorchEngine(space, conditions)
    if conditions.engine == "fused":
        return FusedEngine(space, conditions)
    return OnnxruntimeEngine(space, conditions)


def make_section_timer(conditions: Conditions) -> Timer:
    """The timer of single sections in mode `slope`: on a GPU captured graphs, where torch runs them, with a cold L2."""
    if torch.device(conditions.device).type == "cuda":
        captured = conditions.engine != "onnxruntime"
        return CudaTimer(CudaDevice(torch.device(conditions.device).index), cold=True, graph=captured)
    return CpuTimer(threads=conditions.threads)


def make_timer(conditions: Conditions) -> ChainTimer:
    """The chain timer of the conditions' device."""
    if torch.device(conditions.device).type == "cuda":
        return CudaChainTimer(CudaTimer(CudaDevice(torch.device(conditions.device).index)))
    return HostChainTimer(CpuTimer(threads=conditions.threads))
