"""Checkpoints: plain tensors, numbers, strings, lists and dicts; written atomically, the one before kept.

`checkpoint.pt` is the latest, `checkpoint.previous.pt` the one before. Whenever the process dies, at least one of the
two is whole (once two have been written), so a run always finds a state to go on from.
"""

from __future__ import annotations

import math
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

LATEST = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"
FORMAT_VERSION = 2
_TEMPORARY = "checkpoint.pt.tmp"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


def save_checkpoint(folder: str | os.PathLike[str], state: dict[str, Any]) -> Path:
    """Write `state` as the latest checkpoint of `folder`; the latest so far becomes the previous one.

    Tensors are written from whatever device they are on. On an error (`OSError`: full disk, no permission) the old
    files stay as they were.
    """
    folder = Path(folder)
    temporary, latest = folder / _TEMPORARY, folder / LATEST
    try:
        with open(temporary, "wb") as file:
            torch.save({"format_version": FORMAT_VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch reports that it could not finish the file, and not why
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    if latest.exists():
        os.replace(latest, folder / PREVIOUS)
    os.replace(temporary, latest)
    _sync_folder(folder)
    return latest


def find_not_finite(state: Mapping[str, Any]) -> str | None:
    """Name (`supernet.weights.stem.conv.weight`) of the first tensor that holds a NaN or an infinity, or None.

    -inf is what masked log-probabilities (`log_alpha`, `log_beta`) are, and allowed in those.
    """

    def visit(value: Any, path: tuple[str, ...]) -> str | None:
        if isinstance(value, torch.Tensor):
            if not value.is_floating_point() or not value.numel():
                return None
            largest = value.max() if path[-1].startswith("log_") else value.abs().max()
            return None if bool(largest < math.inf) else ".".join(path)
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, list | tuple):
            items = enumerate(value)
        return next((found for key, item in items if (found := visit(item, (*path, str(key)))) is not None), None)

    return visit(state, ())


def has_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` holds a checkpoint file, whole or not."""
    return any((Path(folder) / name).exists() for name in (LATEST, PREVIOUS))


def load_checkpoint(
    folder: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> tuple[dict[str, Any], list[str]]:
    """Read the latest whole checkpoint of `folder`; returns it and one remark for every file that was passed over.

    Only tensors and plain values are read (`weights_only=True`): a file with anything else in it is refused, nothing
    of it is run. Raises `CheckpointError` where no file can be used.
    """
    remarks: list[str] = []
    for name in (LATEST, PREVIOUS):
        path = Path(folder) / name
        if not path.exists():
            continue
        try:
            return _read(path, device), remarks
        except CheckpointError as error:
            remarks.append(str(error))
    raise CheckpointError("\n".join(remarks) or f"{folder} holds no checkpoint")


def _read(path: Path, device: torch.device | str) -> dict[str, Any]:
    try:
        if (damaged := _damaged_member(path)) is not None:
            raise CheckpointError(f"{path} is damaged in {damaged}")
        state = torch.load(path, map_location=device, weights_only=True)
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors and plain values ({_first(error)})"
        ) from None
    except Exception as error:  # damage makes the readers of archives and of pickles fail in any way
        raise CheckpointError(f"{path} is damaged or truncated ({_first(error)})") from None
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
        found = state.get("format_version") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path}: expected checkpoint format {FORMAT_VERSION}, found {found}")
    return state


def _damaged_member(path: Path) -> str | None:
    """Name of the archive's first member that is not what was written; torch checks none and reads what there is."""
    with zipfile.ZipFile(path) as archive:
        # attributes are not under the checksum, and what is said to be a folder torch leaves uninitialised
        odd = [member.filename for member in archive.infolist() if member.external_attr != 0]
        return odd[0] if odd else archive.testzip()


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
