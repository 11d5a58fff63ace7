"""IDX files (the format of MNIST and its relatives), plain or gzipped."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from tfnas.data.errors import DataError
from tfnas.files import shown

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_NAME = re.compile(r"(?P<head>.*)images(?P<tail>[-.]idx[34]-ubyte(\.gz)?)", re.DOTALL)
_CHUNK_BYTES = 1 << 24


def read_idx(path: Path) -> NDArray[np.generic]:
    """The array in an IDX file, in native byte order.

    Raises:
        DataError: not an IDX file, truncated, damaged, or longer than its header says.
    """
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if not zipped:
                return _read_stream(raw, path)
            with gzip.GzipFile(fileobj=raw) as stream:
                return _read_stream(stream, path)  # type: ignore[arg-type]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{shown(path)}: expected a whole gzip file, got a truncated or damaged one ({error}); copy it anew"
        ) from error
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror or error}") from error


def _read_stream(stream: BinaryIO, path: Path) -> NDArray[np.generic]:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES or not 1 <= magic[3] <= 4:
        raise DataError(
            f"{shown(path)}: expected an IDX file (two zero bytes, a type code, 1 to 4 dimensions), "
            f"got the first bytes {magic.hex(' ') or 'of an empty file'}"
        )
    dims = magic[3]
    header = stream.read(4 * dims)
    if len(header) < 4 * dims:
        raise DataError(f"{shown(path)}: expected {dims} sizes after the IDX magic number, got the end of the file")
    shape = struct.unpack(f">{dims}I", header)
    dtype = np.dtype(_TYPES[magic[2]])
    expected = math.prod(shape) * dtype.itemsize
    body = bytearray()
    # In pieces: a header that lies about its sizes must not allocate what it claims.
    while len(body) <= expected and (piece := stream.read(min(_CHUNK_BYTES, expected + 1 - len(body)))):
        body += piece
    if len(body) != expected:
        got = f"{len(body)}" if len(body) < expected else "more"
        raise DataError(
            f"{shown(path)}: expected {expected} bytes for an array of {'x'.join(map(str, shape))}, got {got}"
        )
    return np.frombuffer(body, dtype=dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def find_idx_pairs(source: Path) -> tuple[tuple[Path, Path], tuple[Path, Path] | None]:
    """(images, labels) of the training set and, where there is one, of the test set.

    `source` is a folder that holds exactly one training set, or a file of training images.
    """
    if source.is_dir():
        images = sorted(path for path in source.iterdir() if _NAME.fullmatch(path.name) and not _is_test(path.name))
        if len(images) > 1:
            # The same set plain and gzipped is one set.
            images = [
                path
                for path in images
                if path.name.removesuffix(".gz") + ".gz" != path.name or path.with_suffix("") not in images
            ]
        if len(images) != 1:
            found = ", ".join(shown(path.name) for path in images) or "none"
            raise DataError(
                f"{shown(source)}: expected one file of training images (like train-images-idx3-ubyte.gz), "
                f"got {found}; name the file itself as source"
            )
        train = images[0]
    else:
        train = source
        if not _NAME.fullmatch(train.name):
            raise DataError(
                f"{shown(source)}: expected a file name like train-images-idx3-ubyte or train-images-idx3-ubyte.gz"
            )
    test = next(
        (
            path
            for path in (train.with_name(train.name.replace("train", word)) for word in ("t10k", "test"))
            if path != train and path.is_file()
        ),
        None,
    )
    return (train, labels_beside(train)), (test, labels_beside(test)) if test else None


def _is_test(name: str) -> bool:
    return "t10k" in name or "test" in name


def labels_beside(images: Path) -> Path:
    """The label file that belongs to a file of images, plain or gzipped."""
    match = _NAME.fullmatch(images.name)
    if match is None:
        raise DataError(
            f"{shown(images)}: expected a file name like t10k-images-idx3-ubyte or t10k-images-idx3-ubyte.gz"
        )
    name = match["head"] + "labels" + re.sub("idx[34]", "idx1", match["tail"]).removesuffix(".gz")
    for candidate in (images.with_name(name), images.with_name(name + ".gz")):
        if candidate.is_file():
            return candidate
    raise DataError(
        f"{shown(images)}: expected its labels beside it as {shown(name)} or {shown(name)}.gz, got no such file"
    )
