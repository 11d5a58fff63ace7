"""Which classes, and which of their images train the weights and which alpha and beta."""

from __future__ import annotations

import difflib
import math

import numpy as np
from numpy.typing import NDArray

from tfnas.data.errors import DataError
from tfnas.data.keyed_random import Purpose, shuffled


def choose_classes(wanted: int | list[str] | None, class_names: tuple[str, ...], seed: int) -> NDArray[np.int64]:
    """Classes to use, ascending: all, those named, or as many as asked for, chosen by the seed."""
    everything = np.arange(len(class_names), dtype=np.int64)
    if wanted is None:
        return everything
    if isinstance(wanted, int):
        if wanted > len(class_names):
            raise DataError(f"classes: expected at most {len(class_names)} (the source has no more), got {wanted}")
        return np.sort(shuffled(seed, Purpose.CLASSES, 0, everything)[:wanted])
    position = {name: i for i, name in enumerate(class_names)}
    for name in wanted:
        if name not in position:
            near = difflib.get_close_matches(name, class_names, n=1)
            hint = (
                f"; did you mean {near[0]!r}?"
                if near
                else f"; the source has {', '.join(class_names[:10])}" + (", ..." if len(class_names) > 10 else "")
            )
            raise DataError(f"classes: expected names of the source's {len(class_names)} classes, got {name!r}{hint}")
    if len(set(wanted)) != len(wanted):
        raise DataError(f"classes: expected every name once, got {wanted}")
    return np.array(sorted(position[name] for name in wanted), dtype=np.int64)


def split_by_class(
    labels: NDArray[np.int64], class_names: tuple[str, ...], held_out_fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training, held-out) indices, ascending; every class is in both, its held-out share rounded half up.

    Raises:
        DataError: naming a class with no image or with a single one.
    """
    train: list[NDArray[np.int64]] = []
    held_out: list[NDArray[np.int64]] = []
    by_class = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels, minlength=len(class_names)))
    for name, own in zip(class_names, np.split(by_class, ends[:-1]), strict=True):
        if len(own) < 2:
            raise DataError(
                f"class {name!r}: expected at least 2 images (one to train on, one held out), got {len(own)}; "
                "add images or leave the class out with `classes`"
            )
        count = min(max(math.floor(held_out_fraction * len(own) + 0.5), 1), len(own) - 1)
        mixed = shuffled(seed, Purpose.SPLIT, 0, own)
        held_out.append(mixed[:count])
        train.append(mixed[count:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(held_out))
