"""A block without expansion (the stem's fixed one) on the CUDA engine's kernels, as a one-candidate layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tfnas_ext.engine_cuda import product_math


class FixedLayer:
    """conv_dw, BN, act, optional SE, conv_pwl, BN, optional residual; batch statistics, no affine part.

    Called with activations [N, C, H, W] (channels_last, float32, bfloat16 or float64) and the weights of Conv2d modules
    (float32, or float64 with float64 activations), in a block's order: conv_dw [C, 1, k, k], with SE the reduce weight
    [se, C, 1, 1] and bias [se], the expand weight [C, se, 1, 1] and bias [C], then conv_pwl [Cout, C, 1, 1].
    Differentiable once in all of them; deterministic. `device` is the activations': tables are made once, so that
    steps never wait.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        se_channels: int,
        act: str,
        residual: bool,
        eps: float,
        device: torch.device,
    ) -> None:
        self.channels, self.taps, self.se_channels = channels, kernel_size**2, se_channels
        self.table = torch.tensor([[kernel_size, 0, 0, channels, se_channels, 0, 0, 0]])
        self.device_table = torch.ops.tfnas._layer_table(self.table, device)
        self.choice = torch.zeros(1, dtype=torch.int32, device=device)
        self.options = (1, act, residual, eps)

    def __call__(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        out: Tensor = _Fixed.apply(self, x, *weights)
        return out

    def pack(self, weights: tuple[Tensor, ...]) -> list[Tensor]:
        """The seven tensors of a packed layer: mid channel first."""
        depthwise, *se, project = (weight.detach() for weight in weights)
        none = depthwise.new_empty(0)
        packed = [none, depthwise.flatten(), project.flatten(1).t().contiguous()]
        if not se:
            return [*packed, none, none, none, none]
        reduce, reduce_bias, expand, expand_bias = se
        return [*packed, reduce.flatten(1).t().flatten(), reduce_bias, expand.flatten(), expand_bias]

    def arguments(self, packed: list[Tensor]) -> tuple[Any, ...]:
        return packed, self.table, self.device_table, self.choice, None, *self.options, product_math()

    def unpack(self, grads: list[Tensor], weights: tuple[Tensor, ...]) -> list[Tensor]:
        """Gradients in the shapes of the weights."""
        count = self.channels
        found = [grads[1].view(-1, self.taps)[:count]]
        if self.se_channels:
            found += [grads[3].view(count, -1).t(), grads[4], grads[5], grads[6]]
        found.append(grads[2].view(-1, weights[-1].shape[0])[:count].t())
        return [grad.reshape(weight.shape) for grad, weight in zip(found, weights, strict=True)]


class _Fixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: FixedLayer, x: Tensor, *weights: Tensor) -> Tensor:
        x = x.detach().contiguous(memory_format=torch.channels_last)
        packed = layer.pack(weights)
        out, saved = torch.ops.tfnas._layer_forward(x, *layer.arguments(packed))
        ctx.layer = layer
        ctx.save_for_backward(x, saved, *weights)
        ctx.packed = packed
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        layer: FixedLayer = ctx.layer
        x, saved, *weights = ctx.saved_tensors
        active, like = (layer.channels + 7) // 8 * 8, weights[0]
        sizes = [0, active * layer.taps, active * weights[-1].shape[0], *(tensor.numel() for tensor in ctx.packed[3:])]
        grads = [torch.zeros(size, dtype=like.dtype, device=like.device) for size in sizes]
        dout = dout.contiguous(memory_format=torch.channels_last)
        arguments = layer.arguments(ctx.packed)
        dx, _ = torch.ops.tfnas._layer_backward(x, dout, saved, *arguments, True, grads)
        return None, dx, *layer.unpack(grads, tuple(weights))
