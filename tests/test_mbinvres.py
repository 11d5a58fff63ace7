"""The fused block against `reference` in float64: every option, both designs, types, layouts, threads, bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mbinvres_cases import Block, BlockCase, make_block, max_errors, norm_error, random_case, run, running
from torch import Tensor

from tfnas_ext import ops, reference
from tfnas_ext._native import MODULE
from tfnas_ext.reference import ACTIVATIONS, Norm, SqueezeExcite

pytestmark = pytest.mark.skipif(MODULE is None, reason="the native module is not built")

SEEDS = range(60)
SLOW_SEEDS = range(1000, 2000, 100)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check_float64(case: BlockCase) -> None:
    print(case)
    block = make_block(case)
    want = run(reference.mbinvres_with_statistics, block)
    got = run(ops.mbinvres_with_statistics, block, backend="cpu", design=case.design)
    for name, error in max_errors(got, want):
        assert error < 1e-9, (name, error)


@pytest.mark.parametrize("seed", SEEDS)
def test_float64(seed: int) -> None:
    check_float64(random_case(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", SLOW_SEEDS)
def test_float64_sweep(seed: int) -> None:
    for s in range(seed, seed + 100):
        check_float64(random_case(s))


@pytest.mark.parametrize("design", ["strips", "channels"])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_maps_of_several_strips(design: str, kernel: int, stride: int) -> None:
    """Maps so wide that a strip holds a few rows only; the last strip is short."""
    case = BlockCase(1, 4, 15, 250, 18, 6, kernel, stride, "hard_swish", se=3, design=design)
    check_float64(case)


def float32_errors(case: BlockCase) -> None:
    """The 2x rule: at most twice plain PyTorch's own float32 error, in the 2-norm, plus a floor of rounding."""
    print(case)
    block = make_block(case)
    want = run(reference.mbinvres_with_statistics, block)
    single = block.to(torch.float32)
    eager = run(reference.mbinvres_with_statistics, single)
    got = run(ops.mbinvres_with_statistics, single, backend="cpu", design=case.design)
    for name, reference_result in want.items():
        assert got[name].dtype == torch.float32
        error, allowed = norm_error(got[name], reference_result), norm_error(eager[name], reference_result)
        assert error < 2 * allowed + 3e-7, (name, error, allowed)


@pytest.mark.parametrize("design", ["strips", "channels"])
@pytest.mark.parametrize("act", ["swish", "hard_swish"])
@pytest.mark.parametrize(
    "shape",
    [(4, 16, 30, 28, 96, 24, 3, 2), (8, 24, 14, 14, 72, 24, 5, 1), (16, 40, 7, 7, 150, 40, 7, 1)],
)
def test_float32(shape: tuple[int, ...], act: str, design: str) -> None:
    for seed, se in ((1, 0), (2, 8)):
        float32_errors(BlockCase(*shape, act=act, se=se, affine=bool(se), design=design, seed=seed))


@pytest.mark.parametrize("seed", range(6))
def test_gate_at_its_kinks(seed: int) -> None:
    """A hard sigmoid at and beyond -3 and 3: the value and the derivative are PyTorch's."""
    block = make_block(BlockCase(4, 5, 4, 5, 20, 6, act="relu", se=3, se_gate="hard_sigmoid", seed=seed))
    with torch.no_grad():
        block.leaves["se_ew"][::2].zero_()
        block.leaves["se_eb"].copy_(torch.tensor([-3.0, 3.0, 0.0, 3.5, -4.0] * 4))
    for dtype in (torch.float64, torch.float32):
        got, want = (
            run(function, block.to(dtype), **more)
            for function, more in (
                (ops.mbinvres_with_statistics, {"backend": "cpu"}),
                (reference.mbinvres_with_statistics, {}),
            )
        )
        for name, error in max_errors(got, {key: value.double() for key, value in want.items()}):
            assert error < (1e-9 if dtype == torch.float64 else 1e-5), (name, error)


