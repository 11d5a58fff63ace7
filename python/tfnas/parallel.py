"""A network whose gradients are averaged over the processes of a run (DistributedDataParallel)."""

# without postponed annotations: DistributedDataParallel looks at its hook's

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
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
    shared = DistributedDataParallel(network, **options)
    if device.type == "cpu":
        shared.register_comm_hook(None, _mean_in_order)
    return shared


def _mean_in_order(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The mean of a bucket over the processes, added up from the first to the last.

    An all-reduce adds in an order that depends on a gradient's place, and DistributedDataParallel moves them after the
    first step: a resumed training would not come to the same bits.
    """
    own = bucket.buffer()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]

    def mean(future: torch.futures.Future[Any]) -> Tensor:
        future.value()
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total.div_(len(parts))

    work = dist.all_gather(parts, own, async_op=True)
    result: torch.futures.Future[Tensor] = work.get_future().then(mean)
    return result


def exchange_gradients(network: nn.Module, exchange: bool) -> AbstractContextManager[None]:
    """A context in which backward averages gradients over the processes, or only adds them up for a later one."""
    if exchange or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    context: AbstractContextManager[None] = network.no_sync()
    return context
