"""`CudaEngine`: the supernet's body on the CUDA kernels (see `engine`). A step never waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tfnas_ext.backends import KERNEL_SIZES, missing_cuda_code
from tfnas_ext.engine_checks import check_choices_shape, check_inputs, check_widths
from tfnas_ext.engine_spec import BodySpec
from tfnas_ext.packed import PackedLayer

# Order and meaning as `SegmentRole` in csrc/kernels/sgd.h, for the roles of `packed.ROLES`.
_ROWS, _DEPTHWISE, _SQUEEZE_WEIGHT, _SQUEEZE_BIAS, _EXCITE_BIAS = range(5)
_SEGMENT_ROLES = (_ROWS, _DEPTHWISE, _ROWS, _SQUEEZE_WEIGHT, _SQUEEZE_BIAS, _SQUEEZE_WEIGHT, _EXCITE_BIAS)


class _LayerTape(NamedTuple):
    x: Tensor
    saved: Tensor
    out: Tensor


class _PathsTape(NamedTuple):
    paths: list[list[_LayerTape]]
    choices: Tensor  # int32 [P, L], the tape's own: the next forward draws others
    v: Tensor


class _MixtureTape(NamedTuple):
    layers: list[_LayerTape]
    u: Tensor
    v: Tensor


class CudaEngine:
    """`SupernetEngine` of the `sink` depth space on a CUDA device of compute capability 7.5 or newer.

    Choices are read by the kernels on the device; gradients lie in buffers that are allocated once per change of
    widths, so a whole step can be captured in a CUDA graph. float32 products run in tf32 where
    `torch.set_float32_matmul_precision` or `torch.backends.cuda.matmul.fp32_precision` allows it, else in three tf32
    parts that keep float32's precision. Deterministic.
    """

    name = "cuda"
    capturable = True

    def __init__(self, spec: BodySpec, layers: Sequence[PackedLayer]) -> None:
        self.spec = spec
        self.layers = list(layers)
        self._paths = 0  # whose gradients are pending
        self.set_widths([[candidate.max_width for candidate in layer.candidates] for layer in spec.layers])

    def set_widths(self, widths: list[list[int]]) -> None:
        check_widths(self.spec, widths)
        self._widths = [list(row) for row in widths]
        self._prepared_for: torch.device | None = None

    def forward_paths(
        self, x: Tensor, choices: Tensor, v: Tensor | None, with_tape: bool
    ) -> tuple[list[Tensor], _PathsTape | None]:
        x, depth = self._check(x, v)
        check_choices_shape(self.spec, choices)
        given = choices.to(x.device, non_blocking=True)
        known = given.clamp(min=0).minimum(self._last_candidate).to(torch.int32)
        paths = [self._forward(x, depth, row, None) for row in known]
        outs = [out for out, _ in paths]
        return outs, _PathsTape([tape for _, tape in paths], known, depth) if with_tape else None

    def backward_paths(self, tape: _PathsTape, douts: list[Tensor], need_dx: bool) -> Tensor | None:
        total = None
        for p, (layers, dout) in enumerate(zip(tape.paths, douts, strict=True)):
            dx, _, _ = self._backward(layers, tape.v, dout, tape.choices[p], None, need_dx, self._gradients[p])
            total = dx if total is None or dx is None else total + dx
        self._choices[: len(tape.paths)].copy_(tape.choices)  # where clipping and SGD look for them
        self._paths = len(tape.paths)
        return total

    def read_gradients(self) -> list[tuple[int, int, int, Tensor]]:
        found: dict[tuple[int, int, int], Tensor] = {}
        chosen = self._choices[: self._paths].tolist()
        for p, row in enumerate(chosen):
            for index, candidate in enumerate(row):
                for role, grad in enumerate(self._gradient_views(p, index, candidate)):
                    key = (index, candidate, role)
                    found[key] = found[key] + grad if key in found else grad.clone()
        return [(*key, found[key]) for key in sorted(found)]

    def gradient_buffers(self) -> list[Tensor]:
        return [buffer for path in self._gradients[: self._paths] for layer in path for buffer in layer]

    def forward_mixture(
        self, x: Tensor, u: Tensor, v: Tensor | None, with_tape: bool
    ) -> tuple[Tensor, _MixtureTape | None]:
        x, depth = self._check(x, v, u)
        weights = u.detach().to(self._weight_dtype)
        rows = [weights[i, : len(layer.candidates)].contiguous() for i, layer in enumerate(self.spec.layers)]
        out, layers = self._forward(x, depth, None, rows)
        return out, _MixtureTape(layers, u.detach(), depth) if with_tape else None

    def backward_mixture(
        self, tape: _MixtureTape, dout: Tensor, need_dx: bool
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        weights = tape.u.to(self._weight_dtype)
        rows = [weights[i, : len(layer.candidates)].contiguous() for i, layer in enumerate(self.spec.layers)]
        dx, du_rows, dv = self._backward(tape.layers, tape.v, dout, None, rows, need_dx, None)
        du = torch.zeros_like(tape.u)
        for i, row in enumerate(du_rows):
            du[i, : row.numel()] = row
        return dx, du, dv

    @torch.no_grad()
    def clip_and_sgd_(
        self,
        lr: float | Tensor,
        momentum: float,
        weight_decay: float,
        max_norm: float,
        dense: list[tuple[Tensor, Tensor, Tensor]],
    ) -> Tensor:
        if not self._paths:
            raise RuntimeError("clip_and_sgd_ needs the gradients of a backward_paths since the last call")
        segments, like = self._segments[self._paths], self.layers[0].weights()[0]
        params, momenta = [row[0] for row in dense], [row[2] for row in dense]
        grads = [_laid_out_as(param, grad) for param, grad, _ in dense]
        norm, coefficient = torch.ops.tfnas._gradient_norm(segments, grads, max_norm, like)
        rate = lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=like.dtype, device=like.device)
        torch.ops.tfnas._clipped_sgd(segments, params, grads, momenta, coefficient, rate, momentum, weight_decay)
        self._paths = 0
        return norm

    @torch.no_grad()
    def reset_momentum_(self) -> None:
        for layer in self.layers:
            for buffer in layer.momenta():
                buffer.zero_()

    def _check(self, x: Tensor, v: Tensor | None, u: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_inputs(self.spec, x, v, u)
        assert v is not None  # the spec's depth space is sink
        if self._prepared_for != x.device:
            self._prepare(x.device)
        x = x.detach().contiguous(memory_format=torch.channels_last)
        return x, v.detach().to(self._weight_dtype)

    def _prepare(self, device: torch.device) -> None:
        """Tables, gradient buffers and their addresses for the present widths: once per epoch."""
        self._weight_dtype = self.layers[0].weights()[0].dtype
        self._choices = torch.zeros(2, len(self.layers), dtype=torch.int32, device=device)
        last = [len(layer.candidates) - 1 for layer in self.spec.layers]
        self._last_candidate = torch.tensor(last, device=device)
        self._tables = [self._table(i) for i in range(len(self.layers))]
        self._device_tables = [torch.ops.tfnas._layer_table(table, device) for table in self._tables]
        self._gradients = [[self._gradient_buffers(i) for i in range(len(self.layers))] for _ in range(2)]
        self._segments = {paths: self._segment_rows(paths).to(device) for paths in (1, 2)}
        self._prepared_for = device

    def _table(self, index: int) -> Tensor:
        layer = self.layers[index]
        rows = [
            [c.kernel_size, at.mid, at.depthwise, width, c.se_channels, *at[2:]]
            for c, at, width in zip(layer.spec.candidates, layer.offsets, self._widths[index], strict=True)
        ]
        return torch.tensor(rows)

    def _sizes(self, index: int) -> tuple[int, int]:
        """Length of the per-channel vectors of a path, and taps of the largest kernel, as `LayerSizes` counts them."""
        active = max((width + 7) // 8 * 8 for width in self._widths[index])
        return active, max(c.kernel_size for c in self.spec.layers[index].candidates) ** 2

    def _gradient_buffers(self, index: int) -> list[Tensor]:
        layer = self.layers[index]
        active, taps = self._sizes(index)
        sizes = [active * layer.spec.in_channels, active * taps, active * layer.spec.out_channels]
        sizes += [weight.numel() for weight in layer.weights()[3:]]
        like = layer.weights()[0]
        return [torch.zeros(size, dtype=like.dtype, device=like.device) for size in sizes]

    def _gradient_views(self, path: int, index: int, candidate: int) -> list[Tensor]:
        layer, width = self.layers[index], self._widths[index][candidate]
        spec, at = layer.spec.candidates[candidate], layer.offsets[candidate]
        _, taps = self._sizes(index)
        k, se = spec.kernel_size, spec.se_channels
        expand, depthwise, project, reduce, reduce_bias, excite, excite_bias = self._gradients[path][index]
        views = [
            expand.view(-1, layer.spec.in_channels)[:width],
            depthwise.view(-1, taps)[:width, : k * k].reshape(width, k, k),
            project.view(-1, layer.spec.out_channels)[:width],
        ]
        if se:
            views += [
                reduce[at.se_weight : at.se_weight + width * se].view(width, se),
                reduce_bias[at.se_reduce_bias : at.se_reduce_bias + se],
                excite[at.se_weight : at.se_weight + width * se].view(width, se),
                excite_bias[at.se_expand_bias : at.se_expand_bias + width],
            ]
        return views

    def _segment_rows(self, paths: int) -> Tensor:
        """The `Segment` structures of csrc/kernels/sgd.h as int64 rows: addresses, role and columns, size."""
        rows = []
        for index, layer in enumerate(self.layers):
            _, taps = self._sizes(index)
            columns = (layer.spec.in_channels, taps, layer.spec.out_channels, 1, 1, 1, 1)
            choices = [self._choices[p, index].data_ptr() if p < paths else 0 for p in range(2)]
            for role, (weight, buffer) in enumerate(zip(layer.weights(), layer.momenta(), strict=True)):
                grads = [self._gradients[p][index][role] for p in range(2)]
                addresses = [grad.data_ptr() if p < paths else 0 for p, grad in enumerate(grads)]
                table = self._device_tables[index].data_ptr()
                kind = _SEGMENT_ROLES[role] | columns[role] << 32
                if weight.numel():
                    row = [weight.data_ptr(), buffer.data_ptr(), *addresses, *choices, table, kind, grads[0].numel()]
                    rows.append(row)
        return torch.tensor(rows)

    def _arguments(self, index: int, choice: Tensor | None, u: Tensor | None) -> tuple[object, ...]:
        layer = self.layers[index]
        weights = [weight.detach() for weight in layer.weights()]
        spec = layer.spec
        table, device_table = self._tables[index], self._device_tables[index]
        return (
            *(weights, table, device_table, choice, u),
            *(spec.stride, spec.act, spec.residual, self.spec.eps, product_math()),
        )

    def _forward(
        self, x: Tensor, v: Tensor, choices: Tensor | None, u: list[Tensor] | None
    ) -> tuple[Tensor, list[_LayerTape]]:
        tape: list[_LayerTape] = []
        for s, stage in enumerate(self.spec.stages):
            first = len(tape)
            for _ in stage:
                index = len(tape)
                arguments = self._arguments(index, _one(choices, index), u[index] if u else None)
                out, saved = torch.ops.tfnas._layer_forward(x, *arguments)
                tape.append(_LayerTape(x, saved, out))
                x = out
            x = torch.ops.tfnas._sink([layer.out for layer in tape[first:]], v[s])
        return x, tape

    def _backward(
        self,
        tape: list[_LayerTape],
        v: Tensor,
        dout: Tensor,
        choices: Tensor | None,
        u: list[Tensor] | None,
        need_dx: bool,
        gradients: list[list[Tensor]] | None,
    ) -> tuple[Tensor | None, list[Tensor], Tensor]:
        """dx, du of each layer (mixture), dv (mixture). Weight gradients (of a path) go to `gradients`."""
        du: list[Tensor] = [torch.empty(0)] * len(tape)
        dv = torch.zeros_like(v)
        dx: Tensor | None = None
        index = len(tape)
        for s in reversed(range(len(self.spec.stages))):
            dsink = (dout if dx is None else dx).contiguous(memory_format=torch.channels_last)
            dx = None
            depth_weights, stage = v[s].to(dsink.dtype), len(self.spec.stages[s])
            if u is not None:
                outs = [layer.out for layer in tape[index - stage : index]]
                dv[s, :stage] = torch.ops.tfnas._sink_dots(outs, dsink)
            for depth in reversed(range(stage)):
                index -= 1
                layer = tape[index]
                share = depth_weights[depth]
                grad = dsink * share if dx is None else torch.addcmul(dx, dsink, share)
                arguments = self._arguments(index, _one(choices, index), None if u is None else u[index])
                wanted = need_dx or index > 0
                buffers = [] if gradients is None else gradients[index]
                dx, du[index] = torch.ops.tfnas._layer_backward(layer.x, grad, layer.saved, *arguments, wanted, buffers)
        return (dx if need_dx else None), du, dv


def _one(choices: Tensor | None, index: int) -> Tensor | None:
    """The choice of one layer, where kernels read it."""
    return None if choices is None else choices[index : index + 1]


def product_math() -> str:
    """How float32 products run: "tf32" where torch's setting for its own on a GPU allows it, else "fp32"."""
    # follows both of torch's settings; torch.get_float32_matmul_precision raises an error after the newer one
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"