@pytest.mark.parametrize("capability", ["generic", "avx2", "avx512"])
def test_instruction_sets(capability: str) -> None:
    """Each in a process of its own, since it is chosen once: float32 results near float64's."""
    if ["generic", "avx2", "avx512", "avx512_bf16"].index(capability) > [
        "generic",
        "avx2",
        "avx512",
        "avx512_bf16",
    ].index(MODULE.best_cpu_capability()):
        pytest.skip(f"this processor has no {capability}")
    environment = {**os.environ, "TFNAS_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "2"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, str(Path(__file__).with_name("mbinvres_errors.py"))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["capability"] == capability
    assert report["worst"] < 2e-5, report


def test_gradcheck() -> None:
    for design in ("strips", "channels"):
        case = BlockCase(2, 3, 3, 4, 5, 3, se=2, affine=True, residual=True, width=4, design=design, seed=3)
        block = make_block(case)
        names = list(block.leaves)

        def function(*leaves: Tensor, case: BlockCase = case, names: list[str] = names) -> Tensor:
            args, options = Block(case, dict(zip(names, leaves, strict=True))).arguments()
            return ops.mbinvres(*args, **options, backend="cpu", design=case.design)

        assert torch.autograd.gradcheck(function, tuple(block.leaves.values()), atol=1e-6, fast_mode=True)


def test_same_bits_at_a_fixed_number_of_threads_and_the_same_values_at_others(threads: None) -> None:
    for design in ("strips", "channels"):
        case = BlockCase(3, 16, 12, 10, 70, 16, 5, se=4, residual=True, design=design, seed=4)
        block = make_block(case).to(torch.float32)
        results: list[dict[str, Tensor]] = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            twice = [run(ops.mbinvres_with_statistics, block, backend="cpu", design=design) for _ in range(2)]
            for name in twice[0]:
                assert torch.equal(twice[0][name], twice[1][name]), (count, name)
            results.append(twice[0])
        for result in results[1:]:
            for name in result:
                assert norm_error(result[name], results[0][name].double()) < 3e-6, name


# ---------------------------------------------------------------- the identities of the algebra, through the operators
def test_statistics_are_moments_of_the_input() -> None:
    """mean(y1) = W1 mu and var(y1) = w C w^T, y1 never being formed in strips."""
    block = make_block(BlockCase(3, 6, 5, 7, 20, 4, design="strips", seed=5))
    args, options = block.arguments()
    _, statistics = ops.mbinvres_with_statistics(*args, **options, backend="cpu", design="strips")
    x, w = args[0].detach(), args[1].detach().flatten(1)
    mu = x.mean((0, 2, 3))
    centred = (x - mu.view(1, -1, 1, 1)).transpose(0, 1).flatten(1)
    covariance = centred @ centred.t() / centred.shape[1]
    torch.testing.assert_close(statistics.mean1, w @ mu)
    torch.testing.assert_close(statistics.var1, ((w @ covariance) * w).sum(1))


def test_channels_beyond_the_width_are_frozen() -> None:
    for design in ("strips", "channels"):
        block = make_block(BlockCase(2, 5, 6, 5, 20, 4, se=3, affine=True, width=13, design=design, seed=6))
        results = run(ops.mbinvres_with_statistics, block, backend="cpu", design=design)
        for name, dim in (("conv_pw", 0), ("conv_dw", 0), ("conv_pwl", 1), ("se_rw", 1), ("se_ew", 0), ("se_eb", 0)):
            frozen = results[f"d{name}"].transpose(0, dim)[13:]
            assert frozen.numel() > 0
            assert torch.equal(frozen, torch.zeros_like(frozen)), name


@pytest.mark.parametrize("design", ["strips", "channels"])
def test_the_order_of_channels_changes_nothing(design: str) -> None:
    block = make_block(BlockCase(2, 5, 6, 5, 20, 4, se=3, design=design, seed=7))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(8))
    dims = {"conv_pw": 0, "conv_dw": 0, "conv_pwl": 1, "se_rw": 1, "se_ew": 0, "se_eb": 0}
    permuted = {
        name: t.detach().index_select(dims[name], order).requires_grad_() if name in dims else t
        for name, t in block.leaves.items()
    }
    want = run(ops.mbinvres_with_statistics, block, backend="cpu", design=design)
    got = run(ops.mbinvres_with_statistics, Block(block.case, permuted), backend="cpu", design=design)
    torch.testing.assert_close(got["out"], want["out"])
    torch.testing.assert_close(got["dx"], want["dx"])
    torch.testing.assert_close(got["dconv_pw"], want["dconv_pw"][order])


@pytest.mark.parametrize("design", ["strips", "channels"])
@pytest.mark.parametrize("se", [0, 3])
def test_any_combination_of_wanted_gradients(design: str, se: int) -> None:
    """Frozen weights take the way without G = dh1^T x; every gradient alone equals the one among all."""
    case = BlockCase(2, 5, 6, 5, 20, 5, se=se, residual=True, design=design, seed=9)
    block = make_block(case)
    want = run(reference.mbinvres_with_statistics, block)
    wanted = [[name] for name in block.leaves] + [["x", "conv_dw"], ["conv_pw", "conv_pwl"]]
    for names in wanted:
        leaves = {name: t.detach().requires_grad_(name in names) for name, t in block.leaves.items()}
        args, options = Block(case, leaves).arguments()
        out = ops.mbinvres(*args, **options, backend="cpu", design=design)
        dout = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(10)) + 0.1
        grads = torch.autograd.grad(out, [leaves[name] for name in names], dout)
        for name, grad in zip(names, grads, strict=True):
            torch.testing.assert_close(grad, want[f"d{name}"], msg=f"{names}: {name}")


