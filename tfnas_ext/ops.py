"""The fused elastic MBInvRes block: the functions of `reference` on native kernels, with autograd and fake kernels.

`mbinvres` and `mbinvres_with_statistics` take what their namesakes in `tfnas_ext.reference` take and give the same
numbers up to rounding. Statistics and sums are accumulated in float64 from short float32 sums; at a fixed number of
threads results are the same bits every time. Gradients are differentiable once. bfloat16 activations go with weights
in bfloat16 or float32; each weight's gradient has its type, products and sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tfnas_ext import reference
from tfnas_ext.backends import KERNEL_SIZES, choose_backend
from tfnas_ext.operators import working_dtype
from tfnas_ext.reference import BatchStatistics, Norm, SqueezeExcite

NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


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
    backend: str | None = None,
    design: str = "auto",
) -> Tensor:
    """`reference.mbinvres` by the fastest backend that can run the call.

    Args:
        x: [N, Cin, H, W], channels_last or not (converted once); the result is channels_last.
        backend: "cpu", "reference", or None for the fastest, on a GPU the reference; see `backends.choose_backend`.
        design: how the CPU kernels walk the block: "strips", "channels", or "auto", the measured rule. For tests.

    The rest and the errors are those of `reference.mbinvres`. Without a backend named, what native kernels do not do is
    done by the reference: other types than float32, float64 and bfloat16, kernels other than 3, 5 and 7, gradients
    through running statistics (`training` false), running statistics in some of the norms only, and what `torch.func`
    transforms (`grad`, `vmap`, `jvp`). Under bfloat16 autocast `x` is cast to bfloat16 and so is the result, under
    another one both to float32; weights stay as they are.
    """
    norms = (bn1, bn2, bn3) if conv_pw is not None else (bn2, bn3)
    given = [norm.running_mean is not None for norm in norms]
    by_batch = training or not any(given)
    tensors = _weights(conv_pw, conv_dw, conv_pwl, se, bn1, bn2, bn3)
    if _runs_native(x, tensors, backend, by_batch or (all(given) and not _needs_gradient([x, *tensors]))):
        options = (stride, act, residual, conv_dw.shape[0] if width is None else width, eps)
        if by_batch:
            return torch.ops.tfnas.mbinvres(x, *tensors, *options, design, se_act, se_gate)[0]
        running = [t for norm in (bn1, bn2, bn3) for t in (norm.running_mean, norm.running_var)]
        return torch.ops.tfnas.mbinvres_inference(x, *tensors, *running, *options, se_act, se_gate)
    return reference.mbinvres(
        x,
        conv_pw,
        conv_dw,
        conv_pwl,
        se=se,
        bn1=bn1,
        bn2=bn2,
        bn3=bn3,
        stride=stride,
        act=act,
        residual=residual,
        width=width,
        training=training,
        eps=eps,
        se_act=se_act,
        se_gate=se_gate,
    )


def mbinvres_with_statistics(
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
    eps: float = 1e-5,
    se_act: str | None = None,
    se_gate: str = "sigmoid",
    backend: str | None = None,
    design: str = "auto",
) -> tuple[Tensor, BatchStatistics]:
    """`mbinvres` in training, and the detached statistics; as `reference.mbinvres_with_statistics`."""
    tensors = _weights(conv_pw, conv_dw, conv_pwl, se, bn1, bn2, bn3)
    if not _runs_native(x, tensors, backend, True):
        return reference.mbinvres_with_statistics(
            x,
            conv_pw,
            conv_dw,
            conv_pwl,
            se=se,
            bn1=bn1,
            bn2=bn2,
            bn3=bn3,
            stride=stride,
            act=act,
            residual=residual,
            width=width,
            eps=eps,
            se_act=se_act,
            se_gate=se_gate,
        )
    used = conv_dw.shape[0] if width is None else width
    options = (stride, act, residual, used, eps, design, se_act, se_gate)
    out, flat, _ = torch.ops.tfnas.mbinvres(x, *tensors, *options)
    wide = [used] * (2 if conv_pw is None else 4)
    parts: list[Tensor | None] = list(flat.split([*wide, conv_pwl.shape[0], conv_pwl.shape[0]]))
    return out, BatchStatistics(*(parts if conv_pw is not None else [None, None, *parts]))  # type: ignore[arg-type]


def _needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _runs_native(x: Tensor, weights: Sequence[Tensor | None], backend: str | None, possible: bool) -> bool:
    """Whether native kernels run the call; `possible` says that its norms' statistics are no hindrance."""
    name = choose_backend(x.device, backend)
    if name == "cuda" and backend is not None:
        raise ValueError(
            "backend='cuda' has kernels for the layers of a supernet (tfnas_ext.engine) but none for one block; use "
            "backend='reference'"
        )
    if name != "cpu":
        return False
    conv_dw = weights[1]
    assert conv_dw is not None
    fits = possible and working_dtype(x) in NATIVE_DTYPES and conv_dw.dim() == 4 and conv_dw.shape[-1] in KERNEL_SIZES
    fits = fits and not is_transformed([x, *weights])
    if backend is not None and not fits:
        raise ValueError(
            f"backend={backend!r} runs float32, float64 and bfloat16, kernels 3, 5 and 7, running statistics in all "
            f"norms without gradients, and no torch.func transforms; got {x.dtype}, conv_dw of shape "
            f"{list(conv_dw.shape)}. Use backend='reference'."
        )
    return fits


def is_transformed(tensors: Sequence[Tensor | None]) -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which know nothing of the operators."""
    if torch.compiler.is_compiling():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(t is not None and (wrapped(t) or forward_ad.unpack_dual(t).tangent is not None) for t in tensors)


def _weights(
    conv_pw: Tensor | None,
    conv_dw: Tensor,
    conv_pwl: Tensor,
    se: SqueezeExcite | None,
    bn1: Norm,
    bn2: Norm,
    bn3: Norm,
) -> list[Tensor | None]:
    """The operators' 13 tensors."""
    gate = (None, None, None, None) if se is None else tuple(se)
    affine = [t for norm in (bn1, bn2, bn3) for t in (norm.weight, norm.bias)]
    if conv_pw is None:
        affine[:2] = [None, None]
    return [conv_pw, conv_dw, conv_pwl, *gate, *affine]
