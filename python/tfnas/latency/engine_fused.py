"""Engine `fused`: searchable blocks and the stem's fixed block run on this package's kernels, the rest is eager."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from tfnas.latency.chain import Section
from tfnas.latency.engine import Conditions, EngineUnavailable, require_own
from tfnas.latency.engine_torch import TorchEngine
from tfnas.network import Stem
from tfnas.space import OpKey, Space
from tfnas_ext import nn as fused
from tfnas_ext.backends import BackendUnavailableError, choose_backend

if TYPE_CHECKING:
    from tfnas.architecture import Architecture


class FusedEngine(TorchEngine):
    """Sections are `tfnas_ext.nn.MBInvRes` in evaluation mode, on running statistics, bound to the native backend.

    Raises `EngineUnavailable` where the native kernels cannot run the conditions (CPU, float32, channels_last), so
    that a table named `fused` never holds times of the plain PyTorch reference.
    """

    def __init__(self, space: Space, conditions: Conditions) -> None:
        super().__init__(space, conditions)
        require_own(conditions, "fused", dtype="float32", layout="channels_last")
        if torch.device(conditions.device).type != "cpu":
            raise EngineUnavailable("engine 'fused' runs on the CPU only: profile with eager or compile on a GPU")
        try:
            self._backend = choose_backend(conditions.device)
        except BackendUnavailableError as error:
            raise EngineUnavailable(f"engine 'fused': {error}") from None
        if self._backend == "reference":
            raise EngineUnavailable(
                f"engine 'fused': no native kernels for device {conditions.device!r} here; `tfnas info` says why"
            )

    def stem(self) -> Section:
        space = self.space

        def make() -> nn.Module:
            stem = Stem(space)
            block = fused.MBInvRes(
                space.stem_channels,
                None,
                space.fixed_channels,
                se_channels=space.fixed_se_channels,
                act=space.stem_act,
                backend=self._backend,
            )
            return nn.Sequential(stem.conv_stem, stem.bn1, stem.act1, block)

        return self.module(make)

    def block(self, key: OpKey, width: int) -> Section:
        return self.module(
            lambda: fused.MBInvRes(
                key.in_channels,
                width,
                key.out_channels,
                key.kernel_size,
                key.stride,
                se_channels=key.se_channels,
                act=key.act,
                backend=self._backend,
            )
        )

    def network(self, arch: Architecture) -> list[Section]:
        return [self.stem(), *(self.block(key, width) for key, width in arch.keys()), self.head()]  # noqa: SIM118