# ---------------------------------------------------------------- layouts, inference, registration
def test_layouts() -> None:
    """NCHW, slices and expanded gradients are converted; the result is channels_last."""
    block = make_block(BlockCase(3, 6, 5, 7, 20, 4, seed=11))
    args, options = block.arguments()
    want = reference.mbinvres(*args, **options)
    padded = torch.zeros(3, 6, 5, 14, dtype=torch.float64)
    padded[..., ::2] = args[0].detach()
    for x in (args[0].detach().contiguous(), padded[..., ::2]):
        x = x.requires_grad_() if x.is_leaf else x
        out = ops.mbinvres(x, *args[1:], **options, backend="cpu")
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out, want)
        out.sum().backward()


@pytest.mark.parametrize("seed", range(12))
def test_inference(seed: int) -> None:
    case = random_case(seed)
    print(case)
    block = make_block(case)
    args, options = block.arguments()
    generator = torch.Generator().manual_seed(seed)
    options |= {f"bn{i}": running(c, generator) for i, c in ((1, case.mid), (2, case.mid), (3, case.out_channels))}
    with torch.no_grad():
        want = reference.mbinvres(*args, **options, training=False)
        got = ops.mbinvres(*args, **options, training=False, backend="cpu")
    torch.testing.assert_close(got, want)
    # With gradients the reference runs; the numbers stay.
    torch.testing.assert_close(ops.mbinvres(*args, **options, training=False).detach(), want)


@pytest.mark.parametrize("trained", ["se_rw", "bn2_weight", "bn3_bias"])
def test_inference_with_one_trained_weight_has_its_gradient(trained: str) -> None:
    """Frozen convolutions: whatever weight still wants a gradient gets it."""
    case = BlockCase(2, 5, 6, 5, 20, 5, se=3, affine=True, seed=19)
    block = make_block(case)
    leaves = {name: t.detach().requires_grad_(name == trained) for name, t in block.leaves.items()}
    args, options = Block(case, leaves).arguments()
    generator = torch.Generator().manual_seed(19)
    for i, channels in ((1, 20), (2, 20), (3, 5)):
        options[f"bn{i}"] = options[f"bn{i}"]._replace(
            **running(channels, generator)._asdict()
            | {"weight": leaves[f"bn{i}_weight"], "bias": leaves[f"bn{i}_bias"]}
        )
    got, want = (f(*args, **options, training=False) for f in (ops.mbinvres, reference.mbinvres))
    grads = [torch.autograd.grad(out.square().sum(), leaves[trained])[0] for out in (got, want)]
    assert grads[1].abs().max() > 0
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("batch", "count"), [(12, 1), (9, 2), (3, 2)])
@pytest.mark.parametrize("se", [0, 5])
def test_inference_of_images_in_groups(batch: int, count: int, se: int, threads: None) -> None:
    """Maps of which a few fit the cache together, the last group smaller; few images are shared by the threads."""
    torch.set_num_threads(count)
    block = make_block(BlockCase(batch, 8, 32, 30, 48, 8, 5, se=se, residual=True, seed=batch))
    args, options = block.arguments()
    generator = torch.Generator().manual_seed(batch)
    options |= {f"bn{i}": running(c, generator) for i, c in ((1, 48), (2, 48), (3, 8))}
    with torch.no_grad():
        want = reference.mbinvres(*args, **options, training=False)
        got = ops.mbinvres(*args, **options, training=False, backend="cpu")
    torch.testing.assert_close(got, want)


