"""The supernet: stem, searchable stages, head, and the architecture parameters (paper, sections 3.2 and 3.3).

The searchable layers live in packed weights behind a `SupernetEngine` (`tfnas_ext.engine`); stem and head are those of
a derived network, without affine parameters and running statistics. Batch norms always use batch statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfnas.architecture import Architecture
from tfnas.architecture_adam import ArchitectureAdam
from tfnas.network import BATCH_NORM_EPS, Head, Stem
from tfnas.space import Layer, Space
from tfnas_ext.engine import SupernetEngine, make_engine, run_mixture, run_paths
from tfnas_ext.engine_spec import BodySpec, CandidateSpec, LayerSpec
from tfnas_ext.fixed_layer import FixedLayer
from tfnas_ext.packed import PackedLayer, copy_named, named_conv_views

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def body_spec(space: Space) -> BodySpec:
    """The searchable layers of a space as an engine wants them."""

    def layer_spec(layer: Layer) -> LayerSpec:
        candidates = tuple(
            CandidateSpec(candidate.name, candidate.kernel_size, layer.max_width(i), layer.se_channels(i))
            for i, candidate in enumerate(layer.candidates)
        )
        gated = space.depth_space == "skip-out" and layer.position > 0
        return LayerSpec(
            layer.in_channels,
            layer.out_channels,
            layer.stride,
            layer.act,
            layer.has_residual,
            candidates,
            gated,
        )

    stages = tuple(tuple(layer_spec(layer) for layer in layers) for layers in space.layers_of_stage)
    return BodySpec(stages, space.depth_space, BATCH_NORM_EPS)


class Supernet(nn.Module):
    """All candidate networks of a space in one, with shared weights.

    Architecture parameters are log-probabilities (rows of their exponentials sum to 1), -inf where there is nothing to
    choose, which the bool buffers `alpha_mask` and `beta_mask` tell:

    - `log_alpha` [L, C]: of the candidates of each searchable layer
    - `log_beta`: of the depths. `sink`: [S, D], entry d is depth d + 1 of stage s. `skip-out`: [L, 2] = (skip, keep) of
      each layer, (-inf, 0) where a layer has no gate. `skip-in`: [S, D], certainly full depth (skipping is in alpha)

    State dicts name candidates one by one (`stages.0.1.k3_e3_se1.conv_pw.weight` ...) at maximum widths, and `stem.*`
    and `head.*` as a derived network does. `widths[l][i]` is the number of channels in use, a prefix of the maximum.

    Args:
        space: the search space.
        engine: what runs the searchable layers, a name for `tfnas_ext.engine.make_engine`.
        dtype: type of the activations: float32, bfloat16 (weights stay float32) or float64 (weights too).
        device: where it is to be, and where `engine` must be able to run. None is torch's default device.

    Fresh weights are drawn from the global generator of torch's default device, whatever `device` is; architecture
    parameters start uniform, widths at the space's start widths.
    """

    log_alpha: nn.Parameter
    log_beta: nn.Parameter
    alpha_mask: Tensor
    beta_mask: Tensor

    def __init__(
        self,
        space: Space,
        engine: str = "auto",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(str(d) for d in DTYPES)}, not {dtype}")
        self.space = space
        self.dtype = dtype
        self.weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._body_spec = body_spec(space)
        self.stem = Stem(space, affine=False, running_stats=False)
        self.stages = nn.ModuleList(
            nn.ModuleList(PackedLayer(spec, dtype=self.weight_dtype) for spec in stage)
            for stage in self._body_spec.stages
        )
        self.head = Head(space, affine=False, running_stats=False)
        for module in (self.stem, self.head):
            module.to(self.weight_dtype).to(memory_format=torch.channels_last)
        for name, mask in (("alpha", _alpha_mask(space)), ("beta", _beta_mask(space))):
            self.register_buffer(f"{name}_mask", mask, persistent=False)
            logits = torch.zeros(mask.shape, dtype=self.weight_dtype).masked_fill(~mask, -torch.inf)
            self.register_parameter(f"log_{name}", nn.Parameter(logits.log_softmax(1)))
        for i, parameter in enumerate(self.dense_parameters()):
            self.register_buffer(f"_dense_momentum_{i}", torch.zeros_like(parameter), persistent=False)
        self._engine_name = engine
        self.widths = [[layer.start_width(i) for i in range(len(layer.candidates))] for layer in space.layers]
        if device is None:
            self._make_engine()
        else:
            self.to(device)  # makes the engine: a GPU's cannot be made before

    def forward_paths(self, images: Tensor, choices: Tensor) -> list[Tensor]:
        """Logits [N, classes], float32 or wider, of one network for each row of `choices` (int64 [P, L], P = 1 or 2).

        `images` [N, C, H, W] may be of any size. The stem runs once. Depth is not sampled: sinks and gates weigh by
        their probabilities, without a gradient to `log_beta`. A backward leaves the gradients of the sampled weights
        with the engine.
        """
        x = self._stem(self._prepare(images))
        v = None if self._body_spec.depth_weights_shape is None else self.depth_weights().detach()
        return [self._logits(out) for out in run_paths(self.engine, x, choices, v)]

    def forward_mixture(self, images: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Logits [N, classes], float32 or wider, where every layer is the sum of its candidates weighed by `u` (Eq. 3).

        `u` [L, C] are candidate weights and `v` depth weights as `depth_weights` gives (Eq. 5); both get gradients. The
        weights of stem and body get none.
        """
        with torch.no_grad():
            x = self._stem(self._prepare(images))
        engine_v = None if self._body_spec.depth_weights_shape is None else v
        return self._logits(run_mixture(self.engine, x, u, engine_v))

    def depth_weights(self) -> Tensor:
        """exp of `log_beta` normalised: the v of Eq. 5 for `sink`; differentiable."""
        return self.log_beta.softmax(1)

    def architecture_parameters(self) -> list[nn.Parameter]:
        """`log_alpha` and `log_beta`."""
        return [self.log_alpha, self.log_beta]

    def architecture_adam(self, lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> ArchitectureAdam:
        """A fresh Adam on `architecture_parameters()`, on the device where they are now."""
        masks = [self.alpha_mask, self.beta_mask]
        fused = self.engine.capturable
        return ArchitectureAdam(self.architecture_parameters(), masks, lr, betas, weight_decay, fused=fused)

    def dense_parameters(self) -> list[nn.Parameter]:
        """Parameters of stem and head, which every path uses."""
        return [parameter for _, parameter in self._named_dense()]

    def dense_momenta(self) -> list[Tensor]:
        """SGD momentum buffers of `dense_parameters()`."""
        return [getattr(self, f"_dense_momentum_{i}") for i, _ in enumerate(self._named_dense())]

    @torch.no_grad()
    def reset_momentum_(self) -> None:
        """Forget the SGD momentum of all weights."""
        self.engine.reset_momentum_()
        for buffer in self.dense_momenta():
            buffer.zero_()

    def packed_layers(self) -> list[PackedLayer]:
        """The weights of the searchable layers, in network order."""
        return [cast(PackedLayer, layer) for stage in self.stages for layer in cast(nn.ModuleList, stage)]

    def set_widths(self, widths: Sequence[Sequence[int]]) -> None:
        """Channels in use, [L][candidates of the layer], each 1..max_width (0 for the candidate `skip`)."""
        new = [list(row) for row in widths]
        self.engine.set_widths(new)
        self.widths = new

    def apply_scaling(self, architecture: Architecture, kept: Sequence[int] | None = None) -> None:
        """Put a scaled network's widths back (Algorithm 1, line 6); all other candidates stay as they are.

        The channels a candidate keeps are those with the largest L1 norm of the depthwise filter among all at maximum
        width, frozen ones included, ties to the one that comes first. They are moved to the front, in their order, with
        everything that belongs to them, momentum too; the others stay as they are behind them, frozen.

        `kept` are the indices of the supernet layers that the architecture's layers come from, in order; by default
        every stage keeps its first ones.
        """
        packed = self.packed_layers()
        widths = [list(row) for row in self.widths]
        for layer, candidate, width in self._kept(architecture, kept):
            order = torch.argsort(packed[layer].channel_importance(candidate), descending=True, stable=True)
            packed[layer].permute_(candidate, torch.cat([order[:width].sort().values, order[width:].sort().values]))
            widths[layer][candidate] = width
        self.set_widths(widths)

    def inherit_weights(self, architecture: Architecture, kept: Sequence[int] | None = None) -> dict[str, Tensor]:
        """State dict of the derived network with the supernet's weights (copies), the first `width` channels of each.

        Complete for `build_network(architecture, affine=False, running_stats=False)`; a network with affine batch norms
        or running statistics keeps its own for those (`strict=False`). `kept` as for `apply_scaling`.
        """
        state = {name: parameter.detach().clone() for name, parameter in self._named_dense()}
        packed = self.packed_layers()
        positions = ((s, p) for s, ops in enumerate(architecture.stages) for p in range(len(ops)))
        for (s, p), (layer, candidate, width) in zip(positions, self._kept(architecture, kept), strict=True):
            views = packed[layer].prefix(packed[layer].weights(), candidate, width)
            named = named_conv_views(f"stages.{s}.{p}", views)
            state |= {name: view.detach().clone(memory_format=torch.contiguous_format) for name, view in named}
        return state

    def optimizer_state(self) -> dict[str, Tensor]:
        """SGD momentum of all weights, under the weights' names in the state dict; not copies."""
        state = {name: buffer for (name, _), buffer in zip(self._named_dense(), self.dense_momenta(), strict=True)}
        for s, stage in enumerate(self.stages):
            for p, layer in enumerate(cast(nn.ModuleList, stage)):
                named = cast(PackedLayer, layer).momentum_state()
                state |= {f"stages.{s}.{p}.{name}": buffer for name, buffer in named.items()}
        return state

    def checkpoint_state(self) -> dict[str, Any]:
        """All that a run keeps of its supernet: plain lists and tensors (not copies), for `load_checkpoint_state`."""
        return {"weights": self.state_dict(), "momentum": self.optimizer_state(), "widths": self.widths}

    def load_checkpoint_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `checkpoint_state` gave, bit for bit; errors name what does not fit this space."""
        self.load_state_dict(state["weights"])
        copy_named(self.optimizer_state(), state["momentum"], "momentum")
        self.set_widths(state["widths"])

    def _kept(self, architecture: Architecture, kept: Sequence[int] | None) -> list[tuple[int, int, int]]:
        """(layer, candidate, width) of the architecture's layers."""
        found = list(architecture.layers())
        indices = [layer.index for layer, _ in found] if kept is None else list(kept)
        if len(indices) != len(found) or sorted(set(indices)) != indices:
            raise ValueError(f"kept must be {len(found)} increasing layer indices, one per kept layer, not {indices}")
        entries = []
        for (layer, op), index in zip(found, indices, strict=True):
            if not 0 <= index < len(self.space.layers) or self.space.layers[index].stage != layer.stage:
                raise ValueError(f"kept: layer {index} is not in stage {self.space.first_stage + layer.stage}")
            entries.append((index, self.space.layers[index].candidate_index(op.candidate), op.width))
        return entries

    def _named_dense(self) -> list[tuple[str, nn.Parameter]]:
        return [*self.stem.named_parameters("stem"), *self.head.named_parameters("head")]

    def _make_engine(self) -> None:
        self.engine: SupernetEngine = make_engine(self._engine_name, self._body_spec, self.packed_layers())
        self.engine.set_widths(self.widths)
        self._fixed: FixedLayer | None = None
        if self.engine.capturable:
            space = self.space
            self._fixed = FixedLayer(
                *(space.stem_channels, 3, space.fixed_se_channels, space.stem_act, self.stem.block.has_residual),
                *(BATCH_NORM_EPS, self.log_alpha.device),
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Supernet:
        super()._apply(fn, recurse)
        if self.log_alpha.dtype != self.weight_dtype:
            raise TypeError("a Supernet's dtype is chosen when it is made: Supernet(space, dtype=...)")
        self._make_engine()  # buffers are new tensors after a move
        return self

    def _prepare(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] != self.space.image_channels:
            raise ValueError(f"images must be [N, {self.space.image_channels}, H, W], not {list(images.shape)}")
        return images.to(dtype=self.dtype, memory_format=torch.channels_last)

    def _run(self, module: nn.Module, x: Tensor) -> Tensor:
        if self.dtype == self.weight_dtype:
            return module(x)
        cast_parameters = {name: parameter.to(self.dtype) for name, parameter in module.named_parameters()}
        return torch.func.functional_call(module, cast_parameters, x)

    def _stem(self, x: Tensor) -> Tensor:
        """The stem; its fixed block on the engine's kernels where the engine has kernels for a GPU."""
        if self._fixed is None:
            return self._run(self.stem, x)
        stem, conv = self.stem, self.stem.conv_stem
        hidden = F.conv2d(x, conv.weight.to(x.dtype), stride=conv.stride, padding=conv.padding)
        return self._fixed(stem.act1(stem.bn1(hidden)), list(stem.block.parameters()))

    def _logits(self, x: Tensor) -> Tensor:
        return self._run(self.head, x).to(self.weight_dtype)


def _alpha_mask(space: Space) -> Tensor:
    counts = torch.tensor([len(layer.candidates) for layer in space.layers])
    return torch.arange(space.max_candidates) < counts[:, None]


def _beta_mask(space: Space) -> Tensor:
    if space.depth_space == "skip-out":
        gated = torch.tensor([layer.position > 0 for layer in space.layers])
        return torch.stack([gated, torch.ones_like(gated)], dim=1)
    depths = torch.tensor([stage.depth for stage in space.stages])[:, None]
    entries = torch.arange(space.max_depth)
    return entries == depths - 1 if space.depth_space == "skip-in" else entries < depths
