"""No memory, no room on the disk, no permission to write: a message, the documented exit code, nothing lost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tfnas.checkpoint import LATEST, load_checkpoint, save_checkpoint
from tfnas.cli import main
from tfnas.cli.codes import BAD_INPUT, FAILED
from tfnas.files import write_bytes_atomically
from tfnas.run import MetricsFile, read_metrics
from tfnas.shortage import is_disk_full, is_out_of_memory

HUGE = 1 << 60


def _real_allocator() -> None:
    torch.empty(HUGE, dtype=torch.uint8)


def _real_python() -> None:
    bytearray(HUGE)


@pytest.mark.parametrize("allocate", [_real_allocator, _real_python])
def test_real_allocators_are_recognised(allocate: object) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        allocate()  # type: ignore[operator]
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (torch.OutOfMemoryError(""), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_what_counts_as_a_full_disk(number: int) -> None:
    assert is_disk_full(OSError(number, os.strerror(number)))
    assert not is_disk_full(OSError(errno.EACCES, "no"))


def test_any_command_out_of_memory_exits_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tfnas.cli.info.software_versions", _real_allocator)
    assert main(["info"]) == FAILED
    err = capsys.readouterr().err
    assert err.startswith("tfnas info: error: not enough memory: ")
    assert str(HUGE) in err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB, where one may be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no small file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_files_that_were_there(small_disk: Path) -> None:
    save_checkpoint(small_disk, {"w": torch.arange(10)})
    write_bytes_atomically(small_disk / "table", b"good")
    with pytest.raises(OSError) as raised:
        save_checkpoint(small_disk, {"w": torch.zeros(1_000_000)})
    assert is_disk_full(raised.value)
    with pytest.raises(OSError) as raised:
        write_bytes_atomically(small_disk / "table", bytes(1_000_000))
    assert is_disk_full(raised.value)
    assert torch.equal(load_checkpoint(small_disk)[0]["w"], torch.arange(10))
    assert (small_disk / "table").read_bytes() == b"good"
    assert sorted(path.name for path in small_disk.iterdir()) == [LATEST, "table"]


def test_metrics_on_a_full_disk(small_disk: Path) -> None:
    """The error comes at the line that does not fit, not again at the end; the lines before it can be read."""
    metrics = MetricsFile(small_disk / "metrics.jsonl")
    metrics.append({"kind": "step"})
    with pytest.raises(OSError) as raised:
        metrics.append({"text": "x" * 1_000_000})
    assert is_disk_full(raised.value)
    metrics.close()
    assert read_metrics(small_disk / "metrics.jsonl") == [{"kind": "step"}]


@pytest.mark.parametrize("arguments", [["info"], ["--help"], ["--version"], ["lut"]])
def test_standard_output_that_is_full_exits_1_without_a_traceback(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "tfnas", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == FAILED
    name = " ".join(["tfnas", *(word for word in arguments if not word.startswith("-"))])
    assert done.stderr.splitlines()[-1] == f"{name}: error: [Errno 28] No space left on device"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["nothing"], ["scale", "tf-nas-a", "nothing", "30"]])
def test_a_full_standard_error_changes_no_exit_code(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "tfnas", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, check=False)
    assert done.returncode == BAD_INPUT
