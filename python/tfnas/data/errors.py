"""The one error of the data layer, and how a path is written in a message."""

from __future__ import annotations

import os


class DataError(ValueError):
    """Images or labels that cannot be used: names argument or path, what was expected, what came, and the remedy."""


def shown(path: str | bytes | os.PathLike[str]) -> str:
    """`path` as printable text: bytes that are not UTF-8 become `\\xNN`, so that no message or file fails on a name."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
