"""The weights of one searchable layer, all candidates in seven tensors, each candidate's width a prefix of its rows."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tfnas_ext.engine_spec import LayerSpec

ROLES = (
    "expand",
    "depthwise",
    "project",
    "se_reduce_weight",
    "se_reduce_bias",
    "se_expand_weight",
    "se_expand_bias",
)


class Offsets(NamedTuple):
    """Where one candidate starts in a layer's tensors: a row of `expand` and `project`, an element of the flat ones."""

    mid: int
    depthwise: int
    se_weight: int  # of se_reduce_weight and se_expand_weight
    se_reduce_bias: int
    se_expand_bias: int


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only when they are written to, where the system can: what is not trained needs none."""
    size = math.prod(shape) * dtype.itemsize
    if sys.platform != "linux" or size == 0 or torch.get_default_device().type != "cpu":
        return torch.zeros(shape, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class PackedLayer(nn.Module):
    """Weights and SGD momentum of a layer's candidates, concatenated at maximum width, mid channel first.

    With E the sum of the candidates' maximum widths (the identity has none), and the candidates in the spec's order:

    - `expand` [E, Cin] and `project` [E, Cout]
    - `depthwise`, 1-D: candidate i's [max_width, k, k], row-major, from `offsets[i].depthwise`
    - `se_reduce_weight` and `se_expand_weight`, 1-D: [max_width, se_channels] each (the reduce weights are transposed,
      so that a width is a prefix), from `offsets[i].se_weight`
    - `se_reduce_bias`, 1-D: [se_channels]; `se_expand_bias`, 1-D: [max_width]

    So the first `width` channels of a candidate are one contiguous range of every tensor. Each parameter has a
    momentum buffer of the same shape, `<role>_momentum`. A state dict names candidates, not packed tensors:
    `<candidate>.conv_pw.weight` [max_width, Cin, 1, 1], `.conv_dw.weight` [max_width, 1, k, k], `.conv_pwl.weight`
    [Cout, max_width, 1, 1], `.se.conv_reduce.weight` [se, max_width, 1, 1], `.se.conv_reduce.bias`,
    `.se.conv_expand.weight` [max_width, se, 1, 1], `.se.conv_expand.bias`, views of the parameters.
    """

    def __init__(
        self, spec: LayerSpec, *, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        offsets: list[Offsets] = []
        end = Offsets(0, 0, 0, 0, 0)
        for c in spec.candidates:
            offsets.append(end)
            se_width = c.max_width if c.se_channels else 0
            sizes = (c.max_width, c.max_width * c.kernel_size**2, se_width * c.se_channels, c.se_channels, se_width)
            end = Offsets(*(a + b for a, b in zip(end, sizes, strict=True)))
        self.offsets = tuple(offsets)
        shapes = (
            (end.mid, spec.in_channels),
            (end.depthwise,),
            (end.mid, spec.out_channels),
            (end.se_weight,),
            (end.se_reduce_bias,),
            (end.se_weight,),
            (end.se_expand_bias,),
        )
        for role, shape in zip(ROLES, shapes, strict=True):
            self.register_parameter(role, nn.Parameter(torch.zeros(shape, dtype=dtype)))
            self.register_buffer(f"{role}_momentum", _untouched_zeros(shape, dtype), persistent=False)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weights of variance 2 / fan out (He et al.), zero biases, as is usual for these blocks."""
        for name, weight in self.named_views(self.weights()):
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            else:
                fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
                if name.endswith("conv_dw.weight"):
                    fan_out //= weight.shape[0]
                with torch.no_grad():
                    weight.normal_(0, math.sqrt(2 / fan_out), generator=generator)

    def weights(self) -> list[Tensor]:
        """The parameters' tensors in the order of `ROLES`."""
        return [getattr(self, role) for role in ROLES]

    def momenta(self) -> list[Tensor]:
        """The momentum buffers in the order of `ROLES`."""
        return [getattr(self, f"{role}_momentum") for role in ROLES]

    def prefix(self, packed: list[Tensor], candidate: int, width: int) -> list[Tensor]:
        """Views of the first `width` channels of a candidate in `packed` (`weights()` or `momenta()`).

        In the order of `ROLES`: [width, Cin], [width, k, k], [width, Cout], and with SE [width, se], [se], [width, se],
        [width]; three tensors without SE, none for the identity. All are contiguous.
        """
        spec, at = self.spec.candidates[candidate], self.offsets[candidate]
        if spec.is_skip:
            return []
        expand, depthwise, project, reduce_weight, reduce_bias, expand_weight, expand_bias = packed
        k, se = spec.kernel_size, spec.se_channels
        views = [
            expand[at.mid : at.mid + width],
            depthwise[at.depthwise : at.depthwise + width * k * k].view(width, k, k),
            project[at.mid : at.mid + width],
        ]
        if se:
            views += [
                reduce_weight[at.se_weight : at.se_weight + width * se].view(width, se),
                reduce_bias[at.se_reduce_bias : at.se_reduce_bias + se],
                expand_weight[at.se_weight : at.se_weight + width * se].view(width, se),
                expand_bias[at.se_expand_bias : at.se_expand_bias + width],
            ]
        return views

    def named_views(self, packed: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Names and views of every candidate at maximum width in `packed`, shaped as Conv2d weights (see the class)."""
        for index, spec in enumerate(self.spec.candidates):
            views = self.prefix(packed, index, spec.max_width)
            yield from named_conv_views(spec.name, views)

    @torch.no_grad()
    def permute_(self, candidate: int, order: Tensor) -> None:
        """Reorder a candidate's mid channels: channel `order[j]` becomes channel j; momentum moves along.

        `order` is a permutation of 0..max_width-1, int64. The candidate at maximum width computes the same function.
        """
        spec = self.spec.candidates[candidate]
        if order.shape != (spec.max_width,) or not torch.equal(
            order.sort().values, torch.arange(spec.max_width, device=order.device)
        ):
            raise ValueError(f"order must be a permutation of 0..{spec.max_width - 1}, not shape {list(order.shape)}")
        for packed in (self.weights(), self.momenta()):
            for role, view in zip(ROLES, self.prefix(packed, candidate, spec.max_width), strict=False):
                if role != "se_reduce_bias":  # the only one that has no mid channels
                    view.copy_(view[order])

    def channel_importance(self, candidate: int) -> Tensor:
        """[max_width]: L1 norm of each mid channel's depthwise filter, whether the channel is in use or frozen."""
        depthwise = self.prefix(self.weights(), candidate, self.spec.candidates[candidate].max_width)[1]
        return depthwise.detach().abs().sum((1, 2))

    def momentum_state(self) -> dict[str, Tensor]:
        """Views of the momentum, named and shaped as in the state dict."""
        return dict(self.named_views(self.momenta()))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weights = self.weights() if keep_vars else [weight.detach() for weight in self.weights()]
        for name, view in self.named_views(weights):
            destination[prefix + name] = view

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        views = {prefix + name: view for name, view in self.named_views([w.detach() for w in self.weights()])}
        for key, view in views.items():
            if key not in state_dict:
                missing_keys.append(key)
            elif state_dict[key].shape != view.shape:
                error_msgs.append(f"{key} must be {list(view.shape)}, not {list(state_dict[key].shape)}")
            else:
                view.copy_(state_dict[key])
        unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in views]


