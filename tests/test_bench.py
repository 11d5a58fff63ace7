"""`tfnas bench`: competitors compute the same and a wrong one is caught, rows and pictures say what was measured."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tfnas.bench import measure
from tfnas.bench.cases import STANDARD, BlockCase, NetworkCase, space_cases
from tfnas.bench.measure import ResultsDifferError, Row, measure_cases
from tfnas.bench.show import rows_table, save_plot, summary
from tfnas.cli import main
from tfnas.space import OpKey
from tfnas.space_io import load_space
from torch import nn

from tfnas_ext._native import MODULE
from tfnas_ext.timing import ProcessTimer, StopRule

pytestmark = pytest.mark.skipif(MODULE is None, reason="the native module is not built")

TINY = BlockCase(OpKey(6, 8, 8, 3, 1, 4, "swish"), 16, 2)
QUICK: dict[str, Any] = {"timer": ProcessTimer(), "rule": StopRule(0.5, 2, 2, time_limit_s=0.01)}


def test_rows_of_a_block() -> None:
    rows = list(measure_cases([TINY, replace(TINY, key=replace(TINY.key, stride=2, se_channels=0))], **QUICK))
    assert [row.phase for row in rows] == ["inference", "step"] * 2
    for row in rows:
        assert list(row.times_ms) == ["ours", "eager_nchw", "eager_channels_last"]
        assert all(ms > 0 for ms in row.times_ms.values())
        assert row.ratio == pytest.approx(row.times_ms[row.best_other] / row.times_ms["ours"])


@pytest.mark.slow
def test_compiled_modules_compute_the_same() -> None:
    (row,) = measure_cases([TINY], phases=["inference"], compiled=True, **QUICK)
    assert "compiled" in row.times_ms


def test_a_network_has_all_its_blocks_fused() -> None:
    case = NetworkCase("tf-nas-a", 2)
    plain = case.plain()
    network = case.fused(plain)
    count = sum(type(module).__name__ == "MBInvRes" for module in plain.modules())
    assert sum(type(module).__module__ == "tfnas_ext.nn" for module in network.modules()) >= count
    assert not any(type(m).__name__ == "MBInvRes" and type(m).__module__ == "tfnas.network" for m in network.modules())
    assert list(network.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x), plain.eval()(x), rtol=1e-3, atol=1e-4)


@dataclass(frozen=True)
class WrongCase(BlockCase):
    def fused(self, plain: nn.Module) -> nn.Module:
        module = super().fused(plain)
        with torch.no_grad():
            module.conv_dw.weight[0] *= -1  # type: ignore[operator, union-attr]
        return module


def test_what_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure_interleaved", lambda *args, **options: pytest.fail("was timed"))
    with pytest.raises(ResultsDifferError, match=r"of 'ours' is off by .*: nothing was timed"):
        list(measure_cases([WrongCase(TINY.key, 16, 2)], **QUICK))


def test_blocks_of_a_space() -> None:
    space = load_space("small")
    cases = space_cases(space, 4)
    assert {case.key for case in cases} == set(space.keys)
    assert len({case.name for case in [*cases, *STANDARD]}) == len(cases) + len(STANDARD)


ROWS = [
    Row("a", "step", "float32", {"ours": 1.0, "eager_nchw": 3.0, "eager_channels_last": 2.0}, 0.01, 5.0),
    Row("b", "step", "float32", {"ours": 4.0, "eager_nchw": 3.0, "eager_channels_last": 8.0}, 0.01, 5.0),
]


def test_lost_rows_are_shown(tmp_path: Path) -> None:
    assert [(row.best_other, row.ratio) for row in ROWS] == [("eager_channels_last", 2.0), ("eager_nchw", 0.75)]
    assert summary(ROWS).startswith("faster than the best of the others in 1 of 2 rows; ratio 0.75 to 2.00")
    assert rows_table(ROWS).row_count == 2
    pytest.importorskip("matplotlib")
    save_plot(tmp_path / "rows.svg", ROWS, "title")
    assert b"<svg" in (tmp_path / "rows.svg").read_bytes()


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    options = ["bench", "--space", "small", "--batch", "2", "--only", "r4_i96_o160_k3_s1_se0", "--seconds", "0.01"]
    assert main([*options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {row["phase"] for row in result["rows"]} == {"inference", "step"}
    assert result["threads"] == threads
    assert result["matmul_gflops"] > 0
    assert main([*options, "--phase", "inference"]) == 0
    assert "faster than the best of the others" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "nothing"], "--only: no case's name contains 'nothing'"),
        (["--batch", "1"], "--batch must be at least 2, not 1"),
        (["--threads", "0"], "threads: expected 1 to 4096, got 0"),
        (["--seconds", "0"], "time_limit_s must be positive"),
        (["--space", "none-such"], "none-such"),
        (["--what", "network", "--architecture", "none-such"], "none-such"),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err
