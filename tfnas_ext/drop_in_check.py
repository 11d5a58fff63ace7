"""Runs a block's own code and the kernels on the same small input and compares everything that comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tfnas_ext.adapters.parts import CheckedParts, NotAccelerated
from tfnas_ext.drop_in_run import run_block

_TOLERANCE = 1e-3  # in the 2-norm: rounding is far below it, another function far above


def check_same_results(
    block: nn.Module, original: type[nn.Module], parts: CheckedParts, dtype: torch.dtype | None
) -> None:
    """Raises `NotAccelerated` where outputs or running statistics differ, in training or in evaluation.

    The block is recognised by its structure; what its `forward` does with that structure is known only by running it.
    Nothing of the block changes, nor the state of random number generators.
    """
    first = parts.conv_dw if parts.conv_pw is None else parts.conv_pw
    size = 2 * parts.conv_dw.kernel_size[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, first.in_channels, size, size - 1, generator=generator).to(first.weight.dtype)

    def own(training: bool) -> list[Tensor]:
        return _results(block, training, lambda: original.forward(block, x))

    def fused(training: bool) -> list[Tensor]:
        return _results(block, training, lambda: run_block(block, parts, x, dtype))

    for training in (True, False):
        try:
            want = own(training)
        except Exception as error:  # whatever its code raises, it is no block of ours
            raise NotAccelerated(f"it does not run on one small input: {error}") from error
        for a, b in zip(fused(training), want, strict=True):
            if not _near(a, b, dtype):
                mode = "training" if training else "evaluation"
                raise NotAccelerated(f"its forward gives other results than its parts in {mode}")


def _results(block: nn.Module, training: bool, run: Callable[[], Tensor | None]) -> list[Tensor]:
    """The output and the buffers after it."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _borrowed(block, training):
        torch.manual_seed(0)
        out = run()
        if not isinstance(out, Tensor):
            raise NotAccelerated("it cannot run on the kernels here")
        return [out, *(buffer.clone() for buffer in block.buffers())]


@contextmanager
def _borrowed(block: nn.Module, training: bool) -> Iterator[None]:
    """Copies instead of the block's buffers, and `training` set everywhere, for a while."""
    modules = list(block.modules())
    flags = [module.training for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    try:
        for module in modules:
            module.training = training
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()
        yield
    finally:
        for module, flag, own in zip(modules, flags, buffers, strict=True):
            module.training = flag
            module._buffers.update(own)


def _near(a: Tensor, b: Tensor, dtype: torch.dtype | None) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    types = [a.dtype, dtype or a.dtype] if a.is_floating_point() else []
    tolerance = max([_TOLERANCE, *(16 * torch.finfo(kind).eps for kind in types)]) if types else 0
    a, b = a.double(), b.double()
    if not bool(b.isfinite().all()):  # weights that overflow say nothing about the block
        return True
    return bool((a - b).norm() <= tolerance * b.norm() + 1e-6)
