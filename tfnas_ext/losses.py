"""Cross entropy and right answers of a batch: torch's operators, or the CUDA engine's kernel that does all at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def cross_entropy(logits: Tensor, labels: Tensor, *, fused: bool) -> tuple[Tensor, Tensor]:
    """(mean cross entropy, number of right answers), 0-d; the first is differentiable in `logits`.

    Args:
        logits: float32 or float64 [N, classes].
        labels: int64 [N], 0 <= label < classes.
        fused: forward and gradient by the package's kernel (two launches). There a label that is no class gives a NaN
            loss; torch's operators raise an error on the CPU and fail on the device.
    """
    if fused:
        loss, correct = _CrossEntropy.apply(logits, labels)
        return loss, correct
    return F.cross_entropy(logits, labels), (logits.detach().argmax(1) == labels).sum()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, correct, dlogits = torch.ops.tfnas._cross_entropy(logits.detach().contiguous(), labels)
        ctx.mark_non_differentiable(correct)
        ctx.save_for_backward(dlogits)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (dlogits,) = ctx.saved_tensors
        return dloss * dlogits, None
