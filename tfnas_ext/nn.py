"""`MBInvRes`: the inverted residual block as a module on the fused kernels, with timm's names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tfnas_ext import ops
from tfnas_ext.elastic import importance_order, kept_channels, permute_channels_, select_norm, select_se
from tfnas_ext.reference import ACTIVATIONS, GATES, BatchStatistics, Norm, SqueezeExcite


class SqueezeExciteWeights(nn.Module):
    """The two 1x1 convolutions of a squeeze-and-excitation, named as timm's; `MBInvRes` does the arithmetic."""

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, hidden_channels, 1)
        self.conv_expand = nn.Conv2d(hidden_channels, channels, 1)


class MBInvRes(nn.Module):
    """Expand 1x1, depthwise k x k, optional squeeze and excitation, project 1x1, a batch norm after each convolution.

    Children, and so the names in a state dict, are timm's InvertedResidual's: `conv_pw, bn1, conv_dw, bn2, se,
    conv_pwl, bn3`. With `max_width=None` there is no expansion: no `conv_pw` and `bn1`, the depthwise convolution
    reads the input.

    Input [N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)], channels_last. In training
    the running statistics, where there are some, are updated as `nn.BatchNorm2d` does.

    The block is elastic: of its `max_width` mid channels it runs the first ones (`set_width`) or any (`set_mask`).
    The others have no part in the result, get zero gradients, and keep their running statistics. Which run is no part
    of the state dict.

    Args:
        max_width: mid channels that there are, or None for no expansion.
        kernel_size: 3, 5 or 7 on native kernels; any odd one on the reference.
        se_channels: hidden channels of squeeze and excitation, 0 for none.
        act: a key of `reference.ACTIVATIONS`.
        se_act: activation inside squeeze and excitation; None is `act`.
        se_gate: its last function, a key of `reference.GATES`.
        residual: add the input; None adds it where stride is 1 and the channels are equal.
        affine, running_stats: of the batch norms; the supernet has neither.
        momentum: of the running statistics; None averages all batches alike.
        width: mid channels in use at first, as by `set_width`; None is all of them.
        backend: see `ops.mbinvres`.

    Raises:
        ValueError: an argument out of range (it is named), here and in every method.
    """

    kept: Tensor | None  # positions of the channels in use where they are no prefix

    def __init__(
        self,
        in_channels: int,
        max_width: int | None,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        se_channels: int = 0,
        act: str = "relu",
        se_act: str | None = None,
        se_gate: str = "sigmoid",
        residual: bool | None = None,
        affine: bool = True,
        running_stats: bool = True,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        width: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for argument, name, known in (
            ("act", act, ACTIVATIONS),
            ("se_act", se_act or act, ACTIVATIONS),
            ("se_gate", se_gate, GATES),
        ):
            if name not in known:
                raise ValueError(f"{argument} must be one of {', '.join(known)}, not {name!r}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {kernel_size}")
        same = stride == 1 and in_channels == out_channels
        if residual and not same:
            raise ValueError(
                f"residual needs stride 1 and equal channels, not {stride}, {in_channels} -> {out_channels}"
            )

        def norm(channels: int) -> nn.BatchNorm2d:
            return nn.BatchNorm2d(channels, eps, momentum, affine, running_stats)

        mid = in_channels if max_width is None else max_width
        self.conv_pw = None if max_width is None else nn.Conv2d(in_channels, mid, 1, bias=False)
        self.bn1 = None if max_width is None else norm(mid)
        self.conv_dw = nn.Conv2d(mid, mid, kernel_size, stride, kernel_size // 2, groups=mid, bias=False)
        self.bn2 = norm(mid)
        self.se = SqueezeExciteWeights(mid, se_channels) if se_channels else None
        self.conv_pwl = nn.Conv2d(mid, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.stride, self.act, self.eps, self.momentum = stride, act, eps, momentum
        self.se_act, self.se_gate = se_act, se_gate
        self.residual = same if residual is None else residual
        self.backend = backend
        self.register_buffer("kept", None, persistent=False)
        self.set_width(width)

    @property
    def max_width(self) -> int:
        """Mid channels that there are."""
        return self.conv_dw.out_channels

    @property
    def width(self) -> int:
        """Mid channels in use."""
        return self._width

    def set_width(self, width: int | None) -> None:
        """Run the first `width` mid channels, 1..max_width; None is all. Undoes `set_mask`."""
        width = self.max_width if width is None else width
        if not 1 <= width <= self.max_width:
            raise ValueError(f"width must be in 1..{self.max_width}, not {width}")
        self._require_expansion(width)
        self._width, self.kept = width, None

    def set_mask(self, mask: Tensor | None) -> None:
        """Run the mid channels where `mask`, bool [max_width], is true: as if the block had no others. None is all.

        Their weights are gathered in every forward pass; a mask that keeps a prefix is `set_width`, without that cost.
        """
        if mask is None:
            return self.set_width(None)
        kept = kept_channels(mask, self.max_width).to(self.conv_dw.weight.device)
        self._require_expansion(len(kept))
        prefix = int(kept[-1]) + 1 == len(kept)
        self._width, self.kept = len(kept), None if prefix else kept
        return None

    def set_importance(self, scores: Tensor, optimizer: torch.optim.Optimizer | None = None) -> Tensor:
        """Sort the mid channels so that `set_width` keeps the most important ones. The block computes what it did.

        Parameters, running statistics and gradients move in place. Channels of a mask stay those it keeps; after
        `set_width` other channels run than before.

        Args:
            scores: [max_width], larger is more important; ties stay in their order.
            optimizer: its state of the moved parameters (momentum and the like) moves along. An optimizer that is not
                given here goes on with the state of other channels: give it, or reset it.

        Returns:
            int64 [max_width]: where the channel now at each position was before.
        """
        order = importance_order(scores, self.max_width).to(self.conv_dw.weight.device)
        self._require_expansion(None)
        permute_channels_(self, order, optimizer)
        if self.kept is not None:
            mask = torch.zeros(self.max_width, dtype=torch.bool, device=order.device)
            mask[self.kept] = True
            self.set_mask(mask[order])
        return order

    def forward(self, x: Tensor, width: int | None = None) -> Tensor:
        """The block of `x`; `width` runs that many first channels in this call, whatever was set."""
        kept = self.kept if width is None else None
        weights, options = self._arguments(kept)
        options["width"] = (self._width if width is None else width) if kept is None else None
        norms = (self.bn1, self.bn2, self.bn3)
        if not self.training or not any(m is not None and m.track_running_stats for m in norms):
            return ops.mbinvres(x, *weights, **options, training=self.training)
        out, statistics = ops.mbinvres_with_statistics(x, *weights, **options)
        wide, narrow = x.shape[0] * x.shape[2] * x.shape[3], out.numel() // out.shape[1]
        self._update_running(statistics, kept, wide, narrow)
        return out

    def extra_repr(self) -> str:
        return f"max_width={self.max_width}, width={self.width}, act={self.act}, residual={self.residual}"

    def _require_expansion(self, width: int | None) -> None:
        """Without expansion the mid channels are the input's: they are neither fewer nor in another order."""
        if self.conv_pw is None and width != self.max_width:
            raise ValueError(f"a block without expansion runs all of its {self.max_width} channels, in their order")

    def _arguments(self, kept: Tensor | None) -> tuple[tuple[Tensor | None, Tensor, Tensor], dict[str, Any]]:
        """Weights and options of `ops.mbinvres`, of the channels `kept` where there are such."""
        conv_pw = None if self.conv_pw is None else self.conv_pw.weight
        conv_dw, conv_pwl, se = self.conv_dw.weight, self.conv_pwl.weight, self._se()
        bn1, bn2 = _norm(self.bn1), _norm(self.bn2)
        if kept is not None:
            assert conv_pw is not None  # set_mask refuses it
            conv_pw, conv_dw = conv_pw.index_select(0, kept), conv_dw.index_select(0, kept)
            conv_pwl = conv_pwl.index_select(1, kept)
            bn1, bn2 = select_norm(bn1, kept), select_norm(bn2, kept)
            se = None if se is None else select_se(se, kept)
        options: dict[str, Any] = {"se": se, "bn1": bn1, "bn2": bn2, "bn3": _norm(self.bn3), "stride": self.stride}
        options |= {"act": self.act, "residual": self.residual, "eps": self.eps, "backend": self.backend}
        options |= {"se_act": self.se_act, "se_gate": self.se_gate}
        return (conv_pw, conv_dw, conv_pwl), options

    def _se(self) -> SqueezeExcite | None:
        if self.se is None:
            return None
        reduce, expand = self.se.conv_reduce, self.se.conv_expand
        assert reduce.bias is not None
        assert expand.bias is not None
        return SqueezeExcite(reduce.weight, reduce.bias, expand.weight, expand.bias)

    def _update_running(self, statistics: BatchStatistics, kept: Tensor | None, wide: int, narrow: int) -> None:
        """After a batch of `wide` values a channel before the depthwise convolution and `narrow` ones after it."""
        for module, mean, var, count, channels in (
            (self.bn1, statistics.mean1, statistics.var1, wide, kept),
            (self.bn2, statistics.mean2, statistics.var2, narrow, kept),
            (self.bn3, statistics.mean3, statistics.var3, narrow, None),
        ):
            if module is not None and module.track_running_stats and mean is not None and var is not None:
                _update_running(module, mean, var, count, channels)


def _norm(module: nn.BatchNorm2d | None) -> Norm:
    if module is None:
        return Norm()
    return Norm(module.weight, module.bias, module.running_mean, module.running_var)


@torch.no_grad()
def _update_running(module: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int, kept: Tensor | None) -> None:
    """PyTorch's update from a batch of `count` values a channel, of the channels `kept`, or of the first ones."""
    assert module.running_mean is not None
    assert module.running_var is not None
    assert module.num_batches_tracked is not None
    module.num_batches_tracked.add_(1)
    unbiased = var * (count / max(count - 1, 1))
    for running, batch in ((module.running_mean, mean), (module.running_var, unbiased)):
        new = batch.to(running.dtype)
        # The average of all batches weighs by a tensor: reading it would wait for a GPU and break a compiled graph.
        share = module.num_batches_tracked.reciprocal().to(new.dtype) if module.momentum is None else module.momentum
        if kept is None:
            running[: new.shape[0]].lerp_(new, share)
        else:
            running.index_copy_(0, kept, running.index_select(0, kept).lerp_(new, share))
