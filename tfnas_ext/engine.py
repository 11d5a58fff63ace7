"""The supernet's fast path: all searchable layers of a supernet behind one interface, and its autograd functions.

An engine runs sampled paths or the mixture of all candidates through the whole body in few calls, keeps the gradients
of what was sampled in compact buffers, and does clipping and SGD on the sampled widths alone. `reference` is plain
PyTorch, `cuda` runs on the CUDA kernels; others register themselves with `register_engine`. All give the same numbers
up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tfnas_ext import engine_cuda
from tfnas_ext.engine_cuda import CudaEngine
from tfnas_ext.engine_native import NativeEngine, native_refusal
from tfnas_ext.engine_reference import ReferenceEngine
from tfnas_ext.engine_spec import BodySpec
from tfnas_ext.packed import PackedLayer


class SupernetEngine(Protocol):
    """What an engine does. It is made from a `BodySpec` and its `PackedLayer`s, whose tensors it reads at every call.

    Throughout: L layers and S stages, C the largest number of candidates of a layer, D the largest depth, P paths.

    - Activations [N, channels, H, W]: channels_last (others are converted at the entry), their type float32, bfloat16,
      or float64; outputs have the input's type. Weights, momentum and their gradients are float32 (float64 with float64
      activations) whatever the activations are. Everything is on one device.
    - Batch norms use batch statistics, have neither affine nor running statistics, and the spec's eps.
    - `choices`, int64 [P, L], P = 1 or 2: the sampled candidate of each layer, counted from 0. On the activations'
      device or on the CPU. Two paths may choose the same candidate.
    - `v`: weights of the depth, see `BodySpec`; `u` [L, C]: weights of the candidates, entries beyond those of a layer
      are not read. Type float32 or float64. No assumption that rows sum to one.
    - A tape holds what a backward needs; it is used once, and only before widths or weights change.
    """

    @property
    def name(self) -> str:
        """As given to `make_engine`, for reports."""
        ...

    @property
    def capturable(self) -> bool:
        """Whether a step makes no choice on the host: a CUDA graph of it can be replayed for other choices.

        It may allocate and wait in the first step after `set_widths` only.
        """
        ...

    def set_widths(self, widths: list[list[int]]) -> None:
        """`widths[l][i]`: mid channels in use of candidate i of layer l, 1..max_width, and 0 for the identity.

        An engine starts at maximum widths. Called between epochs, never between a forward and its backward.
        """
        ...

    def forward_paths(
        self, x: Tensor, choices: Tensor, v: Tensor | None, with_tape: bool
    ) -> tuple[list[Tensor], Any | None]:
        """One output for each of the P paths from the same `x`; the tape is None without `with_tape`."""
        ...

    def backward_paths(self, tape: Any, douts: list[Tensor], need_dx: bool) -> Tensor | None:
        """Gradient of `x`, summed over the paths, from that of each output; `v` gets none (depth is not sampled).

        The gradients of the sampled widths go to the engine's buffers, in place of what an earlier call left there;
        where two paths chose the same candidate of a layer its gradient is the sum of both.
        """
        ...

    def read_gradients(self) -> list[tuple[int, int, int, Tensor]]:
        """(layer, candidate, role, gradient) of all that `backward_paths` left; for tests, may synchronise.

        `role` counts in `packed.ROLES`; the gradient is shaped as `PackedLayer.prefix` shapes it. Sorted.
        """
        ...

    def gradient_buffers(self) -> list[Tensor]:
        """The buffers with all that `backward_paths` left: change them, by an all-reduce say, and the step follows.

        Not copies, of any shape; elements that belong to no sampled weight may hold anything. Their number, order and
        sizes depend on `choices` and widths alone, the elements' places too. Empty where no gradient is pending.
        """
        ...

    def forward_mixture(self, x: Tensor, u: Tensor, v: Tensor | None, with_tape: bool) -> tuple[Tensor, Any | None]:
        """Every layer gives sum_i u[l, i] * op_i(x) (Eq. 3), op_i with its residual; u * x for the identity."""
        ...

    def backward_mixture(self, tape: Any, dout: Tensor, need_dx: bool) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """(dx or None, du [L, C], dv like v or None) in the types of x, u and v. Weights get no gradient."""
        ...

    def clip_and_sgd_(
        self,
        lr: float | Tensor,
        momentum: float,
        weight_decay: float,
        max_norm: float,
        dense: list[tuple[Tensor, Tensor, Tensor]],
    ) -> Tensor:
        """Clip by the total norm, then SGD, on the sampled widths and on `dense`; consumes the gradients.

        `dense` are (parameter, gradient, momentum buffer) of the rest of the network; their gradients may be changed.
        With n the 2-norm of all these gradients together and c = min(1, max_norm / (n + 1e-6)): g = c * g +
        weight_decay * w; buffer = momentum * buffer + g; w = w - lr * buffer, PyTorch's rule for buffers that start
        at zero. What was not sampled, and channels beyond a width, get no update, no momentum and no decay. `max_norm`
        infinite does not clip. `lr` may be a 0-d tensor of the weights' type and device. Returns n, 0-d, without
        synchronisation. RuntimeError where no gradient is pending.
        """
        ...

    def reset_momentum_(self) -> None:
        """Set the momentum of all packed weights to zero."""
        ...


class EngineFactory(NamedTuple):
    """How to make an engine, and why it cannot be made: `refusal(spec, layers)` is None where it can."""

    make: Callable[[BodySpec, Sequence[PackedLayer]], SupernetEngine]
    refusal: Callable[[BodySpec, Sequence[PackedLayer]], str | None]


_FACTORIES: dict[str, EngineFactory] = {
    "reference": EngineFactory(ReferenceEngine, lambda spec, layers: None),
    "cuda": EngineFactory(CudaEngine, engine_cuda.refusal),
    "native": EngineFactory(NativeEngine, native_refusal),
}


def register_engine(name: str, factory: EngineFactory) -> None:
    """Make an engine known under `name`. `auto` tries the last registered first, `reference` last."""
    _FACTORIES[name] = factory


def engine_names() -> list[str]:
    """Names for `make_engine`, in the order in which `auto` tries them."""
    return list(reversed(_FACTORIES))


class EngineRefused(ValueError, RuntimeError):
    """An engine asked for by name that cannot run here; the message says why."""


def make_engine(name: str, spec: BodySpec, layers: Sequence[PackedLayer]) -> SupernetEngine:
    """The engine of that name; `auto` takes the first of `engine_names()` that can run this body.

    Raises:
        ValueError: no engine of that name, or layers that are not the spec's.
        EngineRefused: the engine asked for cannot run this body; the message says why.
    """
    if [layer.spec for layer in layers] != list(spec.layers):
        raise ValueError(f"layers must be the {len(spec.layers)} PackedLayers of spec, in order")
    if name == "auto":
        name = next(n for n in engine_names() if _FACTORIES[n].refusal(spec, layers) is None)
    if name not in _FACTORIES:
        raise ValueError(f"engine must be one of auto, {', '.join(engine_names())}, not {name!r}")
    refusal = _FACTORIES[name].refusal(spec, layers)
    if refusal is not None:
        raise EngineRefused(f"engine {name!r} cannot run here: {refusal}")
    return _FACTORIES[name].make(spec, layers)


def run_paths(engine: SupernetEngine, x: Tensor, choices: Tensor, v: Tensor | None) -> list[Tensor]:
    """`forward_paths` under autograd: P outputs, differentiable once with respect to `x` (not to `v`).

    A backward through the outputs also fills the engine's buffers with weight gradients, for `clip_and_sgd_`.
    """
    if not torch.is_grad_enabled():
        return engine.forward_paths(x, choices, v, False)[0]
    # Weights are not inputs of the function; the anchor makes its outputs require gradients all the same.
    anchor = torch.empty(0, device=x.device, requires_grad=True)
    return list(_Paths.apply(anchor, x, engine, choices, v))


def run_mixture(engine: SupernetEngine, x: Tensor, u: Tensor, v: Tensor | None) -> Tensor:
    """`forward_mixture` under autograd: differentiable once with respect to `x`, `u` and `v`."""
    needs_grad = x.requires_grad or u.requires_grad or (v is not None and v.requires_grad)
    if not (torch.is_grad_enabled() and needs_grad):
        return engine.forward_mixture(x, u, v, False)[0]
    return _Mixture.apply(x, u, v, engine)


def _take_tape(ctx: Any) -> Any:
    if ctx.tape is None:
        raise RuntimeError("the supernet's backward can run once per forward: run the forward again")
    tape, ctx.tape = ctx.tape, None
    return tape


class _Paths(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, engine: SupernetEngine, choices: Tensor, v: Tensor | None
    ) -> tuple[Tensor, ...]:
        outs, ctx.tape = engine.forward_paths(x, choices, v, True)
        ctx.engine = engine
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        dx = ctx.engine.backward_paths(_take_tape(ctx), list(douts), ctx.needs_input_grad[1])
        return None, dx, None, None, None


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, v: Tensor | None, engine: SupernetEngine) -> Tensor:
        out, ctx.tape = engine.forward_mixture(x, u, v, True)
        ctx.engine = engine
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dx, du, dv = ctx.engine.backward_mixture(_take_tape(ctx), dout, ctx.needs_input_grad[0])
        return dx, du, dv, None
