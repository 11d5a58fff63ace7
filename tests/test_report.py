"""The report: complete, self-contained, well-formed, and its figures are the run's."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from damaged import damage
from latency_tables import synthetic_table
from search_cases import tiny_config, tiny_space
from tfnas import search
from tfnas.architecture import load_architecture
from tfnas.cli import run_command
from tfnas.latency.lut_io import load_table, save_table
from tfnas.report import write_report
from tfnas.report.run_data import read_run
from tfnas.report.svg import Series, line_chart, ticks
from tfnas.run import read_metrics
from tfnas.space_io import load_space

_VOID = {"meta", "link", "br", "hr", "img"}


class Balanced(HTMLParser):
    """Fails where tags do not nest; keeps tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag


@pytest.fixture(scope="module", params=["sink", "skip-in", "skip-out"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny search of each depth space."""
    folder = tmp_path_factory.mktemp("search")
    config = tiny_config(folder, architecture__lr=0.5)
    config.space = str(tiny_space(folder, depth_space=request.param))
    save_table(folder / "table.json", synthetic_table(load_space(config.space)))
    search(config, [])
    return folder / "run"


def test_page_is_self_contained_and_well_formed(run: Path) -> None:
    text = write_report(run).read_text()
    page = Balanced()
    page.feed(text)
    page.close()
    assert page.open == []
    assert "script" not in page.tags
    links = [value for name, value in page.attributes if name in ("src", "href")]
    assert links == ["data:,"]
    assert not re.search(r"https?://|url\(|@import", text)
    assert "nan" not in re.sub(r"<pre>.*?</pre>", "", text).lower()
    pictures = re.findall(r"<svg.*?</svg>", text)
    assert len(pictures) > 10
    for picture in pictures:
        ElementTree.fromstring(picture)


def test_figures_are_the_runs(run: Path) -> None:
    text = write_report(run).read_text()
    arch, facts = load_architecture(run / "architecture.json")
    table = load_table(run / "lut.json")
    assert f"{facts['target_latency_ms']:.4f} ms" in text
    assert f"{table.architecture_ms(arch):.4f} ms" in text
    rows = re.findall(
        r"<tr><td>(\d+)\.(\d+)</td><td>(\w+)</td>.*?<td>(\d+) of \d+</td>.*?<td>([\d.]+)</td><td><span", text
    )
    assert [(name, int(width)) for _, _, name, width, _ in rows] == [(o.candidate, o.width) for _, o in arch.layers()]
    base = float(re.findall(r"stem, head.*?<td>([\d.]+)</td><td><span", text)[0])
    assert base + sum(float(ms) for *_, ms in rows) == pytest.approx(table.architecture_ms(arch), abs=1e-3)
    assert "synthetic" in text


def test_operations_are_counted_past_warmup(run: Path) -> None:
    data = read_run(run)
    records = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "epoch"]
    for choice, record in zip(data.strongest(), records, strict=True):
        for row, c in zip(record["log_alpha"], choice, strict=True):
            assert row[c] == max(x for x in row if x is not None)
    for alpha in data.probabilities("log_alpha"):
        assert alpha.sum(1) == pytest.approx(1.0, abs=1e-5)


def test_pictures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert run_command("report", [str(run), "--pictures"]) == 0
    assert "report.html" in capsys.readouterr().out
    for name in ("latency", "accuracy", "operations"):
        assert (run / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_names_are_escaped_and_gaps_allowed(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a<b>&c"
    shutil.copytree(run, copy)
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["kind"] != "end"]
    for line in kept:
        if line["kind"] == "epoch":
            line["held_out_accuracy"] = None
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    text = write_report(copy).read_text()
    assert "a&lt;b&gt;&amp;c" in text
    assert "a<b>" not in text


@pytest.mark.parametrize("missing", ["architecture.json", "lut.json", "metrics.jsonl", "config.yaml"])
def test_unfinished_runs_exit_2(run: Path, tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("report.html"))
    (copy / missing).unlink()
    assert run_command("report", [str(copy)]) == 2
    assert missing in capsys.readouterr().err
    (copy / missing).write_text("{")
    if missing != "config.yaml":
        assert run_command("report", [str(copy)]) == 2
        assert missing in capsys.readouterr().err
    assert not (copy / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("config.yaml", b"\xff\xfe", "config.yaml: expected UTF-8 text"),
        ("training/metrics.jsonl", b'{"kind": "end"}\n', "metrics.jsonl or training/metrics.jsonl: a record lacks"),
    ],
)
def test_other_damaged_files_are_named(run: Path, tmp_path: Path, name: str, content: bytes, part: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(ValueError, match=part):
        write_report(tmp_path / "run")


@pytest.mark.parametrize("line", ["1", "null", '"x"', "[]", "{}", '{"kind": 3}', "{", "\\xff", "[" * 100_000])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "start"}\n' + line.encode() + b'\n{"kind": "end"')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: "):
        read_metrics(path)


def test_damaged_records_are_shown_or_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    good = read_metrics(run / "metrics.jsonl")
    refused = 0
    for seed in range(60):
        bad = damage(random.Random(seed), good)
        (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in bad))
        try:
            write_report(tmp_path / "run")
        except ValueError as error:
            refused += "metrics.jsonl" in str(error)
        except Exception as error:  # what must not happen, reported with the seed that makes it
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    assert refused > 10


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.2, 3.21), (-5, 1e6), (2, 2), (0, 0), (1e-9, 2e-9)])
def test_ticks_enclose_the_range(low: float, high: float) -> None:
    values = ticks(low, high, 5)
    assert values[0] <= low + 1e-12
    assert values[-1] >= high - 1e-12
    assert 2 <= len(values) <= 8
    steps = [b - a for a, b in itertools.pairwise(values)]
    assert all(math.isclose(step, steps[0], rel_tol=1e-6) for step in steps)


def test_chart_points_lie_where_they_should() -> None:
    chart = line_chart([Series("s", [0, 5, 10], [0, None, 100])], "x", "y")
    ((x0, y0), (x1, y1)) = [tuple(map(float, p.split(","))) for p in re.findall(r'points="(.*?)"', chart)[0].split()]
    assert (x0, x1) == (52, 428)
    assert (y0, y1) == (192, 10)
    assert "nothing was measured" in line_chart([Series("s", [0], [None])], "x", "y")
