"""Latency tables on disk: round trips of every format, and files that must be refused with a reason."""

from __future__ import annotations

import copy
import json
import os
import pickle
import warnings
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latency_tables import published_table_path, synthetic_table
from tfnas.latency.lut import Curve, LatencyTable, LatencyTableError
from tfnas.latency.lut_import import export_csv, export_published_pickle
from tfnas.latency.lut_io import LatencyUnitWarning, load_table, save_table, table_to_dict
from tfnas.published import parse_published_key, published_key
from tfnas.space import OpKey
from tfnas.space_io import load_space

KEY = OpKey(28, 40, 40, 3, 1, 0, "swish")
NAME = "MBInvertedResBlock_28_40_0_40_k3_s1_swish"


def small_table() -> LatencyTable:
    curves = {
        KEY: Curve(np.array([8, 17, 32]), np.array([0.1, 0.3, 0.2]), np.array([0.01, 0.02, 0.0]), np.array([5, 9, 7])),
        OpKey(28, 40, 80, 5, 2, 40, "relu"): Curve(
            np.array([15, 16, 31, 32]), np.array([0.3, 0.1, 0.4, 0.2]), kind="sawtooth", period=16
        ),
    }
    header = {
        "device": "a CPU",
        "engine": "eager",
        "batch": 1,
        "threads": 1,
        "mode": "cold",
        "versions": {"torch": "2"},
    }
    return LatencyTable(1.25, curves, header, (0.1, 1.05))


def assert_same_tables(a: LatencyTable, b: LatencyTable, *, noise: bool = True) -> None:
    assert a.base_ms == b.base_ms
    assert list(a.curves) == list(b.curves)
    for key, curve in a.curves.items():
        other = b.curves[key]
        assert (curve.kind, curve.period) == (other.kind, other.period)
        np.testing.assert_array_equal(curve.widths, other.widths)
        np.testing.assert_array_equal(curve.latency_ms, other.latency_ms)
        if noise:
            np.testing.assert_array_equal(curve.rel_stdev, other.rel_stdev)
            np.testing.assert_array_equal(curve.samples, other.samples)


def test_json_round_trip_is_exact(tmp_path: Path) -> None:
    table = small_table()
    save_table(tmp_path / "t.json", table)
    again = load_table(tmp_path / "t.json")
    assert_same_tables(table, again)
    assert again.header == table.header
    assert again.correction == table.correction
    assert os.listdir(tmp_path) == ["t.json"]


def test_an_unwritable_table_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    save_table(path, small_table())
    before = path.read_bytes()
    table = small_table()
    with pytest.raises(ValueError):
        save_table(path, LatencyTable(1.0, table.curves, {"clock": float("nan")}))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["t.json"]


def test_csv_round_trip_is_exact_and_corrected(tmp_path: Path) -> None:
    table = small_table()
    plain = LatencyTable(table.base_ms, table.curves)
    export_csv(tmp_path / "t.csv", plain)
    assert_same_tables(plain, load_table(tmp_path / "t.csv"))
    export_csv(tmp_path / "t.csv", table)
    again = load_table(tmp_path / "t.csv")
    assert again.base_ms == pytest.approx(0.1 + 1.05 * 1.25)
    assert again.latency_ms(KEY, 17) == pytest.approx(1.05 * 0.3)


@pytest.mark.parametrize("export", [export_csv, export_published_pickle])
def test_a_format_without_a_correction_is_not_given_a_base_below_0(tmp_path: Path, export: Any) -> None:
    table = LatencyTable(1.25, small_table().curves, correction=(-2.0, 1.1))
    with pytest.raises(LatencyTableError, match=r"base of 1\.25 ms would become -0\.625 ms"):
        export(tmp_path / "t", table)
    assert not list(tmp_path.iterdir())


