"""`search(config)`: from data and a target latency to a derived network in a run folder."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import torch

from tfnas.architecture import (
    Architecture,
    architecture_to_dict,
    count_multiply_adds,
    count_parameters,
    save_architecture,
)
from tfnas.begin import make_reporter, open_run, stored_state
from tfnas.bilevel import BilevelSearch
from tfnas.callbacks import Callback, Record, Reporter
from tfnas.config import ConfigError, DatasetConfig, SearchConfig
from tfnas.config_io import SEARCH, config_to_dict
from tfnas.data import DataBundle, DataOptions, build_data
from tfnas.derive import Derivation, derive, derive_within_target, kept_layers
from tfnas.evaluate import evaluate_network
from tfnas.latency.lut import LatencyTable
from tfnas.network import build_network
from tfnas.processes import Processes, is_shared_run, local_rank, open_processes
from tfnas.progress import SEARCHING
from tfnas.run import ARCHITECTURE_FILE, TABLE_FILE
from tfnas.scaling import fit_widths
from tfnas.space import Space
from tfnas.space_io import load_space
from tfnas.supernet import Supernet
from tfnas.target import Target, choose_target, measured_latency_ms, obtain_table
from tfnas.threads import use_threads
from tfnas.versions import software_versions

_SKIPPED_SHOWN = 10


@dataclass(frozen=True)
class SearchResult:
    """What a search ends with.

    `met` says whether `lut_latency_ms` is at most the target and within `tolerance` of it. `measured_latency_ms` is
    None where the table is not from this machine. `repaired`: the strongest network could not meet the target at any
    width, and `architecture` is the most probable one that can.
    """

    architecture: Architecture
    target_latency_ms: float
    reachable_range_ms: tuple[float, float]
    lut_latency_ms: float
    measured_latency_ms: float | None
    repaired: bool
    met: bool
    folder: Path
    supernet: Supernet


def search(config: SearchConfig, callbacks: Sequence[Callback] | None = None) -> SearchResult:
    """Run or resume a search; the run folder holds everything that it finds.

    Started by `torchrun` in several processes, each takes `batch_size` images of every step and gradients are averaged;
    the first one writes and tells the callbacks, all return the result.

    Args:
        config: What to search, where and how; see `SearchConfig`. One target; `search_targets` takes several.
        callbacks: Who is told; None shows progress on standard output.

    Raises:
        ConfigError (a ValueError): a configuration that cannot be used; `TargetOutOfReach` among them.
        ValueError, OSError: data, table, space or checkpoint that cannot be used; the message says which and why.
        SearchInterrupted (a KeyboardInterrupt): stopped by a signal, after a checkpoint.
        SearchFailed: a loss that is not finite, not enough memory, or processes that no longer hold the same values.
        ProcessFailed: another process of this run failed or ended.

    On a CPU the result repeats bit for bit with the same configuration, table and numbers of threads and processes
    (measured latencies aside).
    """
    if isinstance(config.target_latency_ms, list):
        raise ConfigError(
            f"target_latency_ms: a search has one target, got {config.target_latency_ms}; tfnas.search_targets takes "
            "several"
        )
    with _prepared(config, callbacks) as ready:
        ready.loop.run()
        return _end(ready)


def warm_up(config: SearchConfig, callbacks: Sequence[Callback] | None = None) -> None:
    """The warm-up epochs of a search, resumable, up to the checkpoint after them; raises as `search` does.

    Targets, if there are several, must all be in reach; they have no influence yet.
    """
    with _prepared(config, callbacks) as ready:
        ready.loop.run(config.warmup_epochs)


@dataclass(frozen=True)
class _Prepared:
    config: SearchConfig
    space: Space
    loop: BilevelSearch
    reporter: Reporter
    processes: Processes
    start_s: float


@contextmanager
def _prepared(config: SearchConfig, callbacks: Sequence[Callback] | None) -> Iterator[_Prepared]:
    """Everything in place for the first step, or the next one of a resumed run."""
    start_s = time.monotonic()
    use_threads(config.threads)
    device = choose_device(config.device)
    with ExitStack() as stack:
        stack.enter_context(on_device(device))
        processes = stack.enter_context(open_processes(device))
        reporter = make_reporter(config.tensorboard, callbacks, SEARCHING, processes)
        stack.callback(reporter.close)
        folder = open_run(config, SEARCH, Path(config.space).stem, processes, stack)
        config = dataclasses.replace(config, output=str(folder))
        reporter.config(config_to_dict(config))
        state = stored_state(config, folder, device, processes, reporter.say)
        data_space = load_space(config.space, _space_overrides(config))
        require_batch_norm("batch_size", config.batch_size, data_space)
        require_batch_norm("dataset.evaluation_batch_size", config.dataset.evaluation_batch_size, data_space)
        options = data_options(config, data_space, device)
        data = build_data(options, config.seed, rank=processes.rank, world_size=processes.world_size)
        say_skipped(data, reporter.say)
        space = dataclasses.replace(data_space, num_classes=config.num_classes or data.num_classes)
        table = processes.from_first(lambda: obtain_table(config, space, device, folder / TABLE_FILE, reporter.say))
        target = choose_target(space, table, config.target_latency_ms)
        supernet = make_supernet(config, dataclasses.replace(space, num_classes=data.num_classes), device)
        loop = BilevelSearch(config, supernet, data, table, target, folder, reporter, state, processes)
        fresh, metrics_bytes = state is None, state["metrics_bytes"] if state else 0
        del state  # on a GPU it takes as much memory as all weights and their momentum
        # not before the checkpoint is known to be this search's
        reporter.open(folder, metrics_bytes)
        reporter.record(_start_record(config, loop, data, device), write=fresh)
        yield _Prepared(config, space, loop, reporter, processes, start_s)


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is a device, else the CPU. A `ConfigError` says why a named device cannot be used.

    Of several processes each takes the GPU that has its number on the machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and is_shared_run():
        if device.index is not None:
            raise ConfigError(f"device: every process has a GPU of its own, so name cuda, not {name}")
        device = torch.device("cuda", local_rank())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {device} asked for, but this torch ({torch.__version__}) sees {torch.cuda.device_count()} GPUs"
        )
    return device


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """A context in which `device`, if it is a GPU, is the current one, as host memory pinned for it wants.

    So no process makes itself known to a GPU that it does not use, nor takes memory there.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class HasData(Protocol):
    """The keys of a configuration that say which images are read."""

    data: str
    dataset: DatasetConfig
    batch_size: int


