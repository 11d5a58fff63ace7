"""The block under torch.compile, export, torch.func, checkpointing, autocast and data parallelism: equal to eager."""

from __future__ import annotations

import copy
import io
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from tfnas_ext import ops
from tfnas_ext._native import MODULE
from tfnas_ext.nn import MBInvRes

pytestmark = pytest.mark.skipif(MODULE is None, reason="the native module is not built")

WIDTHS = (40, 2, 3, 16, 17, 20, 31, 32, 33, 39)  # ten, on both sides of the kernels' planes of 16 channels


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make(**options: Any) -> MBInvRes:
    torch.manual_seed(0)
    return MBInvRes(8, 40, 8, 3, act="swish", se_channels=4, **options)


def images(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 8, 7, 7, generator=torch.Generator().manual_seed(seed))


def gradients(out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view_as(out))


def check_every_width(backend: str) -> None:
    def function(x: Tensor, conv_pw: Tensor, conv_dw: Tensor, conv_pwl: Tensor, width: int) -> Tensor:
        return ops.mbinvres(x, conv_pw, conv_dw, conv_pwl, act="hard_swish", residual=True, width=width)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    block = make()
    leaves = [images().requires_grad_(), *(m.weight for m in (block.conv_pw, block.conv_dw, block.conv_pwl) if m)]
    for width in WIDTHS:
        got, want = compiled(*leaves, width), function(*leaves, width)
        assert torch.equal(got, want), width
        for a, b in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
            assert torch.equal(a, b), width
    assert counters["stats"]["unique_graphs"] == 1


def test_one_graph_serves_every_width() -> None:
    check_every_width("aot_eager")


@pytest.mark.slow
def test_one_graph_serves_every_width_with_inductor() -> None:
    # the compiler's cache on disk does not know which version of our operators an entry was made with
    with torch._inductor.config.patch(force_disable_caches=True):
        check_every_width("inductor")


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_a_module_is_one_graph(momentum: float | None) -> None:
    """Widths by the argument; running statistics are those of the eager twin."""
    block = make(momentum=momentum)
    twin = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for step, width in enumerate(WIDTHS if momentum else WIDTHS[:4]):
        x = images(seed=step).requires_grad_()
        got, want = compiled(x, width), twin(x, width)
        assert torch.equal(got, want)
        for a, b in zip(
            gradients(got, [x, *block.parameters()]), gradients(want, [x, *twin.parameters()]), strict=True
        ):
            assert torch.equal(a, b), width
    for name, value in twin.named_buffers():
        torch.testing.assert_close(dict(block.named_buffers())[name], value, msg=name)
    assert counters["stats"]["unique_graphs"] == 1


def test_set_width_is_one_graph_where_dynamo_may_follow_integers_of_modules() -> None:
    block = make().eval()
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True), torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
        for width in WIDTHS:
            block.set_width(width)
            assert torch.equal(compiled(images()), block(images())), width
    assert counters["stats"]["unique_graphs"] == 1


def test_masks_of_several_sizes_do_not_break_the_graph() -> None:
    block = make()
    twin = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed in range(3):
        mask = torch.rand(40, generator=torch.Generator().manual_seed(seed)) < 0.5
        block.set_mask(mask)
        twin.set_mask(mask)
        torch.testing.assert_close(compiled(images()), twin(images()))
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(block.state_dict()[name], value, msg=name)


# ---------------------------------------------------------------- export
@pytest.mark.parametrize("training", [True, False])
def test_export_with_any_batch(training: bool) -> None:
    block = make().train(training)
    name = "mbinvres" if training else "mbinvres_inference"
    with torch.no_grad():
        program = torch.export.export(block, (images(),), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
        assert [n.target for n in program.graph.nodes if "tfnas" in str(n.target)] == [
            getattr(torch.ops.tfnas, name).default
        ]
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for batch in (2, 5, 100):  # 100 images: the kernels' other design
            assert torch.equal(loaded(images(batch)), block(images(batch)))


def test_export_with_any_width() -> None:
    block = make().eval()
    with torch.no_grad():
        dynamic = (None, torch.export.Dim.DYNAMIC)
        module = torch.export.export(block, (images(), 17), dynamic_shapes=dynamic).module()
        for width in WIDTHS:
            assert torch.equal(module(images(), width), block(images(), width))


def test_export_with_gradients_is_plain_torch() -> None:
    """Frozen statistics are differentiated by the reference, so the graph has nothing of ours."""
    block = make().eval()
    program = torch.export.export(block, (images(),))
    assert not any("tfnas" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(images()), block(images()))


# ---------------------------------------------------------------- torch.func and checkpointing
def test_functional_call() -> None:
    block, other = make(), make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.7).add_(0.01)
    got = torch.func.functional_call(block, dict(other.named_parameters()), (images(),))
    want = copy.deepcopy(other)(images())
    assert torch.equal(got, want)
    for a, b in zip(
        gradients(got, list(other.parameters())), gradients(other(images()), list(other.parameters())), strict=True
    ):
        assert torch.equal(a, b)


