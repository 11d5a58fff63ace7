"""Random damage to what a JSON or YAML file holds."""

from __future__ import annotations

import copy
import random
from typing import Any

JUNK: list[Any] = [
    *(None, True, -1, 0, 1, 2, 7, 10**30, 10**400, 0.5, -0.0, float("inf"), float("nan"), 1e300),
    *("", "relu", "k3_e3", "imagenet", "\x00", [], [[]], [1], {}, {"name": 1}, {"": {}}),
]


def damage(rng: random.Random, data: Any) -> Any:
    """A copy of nested dicts and lists with one entry replaced, removed, renamed or doubled."""
    data = copy.deepcopy(data)
    nodes = [data]
    for node in nodes:
        children = node.values() if isinstance(node, dict) else node
        nodes.extend(child for child in children if isinstance(child, dict | list) and child)
    node = rng.choice(nodes)
    key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    action = rng.choice(["replace", "replace", "replace", "remove", "rename", "double"])
    if action == "replace":
        node[key] = rng.choice(JUNK)
    elif action == "remove":
        del node[key]
    elif isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    else:
        node[f"{key}x" if action == "rename" else rng.choice(["", "x", "stage9", "base"])] = node.pop(key)
    return data
