"""What `accelerate` leaves alone, with which reason; errors leave a model as it was; strange types and devices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from published_blocks import MBInvertedResBlock
from torch import Tensor, nn

import tfnas_ext
from tfnas_ext import drop_in, drop_in_block
from tfnas_ext._native import MODULE

pytestmark = pytest.mark.skipif(MODULE is None, reason="the native module is not built")


def block(**options: Any) -> MBInvertedResBlock:
    options = {"in_channels": 8, "mid_channels": 24, "se_channels": 4, "out_channels": 8} | options
    return MBInvertedResBlock(**options)


def timm_block(**options: Any) -> nn.Module:
    blocks = pytest.importorskip("timm.models._efficientnet_blocks")
    return blocks.InvertedResidual(8, 8, **({"exp_ratio": 3.0} | options))


def replace_conv(name: str, **options: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        unit = getattr(model, name)
        old = unit.conv
        kept = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation", "groups")}
        unit.conv = nn.Conv2d(old.in_channels, old.out_channels, **(kept | {"bias": False} | options))

    return change


def replace_norm(norm: nn.Module) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model.depth_conv, "bn", norm)


def hooked(model: nn.Module) -> None:
    model.point_linear.conv.register_forward_hook(lambda module, args, out: out * 2)


def parametrized(model: nn.Module) -> None:
    nn.utils.parametrizations.spectral_norm(model.point_linear.conv)


def old_spectral_norm(model: nn.Module) -> None:
    nn.utils.spectral_norm(model.point_linear.conv)


def pruned(model: nn.Module) -> None:
    nn.utils.prune.l1_unstructured(model.point_linear.conv, "weight", 0.5)


def patched(model: nn.Module) -> None:
    own = model.forward
    model.forward = lambda x: own(x) * 2


def extended(model: nn.Module) -> None:
    model.dropout = nn.Dropout()


def scripted_part(model: nn.Module) -> None:
    model.point_linear = torch.jit.script(model.point_linear)


ALTERATIONS: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "dilation": (replace_conv("depth_conv", dilation=2, padding=2), "depth_conv.conv has dilation (2, 2)"),
    "grouped depthwise": (replace_conv("depth_conv", groups=12), "depth_conv.conv has 12 groups"),
    "grouped pointwise": (replace_conv("inverted_bottleneck", groups=2), "inverted_bottleneck.conv has 2 groups"),
    "bias": (replace_conv("point_linear", bias=True), "point_linear.conv has a bias"),
    "padding": (replace_conv("depth_conv", padding=(1, 1), kernel_size=(5, 5)), "has padding (1, 1), not (2, 2)"),
    "padding mode": (replace_conv("depth_conv", padding_mode="reflect"), "padding_mode 'reflect'"),
    "kernel": (replace_conv("depth_conv", kernel_size=(9, 9), padding=(4, 4)), "kernel (9, 9); the kernels know"),
    "flat kernel": (replace_conv("depth_conv", kernel_size=(3, 1), padding=(1, 0)), "kernel (3, 1)"),
    "wide pointwise": (replace_conv("point_linear", kernel_size=(3, 3), padding=(1, 1)), "not those of a pointwise"),
    "hook": (hooked, "point_linear.conv has hooks"),
    "parametrization": (parametrized, "has a parametrization"),
    "spectral norm": (old_spectral_norm, "has hooks"),
    "pruning": (pruned, "has hooks"),
    "patched forward": (patched, "forward of the block was replaced"),
    "another part": (extended, "a part that MBInvertedResBlock does not have: dropout"),
    "TorchScript": (scripted_part, "point_linear is a TorchScript module"),
    "group norm": (replace_norm(nn.GroupNorm(4, 24)), "depth_conv.bn is a GroupNorm"),
    "synchronised norm": (replace_norm(nn.SyncBatchNorm(24)), "depth_conv.bn is a SyncBatchNorm"),
    "eps": (replace_norm(nn.BatchNorm2d(24, eps=1e-2)), "different eps"),
    "activation": (lambda model: setattr(model.depth_conv, "act", nn.GELU()), "activation GELU is not known"),
    "two activations": (lambda model: setattr(model.depth_conv, "act", nn.ReLU()), "activations differ"),
    "half": (lambda model: model.half(), "is float16, which the kernels do not compute in, unless dtype=torch.float32"),
    "meta": (lambda model: model.to("meta"), "is on meta; drop-in blocks run on the CPU only"),
    "mixed types": (lambda model: model.point_linear.double(), "of several types"),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_look_alikes_are_left_alone(name: str) -> None:
    alter, reason = ALTERATIONS[name]
    model = nn.Sequential(block(), block())
    alter(model[1])
    classes = [type(module) for module in model.modules()]
    report = tfnas_ext.accelerate(model)
    assert [row.name for row in report.replaced] == ["0"]
    (left,) = report.left
    assert left.name == "1"
    assert reason in left.reason
    assert type(model[1]) is MBInvertedResBlock
    assert f"left: 1 (published_blocks.MBInvertedResBlock): {left.reason}" in str(report)
    tfnas_ext.restore(model)
    assert [type(module) for module in model.modules()] == classes
    with pytest.raises(tfnas_ext.AccelerateError, match="left: 1"):
        tfnas_ext.accelerate(model, strict=True)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pad_type": "same", "stride": 2}, "conv_dw is a Conv2dSame (TensorFlow's SAME padding), not a Conv2d"),
        ({"dilation": 2}, "conv_dw has dilation (2, 2)"),
        ({"s2d": 1}, "space-to-depth"),
        ({"dw_kernel_size": [3, 5]}, "conv_dw is a MixedConv2d"),
        ({"group_size": 8}, "not depthwise"),
        ({"act_layer": nn.GELU}, "activation GELU is not known"),
        ({"norm_layer": nn.GroupNorm}, "is a GroupNorm"),
        ({"aa_layer": "blur", "stride": 2}, "anti-aliasing"),
    ],
)
def test_timm_blocks_that_differ(options: dict[str, Any], reason: str) -> None:
    try:
        model = timm_block(**options)
    except Exception as error:  # an option that this timm does not know
        pytest.skip(f"timm: {error}")
    (left,) = tfnas_ext.accelerate(model).left
    assert reason in left.reason


def test_other_families_are_named() -> None:
    blocks = pytest.importorskip("timm.models._efficientnet_blocks")
    (left,) = tfnas_ext.accelerate(blocks.EdgeResidual(8, 8)).left
    assert "full convolution" in left.reason


def test_shared_modules_are_left_alone() -> None:
    shared = block()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": block(), "d": block(), "e": block()})
    model["d"].depth_conv.bn = model["c"].depth_conv.bn
    report = tfnas_ext.accelerate(model)
    assert [row.name for row in report.replaced] == ["e"]
    assert {row.name: row.reason for row in report.left} == {
        "a": "a is shared: it is b.0 too",
        "c": "c.depth_conv.bn is shared: it is d.depth_conv.bn too",
        "d": "c.depth_conv.bn is shared: it is d.depth_conv.bn too",
    }


def test_a_subclass_with_a_forward_of_its_own_is_left_alone() -> None:
    class Doubled(MBInvertedResBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Same(MBInvertedResBlock):
        pass

    model = nn.Sequential(Doubled(8, 24, 0, 8), Same(8, 24, 0, 8))
    report = tfnas_ext.accelerate(model)
    assert [row.name for row in report.replaced] == ["1"]
    assert "has a forward of its own" in report.left[0].reason


def test_a_namesake_that_computes_something_else_is_left_alone() -> None:
    namesake = type("MBInvertedResBlock", (nn.Module,), {"forward": lambda self, x: x})
    model = block()
    model.__class__ = namesake
    (left,) = tfnas_ext.accelerate(model).left
    assert "other results than its parts" in left.reason
    (left,) = tfnas_ext.accelerate(namesake()).left
    assert left.reason == "it has no depth_conv or no point_linear"


def test_an_error_while_converting_leaves_the_model_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(block(), block(), block())
    state = copy.deepcopy(model.state_dict())
    contents = [dict(module.__dict__) for module in model.modules()]
    done: list[nn.Module] = []

    def failing(module: nn.Module, dtype: torch.dtype | None) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(module)
        drop_in_block.fuse(module, dtype)

    monkeypatch.setattr(drop_in, "fuse", failing)
    with pytest.raises(KeyboardInterrupt):
        tfnas_ext.accelerate(model)
    assert done == [model[0]]
    assert [type(module) for module in model] == [MBInvertedResBlock] * 3
    assert [dict(module.__dict__) for module in model.modules()] == contents

    def broken(found: nn.Module) -> tfnas_ext.BlockParts:
        raise ZeroDivisionError

    class Other(nn.Module):
        pass

    tfnas_ext.register_block(Other, broken)
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError):
        tfnas_ext.accelerate(nn.Sequential(model, Other()))
    assert [type(module) for module in model] == [MBInvertedResBlock] * 3
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_check_leaves_no_trace() -> None:
    model = block()
    model.drop_connect_rate = 0.5
    model.depth_conv.bn.eval()
    state = copy.deepcopy(model.state_dict())
    contents = [(dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tfnas_ext.accelerate(model)
    assert torch.equal(torch.rand(1), expected)
    tfnas_ext.restore(model)
    assert [(dict(module.__dict__), dict(module._buffers)) for module in model.modules()] == contents
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        tfnas_ext.accelerate([block()])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be"):
        tfnas_ext.restore(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype"):
        tfnas_ext.accelerate(block(), dtype="float32")  # type: ignore[arg-type]
    for dtype in (torch.float16, torch.complex64, torch.int8):
        with pytest.raises(ValueError, match="dtype must be one of float32, float64"):
            tfnas_ext.accelerate(block(), dtype=dtype)
    assert tfnas_ext.accelerate(nn.Linear(2, 2)) == tfnas_ext.Report((), ())


def outcome(model: nn.Module, x: Tensor) -> Tensor | str:
    try:
        return model(x)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_strange_inputs_give_what_the_plain_block_gives() -> None:
    """float16, bfloat16, complex, sparse, meta, quantised, empty, wrong shapes and a single pixel."""
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    inputs = [
        x.half(),
        x.bfloat16(),
        x.double(),
        x.to(torch.complex64),
        x.to_sparse(),
        x.to("meta"),
        torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        x[:0],
        x[0],
        x[:, :4],
        x[:1, :, :1, :1],
        x.permute(0, 1, 3, 2),
        x.transpose(0, 1)[:, :, :, ::2].transpose(0, 1),
    ]
    torch.manual_seed(0)
    plain = block()
    fast = copy.deepcopy(plain)
    tfnas_ext.accelerate(fast)
    for given in inputs:
        for training in (True, False):
            with torch.no_grad():
                got, want = (outcome(copy.deepcopy(m).train(training), given) for m in (fast, plain))
            if isinstance(want, Tensor) and isinstance(got, Tensor):
                assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
                if not want.is_meta:
                    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            else:
                assert got == want


def test_autocast_tracing_and_export_see_the_plain_block() -> None:
    torch.manual_seed(0)
    plain = block().eval()
    fast = copy.deepcopy(plain)
    tfnas_ext.accelerate(fast)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fast(x), plain(x))
        traced = torch.jit.trace(fast, x)
        assert "tfnas" not in str(traced.inlined_graph)
        exported = torch.export.export(fast, (x,))
        assert "tfnas" not in str(exported.graph)


@pytest.mark.parametrize("reason", ["no native module", "TFNAS_BACKEND=reference"])
def test_without_native_kernels_everything_is_left(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason == "no native module":
        monkeypatch.setattr(drop_in._native, "MODULE", None)
    else:
        monkeypatch.setenv("TFNAS_BACKEND", "reference")
    (left,) = tfnas_ext.accelerate(block()).left
    assert left.reason.startswith(reason)


def test_torchscript_models_are_left_alone() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 1)))
    assert tfnas_ext.accelerate(scripted) == tfnas_ext.Report((), ())
    blocks = pytest.importorskip("torchvision.models.mobilenetv2")
    scripted = torch.jit.script(nn.Sequential(blocks.InvertedResidual(8, 8, 1, 3)))
    (left,) = tfnas_ext.accelerate(scripted).left
    assert left.reason == "it is a TorchScript module"
