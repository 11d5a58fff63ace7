"""How many images per second the data layer delivers, and what it costs beside a step that needs them.

    python benchmarks/data_loading.py [--device cuda] [--workers 0,2,8] [--output results.json]

Four ways of feeding 224x224 colour images (files through worker processes, the same files resident, arrays with random
resized crop + flip + colour jitter, arrays with shift + flip) and one of 28x28 gray ones. Every epoch is read to its
end, on a GPU with a synchronisation at the end only. Checked first: the same epoch read twice gives the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tfnas.data import DataOptions, Loader, build_data
from tfnas.data.options import FILE_JITTER
from tfnas.files import write_text_atomically
from tfnas.versions import software_versions

FILE_SIZE = (500, 375)  # a common size of photographs in ImageNet


def write_photographs(root: Path, classes: int, per_class: int) -> None:
    """JPEG files of smooth random content, about as large as photographs of that size."""
    random = np.random.default_rng(0)
    for label in range(classes):
        (root / f"class_{label}").mkdir(parents=True)
        for i in range(per_class):
            coarse = Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8))
            coarse.resize(FILE_SIZE, Image.Resampling.BICUBIC).save(root / f"class_{label}/{i}.jpg", quality=85)


def write_arrays(path: Path, count: int, side: int) -> None:
    images = np.random.default_rng(1).integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(count) % 4)


def images_per_second(loader: Loader, device: torch.device, seconds: float) -> dict[str, float]:
    """Epochs until `seconds` have passed: the best, the median and the worst of their rates."""
    for (x, y), (u, v) in zip(loader.epoch(0), loader.epoch(0), strict=True):
        if not (torch.equal(x, u) and torch.equal(y, v)):
            raise SystemExit("the same epoch read twice differs: no rate is worth reporting")
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while len(rates) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        count = sum(len(labels) for _, labels in loader.epoch(len(rates) + 1))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates.append(count / (time.perf_counter() - start))
    return {"best": max(rates), "median": float(np.median(rates)), "worst": min(rates), "epochs": len(rates)}


def cases(folder: Path, device: str, workers: list[int], batch_size: int) -> Iterator[tuple[str, DataOptions]]:
    photographs, arrays = str(folder / "photographs"), str(folder / "arrays.npz")
    for count in workers:
        yield (
            f"files 500x375 -> 224, {count} workers",
            DataOptions(photographs, workers=count, batch_size=batch_size, device=device),
        )
    yield (
        "the same files, resident (crop, flip, jitter)",
        DataOptions(photographs, resident=True, batch_size=batch_size, device=device),
    )
    resized = DataOptions(
        arrays, resolution=224, crop="resized", color_jitter=FILE_JITTER, batch_size=batch_size, device=device
    )
    yield "arrays 256 -> 224 (crop, flip, jitter)", resized
    yield "arrays 256 (shift, flip)", DataOptions(arrays, crop="pad", batch_size=batch_size, device=device)
    yield "arrays 28 gray (shift, flip)", DataOptions("quickstart", batch_size=batch_size, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", default=f"0,{os.cpu_count()}", help="numbers of worker processes, comma-separated")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--images", type=int, default=160, help="photographs and arrays each")
    parser.add_argument("--seconds", type=float, default=5.0, help="per case")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder / "photographs", 4, arguments.images // 4)
        write_arrays(folder / "arrays.npz", arguments.images, 256)
        workers = [int(count) for count in arguments.workers.split(",")]
        for case, options in cases(folder, arguments.device, workers, arguments.batch_size):
            rates = images_per_second(build_data(options, 0).full_train, device, arguments.seconds)
            rows.append({"case": case} | rates)
            print(f"{case:46} {rates['median']:10,.0f} images/s ({rates['worst']:,.0f} to {rates['best']:,.0f})")
    machine = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    report = {
        "benchmark": "data_loading",
        "device": str(device),
        "machine": machine,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "batch_size": arguments.batch_size,
        "date": time.strftime("%Y-%m-%d"),
        "versions": software_versions(),
        "rows": rows,
    }
    if arguments.output:
        write_text_atomically(arguments.output, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
