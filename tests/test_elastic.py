"""Elastic use of `MBInvRes`: a masked block equals one that has the kept channels only, sorting changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tfnas_ext.elastic import CHANNEL_DIMS
from tfnas_ext.nn import MBInvRes

BACKENDS = (None, "reference")
MASK = torch.tensor([True, False, True, True, False, False, True, True, True, False, True, False])


def make(seed: int = 0, **options: Any) -> MBInvRes:
    """A float64 block whose norms have affine parts and running statistics of their own."""
    torch.manual_seed(seed)
    block = MBInvRes(6, 12, 6, 5, act="swish", **options).double()
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.data.copy_(torch.rand_like(tensor) + 0.5 * ("var" in name))
    return block


def images(seed: int = 1) -> Tensor:
    return torch.randn(3, 6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sliced(block: MBInvRes, kept: Tensor, **options: Any) -> MBInvRes:
    """A block that has the channels `kept` only."""
    small = MBInvRes(6, len(kept), 6, 5, act="swish", **options).double().train(block.training)
    state = {
        name: value.index_select(CHANNEL_DIMS[name], kept) if name in CHANNEL_DIMS else value
        for name, value in block.state_dict().items()
    }
    small.load_state_dict(state)
    return small


def results(block: MBInvRes, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    block.zero_grad()
    out = block(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    assert x.grad is not None
    gradients = {f"d{name}": p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "dx": x.grad, **gradients, **dict(block.named_buffers())}


def check_equals_sliced(block: MBInvRes, kept: Tensor, **options: Any) -> None:
    small = sliced(block, kept, **options)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    for step in range(2):
        got, want = results(block, images(step)), results(small, images(step))
        left = torch.ones(12, dtype=torch.bool)
        left[kept] = False
        for name, value in want.items():
            stem = name.removeprefix("d")
            if stem not in CHANNEL_DIMS:
                torch.testing.assert_close(got[name], value, msg=name)
                continue
            dim = CHANNEL_DIMS[stem]
            torch.testing.assert_close(got[name].index_select(dim, kept), value, msg=name)
            rest = got[name].transpose(0, dim)[left]
            expected = torch.zeros_like(rest) if name != stem else before[stem].transpose(0, dim)[left]
            assert torch.equal(rest, expected), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("se", [0, 4])
def test_masked_equals_sliced(se: int, training: bool, backend: str | None) -> None:
    """Outputs, gradients and running statistics; those of other channels stay as they were."""
    block = make(se_channels=se, backend=backend).train(training)
    block.set_mask(MASK)
    assert block.width == int(MASK.sum())
    check_equals_sliced(block, MASK.nonzero().flatten(), se_channels=se, backend=backend)


@pytest.mark.parametrize("training", [True, False])
def test_width_equals_sliced(training: bool) -> None:
    block = make(se_channels=3).train(training)
    block.set_width(7)
    check_equals_sliced(block, torch.arange(7), se_channels=3)
    block.set_width(None)
    x = images()
    with torch.no_grad():
        block.eval()
        assert torch.equal(block(x, width=5), (block.set_width(5), block(x))[1])


def test_inference_without_gradients_runs_masked_and_sliced_alike() -> None:
    block = make(se_channels=4).eval()
    block.set_mask(MASK)
    with torch.no_grad():
        want = sliced(block, MASK.nonzero().flatten(), se_channels=4)(images())
        torch.testing.assert_close(block(images()), want)


def test_a_mask_that_keeps_a_prefix_is_a_width() -> None:
    block = make()
    block.set_mask(torch.arange(12) < 5)
    assert (block.width, block.kept) == (5, None)
    block.set_mask(None)
    assert block.width == 12


def test_cumulative_running_statistics() -> None:
    """momentum=None averages all batches alike, as nn.BatchNorm2d does."""
    torch.manual_seed(3)
    block = MBInvRes(6, 12, 6, momentum=None).double()
    norm = torch.nn.BatchNorm2d(12, momentum=None).double()
    for step in range(3):
        block(images(step))
        norm(block.conv_pw(images(step)))  # type: ignore[misc]
    torch.testing.assert_close(block.bn1.running_mean, norm.running_mean)  # type: ignore[union-attr]
    torch.testing.assert_close(block.bn1.running_var, norm.running_var)  # type: ignore[union-attr]


@pytest.mark.parametrize("training", [True, False])
def test_sorting_by_importance_changes_nothing(training: bool) -> None:
    block = make(se_channels=4).train(training)
    twin = copy.deepcopy(block)
    order = block.set_importance(torch.randn(12, generator=torch.Generator().manual_seed(4)))
    assert sorted(order.tolist()) == list(range(12))
    got, want = results(block, images()), results(twin, images())
    for name, value in want.items():
        dim = CHANNEL_DIMS.get(name.removeprefix("d"))
        torch.testing.assert_close(got[name], value if dim is None else value.index_select(dim, order), msg=name)


def test_set_width_keeps_the_most_important_and_ties_keep_their_order() -> None:
    block = make().eval()
    scores = torch.tensor([0, 5, 1, 5, 2, 9, 9, 0, 1, 5, 2, 0])
    twin = copy.deepcopy(block)
    order = block.set_importance(scores)
    assert order.tolist() == [5, 6, 1, 3, 9, 4, 10, 2, 8, 0, 7, 11]
    block.set_width(5)
    twin.set_mask(scores >= 5)
    torch.testing.assert_close(block(images()), twin(images()))


def test_a_mask_follows_the_channels_it_keeps() -> None:
    block = make(se_channels=4).eval()
    block.set_mask(MASK)
    want = block(images())
    block.set_importance(torch.randn(12, generator=torch.Generator().manual_seed(5)))
    torch.testing.assert_close(block(images()), want)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_the_optimizers_state_moves_along(kind: str) -> None:
    """Training goes on as if nothing had moved; without the optimizer it does not."""

    def optimizer_of(block: MBInvRes) -> torch.optim.Optimizer:
        if kind == "sgd":
            return torch.optim.SGD(block.parameters(), 0.1, momentum=0.9)
        return torch.optim.Adam(block.parameters(), 0.01)

    def step(block: MBInvRes, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        block(images(seed)).square().mean().backward()
        optimizer.step()

    blocks = [make(se_channels=4), make(se_channels=4), make(se_channels=4)]
    optimizers = [optimizer_of(block) for block in blocks]
    for block, optimizer in zip(blocks, optimizers, strict=True):
        step(block, optimizer, 6)
    scores = torch.randn(12, generator=torch.Generator().manual_seed(7))
    blocks[0].set_importance(scores, optimizers[0])
    blocks[2].set_importance(scores)
    for block, optimizer in zip(blocks, optimizers, strict=True):
        step(block, optimizer, 8)
        block.eval()
    outputs = [block(images()) for block in blocks]
    torch.testing.assert_close(outputs[0], outputs[1])
    assert not torch.allclose(outputs[2], outputs[1])


def test_what_runs_is_no_part_of_the_state_and_survives_copies() -> None:
    block = make()
    names = set(block.state_dict())
    block.set_mask(MASK)
    assert set(block.state_dict()) == names
    twin = copy.deepcopy(block)
    torch.testing.assert_close(twin(images()), block(images()))
    make().load_state_dict(block.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.set_width(0), "width must be in 1..12, not 0"),
        (lambda b: b.set_width(13), "width must be in 1..12, not 13"),
        (lambda b: b.set_mask(torch.ones(11, dtype=torch.bool)), r"mask must be bool \[max_width\] = \[12\]"),
        (lambda b: b.set_mask(torch.ones(12)), r"mask must be bool .*float32"),
        (lambda b: b.set_mask(torch.zeros(12, dtype=torch.bool)), "keep at least one channel"),
        (lambda b: b.set_importance(torch.zeros(11)), r"scores must be \[max_width\] = \[12\], not \[11\]"),
        (lambda b: b.set_importance(torch.full((12,), torch.nan)), "with NaN"),
        (lambda b: b.set_importance(torch.zeros(12, dtype=torch.complex64)), "real numbers, got torch.complex64"),
        (lambda b: b(images(), width=13), "width must be"),
        (lambda b: b(images(), width=0), "width must be"),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    block = make()
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match=message):
        call(block)
    assert block.width == 12
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("method", ["set_width", "set_mask", "set_importance"])
def test_a_block_without_expansion_is_not_elastic(method: str) -> None:
    block = MBInvRes(6, None, 6)
    argument = {"set_width": 5, "set_mask": torch.arange(6) < 5, "set_importance": torch.arange(6)}[method]
    with pytest.raises(ValueError, match="without expansion runs all of its 6 channels"):
        getattr(block, method)(argument)
    block.set_width(6)
