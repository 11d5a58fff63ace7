"""The processes that share one run (started by `torchrun`), and what they have to agree on.

Every process holds the whole state and computes the same updates from averaged gradients. The first one writes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tfnas.config import ConfigError
from tfnas.interrupt import ProcessFailed

# The others wait while the first process measures a latency table.
_TIMEOUT = timedelta(hours=3)

T = TypeVar("T")


class ProcessesDiverged(RuntimeError):
    """Processes that should hold the same values do not; the message names the processes and the values."""


class Processes:
    """This process among `world_size`, counted from 0 by `rank`. Alone, all methods are the identity.

    Methods that exchange something must be called by every process, in the same order.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self.wants_stop = False
        self._stops: Tensor | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def reduce_(self, means: Sequence[Tensor], sums: Sequence[Tensor] = ()) -> None:
        """Replace `means` by their means over the processes and `sums` by their sums, in one all-reduce.

        Tensors of any shapes and types on one device, the same on every process; they travel in the widest type. The
        same bits arrive everywhere. `wants_stop` of all processes travels along, for `stop_agreed`.
        """
        if self.world_size == 1:
            return
        tensors = [*means, *sums]
        stop = torch.full((1,), float(self.wants_stop), device=tensors[0].device)
        bucket = torch.cat([*(tensor.detach().reshape(-1) for tensor in tensors), stop])
        self._exchange(dist.all_reduce, bucket)
        bucket[: sum(mean.numel() for mean in means)].div_(self.world_size)
        *parts, self._stops = bucket.split([*(tensor.numel() for tensor in tensors), 1])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.detach().copy_(part.view(tensor.shape))

    def stop_agreed(self) -> bool:
        """Whether some process wanted to stop at the last `reduce_`; the same answer everywhere. Reads the device."""
        if self.world_size == 1:
            return self.wants_stop
        return self._stops is not None and float(self._stops) > 0

    def from_first(self, function: Callable[[], T]) -> T:
        """What `function` gives on the first process, sent to all (by pickle); elsewhere it is not called.

        Where it raises, the first process raises that error and the others `ProcessFailed`.
        """
        if self.world_size == 1:
            return function()
        message: list[Any] = [None, None]
        if self.is_first:
            try:
                message = [function(), None]
            except Exception as error:
                self._exchange(dist.broadcast_object_list, [None, str(error)])
                raise
        self._exchange(dist.broadcast_object_list, message)
        value, failure = message
        if failure is not None:
            raise ProcessFailed(f"process {self.rank}: process 0 failed and says why")
        result: T = value
        return result

    def require_equal(self, values: Mapping[str, Iterable[Tensor | str]], when: str) -> None:
        """Raise `ProcessesDiverged` on every process unless all hold the same bits under each name of `values`."""
        if self.world_size == 1:
            return
        digests = {name: _digest(parts) for name, parts in values.items()}
        found: list[dict[str, str]] = [{}] * self.world_size
        self._exchange(dist.all_gather_object, found, digests)
        differing = {
            name: [rank for rank, other in enumerate(found) if other.get(name) != found[0][name]] for name in found[0]
        }
        wrong = {name: ranks for name, ranks in differing.items() if ranks}
        if wrong:
            details = "; ".join(f"{name} of process {', '.join(map(str, ranks))}" for name, ranks in wrong.items())
            raise ProcessesDiverged(
                f"{when}: the processes no longer hold the same values, different from process 0's are: {details}. "
                "All must run the same versions on the same kind of device; the last checkpoint is kept"
            )

    def _exchange(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            function(*arguments)
        except RuntimeError as error:
            raise ProcessFailed(
                f"process {self.rank}: another process has ended or does not answer ({str(error).splitlines()[0]})"
            ) from error


ALONE = Processes()


def is_shared_run() -> bool:
    """Whether this process was started as one of several (`torchrun`), or is in a process group already."""
    return dist.is_available() and (dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1)


@contextmanager
def open_processes(device: torch.device) -> Iterator[Processes]:
    """The processes of this run, by gloo on a CPU and nccl on CUDA; a process group that exists already is used.

    A `ConfigError` says what is missing in the environment that `torchrun` sets.
    """
    if not is_shared_run():
        yield Processes()
        return
    if dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size())
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; start several processes "
            "by torchrun --nproc-per-node N -m tfnas ..., or unset WORLD_SIZE"
        )
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_TIMEOUT, device_id=device if on_gpu else None
    )
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def is_first_process() -> bool:
    """Whether this process is the only or the first one of a run, also after the run."""
    return not is_shared_run() or os.environ.get("RANK", "0") == "0"


def local_rank() -> int:
    """Number of this process among those of its machine: which GPU is its own."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))) if is_shared_run() else 0


def _digest(parts: Iterable[Tensor | str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(part.encode())
    return digest.hexdigest()
