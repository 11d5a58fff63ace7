"""Errors that are the machine's and not the input's: no memory or room left, no permission, a GPU not to be timed."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
_CANNOT_WRITE = _NO_ROOM | {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT, errno.ENOTDIR}
# How torch's CPU allocator, C++, CUDA and its libraries put it, where they raise a plain RuntimeError. Data workers are
# killed for want of memory, main or shared, and hardly ever for anything else.
_NO_MEMORY_WORDS = ("DefaultCPUAllocator", "std::bad_alloc", "out of memory", "ALLOC_FAILED", "DataLoader worker")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: a GPU's (`torch.OutOfMemoryError`), torch's on the CPU, Python's or C++'s."""
    if isinstance(error, MemoryError):
        return True
    # torch's class by its name: a command may end before torch is imported
    named = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, RuntimeError) and (named or any(words in str(error) for words in _NO_MEMORY_WORDS))


def is_disk_full(error: BaseException) -> bool:
    """Whether a file could not be written for want of room: full disk, quota, file size limit."""
    return isinstance(error, OSError) and error.errno in _NO_ROOM


def is_timing_failure(error: BaseException) -> bool:
    """Whether a GPU could not be timed (`tfnas_ext.timing_cuda.GateTimeout`)."""
    return type(error).__name__ == "GateTimeout"  # by its name, as above


def is_write_failure(error: BaseException) -> bool:
    """Whether a file of a running search or training could not be written, for whatever reason."""
    return isinstance(error, OSError) and error.errno in _CANNOT_WRITE


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that torch has taken of a GPU, or that this process has taken at all, in bytes."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    from tfnas_ext.timing_host import peak_resident_bytes

    return peak_resident_bytes()
