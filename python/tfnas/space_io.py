"""Search spaces as YAML files and plain dicts, validated key by key (paper, Table 1; Fig. 3 for `depth_space`).

A file holds the fields of `space.Space` under their own names. With `base: NAME_OR_PATH` it needs only what differs
from another space. An entry of `candidates` is either a full mapping or the name of a candidate of the base space
(of `imagenet`, which is Table 1, where no base is given).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from tfnas.fields import Fields, describe, suggestion
from tfnas.files import write_text_atomically
from tfnas.space import ACTIVATIONS, DEPTH_SPACES, KERNEL_SIZES, STRIDES, Candidate, Space, Stage
from tfnas.strict_yaml import read_yaml

BUILTIN_SPACES = Path(__file__).parent / "configs" / "spaces"
TABLE_1 = "imagenet"

# far beyond any sensible network, but a slip of the keyboard must not take all memory
MAX_SIZE = 2**20
MAX_DEPTH = 64
MAX_EXPANSION = 1024.0

_STAGE_KEYS = tuple(field.name for field in fields(Stage))
_CANDIDATE_KEYS = tuple(field.name for field in fields(Candidate))
_SPACE_KEYS = tuple(field.name for field in fields(Space))
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def builtin_spaces() -> list[str]:
    """Names that `load_space` knows without a path."""
    return sorted(path.stem for path in BUILTIN_SPACES.glob("*.yaml"))


def load_space(name_or_path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Space:
    """Read a built-in space by name, or a YAML file by path; `overrides` replaces top-level fields.

    `load_space("small", {"resolution": 32, "image_channels": 3, "num_classes": 100})`. Raises `ValueError` for an
    unknown name, bad YAML or a bad value (naming file, key and allowed values), `FileNotFoundError` for a missing file.
    """
    path = _find(name_or_path)
    space = _load(path, seen=())
    if not overrides:
        return space
    try:
        return _replace(space, overrides)
    except ValueError as error:
        raise ValueError(f"overrides of search space {space.name}: {error}") from None


def space_to_dict(space: Space) -> dict[str, Any]:
    """Every field of the space as plain dicts, lists, numbers and strings; `space_from_dict` is its inverse."""
    data = asdict(space)
    data["stages"] = list(data["stages"])
    data["candidates"] = list(data["candidates"])
    return data


def space_from_dict(data: Mapping[str, Any]) -> Space:
    """Build and fully check a space. A `ValueError` names the key by its dotted path, e.g. `stages[2].stride`."""
    top = Fields(data, "", required=[k for k in _SPACE_KEYS if k != "depth_space"], optional=["depth_space"])
    space = Space(
        name=top.text("name"),
        resolution=top.integer("resolution", maximum=MAX_SIZE),
        image_channels=top.integer("image_channels", maximum=MAX_SIZE),
        num_classes=top.integer("num_classes", maximum=MAX_SIZE),
        stem_channels=top.integer("stem_channels", maximum=MAX_SIZE),
        stem_stride=top.integer_choice("stem_stride", STRIDES),
        stem_act=top.choice("stem_act", ACTIVATIONS),
        fixed_channels=top.integer("fixed_channels", maximum=MAX_SIZE),
        fixed_se_channels=top.integer("fixed_se_channels", minimum=0, maximum=MAX_SIZE),
        stages=tuple(_stage(item, path) for path, item in top.items("stages")),
        candidates=tuple(_candidate(item, path) for path, item in top.items("candidates")),
        head_channels=top.integer("head_channels", maximum=MAX_SIZE),
        head_act=top.choice("head_act", ACTIVATIONS),
        depth_space=top.choice("depth_space", DEPTH_SPACES) if "depth_space" in top else DEPTH_SPACES[0],
    )
    _check_candidates(space)
    return space


def validate_space(space: Space) -> None:
    """Check a space built in Python as strictly as one read from a file (same `ValueError`)."""
    space_from_dict(space_to_dict(space))


def save_space(path: str | os.PathLike[str], space: Space) -> None:
    """Check `space` and write it as a YAML file for `load_space`, atomically; a configuration may name that file."""
    validate_space(space)
    write_text_atomically(path, yaml.safe_dump(space_to_dict(space), sort_keys=False))


def _stage(item: object, path: str) -> Stage:
    stage = Fields(item, path, required=_STAGE_KEYS)
    return Stage(
        out_channels=stage.integer("out_channels", maximum=MAX_SIZE),
        depth=stage.integer("depth", maximum=MAX_DEPTH),
        stride=stage.integer_choice("stride", STRIDES),
        act=stage.choice("act", ACTIVATIONS),
    )


def _candidate(item: object, path: str) -> Candidate:
    if isinstance(item, str):
        item = _named_candidate(item, path, load_space(TABLE_1))
    entry = Fields(item, path, required=[k for k in _CANDIDATE_KEYS if k != "se_expansion"], optional=["se_expansion"])
    name = entry.text("name")
    # names become parts of state-dict keys, and "skip" is the operation that depth_space: skip-in adds
    if not _NAME.fullmatch(name) or name == "skip":
        raise entry.fail("name", "letters, digits and underscores starting with a letter, other than 'skip'")
    candidate = Candidate(
        name=name,
        kernel_size=entry.integer_choice("kernel_size", KERNEL_SIZES),
        expansion=entry.number("expansion", maximum=MAX_EXPANSION),
        min_expansion=entry.number("min_expansion", maximum=MAX_EXPANSION),
        max_expansion=entry.number("max_expansion", maximum=MAX_EXPANSION),
        se_expansion=entry.number("se_expansion", maximum=MAX_EXPANSION) if "se_expansion" in entry else 0.0,
    )
    if not 0 < candidate.min_expansion <= candidate.expansion <= candidate.max_expansion:
        raise entry.fail(
            "expansion",
            "0 < min_expansion <= expansion <= max_expansion "
            f"(min_expansion {candidate.min_expansion:g}, max_expansion {candidate.max_expansion:g})",
        )
    return candidate


def _check_candidates(space: Space) -> None:
    """What depends on several keys: unique names, and widths that exist at every layer's input channels."""
    names = [candidate.name for candidate in space.candidates]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(f"candidates[{i}].name: expected unique names, got {name!r} again")
    for layer in space.layers:
        for i, candidate in enumerate(space.candidates):
            where = f"with {layer.in_channels} input channels (layer {layer.index})"
            if layer.min_width(i) > layer.max_width(i):
                raise ValueError(
                    f"candidates[{i}]: no whole width lies in [{candidate.min_expansion:g}, "
                    f"{candidate.max_expansion:g}] {where}; widen min_expansion..max_expansion"
                )
            if candidate.se_expansion > 0 and layer.se_channels(i) < 1:
                raise ValueError(
                    f"candidates[{i}].se_expansion: {candidate.se_expansion:g} gives no SE channel {where}; "
                    "raise it, or set 0 for no SE"
                )


