"""Random MBInvRes blocks, and their outputs, statistics and gradients by any implementation, for the kernel tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tfnas_ext import ops, reference
from tfnas_ext.reference import ACTIVATIONS, GATES, Norm, SqueezeExcite


@dataclass(frozen=True)
class BlockCase:
    """Shapes and options of one block; weights are drawn from `seed`."""

    batch: int
    in_channels: int
    height: int
    columns: int
    mid: int
    out_channels: int
    kernel: int = 3
    stride: int = 1
    act: str = "swish"
    se: int = 0
    affine: bool = False
    expand: bool = True
    residual: bool = False
    width: int | None = None
    design: str = "auto"
    seed: int = 0
    se_act: str | None = None
    se_gate: str = "sigmoid"

    def options(self) -> dict[str, Any]:
        names = ("stride", "act", "residual", "width", "se_act", "se_gate")
        return {name: getattr(self, name) for name in names}


def random_case(seed: int) -> BlockCase:
    """Odd and even sizes, widths and channels that are no multiples of 8, every option; maps from 1 x 2 to 12 x 11."""
    rng = random.Random(seed)
    expand = rng.random() < 0.85
    stride = rng.choice((1, 2))
    in_channels = rng.choice((3, 8, 13, 16, 24, 40))
    mid = rng.choice((1, 5, 16, 21, 48, 50, 70)) if expand else in_channels
    case = BlockCase(
        batch=rng.randint(1, 5),
        in_channels=in_channels,
        height=rng.choice((1, 2, 4, 5, 7, 9, 12)),
        columns=rng.choice((2, 3, 4, 7, 8, 11)),
        mid=mid,
        out_channels=rng.choice((in_channels, 5, 8, 24, 33)),
        kernel=rng.choice((3, 5, 7)),
        stride=stride,
        act=rng.choice(sorted(ACTIVATIONS)),
        se=rng.choice((0, 0, 1, 6, 17)),
        affine=rng.random() < 0.4,
        expand=expand,
        width=rng.randint(1, mid) if expand and rng.random() < 0.6 else None,
        design=rng.choice(("strips", "channels")),
        seed=seed,
    )
    if case.batch * -(-case.height // stride) * -(-case.columns // stride) < 4:
        case = replace(case, batch=case.batch + 3)
    case = replace(case, residual=stride == 1 and case.out_channels == in_channels and rng.random() < 0.7)
    gate = rng.choice(sorted(GATES))
    return replace(case, se_act=rng.choice((None, *sorted(ACTIVATIONS))), se_gate=gate)


@dataclass
class Block:
    """Leaves of one case in some type: gradients are taken with respect to `leaves`."""

    case: BlockCase
    leaves: dict[str, Tensor]

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        t = self.leaves
        se = SqueezeExcite(t["se_rw"], t["se_rb"], t["se_ew"], t["se_eb"]) if self.case.se else None
        norms = {f"bn{i}": Norm(t.get(f"bn{i}_weight"), t.get(f"bn{i}_bias")) for i in (1, 2, 3)}
        return (t["x"], t.get("conv_pw"), t["conv_dw"], t["conv_pwl"]), {"se": se, **norms, **self.case.options()}

    def to(self, dtype: torch.dtype) -> Block:
        return Block(self.case, {k: t.detach().to(dtype).requires_grad_() for k, t in self.leaves.items()})


def make_block(case: BlockCase) -> Block:
    """The case's block in float64, inputs with means and scales of their own."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator) * scale

    cin, mid, cout, k = case.in_channels, case.mid, case.out_channels, case.kernel
    x = normal(case.batch, cin, case.height, case.columns) * (1 + normal(1, cin, 1, 1).abs()) + normal(1, cin, 1, 1)
    leaves = {"x": x.contiguous(memory_format=torch.channels_last)}
    if case.expand:
        leaves["conv_pw"] = normal(mid, cin, 1, 1, scale=cin**-0.5)
    leaves["conv_dw"] = normal(mid, 1, k, k, scale=1 / k)
    leaves["conv_pwl"] = normal(cout, mid, 1, 1, scale=mid**-0.5)
    if case.se:
        leaves["se_rw"], leaves["se_rb"] = normal(case.se, mid, 1, 1, scale=mid**-0.5), normal(case.se)
        leaves["se_ew"], leaves["se_eb"] = normal(mid, case.se, 1, 1, scale=case.se**-0.5), normal(mid)
    if case.affine:
        for i, channels in ((1, mid), (2, mid), (3, cout)):
            if i > 1 or case.expand:
                leaves[f"bn{i}_weight"], leaves[f"bn{i}_bias"] = 1 + 0.3 * normal(channels), normal(channels)
    return Block(case, {k: t.requires_grad_() for k, t in leaves.items()})


def run(function: Callable[..., Any], block: Block, **more: Any) -> dict[str, Tensor]:
    """Output, statistics and all gradients of a `mbinvres_with_statistics`, for one fixed random output gradient."""
    args, options = block.arguments()
    out, statistics = function(*args, **options, **more)
    generator = torch.Generator().manual_seed(block.case.seed + 1)
    dout = (torch.randn(out.shape, dtype=torch.float64, generator=generator) + 0.1).to(out.dtype)
    grads = torch.autograd.grad(out, list(block.leaves.values()), dout)
    results = {"out": out.detach(), **{f"d{name}": g for name, g in zip(block.leaves, grads, strict=True)}}
    return results | {name: t for name, t in statistics._asdict().items() if t is not None}


def max_errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> Iterator[tuple[str, float]]:
    """Largest difference of each result, relative to the largest value."""
    assert got.keys() == want.keys()
    for name, exact in want.items():
        assert got[name].shape == exact.shape, name
        scale = exact.abs().max().clamp_min(1e-3)
        yield name, ((got[name].double() - exact).abs().max() / scale).item()


def norm_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-3)).item()


def bfloat16_errors(case: BlockCase) -> Iterator[tuple[str, float, float]]:
    """Our error and plain PyTorch's of each result against float64, for bfloat16 inputs and weights."""
    low = make_block(case).to(torch.bfloat16)
    want = run(reference.mbinvres_with_statistics, low.to(torch.float64))
    eager = run(reference.mbinvres_with_statistics, low)
    got = run(ops.mbinvres_with_statistics, low, backend="cpu", design=case.design)
    for name, exact in want.items():
        assert got[name].dtype == eager[name].dtype, name
        yield name, norm_error(got[name], exact), norm_error(eager[name], exact)


def bfloat16_excess(case: BlockCase) -> Iterator[tuple[str, float]]:
    """Our error of each result over what the 2x rule allows it: below 1 it holds."""
    for name, ours, eager in bfloat16_errors(case):
        yield name, ours / (2 * eager + 2e-3)


def running(channels: int, generator: torch.Generator) -> Norm:
    """A batch norm with random affine part and running statistics, float64."""
    draw = [torch.randn(channels, dtype=torch.float64, generator=generator) for _ in range(4)]
    return Norm(draw[0], draw[1], draw[2], draw[3].abs() + 0.5)
