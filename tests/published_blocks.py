"""A stand-in for the published TF-NAS code's block and mixed operation: its names, structure and arithmetic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Swish(nn.Module):
    """Works in place, as the published one does."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(x.sigmoid())


def activation(name: str) -> nn.Module:
    return {"relu": lambda: nn.ReLU(inplace=True), "relu6": lambda: nn.ReLU6(inplace=True), "swish": Swish}[name]()


def drop_connect(x: Tensor, training: bool, rate: float) -> Tensor:
    if not training:
        return x
    keep = 1 - rate
    mask = keep + torch.rand((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device)
    return x / keep * mask.floor_()


class MBInvertedResBlock(nn.Module):
    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        se_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        affine: bool = True,
        act_func: str = "relu6",
        running_stats: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.se_channels, self.out_channels = in_channels, se_channels, out_channels
        self.kernel_size, self.stride, self.groups, self.has_shuffle = kernel_size, stride, 1, False
        self.act_func = act_func
        self.has_residual = in_channels == out_channels and stride == 1
        self.drop_connect_rate = 0.0

        def norm(channels: int) -> nn.BatchNorm2d:
            return nn.BatchNorm2d(channels, affine=affine, track_running_stats=running_stats)

        self.inverted_bottleneck = None
        self.mid_channels = in_channels
        if mid_channels > in_channels:
            self.mid_channels = mid_channels
            self.inverted_bottleneck = nn.Sequential()
            self.inverted_bottleneck.add_module("conv", nn.Conv2d(in_channels, mid_channels, 1, bias=False))
            self.inverted_bottleneck.add_module("bn", norm(mid_channels))
            self.inverted_bottleneck.add_module("act", activation(act_func))
        mid = self.mid_channels
        self.depth_conv = nn.Sequential()
        conv = nn.Conv2d(mid, mid, kernel_size, stride, kernel_size // 2, groups=mid, bias=False)
        self.depth_conv.add_module("conv", conv)
        self.depth_conv.add_module("bn", norm(mid))
        self.depth_conv.add_module("act", activation(act_func))
        self.squeeze_excite = None
        if se_channels > 0:
            self.squeeze_excite = nn.Sequential()
            self.squeeze_excite.add_module("conv_reduce", nn.Conv2d(mid, se_channels, 1))
            self.squeeze_excite.add_module("act", activation(act_func))
            self.squeeze_excite.add_module("conv_expand", nn.Conv2d(se_channels, mid, 1))
        self.point_linear = nn.Sequential()
        self.point_linear.add_module("conv", nn.Conv2d(mid, out_channels, 1, bias=False))
        self.point_linear.add_module("bn", norm(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.inverted_bottleneck is not None:
            x = self.inverted_bottleneck(x)
        x = self.depth_conv(x)
        if self.squeeze_excite is not None:
            x = self.squeeze_excite(F.adaptive_avg_pool2d(x, 1)).sigmoid() * x
        x = self.point_linear(x)
        if self.has_residual:
            if self.drop_connect_rate > 0:
                x = drop_connect(x, self.training, self.drop_connect_rate)
            x = x + shortcut
        return x


class MixedOperation(nn.Module):
    """Candidates `m_ops` and their `log_alphas`: one of them, or all, weighted."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, act_func: str) -> None:
        super().__init__()
        self.m_ops = nn.ModuleList()
        for se in (0, in_channels):
            for kernel in (3, 5):
                for expansion in (3, 6):
                    mid = in_channels * expansion
                    options = {"affine": False, "act_func": act_func, "running_stats": False}
                    block = MBInvertedResBlock(in_channels, mid, se, out_channels, kernel, stride, **options)
                    self.m_ops.append(block)
        self.log_alphas = nn.Parameter(torch.zeros(len(self.m_ops)))

    def forward(self, x: Tensor, choice: int | None = None) -> Tensor:
        if choice is not None:
            return self.m_ops[choice](x)
        weights = F.softmax(self.log_alphas, dim=-1)
        return sum(w * op(x) for w, op in zip(weights, self.m_ops, strict=True))
