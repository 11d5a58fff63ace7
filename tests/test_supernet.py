"""The supernet and its two steps against a naive supernet of modules and torch's optimizers, in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from naive_supernet import NaiveSupernet, tiny_space
from tfnas.architecture import Architecture, Op
from tfnas.network import build_network
from tfnas.space import Space
from tfnas.space_io import load_space
from tfnas.steps import architecture_step, evaluation_step, weight_step
from tfnas.supernet import Supernet, body_spec
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tfnas_ext.engine import engine_names

ENGINES = pytest.mark.parametrize("engine", engine_names())
DEPTH_SPACES = pytest.mark.parametrize("depth_space", ["sink", "skip-in", "skip-out"])


def supernet_or_skip(space: Space, engine: str, dtype: torch.dtype) -> Supernet:
    """The supernet, or a skipped test where its engine says that it cannot run this space here."""
    try:
        return Supernet(space, engine, dtype)
    except RuntimeError as error:
        if "cannot run here" not in str(error):
            raise
        pytest.skip(str(error))


class Pair:
    """A supernet with random widths and architecture parameters, its naive twin, and data for both."""

    def __init__(self, depth_space: str, engine: str, seed: int, candidates: int = 3, batch: int = 4, size: int = 13):
        print(f"seed {seed}")
        torch.manual_seed(seed)
        self.rng = random.Random(seed)
        self.space = tiny_space(depth_space, candidates)
        self.supernet = supernet_or_skip(self.space, engine, torch.float64)
        with torch.no_grad():
            for parameter in self.supernet.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))  # biases too, which start at zero
            for name in ("alpha", "beta"):
                logits = getattr(self.supernet, f"log_{name}")
                logits.copy_(logits.masked_fill(~getattr(self.supernet, f"{name}_mask"), -torch.inf).log_softmax(1))
        layers = self.supernet.packed_layers()
        self.supernet.set_widths(
            [[min(c.max_width, self.rng.randint(2, 24)) for c in layer.spec.candidates] for layer in layers]
        )
        self.naive = NaiveSupernet(self.space, body_spec(self.space), self.supernet.widths).double()
        self.naive.load(self.supernet.state_dict())
        self.images = torch.randn(batch, 3, size, size - 2, dtype=torch.float64)
        self.labels = torch.randint(0, self.space.num_classes, (batch,))

    def choices(self, paths: int = 2) -> Tensor:
        counts = [len(layer.candidates) for layer in self.space.layers]
        rows = [self.rng.sample(range(n), paths) if n >= paths else [0] * paths for n in counts]
        return torch.tensor(rows).t().contiguous()

    def check_weights(self) -> None:
        """The naive weights are those of the supernet's prefixes."""
        state = self.supernet.state_dict()
        for module, prefix in ((self.naive.stem, "stem."), (self.naive.head, "head.")):
            tensors = [tensor for name, tensor in state.items() if name.startswith(prefix)]
            for parameter, tensor in zip(module.parameters(), tensors, strict=True):
                close(tensor, parameter.detach())
        for name, parameter in self.naive.body.named_parameters():
            close(state[name][tuple(slice(0, n) for n in parameter.shape)], parameter.detach())


def close(got: Tensor, want: Tensor, tolerance: float = 1e-8) -> None:
    assert got.shape == want.shape
    scale = want.detach().abs().max().clamp_min(1e-3)
    assert ((got - want).abs().max() / scale).item() < tolerance


def full_depth(space_layers: Any, choice: list[int], widths: list[list[int]]) -> list[Op]:
    return [Op.of(layer, c, widths[layer.index][c]) for layer, c in zip(space_layers, choice, strict=True)]