def test_pickle_round_trip_keeps_every_width_corrected(tmp_path: Path) -> None:
    table = small_table()
    export_published_pickle(tmp_path / "t.pkl", table)
    again = load_table(tmp_path / "t.pkl")
    for key, curve in table.curves.items():
        widths = np.arange(curve.widths[0], curve.widths[-1] + 1)
        np.testing.assert_allclose(again.latencies_ms(key, widths), 1.05 * curve.latencies_ms(widths), rtol=1e-15)
    assert again.base_ms == pytest.approx(table.total_ms(table.base_ms))


def test_pickle_is_recognised_without_its_suffix(tmp_path: Path) -> None:
    export_published_pickle(tmp_path / "table", small_table())
    assert set(load_table(tmp_path / "table").curves) == set(small_table().curves)


@pytest.mark.parametrize(("name", "dropped"), [("latency_gpu.pkl", 88), ("latency_cpu.pkl", 84)])
def test_published_table_covers_the_imagenet_space(name: str, dropped: int) -> None:
    table = load_table(published_table_path(name))
    assert len(table.curves) == 66
    assert sum(curve.widths.size for curve in table.curves.values()) == 36480 - dropped
    assert table.header["dropped_non_positive"] == dropped
    for space in ("imagenet", "imagenet-no-se"):
        table.require_space(load_space(space))
    with pytest.raises(LatencyTableError, match="no curve"):
        table.require_space(load_space("small"))


def test_published_names_map_both_ways() -> None:
    assert parse_published_key(NAME) == KEY
    for key in load_space("imagenet").keys:
        assert parse_published_key(published_key(key)) == key
    for name in ("", "base", NAME + "x", NAME.replace("28", "-28"), NAME.replace("_k3", "")):
        with pytest.raises(ValueError):
            parse_published_key(name)


class _Planted:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("place", ["top", "value", "key", "base"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_holding_code_is_refused_and_nothing_runs(tmp_path: Path, place: str, protocol: int) -> None:
    planted = _Planted(tmp_path / "ran")
    document: Any = {
        "top": planted,
        "value": {"base": 1.0, NAME: {8: planted}},
        "key": {"base": 1.0, NAME: {planted: 1.0}},
        "base": {"base": planted, NAME: {8: 1.0}},
    }[place]
    path = tmp_path / "t.pkl"
    path.write_bytes(pickle.dumps(document, protocol=protocol))
    with pytest.raises(LatencyTableError, match="refused"):
        load_table(path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "ran").exists()  # the plant works where the reader is not restricted


@pytest.mark.parametrize("name", ["builtins.eval", "os.system", "builtins.getattr", "collections.OrderedDict.fromkeys"])
def test_pickles_naming_other_callables_are_refused(tmp_path: Path, name: str) -> None:
    module, _, attribute = name.partition(".") if name.startswith("collections") else name.rpartition(".")
    stream = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, attribute))
    (tmp_path / "t.pkl").write_bytes(stream + b"\x93)R.")
    with pytest.raises(LatencyTableError, match="refused"):
        load_table(tmp_path / "t.pkl")


@pytest.mark.parametrize(
    ("document", "word"),
    [
        ([1, 2], "dict of curves"),
        ({NAME: {8: 1.0}}, "base"),
        ({"base": float("nan"), NAME: {8: 1.0}}, "base_ms"),
        ({"base": 1.0}, "none"),
        ({"base": 1.0, "Conv": {8: 1.0}}, "published latency key"),
        ({"base": 1.0, NAME: 3.0}, "dict of .width: ms. each, got a float"),
        ({"base": 1.0, NAME: {"8": 1.0}}, "integer widths"),
        ({"base": 1.0, NAME: {8: "1"}}, "number of ms at width 8, got a str"),
        ({"base": 1.0, NAME: {8: 10**400}}, "64 bits"),
        ({"base": 1.0, NAME: {10**30: 1.0}}, "64 bits"),
        ({"base": 10**400, NAME: {8: 1.0}}, "base_ms"),
        ({"base": 1.0, NAME: {8: True}}, "NEWTRUE"),
        ({"base": 1.0, NAME: {8: [1.0]}}, "got a list"),
        ({"base": 1.0, NAME: {8: float("nan"), 9: 1.0}}, "nan at width 8"),
        ({"base": 1.0, NAME: {8: 1e-6, 9: 2e-6}}, "seconds"),
    ],
)
def test_malformed_pickles(tmp_path: Path, document: object, word: str) -> None:
    (tmp_path / "t.pkl").write_bytes(pickle.dumps(document))
    with pytest.raises(LatencyTableError, match=word) as caught:
        load_table(tmp_path / "t.pkl")
    assert "t.pkl" in str(caught.value)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_pickles_of_every_protocol_are_read(tmp_path: Path, protocol: int, kind: type) -> None:
    document = kind({"base": 1.0, NAME: kind({8: 0.5, 9: 1, 300: 70000.0, 70000: 2**40})})
    (tmp_path / "t.pkl").write_bytes(pickle.dumps(document, protocol=protocol))
    table = load_table(tmp_path / "t.pkl")
    assert table.curves[KEY].widths.tolist() == [8, 9, 300, 70000]
    assert table.curves[KEY].latency_ms.tolist() == [0.5, 1.0, 70000.0, 2.0**40]


