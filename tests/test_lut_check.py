"""Checking a table against networks measured later: at equal speed, slowed down, and where it has gone stale."""

from __future__ import annotations

import errno
import json
import re
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from profile_fakes import FakeEngine, Machine, smooth_ms
from scripted_device import DeviceEngine, StrictDevice
from tfnas.cli import lut_build, main
from tfnas.cli.codes import FAILED, NOISY, OK
from tfnas.config_io import load_config
from tfnas.interrupt import StopRequest
from tfnas.latency.additivity import CHECKING, FITTING, random_architectures
from tfnas.latency.chain_cuda import CudaChainTimer
from tfnas.latency.check import CheckResult, check_table
from tfnas.latency.engine import Conditions, EngineUnavailable
from tfnas.latency.header import engine_version
from tfnas.latency.lut import LatencyTable
from tfnas.latency.lut_io import load_table, save_table
from tfnas.latency.profile import NoisyMachineWarning, ProfileOptions, Progress, build_table
from tfnas.space import OpKey
from tfnas.space_io import load_space

from tfnas_ext.timing_cuda import CudaTimer

SMALL = load_space("small")


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    machine = Machine(noise=0.004)
    engine = FakeEngine(machine, overhead=1.05, offset_ms=0.1)
    options = ProfileOptions(budget_s=60.0, max_samples=12)
    return build_table(SMALL, options, engine=engine, timer=machine.timer(), now_s=machine.now_s)


def check(table: LatencyTable, machine: Machine, engine: FakeEngine | None = None, **kwargs: int) -> CheckResult:
    engine = FakeEngine(machine, overhead=1.05, offset_ms=0.1) if engine is None else engine
    return check_table(table, SMALL, engine=engine, timer=machine.timer(), now_s=machine.now_s, **kwargs)


def test_a_good_table_holds(table: LatencyTable) -> None:
    result = check(table, Machine(noise=0.004), architectures=20, seed=3)
    assert result.holds, result.reasons
    assert result.mape < 0.01
    assert abs(result.bias) < 0.01
    assert result.spearman > 0.99
    assert result.scale == pytest.approx(1.0, abs=0.01)
    assert len(result.measured_ms) == 20


def test_a_slower_machine_is_told_apart_from_a_wrong_table(table: LatencyTable) -> None:
    result = check(table, Machine(noise=0.004, speed=1.2), architectures=20)
    assert result.scale == pytest.approx(1.2, rel=0.01)
    assert result.raw_bias == pytest.approx(1 / 1.2 - 1, abs=0.02)
    assert abs(result.bias) < 0.01
    assert not result.holds
    assert [r for r in result.reasons if "slower" in r]


def test_a_stale_table_does_not_hold(table: LatencyTable) -> None:
    def other_library(key: OpKey, width: int) -> float:
        return smooth_ms(key, width) * (2.0 if key.kernel_size == 5 else 1.0)

    machine = Machine()
    result = check(table, machine, FakeEngine(machine, other_library), architectures=20)
    assert not result.holds
    assert any("mean error" in reason for reason in result.reasons)


def test_differences_of_machine_and_software_are_remarked(table: LatencyTable) -> None:
    other = replace(table, header=dict(table.header) | {"torch": "1.1.0", "device": "Xeon"})
    remarks = check(other, Machine(), architectures=3).remarks
    assert any("torch: 1.1.0 when built" in remark for remark in remarks)
    assert any("device: Xeon when built" in remark for remark in remarks)


def test_other_kernels_of_an_engine_are_remarked(table: LatencyTable) -> None:
    """A table of the fused engine by AVX-512 says little of AVX2, one of onnxruntime little of another version."""
    pytest.importorskip("onnxruntime")
    for engine in ("fused", "onnxruntime"):
        version = engine_version(engine)
        assert version
        header = dict(table.header) | {"engine": engine, "layout": "channels_last"}
        assert not [r for r in check(replace(table, header=header), Machine(), architectures=3).remarks if version in r]
        remarks = check(
            replace(table, header=header | {"engine_version": "another"}), Machine(), architectures=3
        ).remarks
        assert f"engine_version: another when built, {version} now" in remarks
    assert engine_version("eager") is None