def data_options(config: HasData, space: Space, device: torch.device) -> DataOptions:
    """The data layer's options: images as the space takes them."""
    values = dataclasses.asdict(config.dataset)
    if config.data == "fake" and isinstance(config.dataset.classes, int):
        values["num_classes"] = config.dataset.classes
    for key in ("color_jitter", "mean", "std"):
        values[key] = None if values[key] is None else tuple(values[key])
    return DataOptions(
        source=config.data,
        batch_size=config.batch_size,
        resolution=space.resolution,
        image_channels=space.image_channels,
        device=str(device),
        **values,
    )


def require_batch_norm(key: str, batch_size: int | None, space: Space) -> None:
    """Raise `ConfigError` where batches of `batch_size` leave the last batch norms one value per channel."""
    if batch_size == 1 and space.out_resolution == 1:
        raise ConfigError(
            f"{key}: expected at least 2, got 1: images of {space.resolution} pixels come down to a single one, and "
            "batch norm needs more than one value per channel; or raise resolution"
        )


def say_skipped(data: DataBundle, say: Callable[[str], None]) -> None:
    """Name the first files that `dataset.skip_bad_images` left out, and how many there are."""
    for text in data.skipped[:_SKIPPED_SHOWN]:
        say(f"left out: {text}")
    if data.skipped:
        say(f"warning: {len(data.skipped)} image files left out, as dataset.skip_bad_images asks for")


