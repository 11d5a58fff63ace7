"""Pictures: the suffix decides the format, a failed one leaves the old file."""

from __future__ import annotations

from pathlib import Path

import pytest
from tfnas.pictures import new_figure, save_figure

pytest.importorskip("matplotlib")


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("a.PDF", b"%PDF"), ("a.svg", b"<?xml"), ("a", b"\x89PNG")]
)
def test_the_suffix_decides(name: str, start: bytes, tmp_path: Path) -> None:
    save_figure(tmp_path / name, new_figure(2, 1))
    assert (tmp_path / name).read_bytes().startswith(start)


def test_a_failed_picture_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fails(*args: object) -> None:
        raise OSError(28, "disk full")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        save_figure(path, new_figure(2, 1))
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_an_unknown_format_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="xyz"):
        save_figure(tmp_path / "a.xyz", new_figure(2, 1))
    assert list(tmp_path.iterdir()) == []
