"""Compiles every CUDA kernel and writes its registers, shared memory and spills into docs/kernels.md.

    python tools/kernel_resources.py [--check]

Needs nvcc, no GPU and no torch. Device code only, one file and architecture at a time; what the compiler said is kept
in build/kernel-resources and asked again only where a source changed, so a run that was stopped goes on. `--check` only
says whether a kernel spills or the table is out of date (exit 1). `compile_architectures.py` tries the other cards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import _toolchain  # noqa: E402

DOCUMENT = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- resources: begin -->", "<!-- resources: end -->"
ARCHS = ("80", "90")
CACHE = ROOT / "build" / "kernel-resources"
CSRC = ROOT / "csrc"
INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
# Registers, bytes of static shared memory, bytes spilled.
Resources = tuple[int, int, int]


def dependencies(source: Path) -> list[Path]:
    """`source` and the project's headers that it includes, directly or not."""
    found: dict[Path, None] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found[path] = None
        for name in INCLUDE.findall(path.read_text()):
            candidates = (path.parent / name, CSRC / name)
            waiting += [c.resolve() for c in candidates if c.exists()][:1]
    return sorted(found)


def device_sources() -> list[Path]:
    """What holds kernels and compiles without torch's headers, which the path sampler's launcher needs."""
    launchers = [p for p in sorted((CSRC / "cuda").glob("*.cu")) if no_torch(p)]
    return [*launchers, CSRC / "kernels" / "sample_paths.cuh", CSRC / "timing" / "event_timer.cu"]


def no_torch(source: Path) -> bool:
    return not any(re.search(r"#include <(torch|ATen|c10)/", path.read_text()) for path in dependencies(source))


def compile_source(nvcc: str, version: str, source: Path, arch: str) -> dict[str, Resources]:
    """Kernel -> resources, from the compiler's own report or from the cache of what it said."""
    digest = hashlib.sha256(version.encode())
    for path in dependencies(source):
        digest.update(path.read_bytes())
    kept = CACHE / f"{source.stem}-sm_{arch}.json"
    if kept.exists():
        entry = json.loads(kept.read_text())
        if entry["digest"] == digest.hexdigest():
            return {name: tuple(resources) for name, resources in entry["kernels"].items()}
    start = time.monotonic()
    kept.parent.mkdir(parents=True, exist_ok=True)
    command = [nvcc, "-x", "cu", "-std=c++20", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", f"-I{CSRC}"]
    result = subprocess.run(
        [*command, str(source), "-o", str(kept.with_suffix(".cubin"))], capture_output=True, text=True
    )
    if result.returncode:
        sys.exit(f"{source.name} does not compile for sm_{arch}:\n{result.stderr}")
    kept.with_suffix(".cubin").unlink()
    found: dict[str, Resources] = {}
    for part in result.stderr.split("Compiling entry function '")[1:]:
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        spills = re.search(r"(\d+) bytes spill stores", part)
        assert registers is not None, part
        name = demangle(part.split("'")[0])
        found[name] = (int(registers[1]), int(shared[1]) if shared else 0, int(spills[1]) if spills else 0)
    kept.write_text(json.dumps({"digest": digest.hexdigest(), "kernels": found}, indent=1) + "\n")
    print(f"sm_{arch}: {source.name}, {len(found)} kernels, {time.monotonic() - start:.0f} s", file=sys.stderr)
    return found


def demangle(name: str) -> str:
    """`expand_dw<float, TF32, 1, ...>` of a mangled name: what a reader needs to find the kernel."""
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    text = re.sub(r"\(tfnas::cuda::(Math|DzMode)\)(\d)", r"\1\2", text)
    maths = {"Math0": "FMA", "Math1": "TF32", "Math2": "3xTF32", "Math3": "BF16", "DzMode0": "gate", "DzMode1": "wide"}
    text = re.sub(r"(Math|DzMode)\d", lambda m: maths[m[0]], text)
    text = text.replace("tfnas::cuda::", "").replace("tfnas::", "").replace("__nv_", "")
    text = text.removeprefix("void ")
    depth = 0
    for i, character in enumerate(text):  # up to the argument list
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return text[:i].replace(" >", ">")
    return text


def table(rows: dict[str, dict[str, Resources]]) -> str:
    lines = ["| kernel | registers sm_80 / sm_90 | static shared bytes | spill bytes |", "|-|-|-|-|"]
    for name, by_arch in sorted(rows.items()):
        registers = " / ".join(str(by_arch[arch][0]) for arch in ARCHS)
        spills = " / ".join(str(by_arch[arch][2]) for arch in ARCHS)
        lines.append(f"| `{name}` | {registers} | {by_arch['90'][1]} | {spills} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    toolkit = _toolchain.find_nvcc()
    if toolkit is None:
        sys.exit("no nvcc was found: put it on PATH or set CUDA_HOME")
    nvcc = str(Path(toolkit.home, "bin", "nvcc"))
    rows: dict[str, dict[str, Resources]] = {}
    for arch in ARCHS:
        for source in device_sources():
            for name, resources in compile_source(nvcc, toolkit.version, source, arch).items():
                rows.setdefault(name, {})[arch] = resources
    spilling = [f"{name} on sm_{arch}" for name, by in rows.items() for arch, r in by.items() if r[2]]
    for name in spilling:
        print(f"spills: {name}", file=sys.stderr)
    text = DOCUMENT.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    new = f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"
    if arguments.check and new != text:
        sys.exit(f"{DOCUMENT.name} is out of date: run python tools/kernel_resources.py")
    if not arguments.check:
        DOCUMENT.write_text(new)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
