"""Plain YAML files, read strictly."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

_MAX_VALUES, _MAX_DEPTH = 100_000, 50


def read_yaml(path: Path) -> Any:
    """Parse a UTF-8 YAML file; only plain values are made.

    A `ValueError` names the file and the place for anything that is not YAML, for objects, and for a key given twice,
    which PyYAML would settle silently; and for aliases that contain themselves or unfold to an enormous file.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, LookupError) as error:
        # PyYAML's own constructors raise the last two for tagged values such as `!!timestamp x` and `!!bool x`
        raise ValueError(f"{path} is not valid YAML: {error}") from None


class _StrictLoader(yaml.SafeLoader):
    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _unfolded_size(node, {}, 1)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[str] = set()
        for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key in keys:
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"found the key {key!r} twice"
                )
            keys.add(key)
        return super().construct_mapping(node, deep)


def _unfolded_size(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """Values in `node` once every alias is written out; `sizes` holds those known, by id.

    Raises a `YAMLError` for more values or deeper nesting than any file of ours needs, which a cycle always has.
    """
    if id(node) not in sizes:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = list(node.value)
        elif isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        size = 1 + sum(_unfolded_size(child, sizes, depth + 1) for child in children) if depth < _MAX_DEPTH else None
        if size is None or size > _MAX_VALUES:
            what = f"more than {_MAX_VALUES} values" if size else f"nesting deeper than {_MAX_DEPTH}"
            raise yaml.constructor.ConstructorError(
                None, None, f"found {what}, or an alias within itself", node.start_mark
            )
        sizes[id(node)] = size
    return sizes[id(node)]
