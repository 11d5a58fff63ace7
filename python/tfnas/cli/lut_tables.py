"""`tfnas lut show|compare|import|export`: look at latency tables and bring them from one format to another."""

from __future__ import annotations

import json as json_format
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table

from tfnas.cli.codes import OK
from tfnas.cli.terminal import terminal
from tfnas.latency.compare import compare_tables
from tfnas.latency.lut import Curve, LatencyTable
from tfnas.latency.lut_import import export_csv, export_published_pickle
from tfnas.latency.lut_io import load_table, save_table
from tfnas.latency.plot import curves_table, error_bars, save_plot
from tfnas.scaling import reachable_range_ms
from tfnas.space import OpKey
from tfnas.space_io import load_space


def show(lut: Path, space: str | None = None, curve: str = "", png: Path | None = None, json: bool = False) -> int:
    """Show a latency table: what it says of itself, and its curves with their error bars.

    Args:
        lut: Table to show: JSON, published pickle, CSV, OFA's or ProxylessNAS's YAML.
        space: Search space, a built-in name or a YAML file, whose reachable range to print.
        curve: Show only curves whose name contains this text, such as `r28_i40`.
        png: Picture to draw the curves into (needs matplotlib, extra `plots`); `.svg` and `.pdf` work too.
        json: Print one JSON object.

    Returns:
        The exit code.
    """
    table = load_table(lut)
    curves = {key: found for key, found in table.curves.items() if curve in str(key)}
    if not curves:
        raise ValueError(f"--curve: no curve of {lut} contains {curve!r}; one is named {next(iter(table.curves))}")
    range_ms = reachable_range_ms(load_space(space), table) if space is not None else None
    if png is not None:
        try:
            save_plot(png, curves, title=_title(table, lut))
        except ModuleNotFoundError as error:
            raise ValueError(f"--png: {error}") from None
    if json:
        facts = {
            "header": dict(table.header),
            "base_ms": table.base_ms,
            "correction": {"offset_ms": table.correction[0], "slope": table.correction[1]},
            "reachable_range_ms": range_ms,
            "curves": [_curve_facts(key, found) for key, found in curves.items()],
        }
        print(json_format.dumps(facts, indent=1))
        return OK
    console = terminal()
    console.print(_title(table, lut), highlight=False)
    for name, value in table.header.items():
        if value is not None and value != {}:
            console.print(f"  {name}: {value}", highlight=False)
    offset_ms, slope = table.correction
    console.print(f"base {table.base_ms:.4f} ms; network = {offset_ms:+.4f} ms + {slope:.4f} x sum", highlight=False)
    if range_ms is not None:
        console.print(f"networks of space {space} reach {range_ms[0]:.4f} to {range_ms[1]:.4f} ms", highlight=False)
    console.print(curves_table(curves, ascii_only=console.options.ascii_only))
    return OK


def compare(first: Path, second: Path, json: bool = False) -> int:
    """Compare two latency tables: of two devices or engines, or of two builds.

    Args:
        first: Table that the other one is divided by.
        second: The other table.
        json: Print one JSON object: `scale`, `deviation_median`, `deviation_p95` (fractions), `scales` and more.

    Returns:
        The exit code.
    """
    found = compare_tables(load_table(first), load_table(second))
    if json:
        print(json_format.dumps({"first": str(first), "second": str(second)} | found.as_dict(), indent=1))
        return OK
    console = terminal()
    base = "" if found.base_ratio is None else f"; base {found.base_ratio:.4f}"
    console.print(
        f"{second} takes {found.scale:.4f} of the time of {first} (median of {found.entries} widths on {found.curves} "
        f"curves){base}",
        highlight=False,
    )
    console.print(
        f"after this scale they differ by {100 * found.deviation_median:.2f} % (median), "
        f"{100 * found.deviation_p95:.2f} % (95th percentile), {100 * found.deviation_max:.2f} % (largest)",
        highlight=False,
    )
    for name, (theirs, ours) in found.header.items():
        console.print(f"  {name}: {theirs} against {ours}", highlight=False)
    for path, keys in ((first, found.only_first), (second, found.only_second)):
        if keys:
            console.print(f"  only in {path}: {len(keys)} curves, such as {keys[0]}", highlight=False)
    rows = Table(box=None, pad_edge=False, header_style="bold")
    rows.add_column("curve", no_wrap=True)
    rows.add_column("second / first", justify="right")
    for key, scale in sorted(found.scales.items(), key=lambda item: item[1]):
        rows.add_row(str(key).removeprefix("mbinvres_"), f"{scale:.4f}")
    console.print(rows)
    return OK


def import_table(
    input: Path,
    output: Path,
    device: str | None = None,
    engine: str | None = None,
    batch: int | None = None,
    threads: int | None = None,
    dtype: str | None = None,
    layout: str | None = None,
    mode: Literal["cold", "hot", "chain", "slope"] | None = None,
) -> int:
    """Read somebody else's latency table and write it in this package's format.

    Other formats do not say what was measured: the options put what you know of it into the header.

    Args:
        input: Published pickle (`.pkl`; nothing in it is run), CSV, OFA's or ProxylessNAS's YAML; latencies in ms.
        output: Table to write (JSON).
        device: What was measured, such as `Titan RTX`.
        engine: What ran the networks.
        batch: Images a forward pass.
        threads: CPU threads.
        dtype: Type of weights and activations.
        layout: Memory layout of the activations.
        mode: Caches while measuring: `cold`, `hot`, `chain` for blocks timed inside a network, `slope` for the marginal
            cost in a chain of copies.

    Returns:
        The exit code.
    """
    table = load_table(input)
    known: dict[str, Any] = {
        "device": device, "engine": engine, "batch": batch, "threads": threads, "dtype": dtype, "layout": layout,
        "mode": mode,
    }  # fmt: skip
    stated = {name: value for name, value in known.items() if value is not None}
    save_table(output, replace(table, header={**table.header, **stated}))
    print(f"{output}: {len(table.curves)} curves, base {table.base_ms:.4f} ms")
    if dropped := table.header.get("dropped_non_positive"):
        print(f"{dropped} entries that were not above 0 were dropped")
    return OK


def export_table(lut: Path, output: Path) -> int:
    """Write a latency table in somebody else's format; the correction is applied to the latencies.

    Args:
        lut: Table to read, in any known format.
        output: `.csv` for knots as CSV, `.pkl` for the published code's pickle (every width a curve covers).

    Returns:
        The exit code.
    """
    writers = {".csv": export_csv, ".pkl": export_published_pickle}
    if output.suffix.lower() not in writers:
        raise ValueError(f"--output: expected a name that ends in {' or '.join(writers)}, got {output}")
    table = load_table(lut)
    writers[output.suffix.lower()](output, table)
    print(f"{output}: {len(table.curves)} curves")
    return OK


def _curve_facts(key: OpKey, curve: Curve) -> dict[str, Any]:
    bars = error_bars(curve)
    return {
        "name": str(key),
        "kind": curve.kind,
        "period": curve.period,
        "widths": curve.widths.tolist(),
        "latency_ms": curve.latency_ms.tolist(),
        "error_bar": [None if np.isnan(bar) else float(bar) for bar in bars],
    }


def _title(table: LatencyTable, path: Path) -> str:
    device, engine, batch = (table.header.get(name) for name in ("device", "engine", "batch"))
    about = [str(device) if device else None, engine, f"batch {batch}" if batch else None]
    return ", ".join([path.name, *(text for text in about if text)])
