"""`tfnas info`: versions, devices, backends; with `--architecture` the facts of an architecture file."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

import torch
from jsonargparse import ArgumentParser

from tfnas.cli.codes import OK
from tfnas.versions import software_versions


def run(arguments: list[str]) -> int:
    """Print the facts asked for, as text or `--json`; returns the exit code."""
    parser = ArgumentParser(prog="tfnas info", exit_on_error=False, allow_abbrev=False, description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(arguments)
    facts = environment_facts()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print("\n".join(_lines(facts)))
    return OK


def environment_facts() -> dict[str, Any]:
    """Versions, the machine's devices and threads."""
    return {
        "versions": software_versions(),
        "platform": platform.platform(),
        "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "cuda_devices": _cuda_devices(),
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
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, item in enumerate(value):
                lines += [f"{indent}{key} {index}:", *_lines(item, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {value if value not in (None, []) else 'none'}")
    return lines
