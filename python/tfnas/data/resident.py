"""Image files decoded once into memory, so that no step waits for a decoder."""

from __future__ import annotations

import numpy as np
import torch

from tfnas.data.errors import DataError
from tfnas.data.file_reader import FileReader
from tfnas.data.images import ArrayImages

_DECODED_AT_ONCE = 64


def decode_all(reader: FileReader) -> ArrayImages:
    """Every image of `reader` as `reader.transform` leaves it: uint8 on `reader.device`.

    Raises:
        DataError: a file that cannot be decoded, or more images than fit into the device's memory.
    """
    count, side = len(reader.images), reader.transform.resolution
    shape = (count, reader.channels, side, side)
    try:
        pixels = torch.empty(shape, dtype=torch.uint8, device=reader.device)
    except RuntimeError as error:
        raise DataError(
            f"resident: expected {count} images of {side}x{side} to fit into {reader.device}'s memory, "
            f"they take {np.prod(shape, dtype=np.int64)} bytes; use fewer classes or resident: false"
        ) from error
    batches = np.array_split(np.arange(count, dtype=np.int64), -(-count // _DECODED_AT_ONCE))
    for indices, images in zip(batches, reader.read(0, batches), strict=True):
        pixels[indices[0] : indices[-1] + 1] = images
    return ArrayImages(pixels)
