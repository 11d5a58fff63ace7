"""A network whose gradients are averaged over the processes of a run (DistributedDataParallel)."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tfnas.processes import Processes


def share_network(network: nn.Module, processes: Processes) -> nn.Module:
    """`network` itself where there is one process; otherwise wrapped, sharing its parameters and buffers.

    Parameters must be equal in all processes. Buffers stay each process's own.
    """
    if processes.world_size == 1:
        return network
    device = next(network.parameters()).device
    options: dict[str, Any] = {"device_ids": [device] if device.type == "cuda" else None}
    # torch 2.14 gave the option its second name
    known = inspect.signature(DistributedDataParallel).parameters
    options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
    return DistributedDataParallel(network, **options)


def exchange_gradients(network: nn.Module, exchange: bool) -> AbstractContextManager[None]:
    """A context in which backward averages gradients over the processes, or only adds them up for a later one."""
    if exchange or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    context: AbstractContextManager[None] = network.no_sync()
    return context
