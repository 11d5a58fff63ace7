"""The functions behind `tfnas lut show|compare|import|export` and `tfnas scale`."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import sys
from pathlib import Path

import pytest
from latency_tables import published_table_path, synthetic_table
from tfnas.architecture import load_architecture
from tfnas.cli import main
from tfnas.cli.lut_tables import compare, export_table, import_table, show
from tfnas.cli.scale import scale
from tfnas.latency.lut import LatencyTableError
from tfnas.latency.lut_io import load_table, save_table
from tfnas.space_io import load_space


@pytest.fixture
def table_file(tmp_path: Path) -> Path:
    table = synthetic_table(load_space("small"))
    save_table(tmp_path / "small.json", dataclasses.replace(table, header={"device": "synthetic", "batch": 1}))
    return tmp_path / "small.json"


def test_show_as_text_and_json(table_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = load_table(table_file)
    assert show(table_file, space="small") == 0
    text = capsys.readouterr().out
    assert "device: synthetic" in text
    assert "reach" in text
    for key in table.curves:
        assert str(key).removeprefix("mbinvres_") in text
    assert show(table_file, curve="_k5_", json=True) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["base_ms"] == table.base_ms
    names = [entry["name"] for entry in facts["curves"]]
    assert names == [str(key) for key in table.curves if key.kernel_size == 5]
    with pytest.raises(ValueError, match="--curve"):
        show(table_file, curve="nothing")


def test_show_draws_a_picture(table_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    assert show(table_file, curve="_k3_", png=tmp_path / "curves.png") == 0
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"--png.*plots"):
        show(table_file, png=tmp_path / "other.png")


def test_compare_as_text_and_json(table_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = load_table(table_file)
    slower = {k: dataclasses.replace(c, latency_ms=1.5 * c.latency_ms) for k, c in table.curves.items()}
    header = {"device": "another", "batch": 1}
    save_table(tmp_path / "slower.json", dataclasses.replace(table, curves=slower, header=header))
    assert compare(table_file, tmp_path / "slower.json") == 0
    text = capsys.readouterr().out
    assert "1.5000" in text
    assert "synthetic against another" in text
    assert compare(table_file, tmp_path / "slower.json", json=True) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["scale"] == pytest.approx(1.5)
    assert facts["deviation_median"] < 1e-12
    assert facts["header"] == {"device": ["synthetic", "another"]}


def test_a_terminal_of_ascii_gets_ascii(table_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, row in (("ascii", "_.-:=+*#"), ("utf-8", "▁▂▃▄▅▆▇█")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
        monkeypatch.setattr(sys, "stdout", stream)
        assert show(table_file) == 0
        stream.seek(0)
        assert set(row) <= set(stream.read())


@pytest.mark.parametrize("command", [("show",), ("show", "--json"), ("compare",)])
def test_a_reader_that_leaves_is_no_failure(
    table_file: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tfnas lut show table.json | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    stdout = os.dup(1)
    try:
        with os.fdopen(writer, "w") as pipe:
            os.dup2(pipe.fileno(), 1)
            monkeypatch.setattr(sys, "stdout", os.fdopen(os.dup(1), "w"))
            name, *flags = command
            assert main(["lut", name, str(table_file), *[str(table_file)] * (name == "compare"), *flags]) == 0
            monkeypatch.undo()
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def test_names_are_no_markup(table_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets in names of files and devices are rich's markup, dollar signs are matplotlib's formulas."""
    odd = tmp_path / "[bold] [_b] $x^$ [/i].json".replace("/", "")
    table = dataclasses.replace(load_table(table_file), header={"device": "[/red] $_$", "engine": "[bold]"})
    save_table(odd, table)
    assert show(odd) == 0
    shown = capsys.readouterr().out
    assert f"{odd.name}, [/red] $_$, [bold]" in shown
    assert compare(table_file, odd) == 0
    assert f"{odd} takes 1.0000 of the time" in capsys.readouterr().out.replace("\n", "")
    if importlib.util.find_spec("matplotlib"):
        assert show(odd, curve="_k3_", png=tmp_path / "curves.png") == 0


def test_import_and_export(table_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix in (".csv", ".pkl"):
        assert export_table(table_file, tmp_path / f"t{suffix}") == 0
        assert import_table(tmp_path / f"t{suffix}", tmp_path / "again.json", device="a CPU", batch=4) == 0
        again = load_table(tmp_path / "again.json")
        assert again.header["device"] == "a CPU"
        assert again.header["batch"] == 4
        assert compare(table_file, tmp_path / "again.json", json=True) == 0
    with pytest.raises(ValueError, match="--output"):
        export_table(table_file, tmp_path / "t.yaml")
    with pytest.raises(LatencyTableError, match=r"header\.batch"):
        import_table(tmp_path / "t.csv", tmp_path / "bad.json", batch=0)
    assert not (tmp_path / "bad.json").exists()


def test_import_of_the_published_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert import_table(published_table_path(), tmp_path / "gpu.json", device="Titan RTX", batch=32) == 0
    assert "88 entries" in capsys.readouterr().out
    arch, _ = load_architecture("tf-nas-a")
    assert load_table(tmp_path / "gpu.json").architecture_ms(arch) == pytest.approx(17.9995, abs=5e-5)


def test_scale_tf_nas_a(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lut = published_table_path()
    assert scale("tf-nas-a", lut, 15.0, output=tmp_path / "a.json", json=True) == 0
    facts = json.loads(capsys.readouterr().out)
    assert 14.998 <= facts["lut_latency_ms"] <= 15.0
    assert facts["target_latency_ms"] == 15.0
    arch, saved = load_architecture(tmp_path / "a.json")
    assert load_table(lut).architecture_ms(arch) == facts["lut_latency_ms"] == saved["lut_latency_ms"]
    assert facts["widths"] == [[op.width for op in ops] for ops in arch.stages]
    assert scale("tf-nas-a", lut, 30.0) == 0
    assert "maximum" in capsys.readouterr().out


def test_scale_out_of_reach_names_the_range_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"target_latency_ms 5 is out of reach.*13\.1593 to 23\.4856 ms"):
        scale("tf-nas-a", published_table_path(), 5.0, output=tmp_path / "a.json")
    assert not (tmp_path / "a.json").exists()
