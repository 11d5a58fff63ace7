"""`ReferenceEngine`: the supernet's body in plain PyTorch, what every other engine is compared with (see `engine`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from tfnas_ext.engine_checks import check_inputs, check_widths, read_choices
from tfnas_ext.engine_spec import BodySpec
from tfnas_ext.packed import PackedLayer
from tfnas_ext.reference import SqueezeExcite, mbinvres

Key = tuple[int, int]  # layer, candidate


class _PathsTape(NamedTuple):
    x: Tensor
    outs: list[Tensor]
    weights: list[dict[Key, list[Tensor]]]  # of each path: the leaves of its graph


class _MixtureTape(NamedTuple):
    x: Tensor
    u: Tensor
    v: Tensor | None
    out: Tensor


class ReferenceEngine:
    """`SupernetEngine` of ordinary differentiable operations, on any device.

    A path touches the sampled widths alone: they are contiguous ranges of the packed weights and become leaves of the
    graph without a copy. `choices` is read on the host: one synchronisation per call where it lives on a GPU, none
    where it is a CPU tensor. Deterministic where PyTorch's convolutions are.
    """

    name = "reference"
    capturable = False
    memory_format = torch.channels_last

    def __init__(self, spec: BodySpec, layers: Sequence[PackedLayer]) -> None:
        self.spec = spec
        self.layers = list(layers)
        self._widths = [[candidate.max_width for candidate in layer.candidates] for layer in spec.layers]
        self._gradients: dict[Key, list[Tensor]] | None = None

    def set_widths(self, widths: list[list[int]]) -> None:
        check_widths(self.spec, widths)
        self._widths = [list(row) for row in widths]

    def forward_paths(
        self, x: Tensor, choices: Tensor, v: Tensor | None, with_tape: bool
    ) -> tuple[list[Tensor], _PathsTape | None]:
        check_inputs(self.spec, x, v)
        rows = read_choices(self.spec, choices)
        x = x.detach().contiguous(memory_format=self.memory_format).requires_grad_(with_tape)
        outs: list[Tensor] = []
        weights: list[dict[Key, list[Tensor]]] = []
        with torch.set_grad_enabled(with_tape):
            for row in rows:
                leaves = {(index, c): self._weights(index, c, with_tape) for index, c in enumerate(row)}
                outs.append(self._body(x, v, self._sampled(row, leaves)))
                weights.append(leaves)
        detached = [out.detach() for out in outs]
        return detached, _PathsTape(x, outs, weights) if with_tape else None

    def backward_paths(self, tape: _PathsTape, douts: list[Tensor], need_dx: bool) -> Tensor | None:
        leaves = [leaf for path in tape.weights for key in path for leaf in path[key]]
        inputs = [*leaves, tape.x] if need_dx else leaves
        grads = iter(torch.autograd.grad(tape.outs, inputs, douts))
        gradients: dict[Key, list[Tensor]] = {}
        for path in tape.weights:
            for key, tensors in path.items():
                new = [next(grads) for _ in tensors]
                gradients[key] = [a + b for a, b in zip(gradients[key], new, strict=True)] if key in gradients else new
        self._gradients = gradients
        return next(grads) if need_dx else None

    def read_gradients(self) -> list[tuple[int, int, int, Tensor]]:
        found = sorted((self._gradients or {}).items())
        return [(layer, c, role, grad) for (layer, c), grads in found for role, grad in enumerate(grads)]

    def gradient_buffers(self) -> list[Tensor]:
        return [grad for grads in (self._gradients or {}).values() for grad in grads]

    def forward_mixture(
        self, x: Tensor, u: Tensor, v: Tensor | None, with_tape: bool
    ) -> tuple[Tensor, _MixtureTape | None]:
        check_inputs(self.spec, x, v, u)
        x = x.detach().contiguous(memory_format=self.memory_format).requires_grad_(with_tape)
        u = u.detach().requires_grad_(with_tape)
        v = None if v is None else v.detach().requires_grad_(with_tape)
        with torch.set_grad_enabled(with_tape):
            table = [row.unbind() for row in u.unbind()]

            def mixed(index: int, h: Tensor) -> Tensor:
                count = len(self.spec.layers[index].candidates)
                terms = (table[index][c] * self._op(index, c, h, self._weights(index, c, False)) for c in range(count))
                return _sum(terms)

            out = self._body(x, v, mixed)
        return out.detach(), _MixtureTape(x, u, v, out) if with_tape else None

    def backward_mixture(
        self, tape: _MixtureTape, dout: Tensor, need_dx: bool
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        inputs = [tape.u] + ([] if tape.v is None else [tape.v]) + ([tape.x] if need_dx else [])
        # a body of skip-out may have no gated layer, and then does not read v
        grads = list(torch.autograd.grad(tape.out, inputs, dout, allow_unused=True, materialize_grads=True))
        du = grads.pop(0)
        dv = None if tape.v is None else grads.pop(0)
        return (grads.pop() if need_dx else None), du, dv

    @torch.no_grad()
    def clip_and_sgd_(
        self,
        lr: float | Tensor,
        momentum: float,
        weight_decay: float,
        max_norm: float,
        dense: list[tuple[Tensor, Tensor, Tensor]],
    ) -> Tensor:
        if self._gradients is None:
            raise RuntimeError("clip_and_sgd_ needs the gradients of a backward_paths since the last call")
        params, grads, buffers = ([row[i] for row in dense] for i in range(3))
        for (index, candidate), tensors in self._gradients.items():
            layer, width = self.layers[index], self._widths[index][candidate]
            params += layer.prefix(layer.weights(), candidate, width)
            buffers += layer.prefix(layer.momenta(), candidate, width)
            grads += tensors
        self._gradients = None
        norm = torch.nn.utils.get_total_norm(grads)
        coefficient = (max_norm / (norm + 1e-6)).clamp(max=1)
        grads = list(torch._foreach_mul(grads, coefficient))
        sgd(
            params,
            grads,
            list(buffers),
            foreach=True,
            lr=float(lr),
            momentum=momentum,
            weight_decay=weight_decay,
            dampening=0,
            nesterov=False,
            maximize=False,
        )
        return norm

    @torch.no_grad()
    def reset_momentum_(self) -> None:
        for layer in self.layers:
            for buffer in layer.momenta():
                buffer.zero_()

    def _body(self, x: Tensor, v: Tensor | None, op: Callable[[int, Tensor], Tensor]) -> Tensor:
        """`x` through all stages, layer l being `op(l, input)`, depths by `v`."""
        depth_weights = None if v is None else [row.unbind() for row in v.unbind()]
        index = 0
        for s, stage in enumerate(self.spec.stages):
            outs: list[Tensor] = []
            for layer in stage:
                h = op(index, x)
                if layer.gated:
                    assert depth_weights is not None
                    skip, keep = depth_weights[index]
                    h = skip * x + keep * h
                outs.append(h)
                x = h
                index += 1
            if self.spec.depth_space == "sink":
                assert depth_weights is not None
                x = _sum(weight * out for weight, out in zip(depth_weights[s], outs, strict=False))
        return x

    def _sampled(self, row: list[int], weights: dict[Key, list[Tensor]]) -> Callable[[int, Tensor], Tensor]:
        return lambda index, h: self._op(index, row[index], h, weights[index, row[index]])

    def _weights(self, index: int, candidate: int, requires_grad: bool) -> list[Tensor]:
        layer = self.layers[index]
        views = layer.prefix(layer.weights(), candidate, self._widths[index][candidate])
        return [view.detach().requires_grad_(requires_grad) for view in views]

    def _op(self, index: int, candidate: int, x: Tensor, weights: list[Tensor]) -> Tensor:
        layer = self.spec.layers[index]
        if layer.candidates[candidate].is_skip:
            return x
        expand, depthwise, project, *se = (weight.to(x.dtype) for weight in weights)
        return mbinvres(
            x,
            expand[:, :, None, None],
            depthwise[:, None],
            project.t()[:, :, None, None],
            se=SqueezeExcite(se[0].t()[:, :, None, None], se[1], se[2][:, :, None, None], se[3]) if se else None,
            stride=layer.stride,
            act=layer.act,
            residual=layer.residual,
            eps=self.spec.eps,
        )


def _sum(terms: Iterable[Tensor]) -> Tensor:
    iterator = iter(terms)
    total = next(iterator)
    for term in iterator:
        total = total + term
    return total
