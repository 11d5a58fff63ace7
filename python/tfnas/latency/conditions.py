"""From conditions to the things that measure: the engine and the timer of a device."""

from __future__ import annotations

import torch

from tfnas.latency.chain import ChainTimer, HostChainTimer
from tfnas.latency.engine import Conditions, Engine, EngineUnavailable
from tfnas.latency.engine_torch import TorchEngine
from tfnas.space import Space
from tfnas_ext.timing import CpuTimer


def make_engine(space: Space, conditions: Conditions) -> Engine:
    """The engine that `conditions.engine` names. `EngineUnavailable` says why it cannot run here."""
    if torch.device(conditions.device).type == "cuda" and not torch.cuda.is_available():
        raise EngineUnavailable(
            f"device {conditions.device!r}: torch {torch.__version__} sees no CUDA device here; profile on cpu, or on "
            "the machine that has the GPU"
        )
    if conditions.engine in ("eager", "compile"):
        return TorchEngine(space, conditions)
    raise EngineUnavailable(f"engine {conditions.engine!r} is not available in this version; use eager or compile")


def make_timer(conditions: Conditions) -> ChainTimer:
    """The chain timer of the conditions' device."""
    return HostChainTimer(CpuTimer(threads=conditions.threads))