def named_conv_views(name: str, views: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """`PackedLayer.prefix`'s views of one candidate, named `<name>.conv_pw.weight` ..., shaped as Conv2d's weights."""
    if not views:
        return
    expand, depthwise, project = views[:3]
    yield f"{name}.conv_pw.weight", expand[:, :, None, None]
    yield f"{name}.conv_dw.weight", depthwise[:, None]
    yield f"{name}.conv_pwl.weight", project.t()[:, :, None, None]
    if len(views) > 3:
        yield f"{name}.se.conv_reduce.weight", views[3].t()[:, :, None, None]
        yield f"{name}.se.conv_reduce.bias", views[4]
        yield f"{name}.se.conv_expand.weight", views[5][:, :, None, None]
        yield f"{name}.se.conv_expand.bias", views[6]


@torch.no_grad()
def copy_named(target: Mapping[str, Tensor], source: Mapping[str, Tensor], what: str) -> None:
    """Copy `source` into `target`, the same names and shapes on both sides or nothing is written."""
    if target.keys() != source.keys():
        wrong = sorted(target.keys() ^ source.keys())
        raise KeyError(f"{what}: names missing or not known: {', '.join(wrong[:5])}")
    for name, tensor in target.items():
        if source[name].shape != tensor.shape:
            raise ValueError(f"{what}: {name} must be {list(tensor.shape)}, not {list(source[name].shape)}")
    for name, tensor in target.items():
        tensor.copy_(source[name])
