"""Arrays of NumPy and CuPy in and out of the operators through DLPack, without a copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tfnas_ext import ops, reference


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Images as most NumPy code has them, [N, H, W, C], and a block's weights."""
    rng = np.random.default_rng(seed)
    shapes = {"images": (2, 5, 6, 8), "conv_pw": (24, 8, 1, 1), "conv_dw": (24, 1, 3, 3), "conv_pwl": (8, 24, 1, 1)}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def as_tensors(given: dict[str, np.ndarray]) -> list[Tensor]:
    """x and the weights; the images' last dimension becomes the channels of a channels_last tensor."""
    images, *weights = (torch.from_dlpack(array) for array in given.values())
    return [images.permute(0, 3, 1, 2), *weights]


def test_numpy_arrays_share_their_memory() -> None:
    given = arrays()
    tensors = as_tensors(given)
    for tensor, array in zip(tensors, given.values(), strict=True):
        assert tensor.data_ptr() == array.ctypes.data
    assert tensors[0].is_contiguous(memory_format=torch.channels_last)
    out = ops.mbinvres(*tensors, act="swish", residual=True)
    torch.testing.assert_close(out, reference.mbinvres(*tensors, act="swish", residual=True))
    back = np.from_dlpack(out.permute(0, 2, 3, 1))
    assert back.shape == (2, 5, 6, 8)
    assert back.flags.c_contiguous
    assert back.ctypes.data == out.data_ptr()


def test_a_change_of_the_array_is_seen() -> None:
    given = arrays()
    tensors = as_tensors(given)
    before = ops.mbinvres(*tensors)
    given["conv_pwl"] *= -1
    torch.testing.assert_close(ops.mbinvres(*tensors), -before)


def test_cupy_arrays_share_their_memory() -> None:
    cupy = pytest.importorskip("cupy")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    given = {name: cupy.asarray(array) for name, array in arrays().items()}
    tensors = as_tensors(given)
    for tensor, array in zip(tensors, given.values(), strict=True):
        assert tensor.is_cuda
        assert tensor.data_ptr() == array.data.ptr
    out = ops.mbinvres(*tensors, act="swish", residual=True)
    back = cupy.from_dlpack(out.permute(0, 2, 3, 1))
    assert back.data.ptr == out.data_ptr()
    want = ops.mbinvres(*as_tensors(arrays()), act="swish", residual=True, backend="reference")
    torch.testing.assert_close(torch.from_numpy(cupy.asnumpy(back)).permute(0, 3, 1, 2), want, rtol=1e-4, atol=1e-4)
