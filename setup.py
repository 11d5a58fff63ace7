"""Builds the native module tfnas_ext._C from csrc/sources.json; everything else stands in pyproject.toml.

Environment: TFNAS_NATIVE=0 leaves the native module out, TFNAS_CUDA=0|1 decides on CUDA kernels (default: where torch
has CUDA and nvcc is found), TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX and MAX_JOBS as for every torch extension.
"""

import json
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import _build  # noqa: E402
import _toolchain  # noqa: E402

SOURCES = json.loads((ROOT / "csrc" / "sources.json").read_text())
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fvisibility=hidden,-ffp-contract=off"]
# For at::parallel_for. Compiled with but not linked: the OpenMP library must be the one that torch brings.
CXX_FLAGS += ["-fopenmp"] if sys.platform.startswith("linux") else []

torch_version = _build.find_torch(sys.path)
problem = _toolchain.native_problem()
if problem is None and torch_version is None:
    problem = "torch was not there when the package was built"

info = {"native": problem is None, "reason": problem or "", "torch_version": torch_version or ""}
info |= {"cuda_version": "", "cuda_archs": (), "cuda_reason": problem or "", "isas": ()}


class BuildPy(build_py):
    """Also writes what was built, and why not, into the package."""

    def run(self):
        super().run()
        write_build_info(ROOT if self.editable_mode else Path(self.build_lib))


def write_build_info(folder: Path) -> None:
    lines = ['"""Written by setup.py: what was compiled, and for which torch."""', ""]
    lines += [f"{key} = {value!r}" for key, value in info.items()]
    (folder / "tfnas_ext" / "_build_info.py").write_text("\n".join(lines) + "\n")


def native_extension():
    """The extension and the command that builds it. Imports torch, so only called when something is compiled."""
    nvcc = _toolchain.find_nvcc()
    if nvcc is not None:
        os.environ["CUDA_HOME"] = nvcc.home  # cpp_extension reads it once, at import
    import torch
    from torch.utils import cpp_extension

    cuda_reason = _toolchain.cuda_problem(torch.version.cuda, nvcc, SOURCES["cuda"])
    cuda = cuda_reason is None
    if cuda and not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", _toolchain.DEFAULT_CUDA_ARCHS)
    archs = _toolchain.architectures(cpp_extension._get_cuda_arch_flags()) if cuda else ()
    isas = tuple(SOURCES["isa_flags"]) if platform.machine() in ("x86_64", "AMD64") else ("generic",)
    info.update(torch_version=torch.__version__, cuda_reason=cuda_reason or "", cuda_archs=archs, isas=isas)
    info["cuda_version"] = nvcc.version if cuda else ""
    print(
        f"tfnas_ext: building for torch {torch.__version__}; CUDA kernels "
        + (f"ON: nvcc {nvcc.version} at {nvcc.home}, {' '.join(archs)}" if cuda else f"OFF: {cuda_reason}"),
        file=sys.stderr,
    )

    groups = ("ops", "cpu", "engine", "timing", "bindings") + (("cuda",) if cuda else ())
    extension = (cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension)(
        "tfnas_ext._C",
        [file for group in groups for file in SOURCES[group]],
        include_dirs=[str(ROOT / "csrc")],
        # Any change under csrc starts a build; ninja then compiles only what that change touches.
        depends=[str(file) for file in (ROOT / "csrc").rglob("*") if file.is_file()],
        define_macros=[("TFNAS_WITH_CUDA", str(int(cuda)))],
        # Sampling promises the same bits everywhere: no fused multiply-add where none is written.
        extra_compile_args={"cxx": [*CXX_FLAGS, "-ffp-contract=off"], "nvcc": NVCC_FLAGS},
    )
    # libc10_cuda brings the CUDA runtime; toolkits that split their libraries have no libcudart to link against.
    extension.libraries = [name for name in extension.libraries if name != "cudart"]

    class BuildExt(cpp_extension.BuildExtension):
        """Compiles the files under `cpu_per_isa` once per instruction set, then the extension with those objects."""

        def build_extension(self, ext):
            # ninja is given one instruction set at a time, which is no work for many cores
            given = os.environ.get("MAX_JOBS", "")
            jobs = int(given) if given.isdigit() else os.cpu_count() or 1
            at_once = jobs // len(SOURCES["cpu_per_isa"]) if self.use_ninja else 1
            with ThreadPoolExecutor(max(1, at_once)) as pool:
                for objects in pool.map(lambda isa: self.compile_for(isa, ext), isas):
                    ext.extra_objects += objects
            super().build_extension(ext)

        def compile_for(self, isa, ext):
            files = [file for file, wanted in SOURCES["cpu_per_isa"].items() if isa in wanted]
            if not files:
                return []
            # at::vec widens by CPU_CAPABILITY_*; it knows no bf16 variant.
            vec = {"generic": "DEFAULT", "avx512_bf16": "AVX512"}.get(isa, isa.upper())
            return self.compiler.compile(
                files,
                output_dir=str(Path(self.build_temp, isa)),
                macros=[(f"CPU_CAPABILITY_{vec}", None), ("CPU_CAPABILITY", vec), ("TFNAS_ISA", isa)],
                include_dirs=ext.include_dirs,
                extra_postargs={"cxx": [*CXX_FLAGS, *SOURCES["isa_flags"][isa]], "nvcc": []},
                depends=ext.depends,
            )

        def run(self):
            super().run()
            write_build_info(ROOT if self.inplace else Path(self.build_lib))

    return extension, BuildExt


COMPILING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"}
extensions, commands = [], {"build_py": BuildPy}
if problem is None and COMPILING & set(sys.argv):
    extension, build_ext = native_extension()
    extensions, commands = [extension], {**commands, "build_ext": build_ext}
elif problem is not None:
    print(f"tfnas_ext: no native module, because {problem}. The slow 'reference' backend remains.", file=sys.stderr)

setup(
    install_requires=[
        _build.torch_requirement(torch_version),
        "torchvision",
        "numpy>=1.24",
        "jsonargparse[signatures]>=4.49",
        "PyYAML>=6.0",
        "rich>=13.0",
        "safetensors>=0.4",
        "pillow>=9.0",
    ],
    options={"build": {"build_base": f"build/torch-{torch_version}"}},
    ext_modules=extensions,
    cmdclass=commands,
)
