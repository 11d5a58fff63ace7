"""Several processes of one run on this machine, as `torchrun` would start them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import socket
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import torch

_TIMEOUT_S = 120


def run_processes(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns in each of `world_size` processes, by rank; one thread each.

    An exception in a process becomes that process's result. `function` must be a module's, its result picklable.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tfnas.pipeline", "tfnas.train"])
    results = context.Queue()
    port = _free_port()
    processes = [
        context.Process(target=_one, args=(rank, world_size, port, results, function, arguments))
        for rank in range(world_size)
    ]
    start_outside_the_sources(processes)
    found: dict[int, Any] = {}
    try:
        while len(found) < world_size:
            rank, value = results.get(timeout=_TIMEOUT_S)
            found[rank] = pickle.loads(value)
    except queue.Empty:
        raise AssertionError(f"no answer from processes {sorted(set(range(world_size)) - set(found))}") from None
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
            process.join()
    return [found[rank] for rank in range(world_size)]


def start_outside_the_sources(processes: Sequence[BaseProcess]) -> None:
    """Start processes of a fork server; the server imports what it preloads from the folder that it is started in."""
    here = os.getcwd()
    os.chdir(tempfile.gettempdir())
    try:
        for process in processes:
            process.start()
    finally:
        os.chdir(here)


def raise_failures(results: list[Any]) -> list[Any]:
    """`results`, after raising an AssertionError with the traceback of the first exception among them."""
    for rank, result in enumerate(results):
        if isinstance(result, BaseException):
            raise AssertionError(f"process {rank}: {''.join(traceback.format_exception(result))}")
    return results


def _one(
    rank: int, world_size: int, port: int, results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in environment.items()} | {"MASTER_ADDR": "127.0.0.1"}
    try:
        value = function(*arguments)
    except BaseException as error:
        value = error
        if hasattr(error, "add_note"):
            error.add_note(traceback.format_exc())
    try:
        data = pickle.dumps(value)
        pickle.loads(data)
    except Exception:
        data = pickle.dumps(RuntimeError(f"{type(value).__name__}: {value}"))
    # bytes: a tensor in a queue would live only as long as this process
    results.put((rank, data))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
