"""One image file to one PIL image in the channels wanted, whatever it was stored as."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tfnas.data.errors import DataError
from tfnas.files import shown

if TYPE_CHECKING:
    from PIL.Image import Image


def decode(path: str, channels: int) -> Image:
    """The image at `path` in mode `L` (1 channel) or `RGB` (3).

    16-bit gray is scaled to 8 bits (not clipped), transparent parts become white, palettes and CMYK become RGB; of an
    animation the first frame is taken.

    Raises:
        DataError: naming the path: missing, empty, truncated, damaged, or a kind of image that has no fixed range.
    """
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            _check_size(image, path)
            image.load()
            return _converted(image, path, channels)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{shown(path)}: expected an image file, got no such file") from error
    except Exception as error:  # PIL's decoders raise a dozen kinds on damaged files
        reason = shown(str(error).splitlines()[0]) if str(error) else type(error).__name__
        raise DataError(
            f"{shown(path)}: expected a whole image file, got one that cannot be decoded ({reason}); "
            "replace it, or leave such files out with skip_bad_images"
        ) from error


def _check_size(image: Image, path: str) -> None:
    import PIL.Image

    # PIL refuses twice this size and warns from here on; a warning lost in a worker helps nobody.
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise DataError(
            f"{shown(path)}: expected an image of at most {limit} pixels, got {image.width}x{image.height}; shrink it"
        )


def _converted(image: Image, path: str, channels: int) -> Image:
    import PIL.Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        wide = np.asarray(image).astype(np.int64)
        image = PIL.Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise DataError(
            f"{shown(path)}: expected 8 or 16 bits per channel, got 32 (mode {image.mode}); convert the file"
        )
    if image.has_transparency_data:
        visible = image.convert("RGBA")
        white = PIL.Image.new("RGBA", visible.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(white, visible)
    return image.convert("L" if channels == 1 else "RGB")
