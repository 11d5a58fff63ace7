"""Derived networks as timm models: block strings, constructor arguments, and a timm `EfficientNet` with our weights.

timm's inverted residual rounds its width, `in_channels * e`, to a multiple of 8, and no argument of its builder changes
that. The strings of `timm_block_strings` therefore rebuild an architecture exactly where widths are multiples of 8 (and
otherwise one of nearly the same widths); `to_timm` is always exact: it gives the blocks of other widths layers of the
right size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tfnas.architecture import Architecture
from tfnas.network import DropConnect, Network
from tfnas.space import Layer

if TYPE_CHECKING:
    from timm.models.efficientnet import EfficientNet

_ACT_CODES = {"relu": "re", "relu6": "r6", "swish": "sw", "hard_swish": "hs"}
# timm turns strides into dilations beyond its `output_stride`; a network here may have any total stride
_ANY_OUTPUT_STRIDE = 2**30
# the fixed block has no expansion, so timm builds it as a depthwise separable convolution, whose names differ
_FIXED_BLOCK_NAMES = {"conv_dw": "conv_dw", "bn2": "bn1", "se": "se", "conv_pwl": "conv_pw", "bn3": "bn2"}


def timm_block_strings(arch: Architecture) -> list[list[str]]:
    """timm's `arch_def`: one list per stage (the fixed block first), one string such as `ir_r1_k3_s2_e5_c24_se2_nre`.

    `e` is width / in_channels and `se` is se_channels / in_channels, written so that the products are exact.
    """
    space = arch.space
    fixed = f"ds_r1_k3_s1_c{space.fixed_channels}{_se(space.fixed_se_channels, space.stem_channels)}"
    stages: list[list[str]] = [[] for _ in space.stages]
    for layer, op in arch.layers():
        expansion = _ratio(op.width, layer.in_channels)
        stages[layer.stage].append(
            f"ir_r1_k{op.kernel_size}_s{layer.stride}_e{expansion}_c{layer.out_channels}"
            f"{_se(op.se_channels, layer.in_channels)}_n{_ACT_CODES[layer.act]}"
        )
    return [[f"{fixed}_n{_ACT_CODES[space.stem_act]}"], *stages]


def timm_model_kwargs(arch: Architecture) -> dict[str, Any]:
    """Arguments of `timm.models.efficientnet.EfficientNet` that go with the block strings.

    Its one `act_layer` serves stem and head; it is the head's here, and `to_timm` puts the stem's in place. timm has
    no argument for the stem's stride either, which is 2 there.
    """
    from timm.layers import get_act_layer
    from timm.models._efficientnet_builder import decode_arch_def

    space = arch.space
    return {
        "block_args": decode_arch_def(timm_block_strings(arch)),
        "num_classes": space.num_classes,
        "num_features": space.head_channels,
        "in_chans": space.image_channels,
        "stem_size": space.stem_channels,
        "fix_stem": True,
        "round_chs_fn": int,
        "output_stride": _ANY_OUTPUT_STRIDE,
        "act_layer": get_act_layer(space.head_act),
    }


def to_timm(network: Network) -> EfficientNet:
    """A timm `EfficientNet` with the network's exact widths and a copy of its weights, statistics and mode.

    It computes the same logits, and carries the dropout and drop-connect rates over. The network needs batch norms
    with weights and running statistics (`build_network`'s defaults); `ValueError` otherwise. Needs timm
    (`pip install tfnas-ext[export]`).
    """
    try:
        from timm.layers import DropPath, create_act_layer
        from timm.models.efficientnet import EfficientNet
    except ImportError as error:
        raise ImportError(f"exporting to timm needs timm ({error}): pip install 'tfnas-ext[export]'") from error

    arch = network.architecture
    if any(m.weight is None or m.running_mean is None for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        raise ValueError("network: expected batch norms with weights and running statistics (affine, running_stats)")
    like = next(network.parameters())
    # without storage until the weights are known: no time and no random numbers go into an initialisation
    with torch.device("meta"):
        model = EfficientNet(**timm_model_kwargs(arch), drop_rate=network.head.dropout.p)
        model.conv_stem.stride = network.stem.conv_stem.stride
        model.bn1.act = create_act_layer(arch.space.stem_act, inplace=True)
        blocks: list[Any] = [block for stage in model.blocks.children() for block in stage.children()]
        for (layer, op), block in zip(arch.layers(), blocks[1:], strict=True):
            if block.conv_dw.in_channels != op.width:
                _resize(block, layer, op.width, op.se_channels)
        for mine, block in zip(network.blocks(), blocks, strict=True):
            if isinstance(mine.drop_connect, DropConnect):
                block.drop_path = DropPath(mine.drop_connect.rate)
    model.to_empty(device=like.device).to(dtype=like.dtype)
    model.load_state_dict({_timm_name(name): value for name, value in network.state_dict().items()})
    return model.train(network.training)


def _timm_name(name: str) -> str:
    """timm's name of a parameter or buffer of `network.Network`."""
    part, _, rest = name.partition(".")
    if part == "stages":
        stage, _, rest = rest.partition(".")
        return f"blocks.{int(stage) + 1}.{rest}"
    if rest.startswith("block."):
        module, _, rest = rest.removeprefix("block.").partition(".")
        return f"blocks.0.0.{_FIXED_BLOCK_NAMES[module]}.{rest}"
    return rest


def _resize(block: Any, layer: Layer, width: int, se_channels: int) -> None:
    """Give a timm inverted residual layers of exactly `width` and `se_channels` channels."""
    from timm.layers import BatchNormAct2d
    from timm.models._efficientnet_blocks import SqueezeExcite

    act = type(block.bn1.act)
    dw = block.conv_dw
    block.conv_pw = nn.Conv2d(layer.in_channels, width, 1, bias=False)
    block.bn1 = BatchNormAct2d(width, act_layer=act)
    block.conv_dw = nn.Conv2d(width, width, dw.kernel_size, dw.stride, dw.padding, groups=width, bias=False)
    block.bn2 = BatchNormAct2d(width, act_layer=act)
    block.conv_pwl = nn.Conv2d(width, layer.out_channels, 1, bias=False)
    if se_channels:
        block.se = SqueezeExcite(width, rd_channels=se_channels, act_layer=act)


def _se(se_channels: int, in_channels: int) -> str:
    return f"_se{_ratio(se_channels, in_channels)}" if se_channels else ""


def _ratio(channels: int, in_channels: int) -> str:
    return f"{channels / in_channels!r}".removesuffix(".0")
