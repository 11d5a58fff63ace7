"""The one error of the data layer."""

from __future__ import annotations


class DataError(ValueError):
    """Images or labels that cannot be used: names argument or path, what was expected, what came, and the remedy."""
