"""What every test shares: the longer sweeps are left out unless TFNAS_SLOW=1."""

from __future__ import annotations

import os

import pytest

# as the commands do (`tfnas.cli`): tests that share their cores with other programs must not wait spinning
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TFNAS_SLOW") == "1":
        return
    skip = pytest.mark.skip(reason="slow: set TFNAS_SLOW=1 to run it")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)
