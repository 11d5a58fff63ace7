"""What this machine can compile: the C++ compiler, nvcc, and the decision whether to build CUDA kernels."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"


def native_problem() -> str | None:
    """Why no native module is built here, or None."""
    if os.environ.get("TFNAS_NATIVE", "1") == "0":
        return "it was left out by TFNAS_NATIVE=0 when the package was installed"
    return compiler_problem()


def compiler_problem() -> str | None:
    """Why no native module can be compiled here, or None: C++20 and Python's headers are tried for real."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        return f"no C++ compiler ({compiler[0]}) was found when the package was installed"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <Python.h>\n#include <concepts>\nint main() { return 0; }\n")
        command = [*compiler, "-std=c++20", f"-I{sysconfig.get_paths()['include']}", "-c", str(source)]
        result = subprocess.run([*command, "-o", str(Path(folder, "probe.o"))], capture_output=True, text=True)
    if result.returncode == 0:
        return None
    first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip()[:200])
    if "Python.h" in result.stderr:
        return f"Python's headers (Python.h) were missing when the package was installed: {first}"
    return f"the C++ compiler ({compiler[0]}) could not compile C++20 when the package was installed: {first}"


@dataclass(frozen=True)
class Nvcc:
    home: str
    version: str


def find_nvcc() -> Nvcc | None:
    """The CUDA toolkit, asked of nvcc itself: `nvcc` on PATH may be a wrapper script or a link."""
    homes = [home for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda") if home]
    named = [shutil.which(os.path.join(home, "bin", "nvcc")) for home in homes]
    for nvcc in [*named[:-1], shutil.which("nvcc"), named[-1]]:
        if nvcc is None:
            continue
        dry = subprocess.run(
            [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull], capture_output=True, text=True
        )
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE)
        release = re.search(r"release (\d+\.\d+)", version.stdout)
        if top and release:
            return Nvcc(os.path.realpath(top.group(1)), release.group(1))
    return None


def architectures(flags: list[str]) -> tuple[str, ...]:
    """What nvcc's `-gencode` flags put into a binary: machine code (`sm_90`) before PTX (`compute_90`)."""
    found = {name for flag in flags for name in re.findall(r"(?:sm|compute)_\w+", flag.rpartition("code=")[2])}
    return tuple(sorted(found, key=lambda name: (name.startswith("compute"), len(name), name)))


def cuda_problem(torch_cuda: str | None, nvcc: Nvcc | None, sources: list[str]) -> str | None:
    """Why CUDA kernels are not built, or None. `TFNAS_CUDA=1` turns a reason into an error, `=0` is a reason."""
    wanted = os.environ.get("TFNAS_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"tfnas_ext: TFNAS_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return "TFNAS_CUDA=0"
    if not sources:
        problem = "this version has no CUDA sources"
    elif torch_cuda is None:
        problem = "torch is a CPU build; install a CUDA build of torch first"
    elif nvcc is None:
        problem = f"nvcc was not found; install a CUDA {torch_cuda} toolkit or set CUDA_HOME"
    elif nvcc.version.split(".")[0] != torch_cuda.split(".")[0]:
        problem = f"nvcc is {nvcc.version} ({nvcc.home}) but torch was built with CUDA {torch_cuda}; set CUDA_HOME"
    else:
        return None
    if wanted == "1":
        raise SystemExit(f"tfnas_ext: TFNAS_CUDA=1, but {problem}")
    return problem