def test_an_imported_table_knows_no_scale(table: LatencyTable) -> None:
    result = check(replace(table, header={"engine": "eager", "batch": 1}), Machine(), architectures=5)
    assert result.scale is None
    assert result.bias == result.raw_bias
    assert [r for r in result.remarks if r.endswith("assumed: threads 1, dtype float32, layout nchw")]


@pytest.mark.parametrize("stated", [{"engine": "tensorrt"}, {"device_type": "npu"}, {"threads": 10**7}])
def test_conditions_that_nothing_here_measures_are_the_tables(table: LatencyTable, stated: dict[str, object]) -> None:
    with pytest.raises(EngineUnavailable, match=f"the table's conditions.*{next(iter(stated.values()))}"):
        check_table(replace(table, header=stated), SMALL, 5)


def test_never_the_networks_of_the_fit() -> None:
    for seed in (0, 1, 2):
        fitted = random_architectures(SMALL, 20, (seed, FITTING))
        for other in (0, 1, 2):
            assert not set(fitted) & set(random_architectures(SMALL, 40, (other, CHECKING)))


def test_too_few_networks_are_refused(table: LatencyTable) -> None:
    with pytest.raises(ValueError, match="at least 3"):
        check(table, Machine(), architectures=2)


def test_a_table_of_another_space_is_refused(table: LatencyTable) -> None:
    with pytest.raises(ValueError, match="does not cover"):
        check_table(table, load_space("imagenet"), 5)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The commands measure on this machine instead of the real one."""
    machine = Machine(noise=0.004)

    def scripted_build(space: object, options: ProfileOptions, **kwargs: object) -> LatencyTable:
        engine = FakeEngine(machine, conditions=options.conditions)
        return build_table(SMALL, options, engine=engine, timer=machine.timer(), now_s=machine.now_s, **kwargs)  # type: ignore[arg-type]

    def scripted_check(*args: object, **kwargs: object) -> CheckResult:
        engine = FakeEngine(machine)
        return check_table(*args, engine=engine, timer=machine.timer(), now_s=machine.now_s, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(lut_build, "build_table", scripted_build)
    monkeypatch.setattr(lut_build, "check_table", scripted_check)
    return machine


def test_build_and_check_commands(scripted: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "lut.json"
    assert lut_build.build(output, space="small", batch=1, threads=1, budget_s=60.0, json=True) == OK
    header = json.loads(capsys.readouterr().out)
    assert header["batch"] == 1
    assert header == json.loads(json.dumps(dict(load_table(output).header)))
    assert not (tmp_path / "lut.json.partial").exists()
    assert lut_build.check(output, space="small", architectures=10, json=True) == OK
    result = json.loads(capsys.readouterr().out)
    assert {"mape", "bias", "spearman", "max_error", "holds"} <= result.keys()
    assert result["holds"]
    assert lut_build.check(output, space="small", architectures=10) == OK
    assert "the table holds" in capsys.readouterr().out


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_of_a_build(
    is_terminal: bool,
    scripted: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line on a terminal, ended once; a few lines, none of them rewritten, in a log."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert lut_build.build(tmp_path / "lut.json", space="small", batch=1, threads=1, budget_s=60.0) == OK
    told = capsys.readouterr().err
    assert re.search(r"done: \d+ widths, \d+ s left at most ?\n", told)
    if is_terminal:
        assert told.count("\n") == 1
        assert told.count("\r") > 20
    else:
        assert "\r" not in told
        assert list(dict.fromkeys(line.split(":")[0] for line in told.splitlines())) == ["networks", "widths", "done"]
        assert told.count("\n") <= 15


def test_a_log_tells_of_a_build_beyond_its_budget(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiling every width takes hours beyond a short budget, whose share stands still: a line a minute."""
    now_s = 600.0
    monkeypatch.setattr(lut_build.time, "monotonic", lambda: now_s)
    say = lut_build._BuildProgress(StopRequest(), quiet=False)
    for share in (0.95, 0.99, 1.0, 1.0):
        say(Progress("widths", 1, share, 0.0))
    assert capsys.readouterr().err.count("\n") == 2
    for widths in range(2, 62):
        now_s += 10.0
        say(Progress("widths", widths, 1.0, 0.0))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 10
    assert [told[0], told[-1]] == [f"widths: {n} widths, 0 s left at most" for n in (7, 61)]


