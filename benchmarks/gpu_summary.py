"""Puts the results of the GPU check together: one JSON file, and a table to read.

    python benchmarks/gpu_summary.py PREFIX

Reads PREFIX-step.json, PREFIX-kernels.json and PREFIX-data.json, those of them that are there, and writes PREFIX.json
(each under its name) and PREFIX.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tfnas.files import write_text_atomically

PARTS = ("step", "kernels", "data")
# Heading of a column -> how a row gives it.
COLUMNS: dict[str, dict[str, str]] = {
    "step": {
        "step": "{step}",
        "precision": "{precision}",
        "engine": "{engine}",
        "ms": "{median_ms:.3f}",
        "best plain / this": "{ratio_vs_best_plain:.2f}",
        "peak GB": "{peak_gb:.2f}",
        "launches": "{launches}",
        "waits": "{synchronisations}",
    },
    "kernels": {
        "step": "{step}",
        "type": "{dtype}",
        "kernel": "`{kernel}`",
        "ms": "{ms:.3f}",
        "GB/s": "{gb_per_s:.0f}",
        "% of a copy": "{percent:.0f}",
    },
    "data": {"data": "{case}", "images/s": "{median:,.0f}", "worst": "{worst:,.0f}", "best": "{best:,.0f}"},
}


def table(part: str, rows: list[dict[str, Any]]) -> str:
    """A Markdown table of the rows of one result."""
    columns = COLUMNS[part]
    lines = [f"| {' | '.join(columns)} |", "|" + "-|" * len(columns)]
    for row in rows:
        derived = {
            "peak_gb": row.get("peak_bytes", 0) * 1e-9,
            "ms": row.get("us", 0) * 1e-3,
            "percent": row.get("share_of_copy", 0) * 100,
        }
        lines.append(f"| {' | '.join(text.format(**row, **derived) for text in columns.values())} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", help="of the results' names, as benchmarks/results/NVIDIA-H100/2026-01-31")
    prefix = parser.parse_args().prefix
    results: dict[str, Any] = {}
    for part in PARTS:
        path = Path(f"{prefix}-{part}.json")
        if path.exists():
            results[part] = json.loads(path.read_text())
    if not results:
        raise SystemExit(f"{prefix}: none of its results ({', '.join(PARTS)}) is there")
    write_text_atomically(Path(f"{prefix}.json"), json.dumps(results, indent=1) + "\n")
    tables = [table(part, result["rows"]) for part, result in results.items()]
    write_text_atomically(Path(f"{prefix}.md"), "\n\n".join(tables) + "\n")
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
