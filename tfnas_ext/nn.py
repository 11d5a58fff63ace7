"""`MBInvRes`: the inverted residual block as a module on the fused kernels, with timm's names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tfnas_ext import ops
from tfnas_ext.reference import ACTIVATIONS, Norm, SqueezeExcite


class SqueezeExciteWeights(nn.Module):
    """The two 1x1 convolutions of a squeeze-and-excitation, named as timm's; `MBInvRes` does the arithmetic."""

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, hidden_channels, 1)
        self.conv_expand = nn.Conv2d(hidden_channels, channels, 1)


class MBInvRes(nn.Module):
    """Expand 1x1, depthwise k x k, optional squeeze and excitation, project 1x1, a batch norm after each convolution.

    Children, and so the names in a state dict, are timm's InvertedResidual's: `conv_pw, bn1, conv_dw, bn2, se,
    conv_pwl, bn3`. With `mid_channels=None` there is no expansion: no `conv_pw` and `bn1`, the depthwise convolution
    reads the input.

    Input [N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)], channels_last. In training
    the running statistics, where there are some, are updated as `nn.BatchNorm2d` does.

    Args:
        mid_channels: width of the expansion, or None for no expansion.
        kernel_size: 3, 5 or 7 on native kernels; any odd one on the reference.
        se_channels: hidden channels of squeeze and excitation, 0 for none.
        act: a key of `reference.ACTIVATIONS`.
        residual: add the input; None adds it where stride is 1 and the channels are equal.
        affine, running_stats: of the batch norms; the supernet has neither.
        width: mid channels in use, the first ones; None is all of them. May be set at any time.
        backend: see `ops.mbinvres`.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int | None,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        se_channels: int = 0,
        act: str = "relu",
        residual: bool | None = None,
        affine: bool = True,
        running_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        width: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, not {act!r}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {kernel_size}")
        same = stride == 1 and in_channels == out_channels
        if residual and not same:
            raise ValueError(
                f"residual needs stride 1 and equal channels, not {stride}, {in_channels} -> {out_channels}"
            )

        def norm(channels: int) -> nn.BatchNorm2d:
            return nn.BatchNorm2d(channels, eps, momentum, affine, running_stats)

        mid = in_channels if mid_channels is None else mid_channels
        self.conv_pw = None if mid_channels is None else nn.Conv2d(in_channels, mid, 1, bias=False)
        self.bn1 = None if mid_channels is None else norm(mid)
        self.conv_dw = nn.Conv2d(mid, mid, kernel_size, stride, kernel_size // 2, groups=mid, bias=False)
        self.bn2 = norm(mid)
        self.se = SqueezeExciteWeights(mid, se_channels) if se_channels else None
        self.conv_pwl = nn.Conv2d(mid, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.stride, self.act, self.eps, self.momentum = stride, act, eps, momentum
        self.residual = same if residual is None else residual
        self.width, self.backend = width, backend

    def forward(self, x: Tensor) -> Tensor:
        weights = (None if self.conv_pw is None else self.conv_pw.weight, self.conv_dw.weight, self.conv_pwl.weight)
        tracked = [m for m in (self.bn1, self.bn2, self.bn3) if m is not None and m.track_running_stats]
        if not self.training or not tracked:
            return ops.mbinvres(
                x,
                *weights,
                se=self._se(),
                bn1=_norm(self.bn1),
                bn2=_norm(self.bn2),
                bn3=_norm(self.bn3),
                stride=self.stride,
                act=self.act,
                residual=self.residual,
                width=self.width,
                training=self.training,
                eps=self.eps,
                backend=self.backend,
            )
        out, statistics = ops.mbinvres_with_statistics(
            x,
            *weights,
            se=self._se(),
            bn1=_norm(self.bn1),
            bn2=_norm(self.bn2),
            bn3=_norm(self.bn3),
            stride=self.stride,
            act=self.act,
            residual=self.residual,
            width=self.width,
            eps=self.eps,
            backend=self.backend,
        )
        wide, narrow = x.shape[0] * x.shape[2] * x.shape[3], out.numel() // out.shape[1]
        pairs = [
            (self.bn1, statistics.mean1, statistics.var1, wide),
            (self.bn2, statistics.mean2, statistics.var2, narrow),
            (self.bn3, statistics.mean3, statistics.var3, narrow),
        ]
        for module, mean, var, count in pairs:
            if module is not None and module.track_running_stats and mean is not None and var is not None:
                _update_running(module, mean, var, count)
        return out

    def _se(self) -> SqueezeExcite | None:
        if self.se is None:
            return None
        reduce, expand = self.se.conv_reduce, self.se.conv_expand
        assert reduce.bias is not None
        assert expand.bias is not None
        return SqueezeExcite(reduce.weight, reduce.bias, expand.weight, expand.bias)


def _norm(module: nn.BatchNorm2d | None) -> Norm:
    if module is None:
        return Norm()
    return Norm(module.weight, module.bias, module.running_mean, module.running_var)


@torch.no_grad()
def _update_running(module: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """PyTorch's update from a batch of `count` values a channel; only channels in use (a prefix) are touched."""
    assert module.running_mean is not None
    assert module.running_var is not None
    assert module.num_batches_tracked is not None
    module.num_batches_tracked += 1
    momentum = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
    width = mean.shape[0]
    module.running_mean[:width].lerp_(mean.to(module.running_mean.dtype), momentum)
    unbiased = var * (count / max(count - 1, 1))
    module.running_var[:width].lerp_(unbiased.to(module.running_var.dtype), momentum)
