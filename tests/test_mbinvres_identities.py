"""The identities that the fused block is built on, seen from outside: through the operators and the native engine.

float64, a large eps where an identity is about eps. M pixels, `r = 1 / sqrt(var + eps)`, h normalised, g the gradient
of a norm's gain: g1 = M mean(dh1 h1).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mbinvres_cases import Block, BlockCase, make_block
from torch import Tensor

from tfnas_ext import ops
from tfnas_ext._native import MODULE
from tfnas_ext.engine import make_engine
from tfnas_ext.engine_spec import BodySpec, CandidateSpec, LayerSpec
from tfnas_ext.packed import PackedLayer
from tfnas_ext.reference import BatchStatistics, Norm

pytestmark = pytest.mark.skipif(MODULE is None, reason="the native module is not built")

EPS = 0.05
CASES = [
    BlockCase(3, 6, 10, 9, 24, 6 if stride == 1 else 9, kernel, stride, act, se, design=design, seed=seed)
    for seed, (kernel, stride, act, se, design) in enumerate(
        [
            (3, 1, "relu", 0, "strips"),
            (5, 2, "relu", 6, "strips"),
            (3, 1, "relu", 6, "channels"),
            (5, 1, "relu", 0, "channels"),
            (3, 2, "swish", 6, "strips"),
            (5, 1, "swish", 0, "strips"),
            (3, 2, "swish", 6, "channels"),
            (5, 1, "hard_swish", 0, "channels"),
        ],
        start=100,
    )
]


def run_with_gains(case: BlockCase) -> tuple[Block, dict[str, Tensor], BatchStatistics]:
    """All gradients, also those of the norms' gains, which are 1."""
    block = make_block(case)
    (x, *weights), options = block.arguments()
    for i, channels in ((1, case.mid), (2, case.mid), (3, case.out_channels)):
        gain = torch.ones(channels, dtype=torch.float64, requires_grad=True)
        options[f"bn{i}"] = Norm(gain, torch.zeros_like(gain))
        block.leaves[f"gain{i}"] = gain
    more: dict[str, Any] = {"eps": EPS, "backend": "cpu", "design": case.design}
    out, statistics = ops.mbinvres_with_statistics(x, *weights, **options, **more)
    dout = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(case.seed)) + 0.3
    grads = torch.autograd.grad(out, list(block.leaves.values()), dout)
    return block, dict(zip(block.leaves, grads, strict=True)), statistics


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scale_of_a_filter_meets_eps_alone(case: BlockCase) -> None:
    """<w, dw> = eps r^2 g for each norm: scaling the weights before a batch norm changes nothing but eps' share."""
    block, grads, statistics = run_with_gains(case)
    for name, var, gain, dim in (("conv_pw", "var1", "gain1", 0), ("conv_dw", "var2", "gain2", 0)):
        along = (block.leaves[name] * grads[name]).transpose(0, dim).flatten(1).sum(1)
        torch.testing.assert_close(along.detach(), EPS / (getattr(statistics, var) + EPS) * grads[gain])
    along = (block.leaves["conv_pwl"] * grads["conv_pwl"]).flatten(1).sum(1)
    torch.testing.assert_close(along.detach(), EPS / (statistics.var3 + EPS) * grads["gain3"])


@pytest.mark.parametrize("case", [case for case in CASES if case.act == "relu"], ids=str)
def test_relu_leaves_eps_of_mean_dh1_h1(case: BlockCase) -> None:
    """ReLU is homogeneous and BN2 free of scale: M mean(dh1 h1) = eps r2^2 g2."""
    _, grads, statistics = run_with_gains(case)
    torch.testing.assert_close(grads["gain1"], EPS / (statistics.var2 + EPS) * grads["gain2"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_input_gradient_without_the_product_of_dh1_and_x(case: BlockCase) -> None:
    """With frozen weights mean(dh1 h1) is summed directly, else it is rowsum((G - M m1 mu^T) W1') / M: the same dx."""
    block = make_block(case)
    frozen = Block(case, {name: t.detach().requires_grad_(name == "x") for name, t in block.leaves.items()})
    results = []
    for which in (block, frozen):
        args, options = which.arguments()
        out = ops.mbinvres(*args, **options, backend="cpu", design=case.design)
        leaves = [leaf for leaf in which.leaves.values() if leaf.requires_grad]
        dout = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.3
        results.append(torch.autograd.grad(out, leaves, dout)[list(which.leaves).index("x") if which is block else 0])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_batch_norms_take_out_of_dx(case: BlockCase) -> None:
    """Without a residual the gradient of x is orthogonal to a constant shift of any input channel."""
    _, grads, _ = run_with_gains(case)
    scale = grads["x"].abs().sum()
    assert (grads["x"].sum((0, 2, 3)).abs().max() / scale).item() < 1e-12


@pytest.mark.parametrize("size", [(3, 9, 8), (1, 66, 63)], ids=["channels", "strips"])
@pytest.mark.parametrize(("stride", "residual"), [(1, True), (1, False), (2, False)])
def test_mixture_is_the_sum_of_its_paths(size: tuple[int, int, int], stride: int, residual: bool) -> None:
    """One pass over all candidates against one pass each.

    out = sum u_i out_i; dx = sum u_i dx_i, the narrow corrections having been added up; du_i = <dout, h3_i> (+
    <dout, x>), where the constant <dout, x> cancels in a softmax's gradient.
    """
    batch, height, width = size
    cin, cout = 6, 6 if stride == 1 else 9
    sizes = [(k, mid, se) for k in (3, 5) for mid, se in ((18, 0), (36, 0), (20, 6), (36, 12))]
    candidates = [CandidateSpec(f"k{k}_{mid}_{se}", k, mid, se) for k, mid, se in sizes]
    layer = LayerSpec(cin, cout, stride, "swish", residual, tuple(candidates))
    spec = BodySpec(((layer,),), "sink")
    generator = torch.Generator().manual_seed(7)
    packed = [PackedLayer(layer, dtype=torch.float64, generator=generator)]
    engine = make_engine("native", spec, packed)
    x = torch.randn(batch, cin, height, width, dtype=torch.float64, generator=generator) * 1.3 - 0.8
    x = x.contiguous(memory_format=torch.channels_last)
    u = torch.rand(1, len(candidates), dtype=torch.float64, generator=generator).softmax(1)
    v = torch.ones(1, 1, dtype=torch.float64)
    out, tape = engine.forward_mixture(x, u, v, True)
    dout = torch.randn(out.shape, dtype=torch.float64, generator=generator) + 0.3
    dx, du, _ = engine.backward_mixture(tape, dout, True)
    outs, dxs = [], []
    for i in range(len(candidates)):
        (path,), path_tape = engine.forward_paths(x, torch.tensor([[i]]), v, True)
        outs.append(path)
        path_dx = engine.backward_paths(path_tape, [dout], True)
        assert path_dx is not None
        dxs.append(path_dx)
    along = torch.stack([(dout * path).sum() for path in outs])
    torch.testing.assert_close(out, sum(u[0, i] * path for i, path in enumerate(outs)))
    torch.testing.assert_close(dx, sum(u[0, i] * path_dx for i, path_dx in enumerate(dxs)))
    torch.testing.assert_close(du[0], along)
    without_x = along - (dout * x).sum() if residual else along
    torch.testing.assert_close(u[0] * (du[0] - u[0] @ du[0]), u[0] * (without_x - u[0] @ without_x))
