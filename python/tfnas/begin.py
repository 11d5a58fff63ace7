"""What every run begins with, in all its processes: who is told, its folder, the checkpoint in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from tfnas.callbacks import Callback, Reporter
from tfnas.checkpoint import CheckpointError, has_checkpoint, load_checkpoint
from tfnas.config_io import ConfigKind
from tfnas.processes import Processes
from tfnas.progress import Wording, default_progress
from tfnas.run import RunConfig, RunFolder
from tfnas.tensorboard import TensorBoard


def make_reporter(
    tensorboard: bool, callbacks: Sequence[Callback] | None, wording: Wording, processes: Processes
) -> Reporter:
    """A reporter to `callbacks` (None: progress on standard output, by `wording`) and, if asked for, TensorBoard."""
    told = [default_progress(wording)] if callbacks is None else list(callbacks)
    if tensorboard:
        told.append(TensorBoard())
    return Reporter(told, mute=not processes.is_first)


def open_run(config: RunConfig, kind: ConfigKind[Any], stem: str, processes: Processes, stack: ExitStack) -> Path:
    """`RunFolder.open` by the first process, until `stack` closes; the folder's path in all."""
    return processes.from_first(lambda: stack.enter_context(RunFolder.open(config, kind, stem)).path)


def stored_state(
    config: RunConfig, folder: Path, device: torch.device, processes: Processes, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """The checkpoint to go on from, if `resume` is on and there is one; its number of threads is taken over.

    Read by the first process, so that all have the same one even where the newest is damaged.
    """

    def read() -> tuple[dict[str, Any], list[str]] | None:
        if not config.resume or not has_checkpoint(folder):
            return None
        return load_checkpoint(folder, device if processes.world_size == 1 else "cpu")

    found = processes.from_first(read)
    if found is None:
        return None
    state, remarks = found
    if not isinstance(state.get("threads"), int):
        raise CheckpointError(f"{folder} holds a checkpoint that is not of a search or a training")
    for remark in remarks:
        say(f"warning: {remark}; going on from the checkpoint before")
    if state["threads"] != torch.get_num_threads():
        say(f"{state['threads']} CPU threads, as the run had before the interruption")
        torch.set_num_threads(state["threads"])
    return state
