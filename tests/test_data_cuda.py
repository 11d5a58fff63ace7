"""Images resident and augmented on a GPU: the pixels of the CPU up to rounding, and no step waits for the host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_files import image_folder
from tfnas.data import DataOptions, build_data
from tfnas.data.options import FILE_JITTER

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CASES = {
    "shift": DataOptions("quickstart", batch_size=64),
    "resized": DataOptions("quickstart", batch_size=64, image_channels=3, crop="resized", color_jitter=FILE_JITTER),
    "fake": DataOptions("fake", batch_size=64, resolution=32),
}


@pytest.mark.parametrize("name", CASES)
def test_batches_equal_those_of_the_cpu(name: str) -> None:
    on_cpu, on_gpu = (build_data(replace(CASES[name], device=device), 3) for device in ("cpu", "cuda"))
    for part in ("train", "held_out", "test"):
        for (x, y), (u, v) in zip(getattr(on_cpu, part).epoch(1), getattr(on_gpu, part).epoch(1), strict=True):
            assert u.is_cuda
            assert v.is_cuda
            assert torch.equal(y, v.cpu())
            # A pixel of 255 levels may be rounded the other way where an image is synthesised.
            assert ((x - u.cpu()).abs() > 0.03).float().mean() < 1e-3


def test_reading_does_not_wait_for_the_gpu() -> None:
    train = build_data(replace(CASES["resized"], device="cuda"), 0).train
    next(train.epoch(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(train.epoch(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_resident_files_are_decoded_onto_the_gpu(tmp_path: Path) -> None:
    pytest.importorskip("torchvision.transforms.v2")
    options = DataOptions(str(image_folder(tmp_path)), resolution=28, batch_size=8, resident=True)
    on_cpu, on_gpu = (build_data(replace(options, device=device), 0) for device in ("cpu", "cuda"))
    for (x, _), (u, _) in zip(on_cpu.held_out.epoch(0), on_gpu.held_out.epoch(0), strict=True):
        assert (x - u.cpu()).abs().max() < 1e-5