def test_double_backward_is_refused() -> None:
    block = make_block(BlockCase(2, 3, 3, 4, 5, 3, seed=13))
    args, options = block.arguments()
    out = ops.mbinvres(*args, **options, backend="cpu")
    (dx,) = torch.autograd.grad(out.sum(), [args[0]], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dx.sum().backward()


# ---------------------------------------------------------------- bad input
def changed(block: Block, **replaced: Any) -> Block:
    return Block(block.case, {**block.leaves, **replaced})


BAD_LEAVES = {
    "conv_pw": torch.zeros(20, 4, 1, 1, dtype=torch.float64),
    "conv_dw": torch.zeros(20, 1, 3, 5, dtype=torch.float64),
    "conv_pwl": torch.zeros(5, 19, 1, 1, dtype=torch.float64),
    "se_rw": torch.zeros(3, 21, 1, 1, dtype=torch.float64),
    "se_rb": torch.zeros(4, dtype=torch.float64),
    "se_ew": torch.zeros(20, 4, 1, 1, dtype=torch.float64),
    "se_eb": torch.zeros(21, dtype=torch.float64),
    "x": torch.zeros(2, 5, 6, dtype=torch.float64),
}


@pytest.mark.parametrize("name", sorted(BAD_LEAVES))
def test_wrong_shapes_name_the_argument(name: str) -> None:
    block = changed(make_block(BlockCase(2, 5, 6, 5, 20, 5, se=3, seed=14)), **{name: BAD_LEAVES[name]})
    args, options = block.arguments()
    label = {"se_rw": "se_reduce_weight", "se_rb": "se_reduce_bias", "se_ew": "se_expand_weight"}.get(name, name)
    label = {"se_eb": "se_expand_bias"}.get(label, label)
    with pytest.raises((ValueError, RuntimeError, IndexError), match=label if name != "conv_dw" else None):
        ops.mbinvres(*args, **options)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("stride", 3, "stride must be 1 or 2"),
        ("act", "gelu", "act must be one of"),
        ("width", 0, "width must be in 1..20"),
        ("width", 21, "width must be in 1..20"),
        ("eps", 0.0, "eps must be positive"),
        ("design", "rows", "design must be one of"),
        ("residual", True, "residual needs"),
        ("backend", "gpu", "backend must be one of"),
    ],
)
def test_wrong_options_name_the_argument(option: str, value: Any, message: str) -> None:
    args, options = make_block(BlockCase(2, 5, 6, 5, 20, 7, seed=15)).arguments()
    with pytest.raises(ValueError, match=message):
        ops.mbinvres(*args, **{**options, option: value})


def test_wrong_types_and_empty_batches_are_refused() -> None:
    block = make_block(BlockCase(2, 5, 6, 5, 20, 7, seed=16))
    args, options = block.arguments()
    with pytest.raises(TypeError, match="conv_dw must be Double as x is, got Float"):
        ops.mbinvres(args[0], args[1], args[2].float(), args[3], **options)
    with pytest.raises(ValueError, match="x must not be empty"):
        ops.mbinvres(args[0][:0], *args[1:], **options)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ops.mbinvres(args[0][:1, :, :1, :1], *args[1:], **options)
    with pytest.raises(ValueError, match="float32, float64 and bfloat16"):
        ops.mbinvres(args[0].half(), *args[1:], **options, backend="cpu")


def test_one_pixel_maps_of_several_images() -> None:
    for design in ("strips", "channels"):
        check_float64(replace(BlockCase(6, 5, 1, 1, 20, 5, 7, se=3, residual=True, seed=17), design=design))


def test_not_a_number_stays() -> None:
    block = make_block(BlockCase(2, 5, 6, 5, 20, 5, act="relu", seed=18))
    args, options = block.arguments()
    x = args[0].detach().clone()
    x[0, 0, 0, 0] = float("nan")
    for design in ("strips", "channels"):
        assert ops.mbinvres(x, *args[1:], **options, backend="cpu", design=design).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_passes_a_gate_as_pytorch_has_it(dtype: torch.dtype, gate: str, bad: float) -> None:
    """In inference: where the plain modules give a NaN or an infinity, so do the kernels, other images untouched."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x = draw(2, 8, 6, 6)
    x[0, 3, 2, 2] = bad
    norms = [Norm(None, None, draw(c), draw(c).abs() + 0.5) for c in (24, 24, 8)]
    se = SqueezeExcite(draw(4, 24, 1, 1), draw(4), draw(24, 4, 1, 1), draw(24))
    weights = (draw(24, 8, 1, 1), draw(24, 1, 3, 3), draw(8, 24, 1, 1))
    for act in ACTIVATIONS:
        options = {"se": se, "act": act, "se_gate": gate, "training": False, "residual": True}
        options |= {f"bn{i}": norm for i, norm in enumerate(norms, 1)}
        got, want = (ops.mbinvres(x, *weights, **options, backend=name) for name in ("cpu", "reference"))
        assert torch.equal(got.isnan(), want.isnan()), act
        assert torch.equal(got.isinf(), want.isinf()), act
