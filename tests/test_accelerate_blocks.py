"""Single blocks accelerated: every option of the norms, drop-path, squeeze and excitation, registration, fallbacks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from published_blocks import MBInvertedResBlock, MixedOperation
from torch import Tensor, nn

import tfnas_ext
from tfnas_ext import drop_in_block
from tfnas_ext._native import MODULE
from tfnas_ext.drop_in_run import run_block
from tfnas_ext.ops import NATIVE_DTYPES

pytestmark = pytest.mark.skipif(MODULE is None, reason="the native module is not built")


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of an accelerated block ran on the kernels."""
    calls: list[bool] = []

    def counted(*args: Any) -> Tensor | None:
        out = run_block(*args)
        calls.append(out is not None)
        return out

    monkeypatch.setattr(drop_in_block, "run_block", counted)
    return calls


def timm_block(**options: Any) -> nn.Module:
    blocks = pytest.importorskip("timm.models._efficientnet_blocks")
    options = {"act_layer": nn.SiLU, "se_layer": blocks.SqueezeExcite, "exp_ratio": 3.0} | options
    return blocks.InvertedResidual(8, 8, **options)


def plain_block(**options: Any) -> MBInvertedResBlock:
    return MBInvertedResBlock(**({"in_channels": 8, "mid_channels": 24, "se_channels": 4, "out_channels": 8} | options))


