"""How many CPU threads torch computes with."""

from __future__ import annotations

import torch

from tfnas.config import MAX_THREADS


def use_threads(threads: int | None) -> None:
    """Compute with `threads` CPU threads; None leaves PyTorch's choice. `ValueError` outside 1 to `MAX_THREADS`."""
    if threads is not None:
        require_threads(threads)
        torch.set_num_threads(threads)


def require_threads(threads: int) -> None:
    """Raise `ValueError` unless `threads` is within 1 to `MAX_THREADS`."""
    if not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"threads: expected 1 to {MAX_THREADS}, got {threads}")
