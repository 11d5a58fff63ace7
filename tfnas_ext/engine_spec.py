"""What a supernet's body is made of: shapes only, no search. Plain frozen data, checked where it is made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tfnas_ext.reference import ACTIVATIONS

DEPTH_SPACES = ("sink", "skip-in", "skip-out")


@dataclass(frozen=True)
class CandidateSpec:
    """One operation of a layer: an MBInvRes of up to `max_width` mid channels; `max_width` 0 is the identity ("skip").

    `name` is unique in its layer and names the weights in state dicts. `se_channels` is the hidden width of squeeze
    and excitation, 0 for none. Of the identity, `kernel_size` and `se_channels` are 0 as well.
    """

    name: str
    kernel_size: int
    max_width: int
    se_channels: int = 0

    def __post_init__(self) -> None:
        if not self.name or "." in self.name:
            raise ValueError(f"name must be a non-empty string without dots, not {self.name!r}")
        if self.is_skip:
            if self.kernel_size or self.se_channels:
                raise ValueError(f"{self.name}: max_width 0 is the identity; kernel_size and se_channels must be 0")
        elif self.max_width < 0 or self.se_channels < 0 or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(
                f"{self.name}: max_width and se_channels must not be negative and kernel_size must be odd, not "
                f"{self.max_width}, {self.se_channels} and {self.kernel_size}"
            )

    @property
    def is_skip(self) -> bool:
        return self.max_width == 0


@dataclass(frozen=True)
class LayerSpec:
    """A searchable layer. `residual` adds the input to every MBInvRes candidate's output (not to the identity's).

    `gated`: the layer has a gate of the `skip-out` depth space (`BodySpec`).
    """

    in_channels: int
    out_channels: int
    stride: int
    act: str
    residual: bool
    candidates: tuple[CandidateSpec, ...]
    gated: bool = False

    def __post_init__(self) -> None:
        if self.act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, not {self.act!r}")
        if self.in_channels < 1 or self.out_channels < 1 or self.stride not in (1, 2):
            raise ValueError(
                f"in_channels and out_channels must be positive and stride 1 or 2, not {self.in_channels}, "
                f"{self.out_channels} and {self.stride}"
            )
        names = [candidate.name for candidate in self.candidates]
        if len(set(names)) != len(names) or all(candidate.is_skip for candidate in self.candidates):
            raise ValueError(f"candidates must have distinct names and one that is not the identity, not {names}")
        same_shape = self.stride == 1 and self.in_channels == self.out_channels
        needs_same_shape = self.residual or self.gated or any(candidate.is_skip for candidate in self.candidates)
        if needs_same_shape and not same_shape:
            raise ValueError("residual, gated and the identity need stride 1 and in_channels = out_channels")


@dataclass(frozen=True)
class BodySpec:
    """All searchable layers, stage by stage, and how a stage's output comes from its layers. L layers, S stages.

    `depth_space` says what the engine's argument `v` means:

    - `sink`: v [S, D], D the largest depth; stage s gives sum_l v[s, l] * (output of its layer l)   (Eq. 5)
    - `skip-out`: v [L, 2]; a gated layer gives v[l, 0] * x + v[l, 1] * op(x), the others op(x); a stage gives its last
      layer's output
    - `skip-in`: v is None; a stage gives its last layer's output (the identity is one of the candidates)

    Entries of `v` that belong to no layer are not read, and get gradient zero.
    """

    stages: tuple[tuple[LayerSpec, ...], ...]
    depth_space: str = "sink"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.depth_space not in DEPTH_SPACES:
            raise ValueError(f"depth_space must be one of {', '.join(DEPTH_SPACES)}, not {self.depth_space!r}")
        if not self.stages or not all(self.stages):
            raise ValueError("stages must not be empty")
        if self.depth_space != "skip-out" and any(layer.gated for layer in self.layers):
            raise ValueError(f"gated layers belong to depth_space 'skip-out', not {self.depth_space!r}")
        channels = self.layers[0].in_channels
        for index, layer in enumerate(self.layers):
            if layer.in_channels != channels:
                raise ValueError(f"layer {index} has in_channels {layer.in_channels}, the one before gives {channels}")
            channels = layer.out_channels
        for s, stage in enumerate(self.stages):
            if self.depth_space == "sink" and any(layer.out_channels != stage[0].out_channels for layer in stage):
                raise ValueError(f"stage {s}: the layers that a sink sums must have the same out_channels")
            if self.depth_space == "sink" and any(layer.stride != 1 for layer in stage[1:]):
                raise ValueError(f"stage {s}: only the first of the layers that a sink sums may have stride 2")

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        return tuple(layer for stage in self.stages for layer in stage)

    @property
    def max_depth(self) -> int:
        return max(len(stage) for stage in self.stages)

    @property
    def max_candidates(self) -> int:
        return max(len(layer.candidates) for layer in self.layers)

    @property
    def depth_weights_shape(self) -> tuple[int, int] | None:
        """Shape of `v`, None where there is none."""
        if self.depth_space == "sink":
            return (len(self.stages), self.max_depth)
        return (len(self.layers), 2) if self.depth_space == "skip-out" else None