def randomise(block: nn.Module, seed: int = 0) -> nn.Module:
    """Everything that starts at 0 or 1 gets a value that shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in block.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
        for norm in block.modules():
            if isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None:
                norm.running_var.abs_().add_(0.5)
    return block.double()


def images(seed: int, batch: int = 4) -> Tensor:
    return torch.randn(batch, 8, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def compare(block: nn.Module, steps: int = 2, prepare: Callable[[nn.Module], Any] = lambda block: None) -> nn.Module:
    """Outputs, all gradients and buffers of the plain and the accelerated block; returns the latter."""
    plain, fast = copy.deepcopy(block), copy.deepcopy(block)
    tfnas_ext.accelerate(fast, strict=True)
    for model in (plain, fast):
        prepare(model)
    for step in range(steps):
        results = []
        for model in (plain, fast):
            torch.manual_seed(step)
            x = images(step).requires_grad_()
            out = model(x)
            inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
            grads = torch.autograd.grad(out, inputs, images(step + 10)[:, :, : out.shape[2], : out.shape[3]])
            results.append([out.detach(), *grads, *(buffer.clone() for buffer in model.buffers())])
        for got, want in zip(*results[::-1], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    return fast


@pytest.mark.parametrize("act", ["relu", "relu6", "swish"])
@pytest.mark.parametrize("options", [{}, {"se_channels": 0}, {"mid_channels": 8}, {"stride": 2}, {"affine": False}])
def test_published_block(act: str, options: dict[str, Any], fused_calls: list[bool]) -> None:
    block = compare(randomise(plain_block(act_func=act, kernel_size=5, **options)))
    block.eval()
    with torch.no_grad():
        block(images(5))
    assert fused_calls
    assert all(fused_calls)


def test_published_block_without_running_statistics(fused_calls: list[bool]) -> None:
    block = compare(randomise(plain_block(affine=False, running_stats=False)))
    compare(block, prepare=lambda model: model.eval())  # batch statistics in evaluation too
    assert all(fused_calls)


def test_published_drop_connect(fused_calls: list[bool]) -> None:
    block = randomise(plain_block())
    block.drop_connect_rate = 0.5
    compare(block, steps=4)
    assert all(fused_calls)


def test_mixed_operation(fused_calls: list[bool]) -> None:
    torch.manual_seed(0)
    plain = MixedOperation(8, 8, 1, "swish").double()
    fast = copy.deepcopy(plain)
    report = tfnas_ext.accelerate(fast, strict=True)
    assert [row.name for row in report.replaced] == [f"m_ops.{i}" for i in range(8)]
    assert {row.block for row in report.replaced} == {"published_blocks.MBInvertedResBlock"}
    assert list(fast.state_dict()) == list(plain.state_dict())
    fused_calls.clear()
    for choice in (None, 3):
        x = images(6)
        got, want = fast(x, choice), plain(x, choice)
        torch.testing.assert_close(got, want)
        wanted = plain.log_alphas if choice is None else plain.m_ops[3].depth_conv.conv.weight
        given = fast.log_alphas if choice is None else fast.m_ops[3].depth_conv.conv.weight
        torch.testing.assert_close(
            torch.autograd.grad(got.square().sum(), given), torch.autograd.grad(want.square().sum(), wanted)
        )
    assert fused_calls == [True] * 9


@pytest.mark.parametrize("act", [nn.ReLU, nn.Hardswish])
@pytest.mark.parametrize("gate", [nn.Sigmoid, nn.Hardsigmoid])
def test_squeeze_and_excitation_of_its_own_kind(act: type[nn.Module], gate: type[nn.Module]) -> None:
    blocks = pytest.importorskip("timm.models._efficientnet_blocks")

    def se(channels: int, **options: Any) -> nn.Module:
        return blocks.SqueezeExcite(channels, rd_channels=5, act_layer=act, gate_layer=gate)

    block = randomise(timm_block(se_layer=se, act_layer=nn.SiLU))
    with torch.no_grad():
        block.se.conv_expand.bias.mul_(8)  # some gates at their bounds
    compare(block)


def test_timm_options(fused_calls: list[bool]) -> None:
    compare(randomise(timm_block(noskip=True)))
    compare(randomise(timm_block(drop_path_rate=0.5)), steps=4)
    compare(randomise(timm_block(se_layer=None, act_layer=nn.ReLU6, dw_kernel_size=7, stride=2)))
    assert all(fused_calls)


def test_momentum_eps_and_counts_of_each_norm(fused_calls: list[bool]) -> None:
    def prepare(model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm, momentum in zip(norms, (0.3, None, 0.01), strict=True):
            norm.momentum, norm.eps = momentum, 1e-2
        norms[2].track_running_stats = False

    compare(randomise(timm_block()), steps=3, prepare=prepare)
    assert all(fused_calls)


def test_frozen_norms_run_their_own_code(fused_calls: list[bool]) -> None:
    def freeze(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    block = compare(randomise(timm_block()), prepare=freeze)
    assert fused_calls == [False, False]
    with torch.no_grad():
        block(images(1))
    assert fused_calls[-1]
    fused_calls.clear()
    compare(randomise(timm_block()), prepare=lambda model: model.bn1.eval())
    assert fused_calls == [False, False]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_in_one_graph() -> None:
    torch.manual_seed(0)
    plain = plain_block(act_func="swish")
    fast = copy.deepcopy(plain)
    tfnas_ext.accelerate(fast)
    compiled = torch.compile(copy.deepcopy(fast), fullgraph=True, backend="aot_eager")
    for step in range(2):
        x = images(step).float()
        got, want = compiled(x), plain(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        got.sum().backward()
        want.sum().backward()
    for a, b in zip(compiled.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    for p, q in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)


def test_frozen_weights_get_no_gradient(fused_calls: list[bool]) -> None:
    block = randomise(timm_block())
    for name, parameter in block.named_parameters():
        parameter.requires_grad_("conv_dw" in name or "bn3" in name)
    compare(block)
    assert all(fused_calls)


def test_type_of_the_computation(fused_calls: list[bool]) -> None:
    block = timm_block().to(torch.bfloat16)
    for dtype in (torch.float32, torch.float64):
        fast = copy.deepcopy(block)
        tfnas_ext.accelerate(fast, dtype=dtype, strict=True)
        x = images(7).to(torch.bfloat16).requires_grad_()
        out = fast(x)
        assert out.dtype == torch.bfloat16
        exact = copy.deepcopy(block).double()(x.double())
        assert (out.double() - exact).norm() < 0.01 * exact.norm()
        out.float().sum().backward()
        assert x.grad is not None
        assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in fast.parameters())
    assert all(fused_calls)


@pytest.mark.skipif(torch.bfloat16 not in NATIVE_DTYPES, reason="the kernels do not compute in bfloat16")
def test_bfloat16(fused_calls: list[bool]) -> None:
    """A bfloat16 network, a float32 one computing in it, and autocast: as near to float64 as plain bfloat16."""
    torch.manual_seed(0)
    block = timm_block()
    x = images(8, batch=16)
    exact = copy.deepcopy(block).double()(x)
    plain = copy.deepcopy(block).bfloat16()(x.bfloat16())
    allowed = 2 * (plain.double() - exact).norm()
    for model, dtype in ((copy.deepcopy(block).bfloat16(), None), (block, torch.bfloat16)):
        tfnas_ext.accelerate(model, dtype=dtype, strict=True)
        given = x.to(next(model.parameters()).dtype)
        out = model(given)
        assert out.dtype == given.dtype
        assert (out.double() - exact).norm() < allowed
        out.float().square().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())
    assert all(fused_calls)
    tfnas_ext.accelerate(block)
    fused_calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x.bfloat16())
        assert out.dtype == torch.bfloat16
        assert (out.double() - exact).norm() < allowed
        assert fused_calls == [True]
        assert block(x.float()).dtype == torch.float32  # the residual is: as plain autocast has it
    assert fused_calls == [True, False]


class Wide(nn.Module):
    """A block with names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.grow = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24))
        self.spread = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24))
        self.shrink = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.shrink(self.spread(self.grow(x).relu()).relu())


