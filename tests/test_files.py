"""Files are whole or untouched; links, devices and pipes stay what they are; errors name the file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from tfnas.files import read_json, write_bytes_atomically, write_text_atomically


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("old")
    for name in ("folder/file", "folder/new"):
        link = tmp_path / f"link-{Path(name).name}"
        link.symlink_to(tmp_path / name)
        write_text_atomically(link, "new")
        assert link.is_symlink()
        assert (tmp_path / name).read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "link-file", "link-new", "new"]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text_atomically(pipe, "some text")
        assert os.read(reader, 100) == b"some text"
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_standard_output_by_its_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.write(1, b"before, ")
    write_text_atomically("/dev/stdout", "some text")
    os.write(1, b", after")
    assert capfd.readouterr().out == "before, some text, after"


def test_a_device_is_written_to(tmp_path: Path) -> None:
    link = tmp_path / "device"  # a link, so that a mistake replaces nothing but it
    link.symlink_to("/dev/full")
    with pytest.raises(OSError, match="device") as caught:
        write_bytes_atomically(link, b"data")
    assert caught.value.errno == errno.ENOSPC
    assert link.is_symlink()
    assert Path("/dev/full").is_char_device()


@pytest.mark.parametrize(
    ("name", "number"), [("no/file", errno.ENOENT), (".", errno.EISDIR), ("file/x", errno.ENOTDIR)]
)
def test_errors_name_the_file_asked_for(tmp_path: Path, name: str, number: int) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match=str(tmp_path)) as caught:
        write_text_atomically(tmp_path / name, "text")
    assert caught.value.errno == number
    assert caught.value.filename == str(tmp_path / name)
    assert str(caught.value).endswith(f": '{tmp_path / name}'")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_half_a_character_in_json_is_refused(tmp_path: Path) -> None:
    """Python would keep it, and fail where it is written down next."""
    path = tmp_path / "x.json"
    path.write_text('{"name": "\\ud83d\\ude00 \\\\ud800"}')
    assert read_json(path) == {"name": "\U0001f600 \\ud800"}
    for text in ('{"name": "\\ud800"}', '{"\\uDC00": 1}', '[["x\\udFFF"]]'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x\.json: not valid JSON.*half a character"):
            read_json(path)
