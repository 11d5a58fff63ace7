"""Latency tables on disk: the package's JSON format, and `load_table`, which reads any format it knows.

The JSON file names the unit in its fields (`base_ms`, `latency_ms`) and is checked entry by entry when read: a table
that is truncated, of another schema version, in another unit or holding impossible values is refused with the reason.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfnas.fields import Fields
from tfnas.files import read_json, write_text_atomically
from tfnas.latency.lut import Curve, LatencyTable, LatencyTableError
from tfnas.latency.lut_import import import_csv, import_ofa_yaml, import_published_pickle
from tfnas.space import ACTIVATIONS, OpKey

SCHEMA_VERSION = 1
MODES = ("cold", "hot", "chain", "slope")

# A block has three convolutions, and launching one kernel takes about 0.002 ms on any device.
_IMPOSSIBLE_BLOCK_MS = 0.0005
_SUSPICIOUS_BLOCK_MS = 0.005

_KEY_FIELDS = ("resolution", "in_channels", "out_channels", "kernel_size", "stride", "se_channels", "act")
_CURVE_FIELDS = ("key", "kind", "period", "widths", "latency_ms", "rel_stdev", "samples")
_TABLE_FIELDS = ("schema_version", "unit", "header", "base_ms", "correction", "curves")
_HEADER_COUNTS = ("batch", "resolution", "threads")
_HEADER_TEXTS = ("device", "device_type", "device_uuid", "engine", "dtype", "tf32", "layout", "date")
_HEADER_GROUPS = ("additivity", "noise")


class LatencyUnitWarning(UserWarning):
    """A table's values are so small that they may be seconds written as milliseconds."""


