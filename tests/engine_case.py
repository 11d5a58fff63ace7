"""Bodies for engine tests: an engine, a naive body with the same weights, and random inputs for both."""

from __future__ import annotations

import random

import pytest
import torch
from naive_body import NaiveBody
from torch import Tensor

from tfnas_ext.engine import SupernetEngine, make_engine
from tfnas_ext.engine_spec import DEPTH_SPACES, BodySpec, CandidateSpec, LayerSpec
from tfnas_ext.packed import ROLES, PackedLayer, named_conv_views
from tfnas_ext.reference import ACTIVATIONS

SKIP = CandidateSpec("skip", 0, 0)
DTYPE = torch.float64


def candidates(base: int) -> tuple[CandidateSpec, ...]:
    return (
        CandidateSpec("k3_e2", 3, 2 * base),
        CandidateSpec("k3_e2_se1", 3, 2 * base, base),
        CandidateSpec("k5_e3", 5, 3 * base),
        CandidateSpec("k5_e3_se2", 5, 3 * base, 2),
    )


def small_body(depth_space: str) -> BodySpec:
    """Two stages of depth 3 and 1; the first starts with stride 2."""

    def layer(cin: int, cout: int, stride: int, act: str, position: int) -> LayerSpec:
        same = stride == 1 and cin == cout
        ops = candidates(cin)
        if depth_space == "skip-in" and same and position:
            ops = (*ops, SKIP)
        gated = depth_space == "skip-out" and same and position > 0
        return LayerSpec(cin, cout, stride, act, same, ops, gated)

    first = tuple(layer(cin, 6, stride, "swish", p) for p, (cin, stride) in enumerate([(4, 2), (6, 1), (6, 1)]))
    return BodySpec((first, (layer(6, 5, 1, "relu", 0),)), depth_space)


def random_body(rng: random.Random) -> BodySpec:
    """Anything a spec allows, small."""
    depth_space = rng.choice(DEPTH_SPACES)
    channels = rng.randint(1, 9)
    stages = []
    for _ in range(rng.randint(1, 3)):
        layers = []
        out_channels = rng.choice([channels, rng.randint(1, 9)])
        for position in range(rng.randint(1, 3)):
            stride = rng.choice([1, 2]) if position == 0 else 1
            same = stride == 1 and channels == out_channels
            ops = tuple(
                CandidateSpec(f"op{i}", rng.choice([1, 3, 5, 7]), rng.randint(1, 24), rng.choice([0, 0, 1, 3, 8]))
                for i in range(rng.randint(1, 4))
            )
            if depth_space == "skip-in" and same and rng.random() < 0.7:
                ops = (*ops, SKIP)
            gated = depth_space == "skip-out" and same and rng.random() < 0.7
            residual = same and rng.random() < 0.8
            act = rng.choice(list(ACTIVATIONS))
            layers.append(LayerSpec(channels, out_channels, stride, act, residual, ops, gated))
            channels = out_channels
        stages.append(tuple(layers))
    return BodySpec(tuple(stages), depth_space, eps=rng.choice([1e-5, 1e-3]))


def engine_or_skip(name: str, spec: BodySpec, layers: list[PackedLayer]) -> SupernetEngine:
    """The engine, or a skipped test where it says that it cannot run this body here."""
    try:
        return make_engine(name, spec, layers)
    except RuntimeError as error:
        if "cannot run here" not in str(error):
            raise
        pytest.skip(str(error))


class Case:
    """An engine, a naive body with the same weights, and random inputs for both."""

    def __init__(self, spec: BodySpec, engine: str, seed: int, shape: tuple[int, int, int] = (3, 9, 7)):
        print(f"seed {seed}, images {shape}, {spec}")
        self.generator = torch.Generator().manual_seed(seed)
        rng = random.Random(seed)
        self.spec = spec
        self.layers = [PackedLayer(spec, dtype=DTYPE, generator=self.generator) for spec in self.spec.layers]
        for layer in self.layers:  # biases of SE start at zero, which hides mistakes
            for bias in (layer.se_reduce_bias, layer.se_expand_bias):
                with torch.no_grad():
                    bias.normal_(generator=self.generator)
        self.widths = [
            [0 if c.is_skip else rng.randint(1, c.max_width) for c in layer.candidates] for layer in self.spec.layers
        ]
        self.engine: SupernetEngine = engine_or_skip(engine, self.spec, self.layers)
        self.engine.set_widths(self.widths)
        self.naive = NaiveBody(self.spec, self.widths).to(DTYPE)
        self.naive.load_prefixes(self.state())
        n, h, w = shape
        self.x = self.normal(n, self.spec.layers[0].in_channels, h, w).requires_grad_()
        counts = [len(layer.candidates) for layer in self.spec.layers]
        first = [rng.randrange(count) for count in counts]
        second = [
            rng.randrange(count) if count == 1 else rng.choice([c for c in range(count) if c != f])
            for f, count in zip(first, counts, strict=True)
        ]
        self.choices = torch.tensor([first, second])
        shape_v = self.spec.depth_weights_shape
        self.v = None if shape_v is None else self.normal(*shape_v)
        # any sign and sum: an engine must not rely on rows that sum to one
        self.u = self.normal(len(counts), self.spec.max_candidates)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=DTYPE, generator=self.generator)

    def state(self) -> dict[str, Tensor]:
        state = {}
        layers = iter(self.layers)
        for s, stage in enumerate(self.spec.stages):
            for position, _ in enumerate(stage):
                state |= {f"stages.{s}.{position}.{k}": t for k, t in next(layers).state_dict().items()}
        return state

    def named_gradients(self) -> dict[str, Tensor]:
        found: dict[tuple[int, int], list[Tensor]] = {}
        for layer, candidate, role, grad in self.engine.read_gradients():
            assert len(found.setdefault((layer, candidate), [])) == role < len(ROLES)
            found[layer, candidate].append(grad)
        places = [(s, p) for s, stage in enumerate(self.spec.stages) for p, _ in enumerate(stage)]
        named: dict[str, Tensor] = {}
        for (layer, candidate), grads in found.items():
            s, position = places[layer]
            name = f"stages.{s}.{position}.{self.spec.layers[layer].candidates[candidate].name}"
            named |= dict(named_conv_views(name, grads))
        return named


def close(got: Tensor, want: Tensor, tolerance: float = 1e-9) -> None:
    assert got.shape == want.shape
    scale = want.detach().abs().max().clamp_min(1e-3)
    assert ((got - want).abs().max() / scale).item() < tolerance
