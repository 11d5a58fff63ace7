"""TF-NAS: a network that meets a latency target, found by differentiable search over operations, depths and widths.

`tfnas.search(config)` runs a search; `tfnas.load_config(name)` gives a configuration to change. Submodules load on
first use, so that importing the package is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfnas.callbacks import Callback as Callback
    from tfnas.config import SearchConfig as SearchConfig
    from tfnas.config_io import load_config as load_config
    from tfnas.pipeline import SearchResult as SearchResult
    from tfnas.pipeline import search as search
    from tfnas.several_targets import search_targets as search_targets

_HOME = {
    "Callback": "callbacks",
    "SearchConfig": "config",
    "SearchResult": "pipeline",
    "load_config": "config_io",
    "search": "pipeline",
    "search_targets": "several_targets",
}
_SUBMODULES = ("architecture", "config", "config_io", "derive", "latency", "network", "scaling", "space", "space_io")

__all__ = ["Callback", "SearchConfig", "SearchResult", "load_config", "search", "search_targets"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"tfnas.{_HOME[name]}"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"tfnas.{name}")
    raise AttributeError(f"module 'tfnas' has no attribute {name!r}")
