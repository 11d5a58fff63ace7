"""torch.ops.tfnas.* as torch sees them: schemas, fake kernels, autograd, autocast, torch.func, checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from mbinvres_cases import Block, BlockCase, make_block, random_case
from torch import Tensor
from torch.library import opcheck

from tfnas_ext._native import MODULE
from tfnas_ext.operators import WEIGHT_NAMES

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


def check_block(case: BlockCase, mask: int, dtype: torch.dtype = torch.float32) -> None:
    """`dtype` is that of x; weights are float32."""
    print(case, mask, dtype)
    block = make_block(case).to(torch.float32)
    block.leaves["x"] = block.leaves["x"].detach().to(dtype).requires_grad_()
    call = (*tensors_of(block), *options_of(case), case.design, case.se_act, case.se_gate)
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


@pytest.mark.parametrize("index", [1, 3])
def test_bfloat16_block_is_registered_properly(index: int) -> None:
    check_block(CASES[index], index, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_random_blocks_are_registered_properly(seed: int) -> None:
    check_block(random_case(seed), seed, torch.bfloat16 if seed % 2 else torch.float32)


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
    call = (*tensors, *options_of(SMALL), "auto", "relu", "hard_sigmoid")
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
    call = (*tensors, *[t for t in running for _ in range(2)], *options_of(case), case.se_act, case.se_gate)
    opcheck(torch.ops.tfnas.mbinvres_inference.default, call)


# ---------------------------------------------------------------- bad input, straight to the operators
WRONG_TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "sparse csr": lambda t: t.reshape(1, -1).to_sparse_csr(),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "complex": lambda t: t.to(torch.complex64),
    "conjugate": lambda t: t.to(torch.complex64).conj(),
    "float16": lambda t: t.half(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "int64": lambda t: t.long(),
    "bool": lambda t: t > 0,
    "of another precision": lambda t: t.float(),
    "a number": lambda t: t.new_zeros(()),
    "of five dimensions": lambda t: t.reshape(*t.shape, *[1] * (5 - t.dim())),
    "empty": lambda t: t[:0],
    "too long": lambda t: torch.cat([t, t[:1]]),
}
BLAMED = ("x", *WEIGHT_NAMES[:7])


@pytest.mark.parametrize("kind", sorted(WRONG_TENSORS))
@pytest.mark.filterwarnings("ignore")
def test_wrong_tensors_are_refused_by_name(kind: str) -> None:
    """Every tensor in turn, in all three operators. Layouts without kernels are refused by torch's dispatcher."""
    tensors = [t if t is None else t.detach() for t in tensors_of(make_block(SMALL))]
    options = options_of(SMALL)
    out, _, saved = torch.ops.tfnas.mbinvres(*tensors, *options)
    running = [torch.ones(c).double() for c in (20, 20, 20, 20, 5, 5)]
    wanted = [t is not None for t in tensors]
    for index, name in enumerate(BLAMED):
        wrong: list[Any] = list(tensors)
        wrong[index] = WRONG_TENSORS[kind](tensors[index])  # type: ignore[arg-type]
        if kind == "too long" and name == "x":
            continue  # a batch of three is a batch
        message = f"{name} |'tfnas::mbinvres.*' backend|as x is|must have shape|Cout"
        with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
            torch.ops.tfnas.mbinvres(*wrong, *options)
        with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
            torch.ops.tfnas.mbinvres_backward(
                out, wrong[0], saved, *wrong[1:], *options, "auto", None, "sigmoid", wanted
            )
        with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
            torch.ops.tfnas.mbinvres_inference(*wrong, *running, *options)


