"""What runs the network that is profiled: the sections of a chain under given conditions, one engine per name.

A table is worth what its conditions are worth: profile the engine, layout, batch and threads that will be deployed.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from tfnas.latency.chain import Section
from tfnas.space import OpKey
from tfnas.threads import require_threads

if TYPE_CHECKING:
    from tfnas.architecture import Architecture

ENGINES = ("eager", "compile", "fused", "onnxruntime")
LAYOUTS = ("nchw", "channels_last")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class EngineUnavailable(ValueError):
    """The engine asked for cannot run here; the message says why and what to do."""


def require_device(device: str) -> None:
    """Raise `EngineUnavailable` for a CUDA device that torch does not see here, or not being built for CUDA."""
    wanted = torch.device(device)
    if wanted.type != "cuda":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (wanted.index or 0) >= count:
        raise EngineUnavailable(
            f"device {device!r}: torch {torch.__version__} sees {count or 'no'} CUDA device{'s'[: count != 1]} here; "
            "profile on cpu, or on the machine that has the GPU"
        )


@dataclass(frozen=True)
class Conditions:
    """Under what a latency was, or is to be, measured. `batch` images at a time, `threads` intra-op CPU threads."""

    device: str = "cpu"
    engine: str = "eager"
    batch: int = 1
    threads: int = 1
    dtype: str = "float32"
    layout: str = "nchw"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(cpu|cuda)(:\d+)?", self.device):
            raise ValueError(f"device: expected cpu, cuda or cuda:N, got {self.device!r}")
        if self.engine not in ENGINES:
            raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {self.engine!r}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.batch < 1:
            raise ValueError(f"batch: expected at least 1, got {self.batch}")
        require_threads(self.threads)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def require_own(conditions: Conditions, engine: str, **own: str) -> None:
    """Raise `EngineUnavailable` unless the conditions are `own`, the only ones that `engine` runs with."""
    for name, value in own.items():
        if getattr(conditions, name) != value:
            raise EngineUnavailable(
                f"engine {engine!r} runs with {name}={value} only, got {name}={getattr(conditions, name)}"
            )


class Engine(Protocol):
    """Makes the sections of networks of one space. Every section maps a batch of activations to the next one."""

    conditions: Conditions

    def input(self) -> torch.Tensor:
        """The network's input, [batch, image_channels, resolution, resolution]."""

    def stem(self) -> Section:
        """Image to the input of the first searchable layer (first convolution and fixed block)."""

    def block(self, key: OpKey, width: int) -> Section:
        """One searchable block of curve `key` with `width` mid channels."""

    def head(self) -> Section:
        """Output of the last layer to logits."""

    def network(self, arch: Architecture) -> list[Section]:
        """A whole network as the deployed one, cut at the same places: stem, blocks, head."""
