"""The module: timm's names, the same numbers as the plain composition, running statistics as nn.BatchNorm2d's."""

from __future__ import annotations

import pytest
import torch

from tfnas_ext import ops
from tfnas_ext.nn import MBInvRes
from tfnas_ext.reference import ACTIVATIONS, GATES


def plain(block: MBInvRes, x: torch.Tensor) -> torch.Tensor:
    """The block's own modules applied one after the other."""
    act, se_act = (ACTIVATIONS[name or block.act] for name in (block.act, block.se_act))
    h = x
    if block.conv_pw is not None:
        assert block.bn1 is not None
        h = act(block.bn1(block.conv_pw(x)))
    h = act(block.bn2(block.conv_dw(h)))
    if block.se is not None:
        h = h * GATES[block.se_gate](block.se.conv_expand(se_act(block.se.conv_reduce(h.mean((2, 3), keepdim=True)))))
    h = block.bn3(block.conv_pwl(h))
    return h + x if block.residual else h


@pytest.mark.parametrize("mid", [None, 24])
@pytest.mark.parametrize("se", [0, 4, -4])
def test_like_the_plain_composition(mid: int | None, se: int) -> None:
    """Negative `se`: with an activation and a gate of its own."""
    torch.manual_seed(1)
    own = {"se_act": "relu", "se_gate": "hard_sigmoid"} if se < 0 else {}
    block = MBInvRes(8, mid, 8, 5, se_channels=abs(se), act="swish", **own).double()
    twin = MBInvRes(8, mid, 8, 5, se_channels=abs(se), act="swish", **own).double()
    twin.load_state_dict(block.state_dict())
    for _ in range(3):
        x = torch.randn(4, 8, 6, 7, dtype=torch.float64, requires_grad=True)
        got, want = block(x), plain(twin, x)
        torch.testing.assert_close(got, want)
        dout = torch.randn_like(want)
        for a, b in zip(
            torch.autograd.grad(got, [x, *block.parameters()], dout),
            torch.autograd.grad(want, [x, *twin.parameters()], dout),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(block.state_dict()[name], value, msg=name)
    block.eval()
    twin.eval()
    with torch.no_grad():
        torch.testing.assert_close(block(x), plain(twin, x))


def test_names_are_timms() -> None:
    names = {name.rsplit(".", 1)[0] for name in MBInvRes(8, 16, 8, se_channels=2).state_dict()}
    assert names == {"conv_pw", "bn1", "conv_dw", "bn2", "se.conv_reduce", "se.conv_expand", "conv_pwl", "bn3"}


def test_width_touches_the_first_channels_only() -> None:
    torch.manual_seed(2)
    block = MBInvRes(8, 16, 8, act="swish", width=5)
    block(torch.randn(4, 8, 6, 7)).sum().backward()
    assert block.conv_dw.weight.grad is not None
    assert block.conv_dw.weight.grad[5:].abs().max() == 0
    assert block.bn2.running_mean is not None
    assert torch.equal(block.bn2.running_mean[5:], torch.zeros(11))
    assert block.bn2.running_mean[:5].abs().min() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"act": "gelu"}, "act must be one of"),
        ({"se_act": "gelu"}, "se_act must be one of"),
        ({"se_gate": "tanh"}, "se_gate must be one of sigmoid, hard_sigmoid"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"residual": True, "stride": 2}, "residual needs stride 1"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MBInvRes(8, 16, 8, **arguments)


def test_single_blocks_on_a_gpu_run_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module built with CUDA has no kernels for them."""
    torch.manual_seed(1)
    block, x = MBInvRes(8, 24, 8, se_channels=4).double(), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    monkeypatch.setattr(ops, "choose_backend", lambda device, backend: "cuda")
    for mode in (True, False):
        torch.testing.assert_close(block.train(mode)(x), plain(block, x))
    block.backend = "cuda"
    with pytest.raises(ValueError, match="none for one block"):
        block(x)