def load_table(path: str | Path) -> LatencyTable:
    """Read a latency table: JSON (`.json`), published pickle (`.pkl`), CSV (`.csv`), OFA/ProxylessNAS YAML (`.yaml`).

    An unknown suffix is decided by the file's first bytes. Pickles are read by a restricted reader: nothing in the
    file is ever run. Raises `LatencyTableError` with the file's name and what is wrong with it, and warns
    (`LatencyUnitWarning`) where the values look like seconds.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise LatencyTableError(f"{path}: expected the file of a latency table, got a folder or device")
    if not path.is_file():
        raise LatencyTableError(f"{path}: no such file; build a latency table with `tfnas lut build --output {path}`")
    suffix = path.suffix.lower()
    if suffix in (".pkl", ".pickle") or (suffix != ".json" and path.open("rb").read(1) == b"\x80"):
        table = import_published_pickle(path)
    elif suffix == ".csv":
        table = import_csv(path)
    elif suffix in (".yaml", ".yml"):
        table = import_ofa_yaml(path)
    else:
        try:
            table = table_from_dict(read_json(path))
        except LatencyTableError as error:
            raise LatencyTableError(f"{path}: {error}") from None
        except ValueError as error:
            raise LatencyTableError(str(error)) from None
    try:
        check_magnitudes(table)
    except LatencyTableError as error:
        raise LatencyTableError(f"{path}: {error}") from None
    return table


def save_table(path: str | Path, table: LatencyTable) -> None:
    """Write a table as JSON (schema version 1), atomically: the file is complete or untouched."""
    write_text_atomically(path, json.dumps(table_to_dict(table), allow_nan=False, separators=(",", ":")) + "\n")


def table_to_dict(table: LatencyTable) -> dict[str, Any]:
    """The JSON document of a table: plain dicts, lists, numbers and strings."""
    check_header(table.header)
    return {
        "schema_version": SCHEMA_VERSION,
        "unit": "ms",
        "header": dict(table.header),
        "base_ms": float(table.base_ms),
        "correction": {"offset_ms": float(table.correction[0]), "slope": float(table.correction[1])},
        "curves": [
            {
                "key": {name: getattr(key, name) for name in _KEY_FIELDS},
                "kind": curve.kind,
                "period": curve.period,
                "widths": curve.widths.tolist(),
                "latency_ms": curve.latency_ms.tolist(),
                "rel_stdev": curve.rel_stdev.tolist(),
                "samples": curve.samples.tolist(),
            }
            for key, curve in table.curves.items()
        ],
    }


def table_from_dict(document: object) -> LatencyTable:
    """Build a table from its JSON document; raises `LatencyTableError` naming the field that is wrong."""
    if not isinstance(document, Mapping):
        raise LatencyTableError(f"expected a JSON object holding a latency table, got {type(document).__name__}")
    version = document.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise LatencyTableError(
            f"schema_version: this version of the package reads {SCHEMA_VERSION}, the file says {version!r}; "
            "build the table again, or read it with the version that wrote it"
        )
    if document.get("unit") != "ms":
        raise LatencyTableError(f"unit: expected 'ms', got {document.get('unit')!r}; convert the table to milliseconds")
    try:
        fields = Fields(document, "", required=_TABLE_FIELDS)
        header = fields.values["header"]
        if not isinstance(header, Mapping):
            raise fields.fail("header", "a mapping")
        check_header(header)
        correction = Fields(fields.values["correction"], "correction", required=("offset_ms", "slope"))
        curves: dict[OpKey, Curve] = {}
        for where, entry in fields.items("curves"):
            key, curve = _curve_from_dict(Fields(entry, where, required=_CURVE_FIELDS))
            if key in curves:
                raise LatencyTableError(f"{where}: {key} appears twice")
            curves[key] = curve
        affine = (correction.number("offset_ms", minimum=-float("inf")), correction.number("slope"))
        return LatencyTable(fields.number("base_ms"), curves, dict(header), affine)
    except LatencyTableError:
        raise
    except (ValueError, OverflowError) as error:
        raise LatencyTableError(str(error)) from None


def _curve_from_dict(fields: Fields) -> tuple[OpKey, Curve]:
    shape = Fields(fields.values["key"], fields.at("key"), required=_KEY_FIELDS)
    counts = {name: shape.integer(name, minimum=0 if name == "se_channels" else 1) for name in _KEY_FIELDS[:-1]}
    key = OpKey(**counts, act=shape.choice("act", ACTIVATIONS))
    knots = {
        name: _numbers(fields, name, integers=name in ("widths", "samples"))
        for name in ("widths", "latency_ms", "rel_stdev", "samples")
    }
    try:
        return key, Curve(**knots, kind=fields.text("kind"), period=fields.integer("period"))
    except LatencyTableError as error:
        raise LatencyTableError(f"{fields.path} ({key}): {error}") from None


def _numbers(fields: Fields, name: str, *, integers: bool) -> Any:
    values = fields.values[name]
    if not isinstance(values, list):
        raise fields.fail(name, "a list of numbers")
    wanted: tuple[type, ...] = (int,) if integers else (int, float)
    for at, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, wanted):
            what = "an integer" if integers else "a number"
            raise LatencyTableError(f"{fields.at(name)}[{at}]: expected {what}, got {value!r}")
    try:
        return np.asarray(values, dtype=np.int64 if integers else np.float64)
    except OverflowError:
        raise fields.fail(name, "numbers that fit 64 bits") from None


def check_header(header: Mapping[str, Any]) -> None:
    """Check the fields of a header that have a meaning; others are free. Raises `LatencyTableError`.

    Counts (batch, resolution, threads) are integers >= 1, texts (device, engine, dtype...) non-empty strings,
    `reference_ms` (one for each reference network) a list of numbers above 0, `additivity` and `noise` mappings, `mode`
    one of `MODES`. A field that is absent or None is not known, which is allowed.
    """
    known = Fields(
        {name: value for name, value in header.items() if value is not None}, "header", optional=list(header)
    )
    try:
        for name in _HEADER_COUNTS:
            if name in known:
                known.integer(name)
        for name in _HEADER_TEXTS:
            if name in known:
                known.text(name)
        if "reference_ms" in known and not _are_times(header["reference_ms"]):
            raise known.fail("reference_ms", "a list of numbers above 0")
        for name in _HEADER_GROUPS:
            if name in known and not isinstance(header[name], Mapping):
                raise known.fail(name, "a mapping")
        if "mode" in known:
            known.choice("mode", MODES)
    except ValueError as error:
        raise LatencyTableError(str(error)) from None
    if header.get("unit", "ms") != "ms":
        raise LatencyTableError(
            f"header.unit: expected 'ms', got {header['unit']!r}; convert the table to milliseconds"
        )


def check_magnitudes(table: LatencyTable) -> None:
    """Refuse (`LatencyTableError`), or warn about (`LatencyUnitWarning`), values that are likely seconds, not ms."""
    median_ms = float(np.median(np.concatenate([curve.latency_ms for curve in table.curves.values()])))
    remedy = "are these seconds? multiply every entry by 1000 if so"
    if median_ms < _IMPOSSIBLE_BLOCK_MS:
        raise LatencyTableError(
            f"latency_ms: half of the blocks take less than {median_ms:.3g} ms, shorter than a kernel launch; {remedy}"
        )
    if median_ms < _SUSPICIOUS_BLOCK_MS:
        message = f"latency_ms: half of the blocks take less than {median_ms:.3g} ms; {remedy}"
        warnings.warn(message, LatencyUnitWarning, stacklevel=3)


def _are_times(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(type(v) in (int, float) and 0 < v < 1e300 for v in values)