def nested_tuple_key() -> bytes:
    """A dict whose key is a tuple 200,000 deep: hashing it overflows the stack of an ordinary reader."""
    return b"\x80\x02})" + 200_000 * b"\x85" + b"K\x01s."


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80\x02}r\xff\xff\xff\x7f.", "memo number"),  # would ask for 32 GB
        (nested_tuple_key(), "tuple"),
        (b"\x80\x02}K\x01\x85K\x01s.", "tuple"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.", "damaged"),  # a bytearray of 1 TB
        (b"\x80\x02" + 100_000 * b"](" + b".", "MARK"),
        (b"\x80\x02}\x82\x01.", "EXT1"),
        (b"\x80\x02}U\x01aQ.", "BINPERSID"),
        (b"\x80\x02}}b.", "BUILD"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
        (b"(ios\nsystem\n.", "INST"),
    ],
)
def test_pickles_built_to_do_harm(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "t.pkl").write_bytes(data)
    with pytest.raises(LatencyTableError, match=words):
        load_table(tmp_path / "t.pkl")


@pytest.mark.parametrize("seed", range(2))
def test_damaged_bytes_never_escape(tmp_path: Path, seed: int) -> None:
    """Random damage to every format either still reads as a table or is refused; nothing else comes out."""
    rng = np.random.default_rng(seed)
    export_published_pickle(tmp_path / "t.pkl", small_table())
    export_csv(tmp_path / "t.csv", small_table())
    save_table(tmp_path / "t.json", small_table())
    (tmp_path / "t.yaml").write_text(PROXYLESS)
    for name in ("t.pkl", "t.csv", "t.json", "t.yaml"):
        original = (tmp_path / name).read_bytes()
        for _ in range(60):
            data = bytearray(original)
            for at in rng.integers(0, len(data), rng.integers(1, 4)):
                data[at] = rng.integers(256)
            (tmp_path / name).write_bytes(data)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with suppress(LatencyTableError):
                    assert load_table(tmp_path / name).curves, f"seed {seed}"


def test_non_positive_pickle_entries_are_dropped_and_counted(tmp_path: Path) -> None:
    document = OrderedDict(base=1.0)
    document[NAME] = OrderedDict([(3, 0.3), (1, -0.1), (2, 0.0)])  # type: ignore[assignment]
    (tmp_path / "t.pkl").write_bytes(pickle.dumps(document))
    table = load_table(tmp_path / "t.pkl")
    assert table.curves[KEY].widths.tolist() == [3]
    assert table.header["dropped_non_positive"] == 2


@pytest.mark.parametrize("name", ["t.json", "t.pkl", "t.csv"])
def test_files_truncated_anywhere_are_refused(tmp_path: Path, name: str) -> None:
    table = synthetic_table(load_space("small"))
    path = tmp_path / name
    {"t.json": save_table, "t.pkl": export_published_pickle, "t.csv": export_csv}[name](path, table)
    data = path.read_bytes()
    for share in (0.0, 0.01, 0.3, 0.7, 0.999):
        path.write_bytes(data[: int(share * len(data))])
        if name == "t.csv" and share > 0.1:
            # CSV has no end mark: what a cut leaves is either malformed or does not cover the space.
            with pytest.raises(LatencyTableError):
                load_table(path).require_space(load_space("small"))
        else:
            with pytest.raises(LatencyTableError, match=name):
                load_table(path)