def _find(name_or_path: str | os.PathLike[str]) -> Path:
    name = os.fspath(name_or_path)
    builtin = BUILTIN_SPACES / f"{name}.yaml"
    if name in builtin_spaces():
        return builtin
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(
            f"unknown search space {name!r}{suggestion(name, builtin_spaces())} "
            f"(built in: {', '.join(builtin_spaces())}; or the path of a .yaml file)"
        )
    if not path.is_file():
        raise FileNotFoundError(f"search space file not found: {path} (built in: {', '.join(builtin_spaces())})")
    return path


def _load(path: Path, seen: tuple[Path, ...]) -> Space:
    """The file's space; `seen` are the files that name it, directly or not, as their base."""
    data = read_yaml(path)
    try:
        if not isinstance(data, dict) or "base" not in data:
            return space_from_dict(data)
        base = _base(data.pop("base"), path)
        if base.resolve() in (*seen, path.resolve()):
            raise ValueError(f"base: {base} leads back to itself")
        return _replace(_load(base, (*seen, path.resolve())), data)
    except ValueError as error:
        raise ValueError(f"search space {path.name}: {error}") from None


def _base(name: object, path: Path) -> Path:
    """The file named by `base:` in `path`; a relative path counts from the folder of `path`."""
    if not isinstance(name, str):
        raise ValueError(f"base: expected the name or path of a search space, got {describe(name)}")
    return _find(name if name in builtin_spaces() or Path(name).suffix == "" else path.parent / name)


def _replace(space: Space, changes: Mapping[str, Any]) -> Space:
    """`space` with top-level fields replaced; names in `candidates` mean the candidates of `space`."""
    changes = dict(changes)
    if isinstance(changes.get("candidates"), list | tuple):
        changes["candidates"] = [
            _named_candidate(item, f"candidates[{i}]", space) if isinstance(item, str) else item
            for i, item in enumerate(changes["candidates"])
        ]
    return space_from_dict(space_to_dict(space) | changes)


def _named_candidate(name: str, path: str, space: Space) -> dict[str, Any]:
    for candidate in space.candidates:
        if candidate.name == name:
            return asdict(candidate)
    names = [candidate.name for candidate in space.candidates]
    raise ValueError(
        f"{path}: unknown candidate {name!r}{suggestion(name, names)} (known: {', '.join(names)}; or a mapping with "
        f"{', '.join(_CANDIDATE_KEYS)})"
    )
