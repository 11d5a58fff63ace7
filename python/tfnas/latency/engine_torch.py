"""The engines that run PyTorch modules: `eager` as they are, `compile` through torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from tfnas.latency.chain import Section
from tfnas.latency.engine import DTYPES, Conditions
from tfnas.network import Head, MBInvRes, Stem, build_network
from tfnas.space import OpKey, Space

if TYPE_CHECKING:
    from tfnas.architecture import Architecture

M = TypeVar("M", bound=nn.Module)


class TorchEngine:
    """Sections are `nn.Module`s in evaluation mode, on the conditions' device, in their dtype and layout.

    Under `compile`, stem, blocks and head are compiled one by one, a network measured whole as one module; every new
    width compiles anew (seconds each).
    """

    def __init__(self, space: Space, conditions: Conditions) -> None:
        self.space = space
        self.conditions = conditions

    def input(self) -> torch.Tensor:
        space, conditions = self.space, self.conditions
        shape = (conditions.batch, space.image_channels, space.resolution, space.resolution)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return x.to(conditions.device, DTYPES[conditions.dtype], memory_format=self._memory_format)

    def stem(self) -> Section:
        return self._section(lambda: Stem(self.space))

    def head(self) -> Section:
        return self._section(lambda: Head(self.space))

    def block(self, key: OpKey, width: int) -> Section:
        return self._section(lambda: make_block(key, width))

    def network(self, arch: Architecture) -> list[Section]:
        if self.conditions.engine == "compile":
            return [self._section(lambda: build_network(arch))]
        network = self.module(lambda: build_network(arch))
        blocks = [block for stage in network.stages.children() for block in stage.children()]
        return [network.stem, *blocks, network.head]

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.conditions.layout == "channels_last" else torch.contiguous_format

    def module(self, make: Callable[[], M]) -> M:
        """A module made by `make`, ready to run under the conditions."""
        # weights are random: the caller's random state must not notice
        with torch.random.fork_rng(devices=[]):
            module = make()
        module.eval().requires_grad_(False)
        module.to(device=self.conditions.device, dtype=DTYPES[self.conditions.dtype])
        return module.to(memory_format=self._memory_format)

    def _section(self, make: Callable[[], nn.Module]) -> Section:
        module = self.module(make)
        return compiled(module) if self.conditions.engine == "compile" else module


def compiled(module: nn.Module) -> Section:
    """`module` through torch.compile, as if it were the only one of its class.

    torch keeps what it compiles with the code that was called, a few versions of each (`recompile_limit`), and runs
    what comes after those uncompiled, with no more than a line in a log. Every block has the same `forward`, at other
    sizes; so each gets a copy of the calling code.
    """

    def run(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = module(x)
        return y

    own = FunctionType(run.__code__.replace(), run.__globals__, "run", None, run.__closure__)
    section: Section = torch.compile(own, dynamic=False, fullgraph=True)
    return section


def make_block(key: OpKey, width: int) -> MBInvRes:
    """The block of a latency curve at one width, with fresh weights."""
    return MBInvRes(
        key.in_channels,
        width,
        key.out_channels,
        kernel_size=key.kernel_size,
        stride=key.stride,
        se_channels=key.se_channels,
        act=key.act,
    )
