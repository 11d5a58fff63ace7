"""Reading plain mappings (from YAML or JSON) key by key; errors name the key, what was expected and what came."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Iterable, Mapping


def suggestion(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest of `known`, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def describe(value: object) -> str:
    """A short rendering of a bad value for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Fields:
    """A mapping whose keys are all in `required` or `optional`; getters check type and range.

    `path` is the dotted path of the mapping inside its file (empty at the top) and prefixes every error, a
    `ValueError`.
    """

    def __init__(
        self, value: object, path: str, required: Collection[str] = (), optional: Collection[str] = ()
    ) -> None:
        self.path = path
        if not isinstance(value, Mapping):
            raise ValueError(f"{path or 'top level'}: expected a mapping of keys to values, got {describe(value)}")
        known = [*required, *optional]
        for key in value:
            if key not in known:
                hint = suggestion(str(key), known)
                raise ValueError(f"{self.at(str(key))}: unknown key{hint} (allowed: {', '.join(known)})")
        missing = [key for key in required if key not in value]
        if missing:
            raise ValueError(f"{self.at(missing[0])}: missing (required: {', '.join(required)})")
        self.values: Mapping[str, object] = value

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def at(self, key: str) -> str:
        """Dotted path of `key`."""
        return f"{self.path}.{key}" if self.path else key

    def fail(self, key: str, expected: str) -> ValueError:
        return ValueError(f"{self.at(key)}: expected {expected}, got {describe(self.values[key])}")

    def integer(self, key: str, minimum: int = 1, maximum: int | None = None) -> int:
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, "an integer")
        if value < minimum or (maximum is not None and value > maximum):
            bound = f"from {minimum} to {maximum}" if maximum is not None else f"of at least {minimum}"
            raise self.fail(key, f"an integer {bound}")
        return value

    def number(self, key: str, minimum: float = 0.0, maximum: float = sys.float_info.max) -> float:
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, "a number")
        # also false for nan; comparing instead of converting, which fails for integers of hundreds of digits
        if not minimum <= value <= maximum:
            bound = f" and at most {maximum:g}" if maximum < sys.float_info.max else ""
            raise self.fail(key, f"a finite number of at least {minimum:g}{bound}")
        return value

    def flag(self, key: str) -> bool:
        value = self.values[key]
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def text(self, key: str) -> str:
        value = self.values[key]
        if not isinstance(value, str) or not value:
            raise self.fail(key, "a non-empty string")
        return value

    def choice(self, key: str, allowed: Collection[str]) -> str:
        value = self.values[key]
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"{self.fail(key, 'one of ' + ', '.join(allowed))}{suggestion(str(value), allowed)}")
        return value

    def integer_choice(self, key: str, allowed: Collection[int]) -> int:
        value = self.integer(key, minimum=0)
        if value not in allowed:
            raise self.fail(key, "one of " + ", ".join(map(str, allowed)))
        return value

    def items(self, key: str) -> list[tuple[str, object]]:
        """Entries of a non-empty list, each with its path `key[i]`."""
        value = self.values[key]
        if not isinstance(value, list | tuple) or not value:
            raise self.fail(key, "a non-empty list")
        return [(f"{self.at(key)}[{i}]", item) for i, item in enumerate(value)]
