"""Other people's latency tables: the published pickle, CSV, and the YAML of OFA and ProxylessNAS. Import and export.

A pickle is read as data: one that holds more than dicts, numbers and strings is refused before anything of it has run.
"""

from __future__ import annotations

import collections
import csv
import io
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tfnas.fields import describe
from tfnas.files import write_bytes_atomically, write_text_atomically
from tfnas.latency.lut import Curve, LatencyTable, LatencyTableError
from tfnas.latency.plain_pickle import load_plain_pickle
from tfnas.published import parse_published_key, published_key
from tfnas.space import ACTIVATIONS, OpKey
from tfnas.strict_yaml import read_yaml

_SHAPE_COLUMNS = ("resolution", "in_channels", "out_channels", "kernel_size", "stride", "se_channels")
CSV_COLUMNS = ("entry", *_SHAPE_COLUMNS, "act", "kind", "period", "width", "latency_ms", "rel_stdev", "samples")
_OPTIONAL_COLUMNS = ("kind", "period", "rel_stdev", "samples")

_YAML_BLOCK = re.compile(
    r"expanded_conv-input:(?P<res>\d+)x(?P<res2>\d+)x(?P<cin>\d+)-output:(?P<out>\d+)x\d+x(?P<cout>\d+)"
    r"-expand:(?P<expand>\d+)-kernel:(?P<kernel>\d+)-stride:(?P<stride>\d+)-idskip:(?P<skip>[01])"
    r"(?:-se:(?P<se>[01])-hs:(?P<hs>[01]))?"
)


def import_published_pickle(path: str | Path) -> LatencyTable:
    """Read a table in the published code's format: `base` and one {width: ms} dict per block name, pickled.

    Entries that are not positive (the published tables extrapolate below width 8) are dropped and counted in the
    header's `dropped_non_positive`. Which candidate a curve belongs to follows from its shape, so the published order
    of candidates does not matter. Raises `LatencyTableError` for anything that is not such a table.
    """
    path = Path(path)
    try:
        raw = load_plain_pickle(_read_bytes(path))
    except pickle.UnpicklingError as error:
        raise LatencyTableError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise LatencyTableError(f"{path}: expected a dict of curves, got {type(raw).__name__}")
    if "base" not in raw:
        raise LatencyTableError(f"{path}: no entry 'base' (latency of stem and head in ms)")
    curves: dict[OpKey, Curve] = {}
    dropped = 0
    for name, entries in raw.items():
        if name == "base":
            continue
        if not isinstance(name, str) or not isinstance(entries, dict):
            raise LatencyTableError(
                f"{path}: expected names with a dict of {{width: ms}} each, got a {type(entries).__name__} at "
                f"{describe(name)}"
            )
        try:
            key = parse_published_key(name)
            kept = {width: ms for width, ms in entries.items() if not _is_number(ms) or not ms <= 0}
            dropped += len(entries) - len(kept)
            if kept:
                curves[key] = _curve_from_entries(kept)
        except ValueError as error:
            raise LatencyTableError(f"{path}: {name!r}: {error}") from None
    header = {"source": "published pickle", "source_file": path.name, "dropped_non_positive": dropped}
    return _table(path, raw["base"], curves, header)


def export_published_pickle(path: str | Path, table: LatencyTable) -> None:
    """Write the published code's format, for every integer width a curve covers; the correction is applied.

    Raises `LatencyTableError` where a shape has no name in that format.
    """
    slope = table.correction[1]
    document: dict[str, Any] = collections.OrderedDict(base=_corrected_base_ms(table))
    for key, curve in table.curves.items():
        widths = np.arange(curve.widths[0], curve.widths[-1] + 1)
        widths = widths[curve.covers(widths)]
        latencies_ms = slope * curve.latencies_ms(widths)
        try:
            name = published_key(key)
        except ValueError as error:
            raise LatencyTableError(f"{key} cannot be written in the published format: {error}") from None
        document[name] = collections.OrderedDict(zip(widths.tolist(), latencies_ms.tolist(), strict=True))
    write_bytes_atomically(path, pickle.dumps(document, protocol=2))


def import_csv(path: str | Path) -> LatencyTable:
    """Read a CSV table: a header row naming `CSV_COLUMNS`, one row `base`, then one row `block` per knot.

    Columns `kind`, `period`, `rel_stdev` and `samples` may be left out. Raises `LatencyTableError` with the line.
    """
    path = Path(path)
    try:
        text = _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LatencyTableError(f"{path}: not UTF-8 text ({error.reason})") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        return _table_from_rows(path, reader)
    except csv.Error as error:
        raise LatencyTableError(f"{path}, after line {reader.line_num}: not CSV ({error})") from None