def change(document: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    document = copy.deepcopy(document)
    *parents, last = path.split("/")
    at: Any = document
    for part in parents:
        at = at[int(part) if part.isdigit() else part]
    if value is KeyError:
        del at[last]
    else:
        at[int(last) if last.isdigit() else last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("schema_version", 2, "schema_version.*reads 1.*says 2"),
        ("schema_version", True, "schema_version"),
        ("schema_version", KeyError, "schema_version"),
        ("unit", "s", "unit: expected 'ms', got 's'"),
        ("unit", KeyError, "unit"),
        ("base_ms", -1, "base_ms"),
        ("base_ms", "2", "base_ms"),
        pytest.param("base_ms", 10**400, "base_ms: expected a finite number", id="base_ms-huge"),
        ("base_ms", KeyError, "base_ms"),
        ("curves", [], "curves"),
        ("curves", {}, "curves"),
        ("curves/0", 3, r"curves\[0\]"),
        ("curves/0/key/act", "tanh", r"curves\[0\].key.act.*relu"),
        ("curves/0/key/stride", 0, r"curves\[0\].key.stride"),
        ("curves/0/key/stride", KeyError, "stride"),
        ("curves/0/widths", [32, 17, 8], "32 is followed by 17"),
        ("curves/0/widths/1", 17.5, r"curves\[0\].widths\[1\].*integer"),
        ("curves/0/widths/1", 10**30, "64 bits"),
        ("curves/0/latency_ms/1", 0, "above 0"),
        ("curves/0/latency_ms/1", -0.5, "above 0"),
        ("curves/0/latency_ms/1", "0.5", r"latency_ms\[1\]"),
        ("curves/0/latency_ms/1", None, r"latency_ms\[1\]"),
        ("curves/0/latency_ms", [0.1], "expected 3 numbers"),
        ("curves/0/latency_s", [0.1], "latency_s: unknown key.*latency_ms"),
        ("curves/0/kind", "cubic", "linear, sawtooth, steps"),
        ("curves/1/key", None, "mapping"),
        ("header", [], "header"),
        ("header/batch", 0, "header.batch"),
        ("header/mode", "warm", "cold, hot, chain"),
        ("header/unit", "seconds", "milliseconds"),
        ("header/device_type", 3, "header.device_type"),
        ("header/reference_ms", 2.0, "header.reference_ms: expected a list of numbers above 0"),
        ("header/reference_ms", [2.0, 0], "header.reference_ms: expected a list of numbers above 0"),
        ("header/noise", "noisy", "header.noise: expected a mapping"),
        ("header/additivity", [1], "header.additivity: expected a mapping"),
        ("correction/slope", 0, "slope above 0"),
        ("correction/offset_ms", "0", "offset_ms"),
    ],
)
def test_json_faults_are_named(tmp_path: Path, path: str, value: object, words: str) -> None:
    file = tmp_path / "t.json"
    file.write_text(json.dumps(change(table_to_dict(small_table()), path, value)))
    with pytest.raises(LatencyTableError, match=words) as caught:
        load_table(file)
    assert str(file) in str(caught.value)


def test_nan_duplicates_and_other_files(tmp_path: Path) -> None:
    document = table_to_dict(small_table())
    file = tmp_path / "t.json"
    file.write_text(json.dumps(change(document, "curves/0/latency_ms/0", float("nan"))))
    with pytest.raises(LatencyTableError, match="NaN"):
        load_table(file)
    document["curves"].append(document["curves"][0])
    file.write_text(json.dumps(document))
    with pytest.raises(LatencyTableError, match="twice"):
        load_table(file)
    for data in (b"", b"\xff\xfe", b"[1]", b"null", b"PK\x03\x04"):
        file.write_bytes(data)
        with pytest.raises(LatencyTableError, match=r"t\.json"):
            load_table(file)
    with pytest.raises(LatencyTableError, match="no such file"):
        load_table(tmp_path / "absent.json")
    with pytest.raises(LatencyTableError, match="got a folder"):
        load_table(tmp_path)


