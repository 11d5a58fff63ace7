"""Batch statistics of the CPU kernels in float32 against PyTorch's own batch norms, which sum in float64."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tfnas_ext import ops, reference
from tfnas_ext._native import MODULE

pytestmark = pytest.mark.skipif(MODULE is None, reason="the native module is not built")


def plain_statistics(x: Tensor, weights: list[Tensor], stride: int, act: str) -> list[tuple[Tensor, Tensor]]:
    """Mean and biased variance of the three batch norms by F.batch_norm; in NCHW, where it rounds least."""
    statistics = []

    def norm(values: Tensor) -> Tensor:
        mean, var = torch.zeros(values.shape[1]), torch.ones(values.shape[1])
        out = F.batch_norm(values, mean, var, training=True, momentum=1.0)
        count = values.numel() // values.shape[1]
        statistics.append((mean.double(), var.double() * (count - 1) / count))
        return out

    conv_pw, conv_dw, conv_pwl = weights
    activate = reference.ACTIVATIONS[act]
    wide = activate(norm(F.conv2d(x, conv_pw)))
    width, kernel = conv_dw.shape[0], conv_dw.shape[-1]
    wide = activate(norm(F.conv2d(wide, conv_dw, padding=kernel // 2, stride=stride, groups=width)))
    norm(F.conv2d(wide, conv_pwl))
    return statistics


@pytest.mark.parametrize("design", ["strips", "channels"])
def test_statistics_round_like_those_of_plain_torch(design: str) -> None:
    """Means in standard deviations, variances relative: root mean squares over many channels, the 2x rule.

    Inputs have means of their own, and zero padding makes border pixels unlike the rest: sums about an odd pixel or
    over many pixels in float32 would cost digits here.
    """
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    errors: dict[str, list[Tensor]] = {}
    for trial in range(60):
        width, size, kernel, stride = rng.randint(1, 16), rng.choice((7, 14, 30)), rng.choice((3, 5)), 1 + trial % 2
        act = rng.choice(("relu", "swish"))
        x = torch.randn(8, 6, size, size, generator=generator) + torch.randn(1, 6, 1, 1, generator=generator)
        x = x.contiguous(memory_format=torch.channels_last)
        shapes = ((width, 6, 1, 1), (width, 1, kernel, kernel), (5, width, 1, 1))
        weights = [0.4 * torch.randn(shape, generator=generator) for shape in shapes]
        _, exact = reference.mbinvres_with_statistics(
            x.double(), *(weight.double() for weight in weights), stride=stride, act=act
        )
        _, ours = ops.mbinvres_with_statistics(x, *weights, stride=stride, act=act, backend="cpu", design=design)
        for i, plain in enumerate(plain_statistics(x.contiguous(), weights, stride, act), start=1):
            mean, var = getattr(exact, f"mean{i}"), getattr(exact, f"var{i}") + 1e-5
            got = getattr(ours, f"mean{i}").double(), getattr(ours, f"var{i}").double()
            for who, (a_mean, a_var) in (("ours", got), ("plain", plain)):
                errors.setdefault(f"{who} mean{i}", []).append((a_mean - mean) / var.sqrt())
                errors.setdefault(f"{who} var{i}", []).append((a_var + 1e-5 - var) / var)
    rms = {name: torch.cat(values).square().mean().sqrt().item() for name, values in errors.items()}
    for name in ("mean1", "var1", "mean2", "var2", "mean3", "var3"):
        print(name, rms[f"ours {name}"], rms[f"plain {name}"])
        assert rms[f"ours {name}"] < 2 * rms[f"plain {name}"] + 2e-8, name