def wide_parts(block: Wide) -> tfnas_ext.BlockParts:
    return tfnas_ext.BlockParts(
        conv_pw=block.grow[0],
        bn1=block.grow[1],
        conv_dw=block.spread[0],
        bn2=block.spread[1],
        se=None,
        conv_pwl=block.shrink[0],
        bn3=block.shrink[1],
        acts=("relu", "relu"),
        residual=True,
    )


def test_registered_blocks(fused_calls: list[bool]) -> None:
    with pytest.raises(tfnas_ext.AccelerateError, match="no block"):
        tfnas_ext.accelerate(Wide(), strict=True)
    tfnas_ext.register_block(Wide, wide_parts)
    compare(randomise(Wide()))
    fused_calls.clear()
    other = Wide()
    other.scale = 0.5  # the adapter knows nothing of it, but the results are compared
    (left,) = tfnas_ext.accelerate(other).left
    assert left.reason == "its forward gives other results than its parts in training"


def test_registration_refuses_what_is_no_block() -> None:
    with pytest.raises(TypeError, match="cls must be a subclass"):
        tfnas_ext.register_block("Wide", wide_parts)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="adapter must be"):
        tfnas_ext.register_block(Wide, None)  # type: ignore[arg-type]


def test_changes_after_acceleration_are_noticed(fused_calls: list[bool]) -> None:
    """Whatever is done to a block later, it computes what its modules say."""

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * 2

    def dilate(block: nn.Module) -> None:
        block.conv_dw.dilation, block.conv_dw.padding = (2, 2), (2, 2)

    changes: list[tuple[Callable[[nn.Module], Any], bool]] = [
        (lambda block: block.conv_dw.register_forward_hook(hook), False),
        (lambda block: setattr(block, "se", nn.Identity()), True),
        (dilate, False),
        (lambda block: nn.utils.parametrizations.weight_norm(block.conv_pw), False),
        (lambda block: setattr(block.bn1, "act", nn.GELU()), False),
        (lambda block: setattr(block.bn2, "eps", 0.5), False),
        (lambda block: setattr(block, "has_skip", False), True),
        (lambda block: setattr(block.conv_dw, "padding_mode", "circular"), False),
        (lambda block: setattr(block.se.conv_reduce, "bias", None), False),
        (lambda block: setattr(block.conv_pwl, "weight", nn.Parameter(torch.ones_like(block.conv_pwl.weight))), True),
        (lambda block: block.register_forward_hook(hook), True),
    ]
    for change, fused in changes:
        fast = randomise(timm_block())
        tfnas_ext.accelerate(fast, strict=True)
        fast(images(0))
        plain = randomise(timm_block())
        plain.load_state_dict(fast.state_dict())
        for model in (plain, fast):
            change(model)
        fused_calls.clear()
        torch.testing.assert_close(fast(images(1)), plain(images(1)))
        assert fused_calls in ([fused], [] if not fused else [True])