def _table_from_rows(path: Path, reader: csv.DictReader[str]) -> LatencyTable:
    columns = reader.fieldnames or []
    missing = [name for name in CSV_COLUMNS if name not in columns and name not in _OPTIONAL_COLUMNS]
    if missing:
        hint = "; a column in seconds must be converted and named latency_ms" if "latency_ms" in missing else ""
        raise LatencyTableError(f"{path}: missing columns {', '.join(missing)} (found: {', '.join(columns)}){hint}")
    base_ms: float | None = None
    knots: dict[OpKey, dict[int, tuple[float, float, int]]] = {}
    kinds: dict[OpKey, tuple[str, int]] = {}
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        try:
            if None in row:
                raise LatencyTableError(f"more fields than the {len(columns)} columns")
            latency_ms = _parse(float, row, "latency_ms")
            if row["entry"] == "base":
                if base_ms is not None:
                    raise LatencyTableError("a second row 'base'")
                base_ms = latency_ms
                continue
            if row["entry"] != "block":
                raise LatencyTableError(f"entry: expected base or block, got {row['entry']!r}")
            if row["act"] not in ACTIVATIONS:
                raise LatencyTableError(f"act: expected one of {', '.join(ACTIVATIONS)}, got {row['act']!r}")
            key = OpKey(**{name: _parse(int, row, name) for name in _SHAPE_COLUMNS}, act=row["act"])
            kind = (row.get("kind") or "linear", _parse(int, row, "period", default=1))
            if kinds.setdefault(key, kind) != kind:
                raise LatencyTableError(f"{key} has two kinds, {kinds[key]} and {kind}")
            noise = (_parse(float, row, "rel_stdev", default=0.0), _parse(int, row, "samples", default=0))
            width = _parse(int, row, "width")
            if width in knots.setdefault(key, {}):
                raise LatencyTableError(f"{key} has width {width} twice")
            knots[key][width] = (latency_ms, *noise)
        except LatencyTableError as error:
            raise LatencyTableError(f"{where}: {error}") from None
    if base_ms is None:
        raise LatencyTableError(f"{path}: no row 'base' (latency of stem and head in ms); is the file truncated?")
    curves: dict[OpKey, Curve] = {}
    for key, entries in knots.items():
        widths = sorted(entries)
        latency_ms, rel_stdev, samples = (np.array([entries[w][column] for w in widths]) for column in range(3))
        kind_name, period = kinds[key]
        try:
            curves[key] = Curve(np.array(widths), latency_ms, rel_stdev, samples, kind_name, period)
        except LatencyTableError as error:
            raise LatencyTableError(f"{path}: {key}: {error}") from None
    return _table(path, base_ms, curves, {"source": "csv", "source_file": path.name})


def export_csv(path: str | Path, table: LatencyTable) -> None:
    """Write the knots of a table as CSV (`CSV_COLUMNS`), the correction applied; the header is not kept."""
    slope = table.correction[1]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerow({"entry": "base", "latency_ms": repr(_corrected_base_ms(table))})
    for key, curve in table.curves.items():
        shape = {name: getattr(key, name) for name in (*_SHAPE_COLUMNS, "act")}
        rows = zip(curve.widths, slope * curve.latency_ms, curve.rel_stdev, curve.samples, strict=True)
        for width, latency_ms, rel_stdev, samples in rows:
            row = {"width": int(width), "latency_ms": repr(float(latency_ms)), "rel_stdev": repr(float(rel_stdev))}
            writer.writerow(
                {"entry": "block", **shape, "kind": curve.kind, "period": curve.period, **row, "samples": int(samples)}
            )
    write_text_atomically(path, text.getvalue())


