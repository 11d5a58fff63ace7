"""torch.ops.tfnas.* as torch sees them: schemas, fake kernels, autograd, autocast, torch.func, checkpointing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from mbinvres_cases import Block, BlockCase, make_block, random_case
from torch import Tensor
from torch.library import opcheck

from tfnas_ext._native import MODULE

pytestmark = pytest.mark.skipif(MODULE is None, reason="the native module is not built")

SMALL = BlockCase(2, 5, 6, 5, 20, 5, se=3, residual=True, seed=12)
# No residual, no expansion, strips, a width, strides 2, norms with affine part, one pixel and one channel.
CASES = (
    SMALL,
    replace(SMALL, affine=True, width=13, design="strips"),
    replace(SMALL, mid=5, expand=False, se=0, affine=True),
    replace(SMALL, kernel=5, stride=2, residual=False, width=7, design="channels"),
    BlockCase(4, 1, 1, 1, 20, 1, seed=13),
)
LEAVES = ("x", "conv_pw", "conv_dw", "conv_pwl", "se_rw", "se_rb", "se_ew", "se_eb")
NORMS = tuple(f"bn{i}_{part}" for i in (1, 2, 3) for part in ("weight", "bias"))


def tensors_of(block: Block) -> list[Tensor | None]:
    """x and the weights in the operators' order."""
    return [block.leaves.get(name) for name in (*LEAVES, *NORMS)]


def options_of(case: BlockCase) -> tuple[Any, ...]:
    return case.stride, case.act, case.residual, case.mid if case.width is None else case.width, 1e-5


def check_block(case: BlockCase, mask: int) -> None:
    print(case, mask)
    block = make_block(case).to(torch.float32)
    call = (*tensors_of(block), *options_of(case), case.design)
    opcheck(torch.ops.tfnas.mbinvres.default, call)
    detached = [None if t is None else t.detach() for t in tensors_of(block)]
    out, _, saved = torch.ops.tfnas.mbinvres(*detached, *call[14:])
    wanted = [t is not None and (i + mask) % 3 > 0 for i, t in enumerate(detached)]
    opcheck(
        torch.ops.tfnas.mbinvres_backward.default,
        (torch.ones_like(out), detached[0], saved, *detached[1:], *call[14:], wanted),
    )


@pytest.mark.parametrize("index", range(len(CASES)))
def test_block_is_registered_properly(index: int) -> None:
    check_block(CASES[index], index)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_random_blocks_are_registered_properly(seed: int) -> None:
    check_block(random_case(seed), seed)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced"])
def test_strides_of_fakes_are_those_of_kernels(layout: str) -> None:
    """Weights of any strides: opcheck compares the strides of every output with the fake kernel's."""

    def strange(t: Tensor | None) -> Tensor | None:
        if t is None or t.dim() != 4:
            return t
        if layout == "channels_last":
            return t.contiguous(memory_format=torch.channels_last)
        if layout == "transposed":
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        return torch.stack([t, t], 1)[:, 0]

    block = make_block(SMALL)
    tensors = [None if t is None else strange(t.detach()) for t in tensors_of(block)]
    call = (*tensors, *options_of(SMALL), "auto")
    opcheck(torch.ops.tfnas.mbinvres.default, call, test_utils=("test_schema", "test_faketensor"))
    out, _, saved = torch.ops.tfnas.mbinvres(*call)
    backward = (out.expand_as(out), tensors[0], saved, *call[1:], [t is not None for t in tensors])
    opcheck(torch.ops.tfnas.mbinvres_backward.default, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("index", range(len(CASES)))
def test_inference_is_registered_properly(index: int) -> None:
    case = CASES[index]
    tensors = [None if t is None else t.detach() for t in tensors_of(make_block(case))]
    channels = (case.mid, case.mid, case.out_channels)
    running = [None if i == 0 and not case.expand else torch.rand(c).double() for i, c in enumerate(channels)]
    call = (*tensors, *[t for t in running for _ in range(2)], *options_of(case))
    opcheck(torch.ops.tfnas.mbinvres_inference.default, call)


def test_sampling_is_registered_properly() -> None:
    log_alpha = torch.log_softmax(torch.arange(12.0).view(3, 4), 1)
    valid = torch.ones(3, 4, dtype=torch.bool)
    for second in ("none", "random"):
        opcheck(torch.ops.tfnas.sample_paths.default, (log_alpha, 2.0, 3, 4, second, valid))
    opcheck(torch.ops.tfnas.uniforms.default, (3, 4, 1, 2, 0))
    opcheck(torch.ops.tfnas.gumbel_noise.default, (3, 4, 1, 2, 0, torch.device("cpu")))
