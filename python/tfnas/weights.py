"""Weights of derived networks as safetensors files, and networks from them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tfnas.architecture import Architecture
from tfnas.fields import suggestion
from tfnas.files import write_bytes_atomically
from tfnas.network import Network, build_network

T = TypeVar("T")


def save_weights(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], facts: Mapping[str, str] | None = None
) -> None:
    """Write a state dict as safetensors, atomically, contiguous and on no device; `facts` go into the header."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_bytes_atomically(path, save(tensors, {"format": "pt", **(facts or {})}))


def read_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and facts of a safetensors file. Raises `FileNotFoundError`, or `ValueError` for a damaged file."""
    return _open(
        path,
        lambda file: ({name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})),  # noqa: SIM118
    )


def _open(path: str | os.PathLike[str], read: Callable[[Any], T]) -> T:
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights {path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            return read(file)
    except SafetensorError as error:
        raise ValueError(f"weights {path}: not a safetensors file, or truncated ({error})") from None


def read_facts(path: str | os.PathLike[str]) -> dict[str, str]:
    """Facts of a safetensors file, without its tensors; raises as `read_weights` does."""
    return _open(path, lambda file: dict(file.metadata() or {}))


def network_with(arch: Architecture, path: str | os.PathLike[str]) -> Network:
    """The network of `arch` in evaluation mode with the weights of a safetensors file.

    Raises `ValueError` naming the first weight that is missing, of another shape, or that nothing asks for.
    """
    weights, _ = read_weights(path)
    # without storage: no time and no random numbers go into weights that are about to be replaced
    with torch.device("meta"):
        network = build_network(arch)
    wanted = network.state_dict()
    for name, value in wanted.items():
        if name not in weights:
            raise ValueError(f"weights {path}: {name} is missing{suggestion(name, weights)}; another architecture?")
        if weights[name].shape != value.shape:
            raise ValueError(
                f"weights {path}: {name} has shape {tuple(weights[name].shape)}, this architecture needs "
                f"{tuple(value.shape)}"
            )
    if extra := [name for name in weights if name not in wanted]:
        raise ValueError(f"weights {path}: {extra[0]} belongs to no layer of this architecture")
    network.load_state_dict(weights, assign=True)
    return network.eval()


def fresh_network(arch: Architecture, seed: int) -> Network:
    """The network of `arch` in evaluation mode with weights drawn by `seed`; torch's generator stays as it was."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 to {2**63 - 1}, got {seed}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_network(arch).eval()
