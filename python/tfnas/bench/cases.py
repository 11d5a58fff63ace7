"""What is timed: one block, or a whole network, in plain PyTorch and with fused blocks of the same weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import nn

import tfnas_ext.nn as fused
from tfnas.architecture import Architecture, block_multiply_adds, count_multiply_adds, load_architecture
from tfnas.latency.engine_torch import make_block
from tfnas.network import MBInvRes, Network, build_network
from tfnas.space import OpKey, Space


class Case(Protocol):
    """One thing to time."""

    @property
    def name(self) -> str: ...

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """[N, C, H, W]."""
        ...

    @property
    def multiply_adds(self) -> int:
        """Of a forward pass of the whole batch."""
        ...

    @property
    def input_gradient(self) -> bool:
        """Whether a training step also differentiates by the input, as it does inside a network."""
        ...

    def plain(self) -> nn.Module:
        """The modules with fresh weights from torch's global generator."""
        ...

    def fused(self, plain: nn.Module) -> nn.Module:
        """The same on fused blocks, with the weights of `plain` but not sharing them."""
        ...


@dataclass(frozen=True)
class BlockCase:
    """A block with `width` mid channels at `batch` images."""

    key: OpKey
    width: int
    batch: int

    input_gradient = True

    @property
    def name(self) -> str:
        return f"{str(self.key).removeprefix('mbinvres_')} width {self.width} batch {self.batch}"

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.key.in_channels, self.key.resolution, self.key.resolution

    @property
    def multiply_adds(self) -> int:
        key = self.key
        return self.batch * block_multiply_adds(
            resolution=key.resolution,
            in_channels=key.in_channels,
            width=self.width,
            out_channels=key.out_channels,
            kernel_size=key.kernel_size,
            stride=key.stride,
            se_channels=key.se_channels,
        )

    def plain(self) -> nn.Module:
        return make_block(self.key, self.width)

    def fused(self, plain: nn.Module) -> nn.Module:
        assert isinstance(plain, MBInvRes)
        return fused_block(plain, self.key.act)


@dataclass(frozen=True)
class NetworkCase:
    """The network of an architecture file or a built-in one, at `batch` images of its space's resolution."""

    architecture: str
    batch: int

    input_gradient = False

    @cached_property
    def arch(self) -> Architecture:
        return load_architecture(self.architecture)[0]

    @property
    def name(self) -> str:
        return f"{self.architecture} batch {self.batch}"

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        space = self.arch.space
        return self.batch, space.image_channels, space.resolution, space.resolution

    @property
    def multiply_adds(self) -> int:
        return self.batch * count_multiply_adds(self.arch)

    def plain(self) -> nn.Module:
        return build_network(self.arch)

    def fused(self, plain: nn.Module) -> nn.Module:
        assert isinstance(plain, Network)
        network = copy.deepcopy(plain)
        acts = [self.arch.space.stem_act, *(layer.act for layer, _ in self.arch.layers())]
        twins = {block: fused_block(block, act) for block, act in zip(network.blocks(), acts, strict=True)}
        for parent in list(network.modules()):
            for name, child in parent.named_children():
                if isinstance(child, MBInvRes):
                    parent.register_module(name, twins[child])
        return network


def fused_block(block: MBInvRes, act: str) -> fused.MBInvRes:
    """A fused block with a copy of `block`'s weights and statistics; `act` is its activation."""
    conv_dw = block.conv_dw
    module = fused.MBInvRes(
        block.conv_pw.in_channels if block.expand else conv_dw.in_channels,
        conv_dw.in_channels if block.expand else None,
        block.conv_pwl.out_channels,
        conv_dw.kernel_size[0],
        conv_dw.stride[0],
        se_channels=block.se.conv_reduce.out_channels if not isinstance(block.se, nn.Identity) else 0,
        act=act,
        backend="cpu",
    )
    weight = conv_dw.weight
    module.to(device=weight.device, dtype=weight.dtype).load_state_dict(block.state_dict())
    return module


# Layers of the `imagenet` space at its resolutions, from large maps to small, and of 32-pixel images.
STANDARD = (
    BlockCase(OpKey(112, 16, 24, 3, 2, 0, "relu"), 96, 8),
    BlockCase(OpKey(56, 24, 24, 5, 1, 0, "relu"), 144, 8),
    BlockCase(OpKey(28, 40, 40, 5, 1, 0, "swish"), 240, 8),
    BlockCase(OpKey(14, 80, 80, 3, 1, 0, "swish"), 480, 8),
    BlockCase(OpKey(14, 112, 112, 5, 1, 224, "swish"), 672, 8),
    BlockCase(OpKey(7, 192, 192, 5, 1, 0, "swish"), 1152, 8),
    BlockCase(OpKey(16, 24, 24, 3, 1, 0, "relu"), 144, 64),
    BlockCase(OpKey(8, 40, 40, 5, 1, 80, "swish"), 240, 64),
    BlockCase(OpKey(4, 80, 80, 3, 1, 0, "swish"), 480, 64),
)


def space_cases(space: Space, batch: int) -> Sequence[BlockCase]:
    """Every different block of a search space, at its largest width."""
    widths: dict[OpKey, int] = {}
    for layer in space.layers:
        for index, candidate in enumerate(layer.candidates):
            if not candidate.is_skip:
                key = layer.key(index)
                widths[key] = max(widths.get(key, 0), layer.max_width(index))
    return [BlockCase(key, width, batch) for key, width in widths.items()]
