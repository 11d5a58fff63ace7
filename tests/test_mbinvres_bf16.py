"""bfloat16 blocks by the 2x rule: at most twice the error of plain PyTorch in bfloat16, both against float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mbinvres_cases import (
    BlockCase,
    bfloat16_errors,
    bfloat16_excess,
    make_block,
    norm_error,
    random_case,
    run,
    running,
)

from tfnas_ext import ops, reference
from tfnas_ext._native import MODULE

pytestmark = pytest.mark.skipif(MODULE is None, reason="the native module is not built")

# Strides, kernels, channels that are no multiple of 16, odd numbers of pixels, several strips, SE, no expansion.
CASES = (
    BlockCase(4, 16, 30, 28, 96, 24, 3, 2, "hard_swish", affine=True),
    BlockCase(8, 24, 14, 14, 72, 24, 5, 1, "swish", se=5, residual=True),
    BlockCase(5, 13, 7, 7, 50, 11, 7, 1, "relu6", se=3, width=37),
    BlockCase(3, 40, 9, 5, 150, 40, 5, 2, "swish", se=10, affine=True),
    BlockCase(1, 8, 15, 251, 18, 24, 5, 1, "hard_swish", se=3),
    BlockCase(6, 24, 9, 9, 24, 16, 3, 1, "swish", expand=False),
)


@pytest.mark.parametrize("design", ["strips", "channels"])
@pytest.mark.parametrize("index", range(len(CASES)))
def test_bfloat16(index: int, design: str) -> None:
    case = replace(CASES[index], design=design, seed=index)
    print(case)
    for name, excess in bfloat16_excess(case):
        assert excess < 1, (name, excess)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(0, 200, 40))
def test_bfloat16_sweep(seed: int) -> None:
    """The rule for sums of errors over 40 random blocks: those of one tiny block, of one number even, are chance."""
    sums: dict[str, list[float]] = {}
    for s in range(seed, seed + 40):
        for name, ours, eager in bfloat16_errors(random_case(s)):
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += ours
            total[1] += eager
    for name, (ours, eager) in sums.items():
        assert ours < 2 * eager, (seed, name, ours, eager)


@pytest.mark.parametrize("capability", ["generic", "avx2", "avx512", "avx512_bf16"])
def test_instruction_sets(capability: str) -> None:
    names = ["generic", "avx2", "avx512", "avx512_bf16"]
    assert MODULE is not None
    if names.index(capability) > names.index(MODULE.best_cpu_capability()):
        pytest.skip(f"this processor has no {capability}")
    environment = {**os.environ, "TFNAS_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "2"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, str(Path(__file__).with_name("mbinvres_errors.py")), "bfloat16"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["capability"] == capability
    assert report["worst"] < 1, report


def test_weights_keep_their_type() -> None:
    """bfloat16 or float32 weights beside bfloat16 activations; each gradient has its weight's type."""
    for dtype in (torch.bfloat16, torch.float32):
        block = make_block(BlockCase(3, 8, 6, 5, 20, 8, se=3, affine=True, residual=True, seed=21)).to(dtype)
        leaves = {**block.leaves, "x": block.leaves["x"].detach().bfloat16().requires_grad_()}
        block = replace(block, leaves=leaves)
        results = run(ops.mbinvres_with_statistics, block, backend="cpu")
        assert results["out"].dtype == results["dx"].dtype == torch.bfloat16
        assert results["mean1"].dtype == torch.float32
        assert {results[f"d{name}"].dtype for name in leaves if name != "x"} == {dtype}


def test_mixtures_of_types_are_refused() -> None:
    args, options = make_block(BlockCase(3, 8, 6, 5, 20, 8, seed=22)).to(torch.bfloat16).arguments()
    with pytest.raises(TypeError, match="conv_dw must be BFloat16 as x is, got Double"):
        ops.mbinvres(args[0], args[1], args[2].double(), args[3], **options, backend="cpu")
    with pytest.raises(TypeError, match="conv_dw must be Float as x is, got BFloat16"):
        ops.mbinvres(args[0].float(), *args[1:], **options, backend="cpu")


@pytest.mark.parametrize("seed", range(4))
def test_inference(seed: int) -> None:
    case = random_case(seed)
    print(case)
    low = make_block(case).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    channels = ((1, case.mid), (2, case.mid), (3, case.out_channels))
    norms = {f"bn{i}": running(c, generator) for i, c in channels}
    results = {}
    for name, block, function, dtype in (
        ("exact", low.to(torch.float64), reference.mbinvres, torch.float64),
        ("eager", low, reference.mbinvres, torch.float32),
        ("ours", low, ops.mbinvres, torch.float32),
    ):
        args, options = block.arguments()
        options |= {key: type(norm)(*(t.to(dtype) for t in norm)) for key, norm in norms.items()}
        with torch.no_grad():
            results[name] = function(*args, **options, training=False)
    error, allowed = norm_error(results["ours"], results["exact"]), norm_error(results["eager"], results["exact"])
    assert error < 2 * allowed + 1e-3, (error, allowed)


def test_not_a_number_stays() -> None:
    args, options = make_block(BlockCase(2, 5, 6, 5, 20, 5, act="relu", seed=24)).to(torch.bfloat16).arguments()
    x = args[0].detach().clone()
    x[0, 0, 0, 0] = float("nan")
    for design in ("strips", "channels"):
        assert ops.mbinvres(x, *args[1:], **options, backend="cpu", design=design).isnan().any()