def test_seconds_are_refused_or_warned_about(tmp_path: Path) -> None:
    document = table_to_dict(small_table())
    file = tmp_path / "t.json"
    for scale, outcome in ((1e-3, LatencyTableError), (1e-2, LatencyUnitWarning), (0.1, None)):
        for number, curve in enumerate(document["curves"]):
            scaled = [scale * ms for ms in table_to_dict(small_table())["curves"][number]["latency_ms"]]
            curve["latency_ms"] = scaled
        file.write_text(json.dumps(document))
        if outcome is LatencyTableError:
            with pytest.raises(LatencyTableError, match="seconds"):
                load_table(file)
        elif outcome is LatencyUnitWarning:
            with pytest.warns(LatencyUnitWarning, match="seconds"):
                load_table(file)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                load_table(file)


CSV_HEAD = "entry,resolution,in_channels,out_channels,kernel_size,stride,se_channels,act,width,latency_ms\n"
CSV_BASE = "base,,,,,,,,,1.5\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "missing columns"),
        (CSV_HEAD.replace("latency_ms", "latency_s"), "missing columns latency_ms.*seconds"),
        (CSV_HEAD, "no row 'base'"),
        (CSV_HEAD + "base,,,,,,,,,1.5\n", "none"),
        (CSV_HEAD + "base,,,,,,,,,1.5\nbase,,,,,,,,,1.5\n", "line 3.*second"),
        (CSV_HEAD + "base,,,,,,,,,nan\nblock,28,40,40,3,1,0,swish,8,0.5\n", "base_ms"),
        (CSV_HEAD + "base,,,,,,,,,1.5\nblock,28,40,40,3,1,0,swish,8,-0.5\n", "above 0"),
        (CSV_HEAD + "base,,,,,,,,,1.5\nblock,28,40,40,3,1,0,swish,8.5,0.5\n", "line 3.*width.*integer"),
        (CSV_HEAD + "base,,,,,,,,,1.5\nblock,28,40,40,3,1,0,tanh,8,0.5\n", "line 3.*act"),
        (CSV_HEAD + "base,,,,,,,,,1.5\nblock,28,40,40,3,1,0\n", "line 3"),
        (CSV_HEAD + "base,,,,,,,,,1.5\n" + 2 * "block,28,40,40,3,1,0,swish,8,0.5\n", "line 4.*twice"),
        (CSV_HEAD + "head,,,,,,,,,1.5\n", "base or block"),
        pytest.param(CSV_HEAD + CSV_BASE + 'block,"' + 140_000 * "x", "after line 2: not CSV", id="quote left open"),
        pytest.param('"' + 140_000 * "x", "not CSV", id="quote left open in the head"),
        (CSV_HEAD + CSV_BASE + "block,-28,40,40,3,1,0,swish,8,0.5\n", "resolution: expected an integer of at least 1"),
        (CSV_HEAD + CSV_BASE + "block,28,40,40,3,1,-4,swish,8,0.5\n", "se_channels: expected an integer of at least 0"),
        (CSV_HEAD + CSV_BASE + "block,28,40,40,3,1,0,swish,8,1_0\n", "line 3: latency_ms: expected a number"),
        (CSV_HEAD + CSV_BASE + "block,28,40,40,3,1,0,swish,8,0.5,0.5\n", "line 3: more fields than the 10 columns"),
        pytest.param(
            CSV_HEAD[:-1] + ",samples\n" + CSV_BASE + f"block,28,40,40,3,1,0,swish,8,0.5,{400 * '9'}\n",
            "samples: expected 1 numbers",
            id="samples-huge",
        ),
    ],
)
def test_csv_faults_are_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(LatencyTableError, match=words):
        load_table(tmp_path / "t.csv")


