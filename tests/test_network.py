"""Derived networks: counts against torch's own, numbers against the formula in float64, shapes of any size."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from random_spaces import random_architecture, random_space
from tfnas.architecture import Architecture, Op, count_multiply_adds, count_parameters, load_architecture
from tfnas.network import Head, MBInvRes, Network, Stem, build_block, build_network
from tfnas.space import ACTIVATIONS
from tfnas.space_io import load_space
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def _uncounted_by_torch(net: Network) -> int:
    """Additions that `count_multiply_adds` includes and the flop counter does not: biases and the head's pooling."""
    biases = sum(m.bias.numel() for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None)
    space = net.architecture.space
    return biases + space.head_channels * space.out_resolution**2


def _assert_counts(arch: Architecture) -> None:
    with torch.device("meta"):
        net = build_network(arch)
        image = torch.empty(1, arch.space.image_channels, arch.space.resolution, arch.space.resolution)
        with FlopCounterMode(display=False) as counter:
            net.eval()(image)
    assert count_parameters(arch) == sum(p.numel() for p in net.parameters())
    assert 2 * (count_multiply_adds(arch) - _uncounted_by_torch(net)) == counter.get_total_flops()


def test_counts_of_tf_nas_a() -> None:
    _assert_counts(load_architecture("tf-nas-a")[0])


@pytest.mark.parametrize("seed", range(12))
def test_counts_of_random_architectures(seed: int) -> None:
    rng = random.Random(seed)
    _assert_counts(random_architecture(rng, random_space(rng)))


_FORMULAS = {
    "relu": lambda x: x.clamp(min=0),
    "relu6": lambda x: x.clamp(0, 6),
    "swish": lambda x: x / (1 + (-x).exp()),
    "hard_swish": lambda x: x * (x + 3).clamp(0, 6) / 6,
}