def import_ofa_yaml(path: str | Path) -> LatencyTable:
    """Read a latency file of OFA (MobileNetV3 blocks) or ProxylessNAS (YAML, safe load), whose means are in ms.

    `expand` is the expansion ratio in ProxylessNAS's names and the width in OFA's (those with `-se:` and `-hs:`).
    ProxylessNAS blocks use ReLU6; OFA's use ReLU, or hard swish with `hs:1`, and with `se:1` a bottleneck of width/4
    rounded to a multiple of 8, as its networks do. `base_ms` is the sum of all entries that are not blocks; each of
    their kinds may appear once. Blocks whose shortcut is not that of this package's blocks (an identity where stride
    is 1 and channels are equal) are dropped and counted in the header's `dropped_other_shortcut`. Such files hold few
    widths: a space they do not cover is refused when it is used.
    """
    path = Path(path)
    try:
        raw = read_yaml(path)
    except ValueError as error:
        raise LatencyTableError(" ".join(str(error).split())) from None
    except OSError as error:
        raise LatencyTableError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(raw, dict):
        raise LatencyTableError(f"{path}: expected a mapping of block names to latencies, got {type(raw).__name__}")
    blocks: dict[OpKey, dict[Any, Any]] = {}
    rest: dict[str, float] = {}
    other_shortcut = 0
    for name, entry in raw.items():
        mean_ms = entry.get("mean") if isinstance(entry, dict) else None
        # comparing instead of converting, which fails for integers of hundreds of digits
        if mean_ms is None or not _is_number(mean_ms) or not 0 < mean_ms <= sys.float_info.max:
            raise LatencyTableError(f"{path}: {name!r}: expected a field 'mean' above 0 (ms), got {describe(entry)}")
        if not str(name).startswith("expanded_conv"):
            part = str(name).split("-", 1)[0]
            if part in rest:
                raise LatencyTableError(
                    f"{path}: several entries of kind {part!r}: stem and head cannot be told apart; keep one network's"
                )
            rest[part] = float(mean_ms)
            continue
        try:
            parsed = _parse_yaml_block(str(name))
        except LatencyTableError as error:
            raise LatencyTableError(f"{path}: {error}") from None
        if parsed is None:
            other_shortcut += 1
            continue
        key, width = parsed
        blocks.setdefault(key, {})[width] = float(mean_ms)
    try:
        curves = {key: _curve_from_entries(entries) for key, entries in blocks.items()}
    except LatencyTableError as error:
        raise LatencyTableError(f"{path}: {error}") from None
    header = {"source": "OFA/ProxylessNAS YAML", "source_file": path.name, "dropped_other_shortcut": other_shortcut}
    return _table(path, sum(rest.values()), curves, header)


def _corrected_base_ms(table: LatencyTable) -> float:
    """What stands for the base where a format has no correction: all of it that belongs to no block."""
    base_ms = float(table.total_ms(table.base_ms))
    if base_ms < 0:
        raise LatencyTableError(
            f"this format has no correction: with the table's, {table.correction[0]:g} ms + {table.correction[1]:g} x "
            f"sum, its base of {table.base_ms:g} ms would become {base_ms:g} ms, which no table may hold; keep the JSON"
        )
    return base_ms


def _parse_yaml_block(name: str) -> tuple[OpKey, int] | None:
    """Key and width of a block; None where its identity shortcut is not the one its stride and channels imply."""
    match = _YAML_BLOCK.fullmatch(name)
    if match is None:
        raise LatencyTableError(f"{name!r}: not a block name of OFA or ProxylessNAS")
    if match["res"] != match["res2"]:
        raise LatencyTableError(f"{name!r}: only square feature maps are supported")
    in_channels, expand = int(match["cin"]), int(match["expand"])
    is_ofa = match["hs"] is not None
    has_residual = match["stride"] == "1" and match["cin"] == match["cout"]
    if has_residual != (match["skip"] == "1"):
        return None
    width = expand if is_ofa else expand * in_channels
    act = "relu6" if not is_ofa else "hard_swish" if match["hs"] == "1" else "relu"
    se_channels = _multiple_of_8(width / 4) if match["se"] == "1" else 0
    key = OpKey(int(match["res"]), in_channels, int(match["cout"]), int(match["kernel"]), int(match["stride"]),
                se_channels, act)  # fmt: skip
    return key, width


def _multiple_of_8(value: float) -> int:
    """MobileNet's rule: nearest multiple of 8, at least 8, never more than 10 % below."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _curve_from_entries(entries: dict[Any, Any]) -> Curve:
    """A curve without noise figures from {width: ms}, in any order."""
    for width, ms in entries.items():
        if not isinstance(width, int) or isinstance(width, bool):
            raise LatencyTableError(f"expected integer widths, got {width!r}")
        if not _is_number(ms):
            raise LatencyTableError(f"expected a number of ms at width {width}, got a {type(ms).__name__}")
    widths = sorted(entries)
    try:
        return Curve(np.array(widths, dtype=np.int64), np.array([entries[width] for width in widths], dtype=np.float64))
    except OverflowError:
        raise LatencyTableError("expected widths and latencies that fit 64 bits") from None


def _parse(kind: type, row: dict[str, Any], name: str, default: Any = None) -> Any:
    text = row.get(name)
    if default is not None and text in (None, ""):
        return default
    try:
        if text is None or "_" in text:  # Python's own way to write numbers
            raise ValueError
        return kind(text)
    except ValueError:
        what = "an integer" if kind is int else "a number"
        raise LatencyTableError(f"{name}: expected {what}, got {text!r}") from None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise LatencyTableError(f"{path}: cannot be read ({error.strerror})") from None


def _table(path: Path, base_ms: Any, curves: dict[OpKey, Curve], header: dict[str, Any]) -> LatencyTable:
    try:
        return LatencyTable(base_ms, curves, header)
    except LatencyTableError as error:
        raise LatencyTableError(f"{path}: {error}") from None