def test_transforms_of_torch_func_run_the_reference() -> None:
    block = make(running_stats=False).double()
    parameters = {name: p.detach() for name, p in block.named_parameters()}
    x = images().double()

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(block, (parameters, {}), (x,)).square().mean()

    block(x).square().mean().backward()
    got = torch.func.grad(loss)(parameters, x)
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)
    batch = torch.stack([x, 2 * x + 1])
    torch.testing.assert_close(torch.func.vmap(block)(batch), torch.stack([block(one) for one in batch]))
    with torch.no_grad():
        direction = torch.ones_like(x)
        direction[..., 0] = 3
        _, tangent = torch.func.jvp(lambda x: loss(parameters, x), (x,), (direction,))
        step = 1e-6 * direction
        numeric = (loss(parameters, x + step) - loss(parameters, x - step)) / 2e-6
        torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    block = make(running_stats=False)
    x = images().requires_grad_()
    leaves = [x, *block.parameters()]
    want = gradients(block(x), leaves)
    out = checkpoint(block, x, use_reentrant=reentrant)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
    for leaf, gradient in zip(leaves, want, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, gradient)


# ---------------------------------------------------------------- autocast
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_casts_the_images(training: bool, dtype: torch.dtype, weights: torch.dtype) -> None:
    """Under bfloat16 autocast: results and gradients are those of bfloat16 images beside weights as they are."""
    block = make().to(weights).train(training)
    twin = copy.deepcopy(block)
    x = images().to(dtype)
    with torch.set_grad_enabled(training):
        with torch.autocast("cpu", torch.bfloat16):
            got = block(x)
        want = twin(x.bfloat16())
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, want)
    if training:
        leaves, twins = list(block.parameters()), list(twin.parameters())
        for a, b in zip(gradients(got, leaves), gradients(want, twins), strict=True):
            assert a.dtype == weights
            assert torch.equal(a, b)


def test_float16_autocast_runs_in_float32() -> None:
    block = make(running_stats=False)
    with torch.autocast("cpu", torch.float16):
        got = block(images().half())
    assert torch.equal(got, block(images().half().float()))


def test_autocast_leaves_float64_alone() -> None:
    block = make(running_stats=False).double()
    with torch.autocast("cpu", torch.bfloat16):
        got = block(images().double())
    assert torch.equal(got, block(images().double()))


def test_autocast_under_compile() -> None:
    """One graph for every width here too."""
    block = make()
    twin = copy.deepcopy(block)

    def function(block: MBInvRes, x: Tensor, width: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return block(nn.functional.conv2d(x, torch.eye(8).view(8, 8, 1, 1)), width)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for width in WIDTHS[:4]:
        got, want = compiled(block, images(), width), function(twin, images(), width)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, want)
    assert counters["stats"]["unique_graphs"] == 1


# ---------------------------------------------------------------- several devices, GPUs
def test_data_parallel() -> None:
    """Without GPUs torch runs the module itself."""
    block = make()
    assert torch.equal(nn.DataParallel(copy.deepcopy(block))(images(4)), block(images(4)))


def _distributed_step(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    block = nn.parallel.DistributedDataParallel(make(running_stats=False), gradient_as_bucket_view=True)
    for _ in range(2):
        block.zero_grad()
        block(images(4)[2 * rank : 2 * rank + 2]).square().mean().backward()
    torch.save([p.grad for p in block.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Two processes: both have the mean of the gradients of the two halves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_distributed_step, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    block = make(running_stats=False)
    (sum(block(half).square().mean() for half in images(4).split(2)) / 2).backward()  # type: ignore[union-attr]
    for a, b, parameter in zip(first, second, block.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, parameter.grad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph() -> None:
    """Captured and replayed on new images: nothing in the block waits for the GPU."""
    block = make(running_stats=False).cuda()
    static = images().cuda()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            block(static).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    block.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        out = block(static)
        out.sum().backward()
    static.copy_(images(seed=9))
    graph.replay()
    twin = copy.deepcopy(block)
    torch.testing.assert_close(out, twin(images(seed=9).cuda()), rtol=1e-4, atol=1e-4)