def _formula(block: MBInvRes, x: Tensor, act: str) -> Tensor:
    """MBInvRes in training mode, written out from its definition with batch statistics."""

    def norm(y: Tensor, bn: nn.BatchNorm2d) -> Tensor:
        y = (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        return y * bn.weight[:, None, None] + bn.bias[:, None, None]

    f = _FORMULAS[act]
    y = f(norm(torch.einsum("nchw,ec->nehw", x, block.conv_pw.weight[:, :, 0, 0]), block.bn1)) if block.expand else x
    k = block.conv_dw.kernel_size[0]
    padded = F.pad(y, [k // 2] * 4)
    windows = padded.unfold(2, k, block.conv_dw.stride[0]).unfold(3, k, block.conv_dw.stride[1])
    y = f(norm(torch.einsum("nchwij,cij->nchw", windows, block.conv_dw.weight[:, 0]), block.bn2))
    if not isinstance(block.se, nn.Identity):
        s = y.mean((2, 3))
        s = f(s @ block.se.conv_reduce.weight[:, :, 0, 0].T + block.se.conv_reduce.bias)
        s = s @ block.se.conv_expand.weight[:, :, 0, 0].T + block.se.conv_expand.bias
        y = y * (1 / (1 + (-s).exp()))[:, :, None, None]
    y = norm(torch.einsum("nehw,oe->nohw", y, block.conv_pwl.weight[:, :, 0, 0]), block.bn3)
    return x + y if block.has_residual else y


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize(("out_channels", "stride"), [(6, 1), (7, 1), (6, 2)])
@pytest.mark.parametrize(("kernel_size", "se_channels"), [(3, 0), (5, 2), (7, 5)])
def test_block_is_its_formula(
    act: str, expand: bool, out_channels: int, stride: int, kernel_size: int, se_channels: int
) -> None:
    torch.manual_seed(0)
    block = MBInvRes(
        6,
        13 if expand else 6,
        out_channels,
        kernel_size=kernel_size,
        stride=stride,
        se_channels=se_channels,
        act=act,
        expand=expand,
    ).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 6, 9, 10, dtype=torch.float64)
    torch.testing.assert_close(block(x), _formula(block, x, act), rtol=1e-9, atol=1e-9)
    assert block.has_residual == (stride == 1 and out_channels == 6)


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_run_and_differentiate(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    arch = random_architecture(rng, random_space(rng))
    space = arch.space
    net = build_network(arch, dropout=0.2, drop_connect=0.2)
    x = torch.randn(3, space.image_channels, space.resolution, space.resolution)
    logits = net(x)
    assert logits.shape == (3, space.num_classes)
    F.cross_entropy(logits, torch.zeros(3, dtype=torch.long)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_pieces_make_the_whole_and_half_sizes_run() -> None:
    torch.manual_seed(0)
    arch, _ = load_architecture("tf-nas-a")
    net = build_network(arch).eval()
    for size in (64, 97):
        x = torch.randn(1, 3, size, size)
        y = Stem(arch.space).eval()
        y.load_state_dict(net.stem.state_dict())
        z = y(x)
        for layer, op in arch.layers():
            block = build_block(layer, op).eval()
            block.load_state_dict(net.stages[layer.stage][layer.position].state_dict())
            assert z.shape[1] == layer.in_channels
            z = block(z)
        head = Head(arch.space).eval()
        head.load_state_dict(net.head.state_dict())
        assert torch.equal(head(z), net(x))


def test_resolutions_are_the_spaces() -> None:
    arch, _ = load_architecture("tf-nas-a")
    seen: list[tuple[int, int]] = []
    with torch.device("meta"):
        net = build_network(arch)
        for stage in net.stages:
            for block in stage:
                block.register_forward_pre_hook(lambda _, x: seen.append((x[0].shape[1], x[0].shape[2])))
        net(torch.empty(1, 3, 224, 224))
    assert seen == [(layer.in_channels, layer.resolution) for layer, _ in arch.layers()]


def test_channels_last_gives_the_same_numbers_and_layout() -> None:
    torch.manual_seed(0)
    rng = random.Random(3)
    arch = random_architecture(rng, load_space("small"))
    net = build_network(arch).double()
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    expected = net(x)
    net.to(memory_format=torch.channels_last)
    layouts = []
    for block in net.blocks():
        block.register_forward_hook(
            lambda _m, _x, y: layouts.append(y.is_contiguous(memory_format=torch.channels_last))
        )
    torch.testing.assert_close(net(x.to(memory_format=torch.channels_last)), expected)
    assert all(layouts)


def test_names_are_timms() -> None:
    arch, _ = load_architecture("tf-nas-a")
    with torch.device("meta"):
        names = [name for name, _ in build_network(arch).named_parameters()]
    block = [name.removeprefix("stages.0.0.") for name in names if name.startswith("stages.0.0.")]
    assert [name for name in block if "bias" not in name] == [
        *("conv_pw.weight", "bn1.weight", "conv_dw.weight", "bn2.weight"),
        *("se.conv_reduce.weight", "se.conv_expand.weight", "conv_pwl.weight", "bn3.weight"),
    ]
    assert not any(".se." in name for name in names if name.startswith("stages.0.1."))
    assert "stem.block.conv_pw.weight" not in names


def test_batch_norm_options() -> None:
    arch = random_architecture(random.Random(0), load_space("small"))
    plain = build_network(arch, affine=False, running_stats=False)
    norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.weight is None and norm.running_mean is None for norm in norms)
    assert all(
        norm.weight is not None and norm.running_mean is not None
        for norm in build_network(arch).modules()
        if isinstance(norm, nn.BatchNorm2d)
    )


def test_drop_connect_grows_with_depth_and_keeps_the_mean() -> None:
    arch, _ = load_architecture("tf-nas-a")
    with torch.device("meta"):
        net = build_network(arch, drop_connect=0.2)
    rates = {
        (layer.stage, layer.position): net.stages[layer.stage][layer.position].drop_connect
        for layer, _ in arch.layers()
        if layer.has_residual
    }
    assert [round(drop.rate, 6) for drop in rates.values()] == [
        round(0.2 * (layer.index + 2) / 19, 6) for layer, _ in arch.layers() if layer.has_residual
    ]
    torch.manual_seed(0)
    layer = arch.space.layers[1]
    block = build_block(layer, Op("k3_e3", 3, 48, 0), drop_connect=0.25)
    x = torch.zeros(4000, 24, 2, 2)
    x[:, 0, 0, 0] = torch.randn(4000)
    branch = block(x) - x
    dropped = (branch.flatten(1) == 0).all(1).float().mean().item()
    assert abs(dropped - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    full = _undropped(block, x)
    kept = (branch.flatten(1) != 0).any(1)
    torch.testing.assert_close(branch[kept], full[kept] / 0.75)
    block.eval()
    assert torch.equal(block(x), block(x))


def _undropped(block: MBInvRes, x: Tensor) -> Tensor:
    """The residual branch of `block` on `x` with nothing dropped."""
    rate, block.drop_connect.rate = block.drop_connect.rate, 0.0
    branch = block(x) - x
    block.drop_connect.rate = rate
    return branch


def test_signals_keep_their_scale_through_depth() -> None:
    torch.manual_seed(0)
    net = build_network(load_architecture("tf-nas-a")[0])
    logits = net(torch.randn(4, 3, 64, 64))
    assert 1e-3 < logits.std().item() < 10


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_bad_rates_are_refused(rate: float) -> None:
    arch = random_architecture(random.Random(0), load_space("small"))
    with pytest.raises(ValueError, match=r"dropout: expected a rate in \[0, 1\)"):
        build_network(arch, dropout=rate)
    with pytest.raises(ValueError, match=r"drop_connect: expected a rate in \[0, 1\)"):
        build_network(arch, drop_connect=rate)


def test_a_block_without_expansion_needs_its_input_width() -> None:
    with pytest.raises(ValueError, match=r"width: expected in_channels \(8\) without expansion, got 9"):
        MBInvRes(8, 9, 8, kernel_size=3, stride=1, se_channels=0, act="relu", expand=False)


def test_same_seed_same_weights() -> None:
    arch = random_architecture(random.Random(0), load_space("small"))
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build_network(arch).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert not torch.equal(states[0]["head.classifier.weight"], states[2]["head.classifier.weight"])


def test_fewer_classes_only_change_the_classifier() -> None:
    arch, _ = load_architecture("tf-nas-a")
    small = Architecture(replace(arch.space, num_classes=10), arch.stages)
    assert count_parameters(arch) - count_parameters(small) == 990 * 1281
