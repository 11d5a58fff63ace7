"""Which mid channels of an `MBInvRes` run: sorting them by importance, and taking some of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tfnas_ext.reference import Norm, SqueezeExcite

# Dimension of the mid channels in every tensor that has them; bn3 has none.
CHANNEL_DIMS = {
    "conv_pw.weight": 0,
    "bn1.weight": 0,
    "bn1.bias": 0,
    "bn1.running_mean": 0,
    "bn1.running_var": 0,
    "conv_dw.weight": 0,
    "bn2.weight": 0,
    "bn2.bias": 0,
    "bn2.running_mean": 0,
    "bn2.running_var": 0,
    "se.conv_reduce.weight": 1,
    "se.conv_expand.weight": 0,
    "se.conv_expand.bias": 0,
    "conv_pwl.weight": 1,
}


def importance_order(scores: Tensor, channels: int) -> Tensor:
    """Positions of `channels` scores from the largest to the smallest, ties in their order: int64 [channels]."""
    if list(scores.shape) != [channels]:
        raise ValueError(f"scores must be [max_width] = [{channels}], not {list(scores.shape)}")
    if scores.is_complex() or bool(scores.isnan().any()):
        raise ValueError(f"scores must be real numbers, got {scores.dtype}{'' if scores.is_complex() else ' with NaN'}")
    return torch.argsort(scores.detach(), descending=True, stable=True)


def kept_channels(mask: Tensor, channels: int) -> Tensor:
    """Positions that `mask` keeps: int64 [width], rising."""
    if mask.dtype != torch.bool or list(mask.shape) != [channels]:
        raise ValueError(
            f"mask must be bool [max_width] = [{channels}], not {mask.dtype} {list(mask.shape)}; True keeps a channel"
        )
    kept = mask.nonzero().flatten()
    if not len(kept):
        raise ValueError("mask must keep at least one channel")
    return kept


@torch.no_grad()
def permute_channels_(block: nn.Module, order: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """Puts mid channel `order[i]` at i, in place: parameters, buffers, gradients, and the optimizer's state of them."""
    for parameter, dim in _channel_tensors(block):
        state = {} if optimizer is None else optimizer.state.get(parameter, {})
        moving = [parameter, parameter.grad, *state.values()]
        for tensor in moving:
            if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))


def _channel_tensors(block: nn.Module) -> Iterator[tuple[Tensor, int]]:
    tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    return ((tensors[name], dim) for name, dim in CHANNEL_DIMS.items() if name in tensors)


def select_norm(norm: Norm, kept: Tensor) -> Norm:
    """A batch norm of the channels `kept`; gradients flow to all of its channels."""
    return Norm(*(None if tensor is None else tensor.index_select(0, kept) for tensor in norm))


def select_se(se: SqueezeExcite, kept: Tensor) -> SqueezeExcite:
    """A squeeze-and-excitation of the channels `kept`; gradients flow to all of its channels."""
    return SqueezeExcite(
        se.reduce_weight.index_select(1, kept),
        se.reduce_bias,
        se.expand_weight.index_select(0, kept),
        se.expand_bias.index_select(0, kept),
    )
