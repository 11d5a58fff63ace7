"""Compiles every CUDA kernel and writes its registers, shared memory and spills into docs/kernels.md.

    python tools/kernel_resources.py [--archs 80 90] [--check]

Needs nvcc, no GPU. `--check` only says whether a kernel spills or the table is out of date (exit 1). `--archs` with
more than the two of the table compiles for those as well, to see that the source still builds for every supported
card: 75 80 86 89 90 100 120.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import _toolchain  # noqa: E402

DOCUMENT = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- resources: begin -->", "<!-- resources: end -->"
TABLE_ARCHS = ("80", "90")
# Kernels that need torch's headers to compile are left to the package's own build.
SOURCES = [*sorted((ROOT / "csrc" / "cuda").glob("layer_*.cu")), ROOT / "csrc" / "cuda" / "sgd.cu"]


def compile_source(nvcc: str, source: Path, arch: str, folder: Path) -> dict[str, tuple[int, int, int]]:
    """Kernel -> registers, bytes of static shared memory, bytes spilled, from the compiler's own report."""
    command = [nvcc, "-std=c++20", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    command += ["-c", str(source), "-o", str(folder / "out.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{source.name} does not compile for sm_{arch}:\n{result.stderr}")
    found = {}
    for part in result.stderr.split("Compiling entry function '")[1:]:
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        spills = re.search(r"(\d+) bytes spill stores", part)
        assert registers is not None, part
        name = demangle(part.split("'")[0])
        found[name] = (int(registers[1]), int(shared[1]) if shared else 0, int(spills[1]) if spills else 0)
    return found


def demangle(name: str) -> str:
    """`expand_dw<float, tf32, stride 1>` of a mangled name: what a reader needs to find the kernel."""
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    text = re.sub(r"\(tfnas::cuda::(Math|DzMode)\)(\d)", r"\1\2", text)
    maths = {"Math0": "FMA", "Math1": "TF32", "Math2": "3xTF32", "Math3": "BF16", "DzMode0": "gate", "DzMode1": "wide"}
    text = re.sub(r"(Math|DzMode)\d", lambda m: maths[m[0]], text).replace("tfnas::cuda::", "").replace("__nv_", "")
    text = text.removeprefix("void ")
    depth = 0
    for i, character in enumerate(text):  # up to the argument list
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return text[:i].replace(" >", ">")
    return text


def table(rows: dict[str, dict[str, tuple[int, int, int]]]) -> str:
    lines = ["| kernel | registers sm_80 / sm_90 | static shared bytes | spill bytes |", "|-|-|-|-|"]
    for name, by_arch in sorted(rows.items()):
        registers = " / ".join(str(by_arch[arch][0]) for arch in TABLE_ARCHS)
        spills = " / ".join(str(by_arch[arch][2]) for arch in TABLE_ARCHS)
        lines.append(f"| `{name}` | {registers} | {by_arch['90'][1]} | {spills} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=list(TABLE_ARCHS))
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    nvcc = _toolchain.find_nvcc()
    if nvcc is None:
        sys.exit("no nvcc was found: put it on PATH or set CUDA_HOME")
    rows: dict[str, dict[str, tuple[int, int, int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for arch in dict.fromkeys([*TABLE_ARCHS, *arguments.archs]):
            for source in SOURCES:
                for name, resources in compile_source(
                    str(Path(nvcc.home, "bin", "nvcc")), source, arch, Path(folder)
                ).items():
                    rows.setdefault(name, {})[arch] = resources
                print(f"sm_{arch}: {source.name} compiled", file=sys.stderr)
    spilling = [f"{name} on sm_{arch}" for name, by in rows.items() for arch, r in by.items() if r[2]]
    text = DOCUMENT.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    new = f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"
    if arguments.check and new != text:
        sys.exit(f"{DOCUMENT.name} is out of date: run python tools/kernel_resources.py")
    if not arguments.check:
        DOCUMENT.write_text(new)
    for name in spilling:
        print(f"spills: {name}", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
