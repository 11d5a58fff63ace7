"""The code in docs/backend.md runs as it stands there, and the plain composition it shows is the reference's."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfnas_ext import ops, reference
from tfnas_ext.nn import MBInvRes
from tfnas_ext.reference import Norm, SqueezeExcite

TEXT = (Path(__file__).parents[1] / "docs" / "backend.md").read_text()


def code_after(heading: str) -> list[str]:
    """Python blocks of one section."""
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.mark.parametrize("act", ["relu", "swish"])
def test_equivalent_to(act: str) -> None:
    torch.manual_seed(0)
    t = {
        name: torch.randn(shape, dtype=torch.float64)
        for name, shape in {
            **{"x": (2, 6, 5, 4), "conv_pw": (12, 6, 1, 1), "conv_dw": (12, 1, 5, 5), "conv_pwl": (6, 12, 1, 1)},
            **{"rw": (3, 12, 1, 1), "rb": (3,), "ew": (12, 3, 1, 1), "eb": (12,)},
        }.items()
    }
    norms = {name: lambda y: F.batch_norm(y, None, None, training=True) for name in ("bn1", "bn2", "bn3")}
    functions = {"act": reference.ACTIVATIONS[act], "se_act": reference.ACTIVATIONS[act], "gate": torch.sigmoid}
    names: dict[str, Any] = {**t, **norms, **functions, "F": F, "k": 5, "E": 12, "stride": 1}
    (code,) = code_after("Equivalent to")
    exec(code, names)
    se = SqueezeExcite(t["rw"], t["rb"], t["ew"], t["eb"])
    want = ops.mbinvres(t["x"], t["conv_pw"], t["conv_dw"], t["conv_pwl"], se=se, act=act, residual=True)
    torch.testing.assert_close(names["out"], want)


def test_signature() -> None:
    """The call with its defaults gives what the defaults give."""
    (code,) = code_after("Signature and shapes")
    x, weights = torch.randn(2, 8, 5, 5), [torch.randn(s) for s in ((16, 8, 1, 1), (16, 1, 3, 3), (8, 16, 1, 1))]
    names = {"ops": ops, "Norm": Norm, "x": x, **dict(zip(("conv_pw", "conv_dw", "conv_pwl"), weights, strict=True))}
    exec(f"out = {code.strip()}", names)
    assert torch.equal(names["out"], ops.mbinvres(x, *weights))  # type: ignore[arg-type]


def test_elastic_use() -> None:
    names: dict[str, Any] = {"MBInvRes": MBInvRes, "scores": torch.rand(240), "x": torch.randn(2, 40, 7, 7)}
    names |= {"F": F, "random": random}
    methods, training = code_after("Elastic use")
    exec(methods, names)
    assert len(training.strip().splitlines()) == 5
    block = names["block"]
    names["network"] = nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    names["optimizer"] = torch.optim.SGD(block.parameters(), 0.1, momentum=0.9)
    names["loader"] = [(torch.randn(2, 40, 7, 7), torch.tensor([1, 2]))] * 2
    before = block.conv_dw.weight.detach().clone()
    exec(training, names)
    assert not torch.equal(before, block.conv_dw.weight)


def test_numpy() -> None:
    rng = np.random.default_rng(0)
    arrays = {"conv_pw": (16, 8, 1, 1), "conv_dw": (16, 1, 3, 3), "conv_pwl": (8, 16, 1, 1), "images": (2, 5, 5, 8)}
    names: dict[str, Any] = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in arrays.items()}
    names |= {"torch": torch, "np": np, "ops": ops}
    (code,) = code_after("NumPy and CuPy")
    exec(code, names)
    assert names["result"].shape == (2, 5, 5, 8)
