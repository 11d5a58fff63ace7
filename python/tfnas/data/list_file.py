"""List files: one `path label` per line."""

from __future__ import annotations

import codecs
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tfnas.data.errors import DataError
from tfnas.data.images import FileImages, Labelled
from tfnas.files import shown


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(line number, text) of every line that is not blank. Bytes that are not UTF-8 are kept as in file names.

    A byte order mark, as some editors write, is no part of the first line.
    """
    try:
        text = os.fsdecode(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror or error}") from error
    # Not splitlines(): a path may hold characters that it takes for line ends.
    lines = ((number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1))
    return [(number, line) for number, line in lines if line.strip()]


def read_label_map(path: Path) -> dict[str, tuple[int, str]]:
    """Label as in a list file -> (class, class name), from lines `label class name`; classes in line order."""
    mapping: dict[str, tuple[int, str]] = {}
    for number, line in read_lines(path):
        label, _, name = line.strip().partition(" ")
        if label in mapping:
            raise DataError(f"{shown(path)}, line {number}: expected every label once, got {shown(label)} again")
        mapping[label] = (len(mapping), shown(name.strip() or label))
    if not mapping:
        raise DataError(f"{shown(path)}: expected lines of `label class name`, got none")
    return mapping


def read_list(
    path: Path, root: Path | None, mapping: dict[str, tuple[int, str]] | None, num_classes: int | None
) -> Labelled:
    """Images and labels of a list file. The label is what follows the last blank, so that paths may hold blanks.

    Without a label map labels are whole numbers from 0; relative paths start from `root` (default: the list's folder).

    Raises:
        DataError: naming file and line: no label, a label outside the classes.
    """
    lines = read_lines(path)
    if not lines:
        raise DataError(f"{shown(path)}: expected lines of `path label`, got none")
    base = path.parent if root is None else root
    # More classes than images cannot all have one; a mistyped label must not make a billion of them.
    classes = _Classes(mapping, num_classes or len(lines))
    paths: list[str] = []
    labels: list[int] = []
    for number, line in lines:
        parts = line.rstrip().rsplit(maxsplit=1)
        if len(parts) != 2:
            raise DataError(f"{shown(path)}, line {number}: expected `path label`, got {shown(line)!r}")
        if "\0" in parts[0]:
            raise DataError(f"{shown(path)}, line {number}: expected a path, got one with a NUL: {parts[0]!a}")
        paths.append(os.path.join(base, parts[0]))
        labels.append(classes.of(parts[1], f"{shown(path)}, line {number}"))
    if mapping is not None:
        names = tuple(name for _, name in sorted(mapping.values()))
    else:
        names = tuple(str(i) for i in range(num_classes or max(labels) + 1))
    return Labelled(FileImages.of(paths), np.array(labels, dtype=np.int64), names)


@dataclass(frozen=True)
class _Classes:
    """From a label's text to its class."""

    mapping: dict[str, tuple[int, str]] | None
    limit: int

    def of(self, label: str, where: str) -> int:
        if self.mapping is not None:
            if label not in self.mapping:
                raise DataError(
                    f"{where}: expected a label of the label map ({len(self.mapping)} labels), got {shown(label)}"
                )
            return self.mapping[label][0]
        if not (label.isascii() and label.isdigit()):
            raise DataError(
                f"{where}: expected a whole number from 0 as label, got {shown(label)}; give a label_map for names"
            )
        # Compared by length first: Python refuses to convert thousands of digits.
        if len(label) > 18 or int(label) >= self.limit:
            raise DataError(
                f"{where}: expected a label in 0..{self.limit - 1}, got {label[:20]}; number the classes from 0 "
                "without gaps, or correct num_classes"
            )
        return int(label)
