"""Derived networks in plain PyTorch, whole (`build_network`) or in pieces (`Stem`, `build_block`, `Head`).

Blocks are named as timm's: `conv_pw bn1 conv_dw bn2 se.conv_reduce se.conv_expand conv_pwl bn3`. Nothing depends on the
image size, and every module works on contiguous and channels_last activations alike (`model.to(memory_format=...)`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tfnas.architecture import Architecture, Op
from tfnas.space import Layer, Space

BATCH_NORM_EPS = 1e-5

_ACTIVATIONS: dict[str, type[nn.ReLU | nn.ReLU6 | nn.SiLU | nn.Hardswish]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "swish": nn.SiLU,
    "hard_swish": nn.Hardswish,
}


def activation(name: str) -> nn.Module:
    """The module of a `space.ACTIVATIONS` name. It works in place: its input is always a fresh batch norm output."""
    return _ACTIVATIONS[name](inplace=True)


class DropConnect(nn.Module):
    """In training, zeroes whole images of a residual branch with probability `rate` and scales the others up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = _rate("drop_connect", rate)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class SqueezeExcite(nn.Module):
    """`x * sigmoid(conv_expand(act(conv_reduce(mean(x)))))`, the mean over height and width."""

    def __init__(self, channels: int, se_channels: int, act: str) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, se_channels, 1)
        self.act1 = activation(act)
        self.conv_expand = nn.Conv2d(se_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv_expand(self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class MBInvRes(nn.Module):
    """Mobile inverted residual block (the paper's MBInvRes): expand, depthwise, squeeze and excite, project.

    Input [N, in_channels, H, W], output [N, out_channels, ceil(H / stride), ceil(W / stride)]. Without `expand` there
    is no `conv_pw` and `width` must equal `in_channels`; without `se_channels` `se` is an identity. The residual is
    added where shapes allow it.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        *,
        kernel_size: int,
        stride: int,
        se_channels: int,
        act: str,
        expand: bool = True,
        affine: bool = True,
        running_stats: bool = True,
        drop_connect: float = 0.0,
    ) -> None:
        super().__init__()
        if not expand and width != in_channels:
            raise ValueError(f"width: expected in_channels ({in_channels}) without expansion, got {width}")
        self.has_residual = stride == 1 and in_channels == out_channels
        self.expand = expand
        if expand:
            self.conv_pw = nn.Conv2d(in_channels, width, 1, bias=False)
            self.bn1 = _batch_norm(width, affine, running_stats)
            self.act1 = activation(act)
        self.conv_dw = nn.Conv2d(
            width, width, kernel_size, stride=stride, padding=kernel_size // 2, groups=width, bias=False
        )
        self.bn2 = _batch_norm(width, affine, running_stats)
        self.act2 = activation(act)
        self.se = SqueezeExcite(width, se_channels, act) if se_channels else nn.Identity()
        self.conv_pwl = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = _batch_norm(out_channels, affine, running_stats)
        self.drop_connect = DropConnect(drop_connect) if self.has_residual else nn.Identity()
        initialize_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv_pw(x))) if self.expand else x
        y = self.act2(self.bn2(self.conv_dw(y)))
        y = self.bn3(self.conv_pwl(self.se(y)))
        return x + self.drop_connect(y) if self.has_residual else y


class Stem(nn.Module):
    """Stages 1 and 2 of Table 1: 3x3 convolution, then the fixed MBInvRes without expansion (rate `drop_connect`)."""

    def __init__(
        self, space: Space, *, affine: bool = True, running_stats: bool = True, drop_connect: float = 0.0
    ) -> None:
        super().__init__()
        channels = space.stem_channels
        self.conv_stem = nn.Conv2d(space.image_channels, channels, 3, stride=space.stem_stride, padding=1, bias=False)
        self.bn1 = _batch_norm(channels, affine, running_stats)
        self.act1 = activation(space.stem_act)
        initialize_weights(self)
        self.block = MBInvRes(
            channels,
            channels,
            space.fixed_channels,
            kernel_size=3,
            stride=1,
            se_channels=space.fixed_se_channels,
            act=space.stem_act,
            expand=False,
            affine=affine,
            running_stats=running_stats,
            drop_connect=drop_connect,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.act1(self.bn1(self.conv_stem(x))))


class Head(nn.Module):
    """Stages 9 to 11 of Table 1: 1x1 convolution, average pooling, dropout, classifier. Output: logits [N, classes]."""

    def __init__(self, space: Space, *, affine: bool = True, running_stats: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv_head = nn.Conv2d(space.stages[-1].out_channels, space.head_channels, 1, bias=False)
        self.bn2 = _batch_norm(space.head_channels, affine, running_stats)
        self.act2 = activation(space.head_act)
        self.dropout = nn.Dropout(_rate("dropout", dropout))
        self.classifier = nn.Linear(space.head_channels, space.num_classes)
        initialize_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.act2(self.bn2(self.conv_head(x))).mean((2, 3))))


class Network(nn.Module):
    """A derived network: `stem`, `stages[s][position]`, `head`. Images [N, C, H, W] in, logits [N, classes] out."""

    def __init__(self, arch: Architecture, stem: Stem, stages: nn.Sequential, head: Head) -> None:
        super().__init__()
        self.architecture = arch
        self.stem = stem
        self.stages = stages
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)))

    def blocks(self) -> Iterator[MBInvRes]:
        """Every MBInvRes in network order, the stem's fixed one first."""
        yield self.stem.block
        yield from (module for module in self.stages.modules() if isinstance(module, MBInvRes))


def build_block(
    layer: Layer, op: Op, *, affine: bool = True, running_stats: bool = True, drop_connect: float = 0.0
) -> MBInvRes:
    """One searchable layer with its chosen operation; always with an expansion, whatever the width."""
    return MBInvRes(
        layer.in_channels,
        op.width,
        layer.out_channels,
        kernel_size=op.kernel_size,
        stride=layer.stride,
        se_channels=op.se_channels,
        act=layer.act,
        affine=affine,
        running_stats=running_stats,
        drop_connect=drop_connect,
    )


def build_network(
    arch: Architecture,
    *,
    affine: bool = True,
    running_stats: bool = True,
    dropout: float = 0.0,
    drop_connect: float = 0.0,
) -> Network:
    """The network of `arch` with fresh weights (drawn from torch's global generator).

    Args:
        arch: What to build; its space gives image channels and classes.
        affine: Whether batch norms have weight and bias (the supernet's have none).
        running_stats: Whether batch norms keep running statistics (the supernet's do not).
        dropout: Rate in [0, 1) before the classifier.
        drop_connect: Rate in [0, 1) of the last residual branch; as in the published code it grows with depth: block i
            of n (the stem's block is the first) is left out, per image, with probability `drop_connect * i / n`.
    """
    _rate("drop_connect", drop_connect)
    depth = 1 + sum(len(ops) for ops in arch.stages)
    stages: list[list[nn.Module]] = [[] for _ in arch.stages]
    stem = Stem(arch.space, affine=affine, running_stats=running_stats, drop_connect=drop_connect / depth)
    for i, (layer, op) in enumerate(arch.layers(), start=2):
        block = build_block(
            layer,
            op,
            affine=affine,
            running_stats=running_stats,
            drop_connect=drop_connect * i / depth,
        )
        stages[layer.stage].append(block)
    head = Head(arch.space, affine=affine, running_stats=running_stats, dropout=dropout)
    return Network(arch, stem, nn.Sequential(*(nn.Sequential(*blocks) for blocks in stages)), head)


@torch.no_grad()
def initialize_weights(module: nn.Module) -> None:
    """Convolutions from N(0, 2 / fan out) with the fan out of one group, linear weights from N(0, 1e-4), biases 0."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            fan_out = child.weight[:, 0].numel() // child.groups
            child.weight.normal_(0, math.sqrt(2 / fan_out))
        elif isinstance(child, nn.Linear):
            child.weight.normal_(0, 0.01)
        if isinstance(child, nn.Conv2d | nn.Linear) and child.bias is not None:
            child.bias.zero_()


def _batch_norm(channels: int, affine: bool, running_stats: bool) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BATCH_NORM_EPS, affine=affine, track_running_stats=running_stats)


def _rate(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a rate in [0, 1), got {value!r}")
    return value
