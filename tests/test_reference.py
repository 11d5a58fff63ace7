"""The specification against ordinary nn.Modules, gradcheck, and its own rules for widths, statistics and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfnas_ext.reference import Norm, SqueezeExcite, mbinvres, mbinvres_with_statistics

ACTS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "swish": nn.SiLU, "hard_swish": nn.Hardswish}


class Textbook(nn.Module):
    """MBInvRes as one would write it with modules; `expand=False` leaves the first convolution out."""

    def __init__(
        self, cin: int, mid: int, cout: int, k: int, stride: int, act: str, se: int, expand: bool, affine: bool
    ):
        super().__init__()
        self.residual = stride == 1 and cin == cout
        self.pw = nn.Conv2d(cin, mid, 1, bias=False) if expand else None
        self.dw = nn.Conv2d(mid, mid, k, stride, k // 2, groups=mid, bias=False)
        self.pwl = nn.Conv2d(mid, cout, 1, bias=False)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(c, affine=affine) for c in (mid, mid, cout))
        self.act = ACTS[act]()
        self.reduce = nn.Conv2d(mid, se, 1) if se else None
        self.expand = nn.Conv2d(se, mid, 1) if se else None
        for norm in (self.bn1, self.bn2, self.bn3):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            if affine:
                nn.init.uniform_(norm.weight, 0.5, 2)
                nn.init.uniform_(norm.bias, -0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        t = x if self.pw is None else self.act(self.bn1(self.pw(x)))
        t = self.act(self.bn2(self.dw(t)))
        if self.reduce is not None and self.expand is not None:
            t = t * self.expand(self.act(self.reduce(t.mean((2, 3), keepdim=True)))).sigmoid()
        t = self.bn3(self.pwl(t))
        return t + x if self.residual else t

    def arguments(self, stride: int, act: str) -> tuple[list[Tensor | None], dict[str, Any]]:
        def norm(bn: nn.BatchNorm2d) -> Norm:
            return Norm(bn.weight, bn.bias, bn.running_mean, bn.running_var)

        se = None
        if self.reduce is not None and self.expand is not None:
            se = SqueezeExcite(self.reduce.weight, self.reduce.bias, self.expand.weight, self.expand.bias)
        weights = [None if self.pw is None else self.pw.weight, self.dw.weight, self.pwl.weight]
        keywords = dict(se=se, bn1=norm(self.bn1), bn2=norm(self.bn2), bn3=norm(self.bn3), stride=stride, act=act)
        return weights, keywords | {"residual": self.residual}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("cin", "mid", "cout", "k", "stride", "act", "se", "expand"),
    [
        (4, 10, 4, 3, 1, "relu", 0, True),
        (4, 9, 6, 5, 2, "swish", 3, True),
        (3, 7, 3, 7, 1, "hard_swish", 2, True),
        (5, 6, 5, 3, 2, "relu6", 0, True),
        (6, 6, 4, 3, 1, "relu", 2, False),
    ],
)
def test_equals_modules(
    cin: int, mid: int, cout: int, k: int, stride: int, act: str, se: int, expand: bool, affine: bool, training: bool
) -> None:
    torch.manual_seed(0)
    module = Textbook(cin, mid, cout, k, stride, act, se, expand, affine).double().train(training)
    x = torch.randn(3, cin, 7, 9, dtype=torch.float64, requires_grad=True)
    weights, keywords = module.arguments(stride, act)
    out = mbinvres(x, *weights, **keywords, training=training)
    before = [buffer.clone() for buffer in module.buffers()]
    leaves = [x, *module.parameters()]
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    assert all(torch.equal(a, b) for a, b in zip(before, module.buffers(), strict=True)), "running statistics written"
    want_out = module(x)
    torch.testing.assert_close(out, want_out, rtol=1e-12, atol=1e-12)
    want = torch.autograd.grad(want_out, leaves, grad, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("se", [0, 3])
def test_width_is_a_prefix(se: int) -> None:
    torch.manual_seed(1)
    module = Textbook(4, 10, 4, 5, 1, "swish", se, True, True).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    weights, keywords = module.arguments(1, "swish")
    out = mbinvres(x, *weights, **keywords, width=6)
    narrow = Textbook(4, 6, 4, 5, 1, "swish", se, True, True).double()
    state = {}
    for name, tensor in narrow.state_dict().items():
        full = module.state_dict()[name]
        state[name] = full[tuple(slice(0, n) for n in tensor.shape)]
    narrow.load_state_dict(state)
    torch.testing.assert_close(out, narrow(x), rtol=1e-12, atol=1e-12)
    out.square().sum().backward()
    assert module.dw.weight.grad is not None
    assert torch.count_nonzero(module.dw.weight.grad[6:]) == 0
    assert torch.count_nonzero(module.dw.weight.grad[:6]) > 0


@pytest.mark.parametrize("expand", [True, False])
def test_statistics_update_running_ones_as_torch_does(expand: bool) -> None:
    torch.manual_seed(2)
    module = Textbook(5, 5 if not expand else 8, 4, 3, 2, "relu", 0, expand, False).double().train()
    x = torch.randn(3, 5, 9, 8, dtype=torch.float64)
    weights, keywords = module.arguments(2, "relu")
    _, statistics = mbinvres_with_statistics(x, *weights, **keywords)
    old = [buffer.clone() for buffer in module.buffers()]
    module(x)
    pairs = list(zip(statistics[::2], statistics[1::2], strict=True))
    for norm, (mean, var), count in zip(
        (module.bn1, module.bn2, module.bn3), pairs, (3 * 9 * 8, 3 * 5 * 4, 3 * 5 * 4), strict=True
    ):
        if mean is None or var is None:
            assert norm is module.bn1
            assert not expand
            continue
        first = next(i for i, b in enumerate(module.buffers()) if b is norm.running_mean)
        torch.testing.assert_close(norm.running_mean, 0.9 * old[first] + 0.1 * mean)
        torch.testing.assert_close(norm.running_var, 0.9 * old[first + 1] + 0.1 * var * count / (count - 1))


def test_gradcheck() -> None:
    torch.manual_seed(3)
    shapes = [(2, 3, 4, 4), (5, 3, 1, 1), (5, 1, 3, 3), (3, 5, 1, 1), (2, 5, 1, 1), (2,), (5, 2, 1, 1), (5,)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def block(x: Tensor, pw: Tensor, dw: Tensor, pwl: Tensor, *se: Tensor) -> Tensor:
        return mbinvres(x, pw, dw, pwl, se=SqueezeExcite(*se), act="swish", residual=True, width=4)

    assert torch.autograd.gradcheck(block, tensors)


def test_bfloat16_stays_bfloat16() -> None:
    torch.manual_seed(4)
    x, pw, dw, pwl = (torch.randn(s) for s in ((4, 8, 8, 8), (16, 8, 1, 1), (16, 1, 3, 3), (8, 16, 1, 1)))
    want = mbinvres(x.double(), pw.double(), dw.double(), pwl.double(), act="swish", residual=True)
    out, statistics = mbinvres_with_statistics(
        x.bfloat16(), pw.bfloat16(), dw.bfloat16(), pwl.bfloat16(), act="swish", residual=True
    )
    assert out.dtype == torch.bfloat16
    assert statistics.mean2.dtype == torch.float32
    assert (out.double() - want).abs().max() < 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act": "gelu"}, "act must be one of"),
        ({"stride": 3}, "stride must be 1 or 2"),
        ({"width": 0}, r"width must be 1\.\.6, not 0"),
        ({"width": 7}, r"width must be 1\.\.6, not 7"),
        ({"residual": True, "stride": 2}, "residual needs stride 1"),
        ({"conv_pw": torch.zeros(6, 5, 1, 1)}, "conv_pw must be"),
        ({"conv_pw": None}, "without conv_pw they must be equal"),
        ({"conv_dw": torch.zeros(6, 1, 4, 4)}, "conv_dw must be"),
        ({"conv_pwl": torch.zeros(4, 5, 1, 1)}, "conv_pwl must be"),
        ({"x": torch.zeros(4, 4, 4)}, "x must be"),
        (
            {"se": SqueezeExcite(*(torch.zeros(s) for s in ((2, 6, 1, 1), (2,), (5, 2, 1, 1), (6,))))},
            "se.expand_weight",
        ),
        ({"x": torch.zeros(1, 4, 1, 1)}, "more than 1 value per channel"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "x": torch.randn(2, 4, 4, 4),
        "conv_pw": torch.randn(6, 4, 1, 1),
        "conv_dw": torch.randn(6, 1, 3, 3),
        "conv_pwl": torch.randn(4, 6, 1, 1),
    }
    mbinvres(**good)
    with pytest.raises(ValueError, match=message):
        mbinvres(**{**good, **change})
