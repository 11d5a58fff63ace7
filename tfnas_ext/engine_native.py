"""`NativeEngine`: the supernet's body on the compiled CPU kernels, behind the interface of `engine.SupernetEngine`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tfnas_ext import _native
from tfnas_ext.backends import KERNEL_SIZES, choose_backend
from tfnas_ext.engine_checks import check_inputs, check_widths, read_choices
from tfnas_ext.engine_spec import BodySpec
from tfnas_ext.packed import PackedLayer

MAX_CANDIDATES = 32


def native_refusal(spec: BodySpec, layers: Sequence[PackedLayer]) -> str | None:
    """Why the native engine cannot run this body, or None."""
    if _native.MODULE is None:
        return f"there is no native module: {_native.REASON}"
    device, dtype = layers[0].expand.device, layers[0].expand.dtype
    if device.type != "cpu":
        return f"its weights are on {device}; the native engine runs on the CPU"
    if choose_backend(device) != "cpu":
        return "TFNAS_BACKEND=reference"
    if dtype not in (torch.float32, torch.float64):
        return f"its weights are {dtype}; the native engine has float32 and float64"
    for index, layer in enumerate(spec.layers):
        if len(layer.candidates) > MAX_CANDIDATES:
            return f"layer {index} has {len(layer.candidates)} candidates; the native engine has up to {MAX_CANDIDATES}"
        for candidate in layer.candidates:
            if not candidate.is_skip and candidate.kernel_size not in KERNEL_SIZES:
                return f"layer {index}, {candidate.name}: kernel_size is {candidate.kernel_size}, not 3, 5 or 7"
    return None


class _Tape(NamedTuple):
    native: Any
    dtype: torch.dtype  # of x and the outputs


class NativeEngine:
    """All layers and sinks in one native call each way; same numbers as `ReferenceEngine` up to rounding.

    bfloat16 activations stay bfloat16 in memory; sums, statistics, weights and their gradients are float32. Memory for
    tapes and scratch is kept and used again. At a fixed number of threads the same inputs give the same bits.
    """

    name = "native"
    capturable = False

    def __init__(self, spec: BodySpec, layers: Sequence[PackedLayer]) -> None:
        assert _native.MODULE is not None  # native_refusal
        self.spec = spec
        self.layers = list(layers)
        self._dtype: torch.dtype = layers[0].get_parameter("expand").dtype
        self._native = _native.MODULE.SupernetEngine(
            [
                (
                    layer.in_channels,
                    layer.out_channels,
                    layer.stride,
                    layer.act,
                    layer.residual,
                    layer.gated,
                    [
                        (c.kernel_size, c.max_width, c.se_channels, *offsets)
                        for c, offsets in zip(layer.candidates, packed.offsets, strict=True)
                    ],
                )
                for layer, packed in zip(spec.layers, layers, strict=True)
            ],
            [len(stage) for stage in spec.stages],
            spec.max_depth,
            spec.depth_space == "sink",
            spec.eps,
        )

    def set_widths(self, widths: list[list[int]]) -> None:
        check_widths(self.spec, widths)
        self._native.set_widths(widths)

    def forward_paths(
        self, x: Tensor, choices: Tensor, v: Tensor | None, with_tape: bool
    ) -> tuple[list[Tensor], _Tape | None]:
        self._check(x, v)
        rows = read_choices(self.spec, choices)
        outs, tape = self._native.forward_paths(self._weights(), self._enter(x), rows, _rows(v), with_tape)
        return [out.to(x.dtype) for out in outs], _Tape(tape, x.dtype) if with_tape else None

    def backward_paths(self, tape: _Tape, douts: list[Tensor], need_dx: bool) -> Tensor | None:
        dx = self._native.backward_paths(self._weights(), tape.native, [self._enter(d) for d in douts], need_dx)
        return None if dx is None else dx.to(tape.dtype)

    def read_gradients(self) -> list[tuple[int, int, int, Tensor]]:
        shapes: dict[tuple[int, int], list[Tensor]] = {}
        found = []
        for layer, candidate, role, flat in self._native.read_gradients():
            packed = self.layers[layer]
            if (layer, candidate) not in shapes:
                width = self._widths_of(layer, candidate)
                shapes[layer, candidate] = packed.prefix(packed.weights(), candidate, width)
            found.append((layer, candidate, role, flat.view(shapes[layer, candidate][role].shape)))
        return found

    def gradient_buffers(self) -> list[Tensor]:
        buffers: list[Tensor] = self._native.gradient_buffers()
        return buffers

    def forward_mixture(self, x: Tensor, u: Tensor, v: Tensor | None, with_tape: bool) -> tuple[Tensor, _Tape | None]:
        self._check(x, v, u)
        out, tape = self._native.forward_mixture(self._weights(), self._enter(x), u.tolist(), _rows(v), with_tape)
        return out.to(x.dtype), _Tape((tape, u, v), x.dtype) if with_tape else None

    def backward_mixture(self, tape: _Tape, dout: Tensor, need_dx: bool) -> tuple[Tensor | None, Tensor, Tensor | None]:
        native, u, v = tape.native
        dx, du, dv = self._native.backward_mixture(self._weights(), native, self._enter(dout), need_dx)
        return (
            None if dx is None else dx.to(tape.dtype),
            torch.tensor(du, dtype=u.dtype),
            None if v is None else torch.tensor(dv, dtype=v.dtype),
        )

    @torch.no_grad()
    def clip_and_sgd_(
        self,
        lr: float | Tensor,
        momentum: float,
        weight_decay: float,
        max_norm: float,
        dense: list[tuple[Tensor, Tensor, Tensor]],
    ) -> Tensor:
        dtype = self._dtype
        momenta = [buffer for layer in self.layers for buffer in layer.momenta()]
        flat: list[Tensor] = []
        moved: list[tuple[Tensor, Tensor]] = []  # tensors that a copy stands for
        for parameter, gradient, buffer in dense:
            row = []
            for tensor in (parameter, gradient, buffer):
                same = tensor.dtype == dtype and tensor.stride() == parameter.stride() and _is_dense(tensor)
                row.append(tensor if same else tensor.to(dtype).contiguous())
            if any(copy.stride() != row[0].stride() for copy in row):
                row = [tensor.to(dtype).contiguous() for tensor in row]
            moved += [(t, c) for t, c in zip((parameter, buffer), (row[0], row[2]), strict=True) if t is not c]
            flat += row
        norm = self._native.clip_and_sgd(self._weights(), momenta, flat, float(lr), momentum, weight_decay, max_norm)
        for tensor, copy in moved:
            tensor.copy_(copy)
        return torch.tensor(norm, dtype=dtype)

    @torch.no_grad()
    def reset_momentum_(self) -> None:
        for layer in self.layers:
            for buffer in layer.momenta():
                buffer.zero_()

    def _check(self, x: Tensor, v: Tensor | None, u: Tensor | None = None) -> None:
        check_inputs(self.spec, x, v, u)
        if x.device.type != "cpu":
            raise ValueError(f"x must be on the CPU, where the native engine runs, not on {x.device}")
        values, height, columns = x.shape[0], x.shape[2], x.shape[3]
        for layer in self.spec.layers:
            height, columns = -(-height // layer.stride), -(-columns // layer.stride)
        if values * height * columns < 2:
            raise ValueError(
                f"x must give each batch norm more than 1 value per channel; of {list(x.shape)} the last layer has "
                f"{values} x {height} x {columns}"
            )

    def _weights(self) -> list[Tensor]:
        return [weight.detach() for layer in self.layers for weight in layer.weights()]

    def _widths_of(self, layer: int, candidate: int) -> int:
        return self._native.widths()[layer][candidate]

    def _enter(self, tensor: Tensor) -> Tensor:
        """channels_last; in the weights' type, or bfloat16 beside float32 weights."""
        mixed = tensor.dtype == torch.bfloat16 and self._dtype == torch.float32
        return tensor.detach().to(tensor.dtype if mixed else self._dtype, memory_format=torch.channels_last)


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one range of memory in some order of dimensions."""
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def _rows(v: Tensor | None) -> list[list[float]]:
    return [] if v is None else v.tolist()
