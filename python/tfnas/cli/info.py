"""`tfnas info`: versions, devices, backends; with `--architecture` the facts of an architecture file."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

import torch
from jsonargparse import ArgumentParser

from tfnas.architecture import count_multiply_adds, count_parameters, load_architecture
from tfnas.cli.codes import OK
from tfnas.latency.lut_io import load_table
from tfnas.versions import software_versions
from tfnas_ext import backend_report, build_info
from tfnas_ext.backends import native_module


def run(arguments: list[str]) -> int:
    """Print the facts asked for, as text or `--json`; returns the exit code."""
    parser = ArgumentParser(prog="tfnas info", exit_on_error=False, allow_abbrev=False, description=__doc__)
    parser.add_argument("--architecture", type=str, help="architecture file, or a built-in name such as tf-nas-a")
    parser.add_argument("--lut", type=str, help="latency table, for the architecture's latency by it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(arguments)
    if args.lut is not None and args.architecture is None:
        raise ValueError("--lut needs --architecture, the network whose latency is asked for")
    facts = architecture_facts(args.architecture, args.lut) if args.architecture is not None else environment_facts()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print("\n".join(_lines(facts)))
    return OK


def architecture_facts(path_or_name: str, lut: str | None = None) -> dict[str, Any]:
    """What an architecture file says and what can be counted from it; latencies in ms.

    `multiply_adds` of one image and `parameters` are counts of the whole network, stem and head included.
    """
    arch, recorded = load_architecture(path_or_name)
    facts: dict[str, Any] = {
        "architecture": str(path_or_name),
        "space": arch.space.name,
        "depths": [len(ops) for ops in arch.stages],
        "multiply_adds": count_multiply_adds(arch),
        "parameters": count_parameters(arch),
    }
    if lut is not None:
        facts["lut"] = lut
        facts["lut_latency_ms"] = load_table(lut).architecture_ms(arch)
    return facts | {"recorded": recorded}


def environment_facts() -> dict[str, Any]:
    """Versions, the machine's devices and threads, what was compiled, and why each backend can or cannot run.

    `cuda_architectures` of the native module are machine code (`sm_90`) and PTX (`compute_90`); empty without CUDA.
    """
    built = build_info()
    return {
        "versions": software_versions(),
        "platform": platform.platform(),
        "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "native_module": {
            "compiled": native_module() is not None,
            "torch": built.torch_version or None,
            "instruction_sets": list(built.isas),
            "cuda": built.cuda_version or None,
            "cuda_architectures": list(built.cuda_archs),
        },
        "cuda_devices": _cuda_devices(),
        "backends": {
            backend.name: {"runs": backend.available, "reason": backend.reason} for backend in backend_report()
        },
    }


def _cuda_devices() -> list[dict[str, Any]]:
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return devices


def _lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    lines: list[str] = []
    for key, value in facts.items():
        if isinstance(value, dict) and value.keys() == {"runs", "reason"}:
            lines.append(f"{indent}{key}: {'runs' if value['runs'] else 'cannot run'}: {value['reason']}")
        elif isinstance(value, dict):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, item in enumerate(value):
                lines += [f"{indent}{key} {index}:", *_lines(item, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], str):
            lines.append(f"{indent}{key}: {', '.join(value)}")
        else:
            lines.append(f"{indent}{key}: {value if value not in (None, []) else 'none'}")
    return lines
