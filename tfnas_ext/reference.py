"""The elastic MBInvRes block in plain PyTorch: the executable specification of every fused kernel.

Whatever a native kernel computes is compared with these functions in float64. They are also the `reference` backend:
ordinary differentiable PyTorch operations, on any device, in any floating point type.

    y1 = conv_pw x      h1 = bn1(y1)   a1 = act(h1)            expand; left out where `conv_pw` is None, then a1 = x
    y2 = conv_dw a1     h2 = bn2(y2)   a2 = act(h2)            depthwise k x k, stride s, zero padding k // 2 (of a1)
    z  = a2 * gate(E act(R mean_hw(a2) + b_R) + b_E)           squeeze and excitation; left out where `se` is None
    y3 = conv_pwl z     out = bn3(y3) (+ x)                    project, and the residual where asked for
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "swish": F.silu,
    "hard_swish": F.hardswish,
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "hard_sigmoid": F.hardsigmoid}


class Norm(NamedTuple):
    """What a batch norm has besides its input; `Norm()` is the supernet's: no affine, no running statistics.

    All tensors are [C]. `weight` and `bias` come together or not at all, and so do the running statistics
    (`running_var` is a variance, not a deviation).
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None


class SqueezeExcite(NamedTuple):
    """Weights of a squeeze-and-excitation with `se` hidden channels, shaped as those of two 1x1 `Conv2d`."""

    reduce_weight: Tensor  # [se, E, 1, 1]
    reduce_bias: Tensor  # [se]
    expand_weight: Tensor  # [E, se, 1, 1]
    expand_bias: Tensor  # [E]


class BatchStatistics(NamedTuple):
    """Mean and biased variance over N, H and W of each convolution's output; `mean1`, `var1` are None without expand.

    float32 tensors of the width (`mean1` .. `var2`) or of the output channels; float64 where the input is.
    """

    mean1: Tensor | None
    var1: Tensor | None
    mean2: Tensor
    var2: Tensor
    mean3: Tensor
    var3: Tensor


def batch_norm(y: Tensor, norm: Norm, training: bool, eps: float) -> Tensor:
    """Batch norm of `y` [N, C, H, W]; running statistics are read where `training` is false, and never written."""
    use_batch = training or norm.running_mean is None
    mean, var = (None, None) if use_batch else (norm.running_mean, norm.running_var)
    return F.batch_norm(y, mean, var, norm.weight, norm.bias, training=use_batch, eps=eps)


def squeeze_excite(a: Tensor, se: SqueezeExcite, act: str, gate: str = "sigmoid") -> Tensor:
    """`a` [N, E, H, W] scaled by a gate per image and channel; `gate` is a key of `GATES`."""
    hidden = ACTIVATIONS[act](F.conv2d(a.mean((2, 3), keepdim=True), se.reduce_weight, se.reduce_bias))
    return a * GATES[gate](F.conv2d(hidden, se.expand_weight, se.expand_bias))


