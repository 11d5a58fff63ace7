"""Compiles every CUDA kernel for every supported card, to see that the source still builds for all of them.

    python tools/compile_architectures.py [--archs 75 80 ...]

Needs nvcc, no GPU and no torch; minutes. Device code only and hardly optimised: what a card refuses (an instruction
it lacks, too much static shared memory) shows all the same. What optimised code costs: `kernel_resources.py`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _toolchain
from kernel_resources import CSRC, device_sources

ARCHS = ("75", "80", "86", "89", "90", "100", "120")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", choices=ARCHS, default=list(ARCHS))
    arguments = parser.parse_args()
    toolkit = _toolchain.find_nvcc()
    if toolkit is None:
        sys.exit("no nvcc was found: put it on PATH or set CUDA_HOME")
    command = [str(Path(toolkit.home, "bin", "nvcc")), "-x", "cu", "-std=c++20", "-cubin", "-Xcicc", "-O1"]
    command += ["-Xptxas", "-O0", f"-I{CSRC}"]
    refused = []
    for arch in arguments.archs:
        start = time.monotonic()
        for source in device_sources():
            with tempfile.TemporaryDirectory() as folder:
                out = os.path.join(folder, "out.cubin")
                result = subprocess.run(
                    [*command, f"-arch=sm_{arch}", str(source), "-o", out], capture_output=True, text=True
                )
            if result.returncode:
                refused.append(f"sm_{arch}: {source.name}")
                print(f"{refused[-1]} does not compile:\n{result.stderr}", file=sys.stderr)
        print(f"sm_{arch}: {len(device_sources())} files in {time.monotonic() - start:.0f} s", flush=True)
    print(f"does not compile: {', '.join(refused)}" if refused else "every kernel compiles for every card asked for")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