@ENGINES
@DEPTH_SPACES
@pytest.mark.parametrize(("candidates", "batch", "size"), [(3, 4, 13), (1, 3, 9), (3, 2, 7)])
def test_five_weight_steps_equal_torch(depth_space: str, engine: str, candidates: int, batch: int, size: int) -> None:
    """Losses, right answers, norms and weights of five steps with momentum, decay and clipping."""
    pair = Pair(depth_space, engine, seed=size + candidates, candidates=candidates, batch=batch, size=size)
    lr, momentum, decay, max_norm = 0.2, 0.9, 1e-2, 1.0
    optimizer = torch.optim.SGD(pair.naive.weights(), lr, momentum, weight_decay=decay)
    before = {name: tensor.clone() for name, tensor in pair.supernet.state_dict().items()}
    clipped = 0
    for _ in range(5):
        choices = pair.choices()
        result = weight_step(
            pair.supernet,
            pair.images,
            pair.labels,
            choices,
            lr=lr,
            momentum=momentum,
            weight_decay=decay,
            max_norm=max_norm,
        )
        optimizer.zero_grad(set_to_none=True)
        logits = [pair.naive.path(pair.images, choice) for choice in choices.tolist()]
        losses = torch.stack([F.cross_entropy(path, pair.labels) for path in logits])
        losses.sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(pair.naive.weights(), max_norm)
        clipped += int(norm > max_norm)
        optimizer.step()
        close(result.losses, losses.detach())
        close(result.norm, norm)
        assert result.correct.tolist() == [(path.argmax(1) == pair.labels).sum() for path in logits]
    assert clipped, "the case must clip at least once"
    pair.check_weights()
    state = pair.supernet.state_dict()
    assert torch.equal(state["log_alpha"], before["log_alpha"])
    assert torch.equal(state["log_beta"], before["log_beta"])
    for name, parameter in pair.naive.body.named_parameters():
        prefix = tuple(slice(0, n) for n in parameter.shape)
        before[name][prefix] = state[name][prefix]
        assert torch.equal(before[name], state[name]), f"{name}: frozen channels changed"


@ENGINES
@DEPTH_SPACES
@pytest.mark.parametrize("candidates", [3, 1])
def test_five_architecture_steps_equal_torch(depth_space: str, engine: str, candidates: int) -> None:
    pair = Pair(depth_space, engine, seed=31, candidates=candidates)
    supernet, naive = pair.supernet, pair.naive
    cost = torch.rand(len(pair.space.layers), pair.space.max_candidates, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items() if not name.startswith("log_")}
    options: dict[str, Any] = dict(lr=0.1, betas=(0.5, 0.999), weight_decay=5e-4)
    optimizer = supernet.architecture_adam(**options)
    mine = [naive.log_alpha, naive.log_beta]
    naive_optimizer = torch.optim.Adam(mine, **options)
    tau, max_norm = 2.0, 0.05
    for _ in range(5):
        noise = torch.randn(cost.shape, dtype=torch.float64)
        u = ((supernet.log_alpha + noise) / tau).softmax(1)
        result = architecture_step(
            supernet,
            optimizer,
            pair.images,
            pair.labels,
            u,
            lambda u, v: (u * cost).sum() * (v[:, 0] ** 2).sum(),
            max_norm=max_norm,
        )
        naive_optimizer.zero_grad()
        naive_u = torch.exp((naive.log_alpha + noise) / tau)
        naive_u = naive_u / naive_u.sum(1, keepdim=True)
        v = torch.exp(naive.log_beta)
        v = v / v.sum(1, keepdim=True)
        logits = naive.mixture(pair.images, naive_u)
        cross_entropy = F.cross_entropy(logits, pair.labels)
        latency = (naive_u * cost).sum() * (v[:, 0] ** 2).sum()
        (cross_entropy + latency).backward()
        for parameter in mine:
            assert parameter.grad is not None
            parameter.grad[parameter.isinf()] = 0
        norm = torch.nn.utils.clip_grad_norm_(mine, max_norm)
        with torch.no_grad():
            masks = [parameter.isinf() for parameter in mine]
            for parameter, mask in zip(mine, masks, strict=True):
                parameter[mask] = 0
            naive_optimizer.step()
            for parameter, mask in zip(mine, masks, strict=True):
                parameter[mask] = -torch.inf
                parameter -= parameter.exp().sum(1, keepdim=True).log()
        close(result.cross_entropy, cross_entropy.detach())
        close(result.latency_term, latency.detach())
        close(result.norm, norm)
        assert result.correct == (logits.argmax(1) == pair.labels).sum()
        for got, want in zip(supernet.architecture_parameters(), mine, strict=True):
            close(got.detach().exp(), want.detach().exp())
            close(got.detach().exp().sum(1), torch.ones(len(got), dtype=torch.float64))
    for name, tensor in supernet.state_dict().items():
        assert name.startswith("log_") or torch.equal(tensor, before[name]), f"{name} changed in an architecture step"
    moments = [*optimizer.first_moments, *optimizer.second_moments]
    assert all(torch.isfinite(m).all() for m in moments)
    assert optimizer.steps == 5


