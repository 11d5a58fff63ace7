"""Pictures by matplotlib, an extra: figures that need no window, files that are never half written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from tfnas.files import write_bytes_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty figure. Raises `ModuleNotFoundError` saying what to install where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"pictures need matplotlib ({error}): pip install 'tfnas-ext[plots]'", name="matplotlib"
        ) from None
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(path: str | Path, figure: Figure) -> None:
    """Write `figure` to `path`, whose suffix decides the format (PNG, SVG, PDF; PNG without one)."""
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(path).suffix.lstrip(".").lower() or "png", dpi=110)
    write_bytes_atomically(path, picture.getvalue())