def _laid_out_as(param: Tensor, grad: Tensor) -> Tensor:
    """`grad`, copied where its elements do not lie in memory in the order of `param`'s."""
    strides = zip(param.shape, param.stride(), grad.stride(), strict=True)
    if all(a == b for size, a, b in strides if size > 1):
        return grad
    return torch.empty_like(param).copy_(grad)


def refusal(spec: BodySpec, layers: Sequence[PackedLayer]) -> str | None:
    """Why the CUDA kernels cannot run this body, or None."""
    device = layers[0].weights()[0].device
    if device.type != "cuda":
        return f"the weights are on {device}, not on a CUDA device"
    operator = "tfnas::_layer_forward"
    if not hasattr(torch.ops.tfnas, "_layer_forward") or not torch._C._dispatch_has_kernel_for_dispatch_key(
        operator, "CUDA"
    ):
        return "this build has no CUDA kernels (`tfnas info` says why)"
    return missing_cuda_code(device) or shape_refusal(spec)


def shape_refusal(spec: BodySpec) -> str | None:
    """What no device changes: the depth space, kernel sizes and numbers of candidates that the kernels know."""
    if spec.depth_space != "sink":
        return f"the CUDA kernels run depth_space 'sink', not {spec.depth_space!r}"
    if spec.max_depth > 16:
        return f"a stage has {spec.max_depth} layers, the CUDA kernels take up to 16"
    for index, layer in enumerate(spec.layers):
        if len(layer.candidates) > 16:
            return f"layer {index} has {len(layer.candidates)} candidates, the CUDA kernels take up to 16"
        sizes = {candidate.kernel_size for candidate in layer.candidates} - set(KERNEL_SIZES)
        if sizes:
            return f"layer {index} has kernel sizes {sorted(sizes)}, the CUDA kernels know 3, 5 and 7"
        if layer.in_channels > 320:
            return f"layer {index} has {layer.in_channels} input channels, the CUDA kernels take up to 320"
    return None