@DEPTH_SPACES
def test_masks_and_starting_point(depth_space: str) -> None:
    supernet = Supernet(tiny_space(depth_space))
    v = supernet.depth_weights()
    if depth_space == "sink":
        torch.testing.assert_close(v, torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1, 0, 0]]))
    elif depth_space == "skip-in":
        torch.testing.assert_close(v, torch.tensor([[0.0, 0, 1], [1, 0, 0]]))
    else:
        torch.testing.assert_close(v, torch.tensor([[0, 1], [0.5, 0.5], [0.5, 0.5], [0, 1]]))
    u = supernet.log_alpha.exp()
    if depth_space == "skip-in":
        torch.testing.assert_close(u, torch.tensor([[1 / 3] * 3 + [0], [0.25] * 4, [0.25] * 4, [1 / 3] * 3 + [0]]))
    else:
        torch.testing.assert_close(u, torch.full((4, 3), 1 / 3))
    assert torch.equal(u > 0, supernet.alpha_mask)
    assert torch.equal(v > 0, supernet.beta_mask)
    layers = supernet.space.layers
    assert supernet.widths == [[layer.start_width(i) for i in range(len(layer.candidates))] for layer in layers]


class NoReading(TorchDispatchMode):
    """Fails where a value would be read back from the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "item", "equal"), name
        return func(*args, **(kwargs or {}))


@DEPTH_SPACES
def test_steps_read_nothing_back(depth_space: str) -> None:
    pair = Pair(depth_space, "reference", seed=41)
    optimizer = pair.supernet.architecture_adam(0.1, (0.5, 0.999))
    with NoReading():
        weight_step(pair.supernet, pair.images, pair.labels, pair.choices(), lr=0.1)
        u = pair.supernet.log_alpha.softmax(1)
        architecture_step(pair.supernet, optimizer, pair.images, pair.labels, u, lambda u, v: u.sum() + v.sum())
    with pytest.raises(AssertionError), NoReading():
        pair.images.sum().item()


@pytest.mark.parametrize("seed", range(3))
def test_scaling_keeps_the_strongest_channels(seed: int) -> None:
    pair = Pair("sink", "reference", seed=50 + seed)
    supernet, space = pair.supernet, pair.space
    for _ in range(2):  # momentum that is not zero
        weight_step(supernet, pair.images, pair.labels, pair.choices(), lr=0.1)
    with torch.no_grad():  # a tie, and a frozen channel among the strongest
        layer = supernet.packed_layers()[0]
        filters = layer.prefix(layer.weights(), 1, 12)[1]
        filters[11] = 9
        filters[3] = -filters[5]
    choice = [1, 0, 2, 1]
    ops = full_depth(space.layers, choice, [[3 + i for i in range(3)] for _ in choice])
    architecture = Architecture(space, (tuple(ops[:2]), tuple(ops[3:])))
    full = [[c.max_width for c in p.spec.candidates] for p in supernet.packed_layers()]
    old_widths = [list(row) for row in supernet.widths]
    old_state = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    old_momentum = {name: tensor.clone() for name, tensor in supernet.optimizer_state().items()}
    supernet.set_widths(full)
    old_logits = evaluation_logits(supernet, pair.images, choice)
    supernet.set_widths(old_widths)
    supernet.apply_scaling(architecture)
    scaled = {(0, 1): 4, (1, 0): 3, (3, 1): 4}
    for layer_index, row in enumerate(supernet.widths):
        for c, width in enumerate(row):
            assert width == scaled.get((layer_index, c), old_widths[layer_index][c])
    places = {0: "stages.0.0", 1: "stages.0.1", 2: "stages.0.2", 3: "stages.1.0"}
    touched = [f"{places[index]}.{space.candidates[c].name}." for index, c in scaled]
    for name, tensor in supernet.state_dict().items():
        if not any(name.startswith(prefix) for prefix in touched):
            assert torch.equal(tensor, old_state[name]), f"{name} changed"
    for (index, c), width in scaled.items():
        prefix = f"{places[index]}.{space.candidates[c].name}"
        importance = old_state[f"{prefix}.conv_dw.weight"].abs().sum((1, 2, 3)).tolist()
        strongest = sorted(range(len(importance)), key=lambda i: (-importance[i], i))[:width]
        order = [*sorted(strongest), *(i for i in range(len(importance)) if i not in strongest)]
        for states in ((old_state, supernet.state_dict()), (old_momentum, supernet.optimizer_state())):
            for name in ("conv_pw", "conv_dw", "se.conv_expand"):
                key = f"{prefix}.{name}.weight"
                assert key not in states[0] or torch.equal(states[0][key][order], states[1][key])
            for name in ("conv_pwl", "se.conv_reduce"):
                key = f"{prefix}.{name}.weight"
                assert key not in states[0] or torch.equal(states[0][key][:, order], states[1][key])
    supernet.set_widths(full)
    close(evaluation_logits(supernet, pair.images, choice), old_logits)


def evaluation_logits(supernet: Supernet, images: Tensor, choice: list[int]) -> Tensor:
    with torch.no_grad():
        return supernet.forward_paths(images, torch.tensor([choice]))[0]


@pytest.mark.parametrize("depth_space", ["sink", "skip-in"])
def test_inherited_network_is_the_supernet_s_path(depth_space: str) -> None:
    pair = Pair(depth_space, "reference", seed=60)
    supernet, space = pair.supernet, pair.space
    skip = 3
    choice = [1, 0, 2, 1] if depth_space == "sink" else [1, skip, 2, 0]
    if depth_space == "sink":
        with torch.no_grad():
            supernet.log_beta[0] = torch.tensor([-torch.inf, 0, -torch.inf])
        kept = [0, 1, 3]
    else:
        kept = [0, 2, 3]
    ops = [Op.of(space.layers[i], choice[i], supernet.widths[i][choice[i]]) for i in kept]
    architecture = Architecture(space, (tuple(ops[:2]), tuple(ops[2:])))
    network = build_network(architecture, affine=False, running_stats=False).double()
    network.load_state_dict(supernet.inherit_weights(architecture, kept))
    close(network(pair.images), evaluation_logits(supernet, pair.images, choice))
    affine = build_network(architecture).double()
    missing, unexpected = affine.load_state_dict(supernet.inherit_weights(architecture, kept), strict=False)
    assert not unexpected
    assert all("bn" in name for name in missing)
    close(affine(pair.images), evaluation_logits(supernet, pair.images, choice))
    for wrong in ([0, 1], [0, 1, 2], [1, 0, 3], [0, 1, 4]):
        with pytest.raises(ValueError, match="kept"):
            supernet.inherit_weights(architecture, wrong)


def test_state_names_and_checkpoint(tmp_path: Any) -> None:
    pair = Pair("sink", "reference", seed=70)
    supernet = pair.supernet
    state = supernet.state_dict()
    assert state["stages.0.1.k5_e3_se1.conv_pw.weight"].shape == (18, 6, 1, 1)
    assert state["stages.0.1.k5_e3_se1.se.conv_reduce.weight"].shape == (3, 18, 1, 1)
    assert state["stages.1.0.k3_e2.conv_pwl.weight"].shape == (7, 12, 1, 1)
    assert {name.split(".")[0] for name in state} == {"stem", "stages", "head", "log_alpha", "log_beta"}
    choices = pair.choices()
    weight_step(supernet, pair.images, pair.labels, choices, lr=0.1)
    torch.save(supernet.checkpoint_state(), tmp_path / "state.pt")
    other = Supernet(pair.space, "reference", torch.float64)
    other.load_checkpoint_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for net in (supernet, other):
        weight_step(net, pair.images, pair.labels, choices.flip(0), lr=0.1)
    for states in ((supernet.state_dict(), other.state_dict()), (supernet.optimizer_state(), other.optimizer_state())):
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert supernet.widths == other.widths
    with pytest.raises(RuntimeError, match=r"stages\.0\.1\.skip|Missing key|size mismatch|must be"):
        Supernet(tiny_space(candidates=2)).load_checkpoint_state(supernet.checkpoint_state())
    supernet.reset_momentum_()
    assert not any(buffer.any() for buffer in supernet.optimizer_state().values())


@ENGINES
def test_bfloat16_follows_float32(engine: str) -> None:
    """Error against float64 at most twice that of the naive supernet under autocast-free bfloat16 casts."""
    torch.manual_seed(80)
    space = tiny_space()
    exact = supernet_or_skip(space, engine, torch.float64)
    low = supernet_or_skip(space, engine, torch.bfloat16)
    low.load_state_dict(exact.state_dict())
    naive = NaiveSupernet(space, body_spec(space), exact.widths)
    naive.load(exact.state_dict())
    images, choices = torch.randn(8, 3, 16, 16), torch.tensor([[0, 1, 2, 0], [1, 2, 0, 2]])
    with torch.no_grad():
        outs, wants = low.forward_paths(images, choices), exact.forward_paths(images, choices)
        plain = naive.bfloat16()
        for out, want, choice in zip(outs, wants, choices.tolist(), strict=True):
            assert out.dtype == torch.float32
            error = (out - want).abs().max()
            plain_error = (plain.path(images.bfloat16(), choice).double() - want).abs().max()
            assert error <= 2 * plain_error + 1e-2
    result = weight_step(low, images, torch.zeros(8, dtype=torch.int64), choices, lr=0.1)
    assert torch.isfinite(result.losses).all()
    assert all(p.dtype == torch.float32 for p in low.parameters())


def test_moving_keeps_the_engine_on_the_weights() -> None:
    pair = Pair("sink", "reference", seed=90)
    before = evaluation_logits(pair.supernet, pair.images, [0, 0, 0, 0])
    engine = pair.supernet.engine
    pair.supernet.double()
    assert pair.supernet.engine is not engine, "a native engine holds tensors, and a move makes new ones"
    assert torch.equal(evaluation_logits(pair.supernet, pair.images, [0, 0, 0, 0]), before)
    weight_step(pair.supernet, pair.images, pair.labels, pair.choices(), lr=0.1)
    assert any(m.any() for layer in pair.supernet.packed_layers() for m in layer.momenta())
    with pytest.raises(TypeError, match="chosen when it is made"):
        pair.supernet.float()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="dtype must be one of"):
        Supernet(tiny_space(), dtype=torch.float16)
    with pytest.raises(ValueError, match="engine must be one of"):
        Supernet(tiny_space(), "fast")
    supernet = Supernet(tiny_space())
    with pytest.raises(ValueError, match=r"images must be \[N, 3, H, W\]"):
        supernet.forward_paths(torch.zeros(2, 1, 13, 13), torch.zeros(1, 4, dtype=torch.int64))
    widths = [list(row) for row in supernet.widths]
    widths[0][0] = 0
    with pytest.raises(ValueError, match="widths: layer 0"):
        supernet.set_widths(widths)
    assert supernet.widths != widths


@pytest.mark.parametrize(("name", "layers"), [("imagenet", 18), ("small", 10), ("imagenet-no-se", 18)])
def test_built_in_spaces(name: str, layers: int) -> None:
    space = load_space(name)
    supernet = Supernet(space)
    assert len(supernet.packed_layers()) == layers
    state = supernet.state_dict()
    expected = sum(3 + 4 * bool(c.se_expansion) for layer in space.layers for c in layer.candidates)
    assert sum(key.startswith("stages.") for key in state) == expected
    images = torch.randn(2, space.image_channels, 33, 33)
    choices = torch.randint(0, len(space.candidates), (2, layers))
    correct = evaluation_step(supernet, images, torch.zeros(2, dtype=torch.int64), choices)
    assert correct.shape == (2,)