def mbinvres(
    x: Tensor,
    conv_pw: Tensor | None,
    conv_dw: Tensor,
    conv_pwl: Tensor,
    *,
    se: SqueezeExcite | None = None,
    bn1: Norm = Norm(),  # noqa: B008 (immutable)
    bn2: Norm = Norm(),  # noqa: B008
    bn3: Norm = Norm(),  # noqa: B008
    stride: int = 1,
    act: str = "relu",
    residual: bool = False,
    width: int | None = None,
    training: bool = True,
    eps: float = 1e-5,
    se_act: str | None = None,
    se_gate: str = "sigmoid",
    convolved: list[Tensor] | None = None,
) -> Tensor:
    """The block of the module's docstring, for `x` [N, Cin, H, W] -> [N, Cout, ceil(H / stride), ceil(W / stride)].

    Args:
        x: any floating point type and memory format; weights have its type and device (or are float32 where `x` is
            bfloat16 or float16: then they are rounded, batch norm tensors aside).
        conv_pw: expand weights [E, Cin, 1, 1], or None for no expansion (then E = Cin).
        conv_dw: depthwise weights [E, 1, k, k], k odd.
        conv_pwl: project weights [Cout, E, 1, 1].
        se: squeeze-and-excitation weights, or None.
        bn1, bn2, bn3: batch norms after the three convolutions; bn1 is not used without expansion.
        stride: of the depthwise convolution, 1 or 2.
        act: a key of `ACTIVATIONS`.
        residual: add `x` to the result; needs stride 1 and Cin = Cout.
        width: channels in use, 1..E: the first `width` of E everywhere (rows of conv_pw and conv_dw, columns of
            conv_pwl, and so on). The others have no part in the result and get zero gradient. None means E.
            Without expansion only E is possible.
        training: batch statistics (true), or running ones where a norm has them. Nothing is written either way.
        eps: of the three batch norms.
        se_act: activation inside squeeze and excitation; None is `act`.
        se_gate: its last function, a key of `GATES`.
        convolved: a list to which y1 (with expansion), y2 and y3 are appended, for those who need what is between.

    Raises:
        ValueError: shapes, strides or names that do not fit (the argument is named); one value per channel in training.
    """
    se_act = act if se_act is None else se_act
    _check(x, conv_pw, conv_dw, conv_pwl, se, stride, act, residual, width, se_act, se_gate)
    if width is not None and width != conv_dw.shape[0]:
        assert conv_pw is not None  # _check refuses it
        conv_pw, conv_dw, conv_pwl = conv_pw[:width], conv_dw[:width], conv_pwl[:, :width]
        bn1, bn2 = _narrow_norm(bn1, width), _narrow_norm(bn2, width)
        se = None if se is None else _narrow_se(se, width)
    if x.dtype.itemsize == 2:
        conv_pw = None if conv_pw is None else conv_pw.to(x.dtype)
        conv_dw, conv_pwl = conv_dw.to(x.dtype), conv_pwl.to(x.dtype)
        se = None if se is None else SqueezeExcite(*(w.to(x.dtype) for w in se))
    activation = ACTIVATIONS[act]
    seen = [] if convolved is None else convolved
    a1 = x
    if conv_pw is not None:
        y1 = F.conv2d(x, conv_pw)
        seen.append(y1)
        a1 = activation(batch_norm(y1, bn1, training, eps))
    y2 = F.conv2d(a1, conv_dw, stride=stride, padding=conv_dw.shape[-1] // 2, groups=conv_dw.shape[0])
    z = activation(batch_norm(y2, bn2, training, eps))
    if se is not None:
        z = squeeze_excite(z, se, se_act, se_gate)
    y3 = F.conv2d(z, conv_pwl)
    seen += [y2, y3]
    out = batch_norm(y3, bn3, training, eps)
    return out + x if residual else out


def mbinvres_with_statistics(
    x: Tensor, conv_pw: Tensor | None, conv_dw: Tensor, conv_pwl: Tensor, **options: Any
) -> tuple[Tensor, BatchStatistics]:
    """`mbinvres` in training (same arguments), and the detached batch statistics, from which running ones are updated.

    PyTorch's update is running = (1 - momentum) * running + momentum * batch, with the variance times M / (M - 1) for
    M = N * H * W values a channel of that convolution's output.
    """
    convolved: list[Tensor] = []
    out = mbinvres(x, conv_pw, conv_dw, conv_pwl, **options, training=True, convolved=convolved)
    moments: list[Any] = [] if conv_pw is not None else [None, None]
    for y in convolved:
        wide = y.detach().to(torch.promote_types(y.dtype, torch.float32))
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        moments += [mean, var]
    return out, BatchStatistics(*moments)


def _narrow_norm(norm: Norm, width: int) -> Norm:
    return Norm(*(None if tensor is None else tensor[:width] for tensor in norm))


def _narrow_se(se: SqueezeExcite, width: int) -> SqueezeExcite:
    return SqueezeExcite(se.reduce_weight[:, :width], se.reduce_bias, se.expand_weight[:width], se.expand_bias[:width])


def _check(
    x: Tensor,
    conv_pw: Tensor | None,
    conv_dw: Tensor,
    conv_pwl: Tensor,
    se: SqueezeExcite | None,
    stride: int,
    act: str,
    residual: bool,
    width: int | None,
    se_act: str,
    se_gate: str,
) -> None:
    for argument, name, known in (
        ("act", act, ACTIVATIONS),
        ("se_act", se_act, ACTIVATIONS),
        ("se_gate", se_gate, GATES),
    ):
        if name not in known:
            raise ValueError(f"{argument} must be one of {', '.join(known)}, not {name!r}")
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, not {stride}")
    if x.dim() != 4:
        raise ValueError(f"x must be [N, Cin, H, W], not {list(x.shape)}")
    if conv_dw.dim() != 4 or conv_dw.shape[1] != 1 or conv_dw.shape[2] != conv_dw.shape[3] or conv_dw.shape[2] % 2 != 1:
        raise ValueError(f"conv_dw must be [E, 1, k, k] with k odd, not {list(conv_dw.shape)}")
    mid, cin = conv_dw.shape[0], x.shape[1]
    if conv_pw is None and mid != cin:
        raise ValueError(f"conv_dw has {mid} channels, x has {cin}: without conv_pw they must be equal")
    if conv_pw is not None and list(conv_pw.shape) != [mid, cin, 1, 1]:
        raise ValueError(f"conv_pw must be [E, Cin, 1, 1] = {[mid, cin, 1, 1]}, not {list(conv_pw.shape)}")
    if conv_pwl.dim() != 4 or list(conv_pwl.shape[1:]) != [mid, 1, 1]:
        raise ValueError(f"conv_pwl must be [Cout, E, 1, 1] with E = {mid}, not {list(conv_pwl.shape)}")
    if se is not None:
        hidden = se.reduce_weight.shape[0]
        for name, expected in (
            ("reduce_weight", [hidden, mid, 1, 1]),
            ("reduce_bias", [hidden]),
            ("expand_weight", [mid, hidden, 1, 1]),
            ("expand_bias", [mid]),
        ):
            shape = list(getattr(se, name).shape)
            if shape != expected:
                raise ValueError(f"se.{name} must be {expected}, not {shape}")
    if residual and (stride != 1 or conv_pwl.shape[0] != cin):
        raise ValueError(f"residual needs stride 1 and Cout = Cin, not stride {stride}, {cin} -> {conv_pwl.shape[0]}")
    if width is not None and not (1 <= width <= mid and (conv_pw is not None or width == mid)):
        raise ValueError(f"width must be {'1..' if conv_pw is not None else ''}{mid}, not {width}")
