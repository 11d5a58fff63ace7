"""What a table's header says of the device and its settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from latency_tables import synthetic_table
from tfnas.latency import header
from tfnas.latency.compare import require_conditions
from tfnas.latency.engine import Conditions
from tfnas.latency.lut import LatencyTableError
from tfnas.space_io import load_space


def test_a_cpu_is_told_by_its_machine_id_and_else_by_its_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers have no machine id, and each another host name: a table built in one holds in the next."""

    def identity(machine_id: str | None, host: str, cores: int = 8) -> str:
        (tmp_path / "machine-id").unlink(missing_ok=True)
        if machine_id is not None:
            (tmp_path / "machine-id").write_text(machine_id)
        monkeypatch.setattr(header.platform, "node", lambda: host)
        monkeypatch.setattr(header.os, "cpu_count", lambda: cores)
        return header.device_uuid("cpu")

    monkeypatch.setattr(header, "MACHINE_ID", tmp_path / "machine-id")
    assert identity("abc\n", "a") == identity("abc\n", "b") != identity("def\n", "a")
    without = identity(None, "a")
    assert without == identity(None, "b") == identity("", "a") == identity("uninitialized\n", "a")
    assert without not in (identity("abc\n", "a"), identity(None, "a", cores=16))


@pytest.fixture
def tf32_settings() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("tf32_settings")
@pytest.mark.parametrize(
    ("precision", "convolutions", "said"),
    [
        ("high", True, "matmul, convolutions"),
        ("high", False, "matmul"),
        ("highest", True, "convolutions"),
        ("highest", False, "none"),
    ],
)
def test_tables_of_a_gpu_say_what_ran_in_tf32(precision: str, convolutions: bool, said: str) -> None:
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = convolutions
    gpu = Conditions(device="cuda")
    assert header.tf32_use(gpu) == said
    for other in (Conditions(), replace(gpu, engine="onnxruntime"), replace(gpu, dtype="bfloat16")):
        assert header.tf32_use(other) is None


def test_tables_of_another_tf32_setting_are_refused_old_ones_are_not() -> None:
    table = replace(synthetic_table(load_space("small")), header={"batch": 1, "tf32": "convolutions"})
    require_conditions(table, {"tf32": "convolutions"})
    require_conditions(replace(table, header={"batch": 1}), {"tf32": "convolutions"})
    with pytest.raises(LatencyTableError, match="tf32 is 'convolutions', wanted 'none'"):
        require_conditions(table, {"tf32": "none"})