def test_hooks_on_all_modules_see_the_inner_ones(fused_calls: list[bool]) -> None:
    fast = randomise(timm_block())
    tfnas_ext.accelerate(fast, strict=True)
    fused_calls.clear()
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        fast(images(0))
    finally:
        handle.remove()
    assert fast.conv_dw in seen
    assert fused_calls == []
    fast(images(0))
    assert fused_calls == [True]


def test_transforms_run_the_blocks_own_code() -> None:
    """In evaluation: in training PyTorch refuses to change running statistics inside a transform, and so do we."""
    plain = randomise(timm_block()).eval()
    fast = copy.deepcopy(plain)
    tfnas_ext.accelerate(fast, strict=True)
    x, seen = images(0), []
    for model in (plain, fast):
        weights = dict(model.named_parameters())

        def call(weights: dict[str, Tensor], x: Tensor, model: nn.Module = model) -> Tensor:
            return torch.func.functional_call(model, weights, (x,))

        def loss(weights: dict[str, Tensor], x: Tensor, call: Callable[..., Tensor] = call) -> Tensor:
            return call(weights, x).square().sum()

        results = [torch.vmap(call, (None, 0))(weights, x[:, None])]
        results += torch.func.grad(loss)(weights, x).values()
        results += torch.func.jvp(lambda x, call=call, weights=weights: call(weights, x), (x,), (x,))
        seen.append(results)
        model.train()
        with pytest.raises(RuntimeError, match=r"in-place operation|in-place|not batched"):
            torch.func.grad(loss)(weights, x)
        assert not any(torch._C._functorch.is_functorch_wrapped_tensor(buffer) for buffer in model.buffers())
    for got, want in zip(*seen[::-1], strict=True):
        torch.testing.assert_close(got, want)


def test_torchscript_says_what_to_do() -> None:
    model = nn.Sequential(plain_block(act_func="relu"))
    tfnas_ext.accelerate(model, strict=True)
    with pytest.raises(RuntimeError, match=r"tfnas_ext\.restore\(model\) before"):
        torch.jit.script(model)
    assert len(tfnas_ext.restore(model)) == 1
    torch.jit.script(model)


def test_second_derivatives_say_what_to_do() -> None:
    fast = randomise(timm_block())
    tfnas_ext.accelerate(fast, strict=True)
    x = images(0).requires_grad_()
    (grad,) = torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"tfnas_ext\.restore\(model\)"):
        grad.square().sum().backward()


@pytest.mark.parametrize("frozen", ["conv_pw.weight", "conv", "bn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_parts_in_every_type(frozen: str, dtype: torch.dtype) -> None:
    """The other gradients are those that a block of which nothing is frozen has."""
    free = randomise(timm_block()).to(dtype)
    tfnas_ext.accelerate(free, strict=True)
    partly = copy.deepcopy(free)
    for name, parameter in partly.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    for model in (free, partly):
        model(images(0).to(dtype)).float().square().sum().backward()
    for (name, got), want in zip(partly.named_parameters(), free.parameters(), strict=True):
        assert (got.grad is None) == name.startswith(frozen)
        if got.grad is not None and want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hooked", [False, True])
def test_compiling_looks_at_the_block(hooked: bool) -> None:
    """Also where the block was never called since it was changed."""
    plain = randomise(plain_block(act_func="relu"))
    fast = copy.deepcopy(plain)
    tfnas_ext.accelerate(fast, strict=True)
    if hooked:
        for model in (plain, fast):
            model.depth_conv.conv.register_forward_hook(lambda module, args, out: out * out)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(fast, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(images(0)), plain(images(0)))
    assert ("tfnas" in graphs[0]) == (not hooked)
