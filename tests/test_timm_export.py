"""timm rebuilds the same network: equal shapes, equal logits, equal strings where timm's rounding allows it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from random_spaces import random_architecture, random_space
from tfnas.architecture import Architecture, count_parameters, load_architecture
from tfnas.network import Network, build_network
from tfnas.timm_export import timm_block_strings, timm_model_kwargs, to_timm
from torch import nn

timm = pytest.importorskip("timm")


def _network(arch: Architecture, **kwargs: float) -> Network:
    """A float64 network whose weights and statistics are all away from their initial values."""
    net = build_network(arch, **kwargs).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net


def _assert_same(arch: Architecture) -> None:
    net = _network(arch)
    model = to_timm(net)
    assert isinstance(model, timm.models.efficientnet.EfficientNet)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(arch)
    x = torch.randn(3, arch.space.image_channels, 40, 41, dtype=torch.float64)
    for training in (False, True):
        torch.testing.assert_close(model.train(training)(x), net.train(training)(x))
    torch.testing.assert_close(model.bn2.running_var, net.head.bn2.running_var)


@pytest.mark.parametrize("seed", range(15))
def test_random_networks(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    _assert_same(random_architecture(rng, random_space(rng)))


def test_tf_nas_a() -> None:
    torch.manual_seed(0)
    arch, _ = load_architecture("tf-nas-a")
    _assert_same(arch)
    strings = timm_block_strings(arch)
    assert strings[0] == ["ds_r1_k3_s1_c16_se0.25_nre"]
    assert strings[1] == ["ir_r1_k3_s2_e5.1875_c24_se2_nre", f"ir_r1_k5_s1_e{128 / 24!r}_c24_nre"]
    assert [len(stage) for stage in strings] == [1, 2, 3, 4, 4, 4, 1]


@pytest.mark.parametrize("seed", range(15))
def test_strings_alone_rebuild_widths_that_are_multiples_of_eight(seed: int) -> None:
    """Shapes from the strings and arguments only, through timm's own decoder and builder."""
    rng = random.Random(100 + seed)
    arch = random_architecture(rng, random_space(rng))
    stages = []
    for ops, layers in zip(arch.stages, arch.space.layers_of_stage, strict=True):
        fitting = []
        for op, layer in zip(ops, layers, strict=False):
            maximum = layer.max_width(layer.candidate_index(op.candidate))
            fitting.append(replace(op, width=rng.randint(1, maximum // 8) * 8))
        stages.append(tuple(fitting))
    arch = Architecture(arch.space, tuple(stages))
    with torch.device("meta"):
        model = timm.models.efficientnet.EfficientNet(**timm_model_kwargs(arch))
        reference = to_timm(build_network(arch))
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in reference.named_parameters()
    }


def test_dropout_and_drop_connect_are_carried_over() -> None:
    arch, _ = load_architecture("tf-nas-a")
    net = build_network(arch, dropout=0.2, drop_connect=0.3)
    model = to_timm(net)
    assert model.drop_rate == 0.2
    rates = [block.drop_path.drop_prob for stage in model.blocks for block in stage if block.has_skip]
    ours = [block.drop_connect.rate for block in net.blocks() if block.has_residual]
    assert rates == ours
    assert max(rates) > 0.25


def test_weights_are_copied_and_no_random_number_is_drawn() -> None:
    net = build_network(random_architecture(random.Random(0), random_space(random.Random(0))))
    state = torch.get_rng_state()
    model = to_timm(net.eval())
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training
    pointers = {p.data_ptr() for p in net.parameters()}
    assert pointers.isdisjoint(p.data_ptr() for p in model.parameters())


@pytest.mark.parametrize("options", [{"affine": False}, {"running_stats": False}])
def test_supernet_batch_norms_are_refused(options: dict[str, bool]) -> None:
    arch = random_architecture(random.Random(0), random_space(random.Random(0)))
    with pytest.raises(ValueError, match="expected batch norms with weights and running statistics"):
        to_timm(build_network(arch, **options))
