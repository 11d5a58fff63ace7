"""Draw what `search_step.py` measured: how many steps ours makes in one of the fastest eager configuration.

    python benchmarks/search_step_picture.py result.json result.png

Needs matplotlib (extra `plots`). A bar for every case, step and dtype of ours; the line at 1 is the fastest eager one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfnas.pictures import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"float32": "#3b6fb6", "bfloat16": "#d98032"}


def draw(result: dict[str, Any]) -> Figure:
    labels: list[str] = []
    for row in result["rows"]:
        label = f"{row['step']} {row['batch']}x{row['resolution']}"
        label += "" if row["space"] == "imagenet" else f"\n{row['space']}"
        labels += [] if label in labels else [label]
        row["label"] = label
    figure = new_figure(1.1 * len(labels) + 2, 4)
    axis = figure.subplots()
    for offset, (dtype, color) in zip((-0.2, 0.2), COLORS.items(), strict=True):
        rows = [row for row in result["rows"] if row["dtype"] == dtype]
        places = [labels.index(row["label"]) + offset for row in rows]
        bars = axis.bar(places, [row["ratio_vs_best_eager"] for row in rows], 0.38, color=color, label=dtype)
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(labels)), labels)
    axis.set_ylabel("fastest eager time / ours")
    axis.set_title(f"Steps of the search, {result['device']}, {result['threads']} threads", fontsize=10)
    axis.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path, help="png, svg or pdf")
    args = parser.parse_args()
    save_figure(args.picture, draw(json.loads(args.result.read_text())))


if __name__ == "__main__":
    main()