@pytest.mark.parametrize("kind", sorted(set(WRONG_TENSORS) - {"too long"}))
@pytest.mark.filterwarnings("ignore")
def test_wrong_gradients_and_saved_memory_are_refused(kind: str) -> None:
    tensors = [t if t is None else t.detach() for t in tensors_of(make_block(SMALL))]
    options = (*options_of(SMALL), "auto", "relu", "sigmoid", [t is not None for t in tensors])
    out, _, saved = torch.ops.tfnas.mbinvres(*tensors, *options[:-1])
    make = WRONG_TENSORS[kind]
    for dout, memory in ((make(out), saved), (out, make(saved))):
        with pytest.raises(
            (ValueError, TypeError, NotImplementedError), match=r"dout|saved|'tfnas::mbinvres_backward'"
        ):
            torch.ops.tfnas.mbinvres_backward(dout, tensors[0], memory, *tensors[1:], *options)
    with pytest.raises(ValueError, match="output_mask asks for the gradient of an argument that is None"):
        torch.ops.tfnas.mbinvres_backward(out, tensors[0], saved, *tensors[1:], *options[:-1], [True] * 14)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, 3, "stride must be 1 or 2"),
        (0, 2**40, "stride must be 1 or 2"),
        (1, "gelu", "act must be one of"),
        (1, "\0", "act must be one of"),
        (2, True, "residual needs"),
        (3, 0, "width must be in 1..20, got 0"),
        (3, 21, "width must be in 1..20"),
        (3, -(2**62), "width must be in 1..20"),
        (3, 2**62, "width must be in 1..20"),
        (4, 0.0, "eps must be positive and finite"),
        (4, float("nan"), "eps must be positive and finite"),
        (4, float("inf"), "eps must be positive and finite"),
        (5, "rows", "design must be one of"),
        (6, "gelu", "se_act must be one of"),
        (7, "softmax", "se_gate must be one of"),
    ],
)
def test_wrong_options_are_refused_by_name(index: int, value: Any, message: str) -> None:
    case = replace(SMALL, out_channels=7, residual=False)
    options: list[Any] = [*options_of(case), "auto", "swish", "sigmoid"]
    options[index] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.tfnas.mbinvres(*tensors_of(make_block(case)), *options)


def test_meta_tensors_give_shapes() -> None:
    tensors = [t if t is None else t.detach() for t in tensors_of(make_block(SMALL))]
    want = torch.ops.tfnas.mbinvres(*tensors, *options_of(SMALL))
    got = torch.ops.tfnas.mbinvres(*[t if t is None else t.to("meta") for t in tensors], *options_of(SMALL))
    for a, b in zip(got, want, strict=True):
        assert (a.device.type, a.shape, a.stride(), a.dtype) == ("meta", b.shape, b.stride(), b.dtype)


def test_inference_refuses_gradients() -> None:
    tensors = tensors_of(make_block(SMALL))
    running = [torch.ones(c).double() for c in (20, 20, 20, 20, 5, 5)]
    out = torch.ops.tfnas.mbinvres_inference(*tensors, *running, *options_of(SMALL))
    with pytest.raises(RuntimeError, match="mbinvres_inference has no gradient"):
        out.sum().backward()


@pytest.mark.parametrize("kind", sorted(set(WRONG_TENSORS) - {"of another precision", "too long"}))
@pytest.mark.filterwarnings("ignore")
def test_sampling_refuses_wrong_tensors(kind: str) -> None:
    log_alpha = torch.zeros(3, 4, dtype=torch.float64)
    if kind == "meta":
        assert torch.ops.tfnas.sample_paths(log_alpha.to("meta"), 1.0, 0, 0, "none").device.type == "meta"
        return
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=r"log_alpha|layers|'tfnas::sample_paths'"):
        torch.ops.tfnas.sample_paths(WRONG_TENSORS[kind](log_alpha), 1.0, 0, 0, "random")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64])
def test_sampling_refuses_masks_that_are_not_bool(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="valid_mask must be bool"):
        torch.ops.tfnas.sample_paths(torch.zeros(3, 4), 1.0, 0, 0, "random", torch.ones(3, 4, dtype=dtype))


@pytest.mark.parametrize("design", ["strips", "channels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [False, True])
def test_each_gradient_alone_and_all_but_it(design: str, dtype: torch.dtype, affine: bool) -> None:
    """Nothing that one gradient needs is made only where another one is wanted."""
    case = replace(SMALL, affine=affine, design=design)
    tensors = [None if t is None else t.detach().float() for t in tensors_of(make_block(case))]
    assert tensors[0] is not None
    tensors[0] = tensors[0].to(dtype)
    options = (*options_of(case), design, None, "sigmoid")
    out, _, saved = torch.ops.tfnas.mbinvres(*tensors, *options)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    there = [t is not None for t in tensors]
    every = torch.ops.tfnas.mbinvres_backward(dout, tensors[0], saved, *tensors[1:], *options, there)
    for index in [i for i, given in enumerate(there) if given]:
        alone = [i == index for i in range(len(there))]
        for mask in (alone, [given and not wanted for given, wanted in zip(there, alone, strict=True)]):
            grads = torch.ops.tfnas.mbinvres_backward(dout, tensors[0], saved, *tensors[1:], *options, mask)
            for got, want, wanted in zip(grads, every, mask, strict=True):
                if wanted:
                    error = (got.double() - want.double()).norm() / want.double().norm()
                    assert error < 100 * torch.finfo(dtype).eps, (index, mask, error)