def make_supernet(config: SearchConfig, space: Space, device: torch.device) -> Supernet:
    """A supernet with weights drawn by the seed; torch's global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Supernet(space, config.engine, getattr(torch, config.precision), device)


def _space_overrides(config: SearchConfig) -> dict[str, Any]:
    overrides = {"resolution": config.resolution, "image_channels": config.image_channels}
    return {key: value for key, value in overrides.items() if value is not None}


def _start_record(config: SearchConfig, loop: BilevelSearch, data: DataBundle, device: torch.device) -> Record:
    return {
        "kind": "start",
        "output": config.output,
        "space": config.space,
        "data": config.data,
        "train_images": data.train.num_images,
        "held_out_images": data.held_out.num_images,
        "skipped_images": len(data.skipped),
        "num_classes": data.num_classes,
        "engine": loop.supernet.engine.name,
        "precision": config.precision,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "seed": config.seed,
        "reachable_range_ms": list(loop.target.reachable_range_ms),
        "target_latency_ms": loop.target.target_latency_ms,
        "target_is_midpoint": loop.target.is_midpoint,
        "all_targets_ms": config.target_latency_ms if isinstance(config.target_latency_ms, list) else None,
        "epochs": config.epochs,
        "warmup_epochs": config.warmup_epochs,
        "steps_per_epoch": loop.steps_per_epoch,
        "images_per_step": loop.images_per_step,
        "processes": loop.processes.world_size,
        "step": loop.step,
        "versions": software_versions(),
    }


def _end(ready: _Prepared) -> SearchResult:
    """Derive the network, measure it, write it down."""
    config, loop, folder = ready.config, ready.loop, ready.loop.folder
    table, target = loop.table, loop.target
    found = _derivation(config, loop.supernet, ready.space, table, target)
    arch = found.architecture
    inherited = inherited_accuracy(loop, found)
    ready.reporter.say("measuring the derived network")
    measured, not_measured_because = ready.processes.from_first(lambda: measured_latency_ms(arch, table))
    facts: Record = {
        "target_latency_ms": target.target_latency_ms,
        "lut_latency_ms": found.lut_latency_ms,
        "measured_latency_ms": measured,
        "repaired": found.repaired,
    }
    details: dict[str, Any] = {"reachable_range_ms": list(target.reachable_range_ms), "tolerance": config.tolerance}
    if not_measured_because:
        details["not_measured_because"] = not_measured_because
    unrepaired = None
    if found.unrepaired is not None:
        unrepaired = {"lut_latency_ms": found.unrepaired_latency_ms, **architecture_to_dict(found.unrepaired)}
    if ready.processes.is_first:
        save_architecture(
            folder / ARCHITECTURE_FILE,
            arch,
            **facts,
            unrepaired=unrepaired,
            seed=config.seed,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            versions={name: version for name, version in software_versions().items() if version is not None},
            details=details,
        )
    ready.reporter.record(
        {
            "kind": "end",
            **facts,
            "not_measured_because": not_measured_because,
            "multiply_adds": count_multiply_adds(arch),
            "parameters": count_parameters(arch),
            "inherited_accuracy": inherited,
            "architecture_file": str(folder / ARCHITECTURE_FILE),
            "seconds": time.monotonic() - ready.start_s,
        }
    )
    return SearchResult(
        architecture=arch,
        target_latency_ms=target.target_latency_ms,
        reachable_range_ms=target.reachable_range_ms,
        lut_latency_ms=found.lut_latency_ms,
        measured_latency_ms=measured,
        repaired=found.repaired,
        met=found.is_within(target.target_latency_ms, config.tolerance),
        folder=folder,
        supernet=loop.supernet,
    )


def inherited_accuracy(loop: BilevelSearch, found: Derivation) -> float | None:
    """Share of the held-out images that the derived network classifies right with the supernet's weights, untrained.

    Batch statistics, as in the supernet. None where the configuration asks for no held-out accuracy.
    """
    log = loop.config.log
    if not log.held_out_every_epochs:
        return None
    net = loop.supernet
    arch = Architecture(loop.space, found.architecture.stages)
    network = build_network(arch, affine=False, running_stats=False)
    network.load_state_dict(net.inherit_weights(arch, found.kept))
    batches = itertools.islice(loop.held_out_data.epoch(0), log.held_out_batches)
    network = network.to(loop.device).to(memory_format=torch.channels_last)
    return evaluate_network(network, batches, loop.config.precision, loop.processes).top1


def _derivation(
    config: SearchConfig, supernet: Supernet, space: Space, table: LatencyTable, target: Target
) -> Derivation:
    alpha, beta, widths = supernet.log_alpha.detach(), supernet.log_beta.detach(), supernet.widths
    if config.derive == "repair":
        return derive_within_target(space, alpha, beta, widths, table, target.target_latency_ms, config.tolerance)
    scaling = fit_widths(derive(space, alpha, beta, widths), table, target.target_latency_ms)
    kept = kept_layers(space, alpha, beta)
    return Derivation(scaling.architecture, scaling.lut_latency_ms, kept, scaling)
