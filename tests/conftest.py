"""What every test shares: the longer sweeps are left out unless TFNAS_SLOW=1."""

from __future__ import annotations

import os

import pytest
from tfnas.openmp import wait_briefly

wait_briefly()  # as the commands do, before a test imports torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TFNAS_SLOW") == "1":
        return
    skip = pytest.mark.skip(reason="slow: set TFNAS_SLOW=1 to run it")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)
