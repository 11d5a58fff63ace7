"""What `accelerate` did to a model: which blocks run on which kernels, and which were left alone and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class ReplacedBlock:
    """`name` as in `named_modules()`, `block` the class with its package, `backend` what runs it."""

    name: str
    block: str
    backend: str


@dataclass(frozen=True)
class LeftBlock:
    """A block that looks like one of ours and stays as it is, with the reason."""

    name: str
    block: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The blocks of a model in the order of `named_modules()`; `str(report)` is a summary for people."""

    replaced: tuple[ReplacedBlock, ...]
    left: tuple[LeftBlock, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} blocks replaced, {len(self.left)} left alone"]
        counts = Counter((row.block, row.backend) for row in self.replaced)
        lines += [f"  {count} x {block} on {backend}" for (block, backend), count in counts.items()]
        lines += [f"  left: {row.name or 'the model'} ({row.block}): {row.reason}" for row in self.left]
        return "\n".join(lines)
