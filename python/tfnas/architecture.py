"""A discrete architecture: which operations, how deep, how wide. Read, write and count it.

An architecture file is JSON: `schema_version`, `space` (a built-in name or all fields), `stages` (per stage a list of
`{candidate, kernel_size, width, se_channels}`) and facts about it (`FACTS`), latencies in milliseconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tfnas.fields import Fields, describe, suggestion
from tfnas.files import read_json, write_text_atomically
from tfnas.space import Layer, OpKey, Space
from tfnas.space_io import load_space, space_from_dict, space_to_dict

SCHEMA_VERSION = 1
BUILTIN_ARCHITECTURES = Path(__file__).parent / "configs" / "architectures"

NUMBER_FACTS = ("target_latency_ms", "lut_latency_ms", "measured_latency_ms")
TEXT_FACTS = ("title", "source", "date", "device", "engine")
# `versions`: software by name; `unrepaired`: the network before a repair; `details`: anything else, as JSON
MAPPING_FACTS = ("versions", "unrepaired", "details")
FACTS = (*NUMBER_FACTS, "seed", "repaired", *TEXT_FACTS, *MAPPING_FACTS)


@dataclass(frozen=True)
class Op:
    """One kept layer: the MBInvRes of `candidate` with `width` mid channels (1 to the candidate's maximum)."""

    candidate: str
    kernel_size: int
    width: int
    se_channels: int

    @classmethod
    def of(cls, layer: Layer, candidate: int, width: int) -> Op:
        """The candidate with index `candidate` of `layer`, `width` channels wide."""
        chosen = layer.candidates[candidate]
        return cls(chosen.name, chosen.kernel_size, width, layer.se_channels(candidate))


@dataclass(frozen=True)
class Architecture:
    """Operations of every kept layer, per stage and in order; stage `s` is `len(stages[s])` layers deep.

    Layers after a stage's first have one shape, so an architecture of a skip-in or skip-out space lists only the
    layers it keeps. Construction checks everything; a `ValueError` names the entry, e.g. `stages[2][0].width`.
    """

    space: Space
    stages: tuple[tuple[Op, ...], ...]

    def __post_init__(self) -> None:
        if len(self.stages) != len(self.space.stages):
            raise ValueError(
                f"stages: expected {len(self.space.stages)} lists, one for each stage of search space "
                f"{self.space.name!r}, got {len(self.stages)}"
            )
        for s, (ops, layers) in enumerate(zip(self.stages, self.space.layers_of_stage, strict=True)):
            if not 1 <= len(ops) <= len(layers):
                raise ValueError(f"stages[{s}]: expected 1 to {len(layers)} layers, got {len(ops)}")
            for position, (op, layer) in enumerate(zip(ops, layers, strict=False)):
                _check_op(op, layer, f"stages[{s}][{position}]")

    def layers(self) -> Iterator[tuple[Layer, Op]]:
        """Every kept searchable layer with its operation, in network order."""
        for ops, layers in zip(self.stages, self.space.layers_of_stage, strict=True):
            yield from zip(layers, ops, strict=False)

    def keys(self) -> list[tuple[OpKey, int]]:
        """Latency key and width of every kept searchable layer."""
        return [(layer.key(layer.candidate_index(op.candidate)), op.width) for layer, op in self.layers()]


def _check_op(op: Op, layer: Layer, path: str) -> None:
    names = [candidate.name for candidate in layer.candidates if not candidate.is_skip]
    if op.candidate not in names:
        raise ValueError(
            f"{path}.candidate: unknown candidate {op.candidate!r}{suggestion(str(op.candidate), names)} "
            f"(allowed: {', '.join(names)})"
        )
    index = layer.candidate_index(op.candidate)
    if type(op.width) is not int or not 1 <= op.width <= layer.max_width(index):
        raise ValueError(
            f"{path}.width: expected an integer from 1 to {layer.max_width(index)} for {op.candidate} with "
            f"{layer.in_channels} input channels, got {op.width!r}"
        )
    expected = Op.of(layer, index, op.width)
    for name in ("kernel_size", "se_channels"):
        if getattr(op, name) != getattr(expected, name):
            raise ValueError(
                f"{path}.{name}: expected {getattr(expected, name)} for {op.candidate} with {layer.in_channels} "
                f"input channels, got {getattr(op, name)!r}"
            )


def architecture_to_dict(arch: Architecture) -> dict[str, Any]:
    """`space` and `stages` as plain dicts, lists, numbers and strings."""
    return {"space": space_to_dict(arch.space), "stages": [[asdict(op) for op in ops] for ops in arch.stages]}


def architecture_from_dict(data: Mapping[str, Any]) -> Architecture:
    """Inverse of `architecture_to_dict`; `space` may be the name of a built-in space. `ValueError` names the key."""
    top = Fields(data, "", required=("space", "stages"))
    value = top.values["space"]
    if isinstance(value, str):
        space = load_space(value)
    elif isinstance(value, Mapping):
        try:
            space = space_from_dict(value)
        except ValueError as error:
            raise ValueError(f"space: {error}") from None
    else:
        raise top.fail("space", "the name of a search space or all of its fields")
    stages = []
    for path, stage in top.items("stages"):
        if not isinstance(stage, list | tuple):
            raise ValueError(f"{path}: expected a list of operations, got {describe(stage)}")
        stages.append(tuple(_op(item, f"{path}[{i}]") for i, item in enumerate(stage)))
    return Architecture(space, tuple(stages))


def _op(item: object, path: str) -> Op:
    entry = Fields(item, path, required=[field.name for field in fields(Op)])
    return Op(
        candidate=entry.text("candidate"),
        kernel_size=entry.integer("kernel_size"),
        width=entry.integer("width"),
        se_channels=entry.integer("se_channels", minimum=0),
    )


def save_architecture(path: str | os.PathLike[str], arch: Architecture, **facts: Any) -> None:
    """Write an architecture file atomically. `facts` are those of `FACTS`; one that is None is left out.

    Raises `ValueError` for an unknown or malformed fact, before anything is written.
    """
    facts = {name: value for name, value in facts.items() if value is not None}
    _check_facts(facts)
    data = {"schema_version": SCHEMA_VERSION, **facts, **architecture_to_dict(arch)}
    write_text_atomically(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def load_architecture(path_or_name: str | os.PathLike[str]) -> tuple[Architecture, dict[str, Any]]:
    """Read an architecture file, or a built-in one by name (`tf-nas-a`); returns it and its facts.

    The published code's `model.config` is read, too, as a network for 224x224 images (`load_published_config` takes
    others).

    Raises `ValueError` naming file and key for anything truncated, unknown or out of range, `FileNotFoundError` for a
    missing file.
    """
    path = _find(path_or_name)
    try:
        data = read_json(path)
        if isinstance(data, dict) and "first_stem" in data:
            from tfnas.published_config import from_published_config  # which needs this module

            return from_published_config(data), {}
        top = Fields(data, "", required=("schema_version", "space", "stages"), optional=FACTS)
        if (version := top.integer("schema_version")) != SCHEMA_VERSION:
            raise ValueError(f"schema_version: this version reads {SCHEMA_VERSION}, got {version}")
        facts = {name: top.values[name] for name in FACTS if name in top}
        _check_facts(facts)
        return architecture_from_dict({"space": top.values["space"], "stages": top.values["stages"]}), facts
    except ValueError as error:
        raise ValueError(f"architecture file {path}: {error}") from None


def builtin_architectures() -> list[str]:
    """Names that `load_architecture` knows without a path."""
    return sorted(path.stem for path in BUILTIN_ARCHITECTURES.glob("*.json"))


def _find(path_or_name: str | os.PathLike[str]) -> Path:
    name = os.fspath(path_or_name)
    if name in builtin_architectures():
        return BUILTIN_ARCHITECTURES / f"{name}.json"
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"architecture {name!r} is neither a file nor built in{suggestion(name, builtin_architectures())} "
            f"(built in: {', '.join(builtin_architectures())})"
        )
    return path


def _check_facts(facts: Mapping[str, Any]) -> None:
    top = Fields(facts, "", optional=FACTS)
    for name in facts:
        if name in NUMBER_FACTS:
            top.number(name)
        elif name == "seed":
            top.integer(name, minimum=0)
        elif name == "repaired":
            top.flag(name)
        elif name in TEXT_FACTS:
            top.text(name)
        elif not isinstance(facts[name], Mapping):
            raise top.fail(name, "a mapping")


def block_multiply_adds(
    *,
    resolution: int,
    in_channels: int,
    width: int,
    out_channels: int,
    kernel_size: int,
    stride: int,
    se_channels: int,
    expand: bool = True,
) -> int:
    """Multiply-adds of one MBInvRes on one image, counted as `count_multiply_adds` does."""
    pixels, out_pixels = resolution**2, (-(-resolution // stride)) ** 2
    expansion = pixels * in_channels * width if expand else 0
    excite = (2 * width + 1) * se_channels + width if se_channels else 0
    return expansion + excite + out_pixels * width * (kernel_size**2 + out_channels)


def block_parameters(
    *, in_channels: int, width: int, out_channels: int, kernel_size: int, se_channels: int, expand: bool = True
) -> int:
    """Parameters of one MBInvRes with affine batch norm."""
    expansion = (in_channels + 2) * width if expand else 0
    excite = (2 * width + 1) * se_channels + width if se_channels else 0
    return expansion + excite + width * (kernel_size**2 + 2) + (width + 2) * out_channels


def count_multiply_adds(arch: Architecture) -> int:
    """Multiply-adds of the whole network on one image of the space's resolution (`tf-nas-a`: 456,747,736).

    Counted: one per weight used per output pixel of every convolution (stem, blocks, squeeze-and-excitation, head) and
    of the classifier (the half of what `torch.utils.flop_counter` counts), one per bias added, and one per value of
    the head's average pooling. Not counted, as in the published counts: batch norm, activations, residual additions,
    the pooling and the gating inside squeeze-and-excitation.
    """
    space = arch.space
    out_pixels = space.out_resolution**2
    stem = space.stem_resolution**2 * 9 * space.image_channels * space.stem_channels
    fixed = block_multiply_adds(
        resolution=space.stem_resolution,
        in_channels=space.stem_channels,
        width=space.stem_channels,
        out_channels=space.fixed_channels,
        kernel_size=3,
        stride=1,
        se_channels=space.fixed_se_channels,
        expand=False,
    )
    blocks = sum(
        block_multiply_adds(
            resolution=layer.resolution,
            in_channels=layer.in_channels,
            width=op.width,
            out_channels=layer.out_channels,
            kernel_size=op.kernel_size,
            stride=layer.stride,
            se_channels=op.se_channels,
        )
        for layer, op in arch.layers()
    )
    head = out_pixels * space.head_channels * (space.stages[-1].out_channels + 1)
    return stem + fixed + blocks + head + (space.head_channels + 1) * space.num_classes


def count_parameters(arch: Architecture) -> int:
    """Trainable parameters of the whole network, affine batch norm included (`tf-nas-a`: 8,757,527)."""
    space = arch.space
    stem = (9 * space.image_channels + 2) * space.stem_channels
    fixed = block_parameters(
        in_channels=space.stem_channels,
        width=space.stem_channels,
        out_channels=space.fixed_channels,
        kernel_size=3,
        se_channels=space.fixed_se_channels,
        expand=False,
    )
    blocks = sum(
        block_parameters(
            in_channels=layer.in_channels,
            width=op.width,
            out_channels=layer.out_channels,
            kernel_size=op.kernel_size,
            se_channels=op.se_channels,
        )
        for layer, op in arch.layers()
    )
    head = (space.stages[-1].out_channels + 2) * space.head_channels
    return stem + fixed + blocks + head + (space.head_channels + 1) * space.num_classes