PROXYLESS = """
Conv-input:224x224x3-output:112x112x32: {count: 10, mean: 2.0, var: 0.1}
Conv_1-input:7x7x320-output:7x7x1280: {count: 10, mean: 1.0, var: 0.1}
expanded_conv-input:28x28x40-output:28x28x40-expand:3-kernel:3-stride:1-idskip:1: {count: 10, mean: 0.5, var: 0.1}
expanded_conv-input:28x28x40-output:28x28x40-expand:6-kernel:3-stride:1-idskip:1: {count: 10, mean: 0.8, var: 0.1}
expanded_conv-input:28x28x40-output:28x28x40-expand:6-kernel:3-stride:1-idskip:0: {count: 10, mean: 0.7, var: 0.1}
"""
OFA = """
expanded_conv-input:14x14x80-output:14x14x80-expand:240-kernel:5-stride:1-idskip:1-se:1-hs:1: {mean: 0.5}
expanded_conv-input:28x28x40-output:14x14x80-expand:160-kernel:7-stride:2-idskip:0-se:0-hs:0: {mean: 0.9}
"""


def test_proxylessnas_and_ofa_yaml(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(PROXYLESS)
    table = load_table(tmp_path / "p.yaml")
    key = OpKey(28, 40, 40, 3, 1, 0, "relu6")
    assert table.base_ms == 3.0
    assert table.latency_ms(key, 120) == 0.5
    assert table.latency_ms(key, 180) == pytest.approx(0.65)
    assert table.header["dropped_other_shortcut"] == 1
    with pytest.raises(LatencyTableError, match="119"):
        table.latency_ms(key, 119)
    with pytest.raises(LatencyTableError, match="66 of 66"):
        table.require_space(load_space("imagenet"))
    (tmp_path / "o.yml").write_text(OFA)
    table = load_table(tmp_path / "o.yml")
    assert table.latency_ms(OpKey(14, 80, 80, 5, 1, 64, "hard_swish"), 240) == 0.5
    assert table.latency_ms(OpKey(28, 40, 80, 7, 2, 0, "relu"), 160) == 0.9


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("!!python/object/apply:os.mkdir ['ran']", "not valid YAML"),
        ("a: [", "not valid YAML"),
        ("- 1", "mapping"),
        ("expanded_conv-input:28x28x40: {mean: 1.0}", "block name"),
        (PROXYLESS.replace("mean: 0.5", "mean: .nan"), "above 0"),
        (PROXYLESS.replace("mean: 0.5", "min: 0.5"), "mean"),
        (PROXYLESS + "Conv-input:192x192x3-output:96x96x32: {mean: 1.0}", "several entries"),
        (PROXYLESS.replace("28x28x40-output", "28x14x40-output"), "square"),
        ("Conv-input:224x224x3-output:112x112x32: {mean: 2.0}", "none"),
        (PROXYLESS.replace("mean: 0.5", "mean: !!timestamp x"), "not valid YAML"),  # PyYAML's AttributeError
        (PROXYLESS.replace("mean: 0.5", "mean: !!bool x"), "not valid YAML"),  # and its KeyError
        (PROXYLESS.replace("mean: 0.5", "mean: 2020-13-45"), "not valid YAML"),
        pytest.param(PROXYLESS.replace("mean: 0.5", "mean: " + 400 * "1"), "above 0", id="mean-huge"),
        (PROXYLESS.replace("mean: 0.5", "mean: 0.5, mean: 0.6"), "twice"),
        (PROXYLESS.replace("expand:3-kernel:3", "expand:3-kernel:0"), "kernel_size: expected an integer of at least 1"),
        (PROXYLESS.replace("expand:3-", "expand:" + 30 * "9" + "-"), "t.yaml: expected widths.*64 bits"),
    ],
)
def test_yaml_faults_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(LatencyTableError, match=words):
        load_table(tmp_path / "t.yaml")
    assert not (tmp_path / "ran").exists()
