"""Images and labels for search and training: `build_data(options, seed) -> DataBundle`."""

from tfnas.data.bundle import DataBundle, build_data
from tfnas.data.errors import DataError
from tfnas.data.loader import Loader
from tfnas.data.options import DataOptions

__all__ = ["DataBundle", "DataError", "DataOptions", "Loader", "build_data"]