def test_options_of_a_build_come_before_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def asked(space: object, options: ProfileOptions, **kwargs: object) -> LatencyTable:
        raise Asked(options.conditions)

    monkeypatch.setattr(lut_build, "build_table", asked)
    profile = load_config("quickstart").profile
    configured = Conditions("cpu", profile.engine, profile.batch_size, profile.threads, profile.dtype, profile.layout)
    for field in fields(Conditions):
        changed = {
            "device": "cuda:1",
            "engine": "fused",
            "batch": 3,
            "threads": configured.threads + 1,
            "dtype": "bfloat16",
            "layout": "channels_last",
        }
        option: dict[str, Any] = {"device": "cpu", field.name: changed[field.name]}
        with pytest.raises(Asked) as caught:
            lut_build.build(tmp_path / "lut.json", **option)
        assert caught.value.args == (replace(configured, **option),)


def test_strict_commands_end_with_3(scripted: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "lut.json"
    scripted.noise = 0.3
    assert lut_build.build(output, space="small", budget_s=3.0, strict=True) == NOISY
    assert output.exists()
    assert "not quiet" in capsys.readouterr().err
    assert lut_build.build(output, space="small", budget_s=3.0) == OK
    scripted.noise, scripted.speed = 0.001, 2.0
    assert lut_build.check(output, space="small", architectures=5, strict=True) == NOISY
    assert "does not hold" in capsys.readouterr().out


def test_an_error_is_not_put_behind_the_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(
        space: object, options: ProfileOptions, progress: Callable[[Progress], None], **kwargs: object
    ) -> LatencyTable:
        progress(Progress("networks", 0, 0.1, 50.0))
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(lut_build, "build_table", full)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["lut", "build", str(tmp_path / "lut.json")]) == FAILED
    assert capsys.readouterr().err.endswith("at most \ntfnas lut: error: [Errno 28] no room\n")


def test_a_gpu_that_cannot_be_timed_ends_a_build_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gpu_build(space: object, options: ProfileOptions, **kwargs: object) -> LatencyTable:
        device = StrictDevice(queue_depth=0)
        engine, options = DeviceEngine(Machine(), device=device), replace(options, mode="slope")
        timer = CudaChainTimer(CudaTimer(device))
        return build_table(SMALL, options, engine=engine, timer=timer, now_s=device.now_s, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(lut_build, "build_table", gpu_build)
    assert main(["lut", "build", "--space", "small", "--output", str(tmp_path / "lut.json"), "--json"]) == FAILED
    assert re.fullmatch(r"tfnas lut: error: the timed work waited for the device.*\n", capsys.readouterr().err)
    assert not (tmp_path / "lut.json").exists()


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lut.json"
    path.write_text('{"schema_version": 1, "curves"')
    with pytest.raises(ValueError, match=r"lut\.json"):
        lut_build.check(path, space="small")


def test_noise_is_no_reason_to_lose_the_table(scripted: Machine) -> None:
    scripted.noise = 0.3
    with pytest.warns(NoisyMachineWarning):
        lut_build.build_table(SMALL, ProfileOptions(budget_s=2.0))


def test_save_and_load_keep_the_correction(table: LatencyTable, tmp_path: Path) -> None:
    save_table(tmp_path / "t.json", table)
    assert load_table(tmp_path / "t.json").correction == pytest.approx(table.correction)
