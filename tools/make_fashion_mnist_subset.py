"""Make the subset of Fashion-MNIST that ships with the package: the same bytes every time.

    python tools/make_fashion_mnist_subset.py [--source /usr/share/datasets/fashion-mnist] [--output FOLDER]

The source is Debian's package `dataset-fashion-mnist`, or any folder with the four original files. Training images come
from the original training set, test images from the original test set, the same number of every class, chosen by a
fixed seed.
"""

from __future__ import annotations

import argparse
import gzip
import struct
from pathlib import Path

import numpy as np
from tfnas.data.idx import find_idx_pairs, read_idx
from tfnas.data.keyed_random import Purpose, shuffled
from tfnas.data.sources import FASHION_MNIST_FOLDER, QUICKSTART_FOLDER

SEED = 2020
PER_CLASS = {"train": 200, "t10k": 50}


def write_idx(path: Path, array: np.ndarray) -> None:
    """uint8 `array` as gzipped IDX, with no time stamp so that equal arrays give equal files."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=9, mtime=0))


def choose(labels: np.ndarray, per_class: int) -> np.ndarray:
    """`per_class` indices of every class, ordered by class: alike images side by side compress better."""
    chosen = [shuffled(SEED, Purpose.SPLIT, 0, np.flatnonzero(labels == label))[:per_class] for label in range(10)]
    return np.concatenate([np.sort(own) for own in chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=FASHION_MNIST_FOLDER)
    parser.add_argument("--output", type=Path, default=QUICKSTART_FOLDER)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    train, test = find_idx_pairs(arguments.source)
    if test is None:
        raise SystemExit(f"{arguments.source}: no t10k files beside the training files")
    for name, (images, labels) in {"train": train, "t10k": test}.items():
        all_labels = read_idx(labels)
        chosen = choose(all_labels, PER_CLASS[name])
        write_idx(arguments.output / f"{name}-images-idx3-ubyte.gz", read_idx(images)[chosen])
        write_idx(arguments.output / f"{name}-labels-idx1-ubyte.gz", all_labels[chosen])


if __name__ == "__main__":
    main()
