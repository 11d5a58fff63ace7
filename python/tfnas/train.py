"""`train(config)`: a derived network from scratch, resumable at any step, best and last weights kept.

The folder of a training: `config.yaml`, `architecture.json`, `metrics.jsonl`, `checkpoint.pt` (all that the rest of
the training depends on), `best.safetensors` and `last.safetensors` (weights to use).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from tfnas.architecture import (
    Architecture,
    builtin_architectures,
    count_multiply_adds,
    count_parameters,
    load_architecture,
    save_architecture,
)
from tfnas.begin import make_reporter, open_run, stored_state
from tfnas.callbacks import Callback, Record
from tfnas.checkpoint import has_checkpoint
from tfnas.config import ConfigError
from tfnas.config_io import config_to_dict
from tfnas.data import DataBundle, build_data
from tfnas.evaluate import Accuracy, evaluate_network
from tfnas.network import Network, build_network
from tfnas.pipeline import choose_device, data_options, on_device, require_batch_norm, say_skipped
from tfnas.processes import Processes, open_processes
from tfnas.run import ARCHITECTURE_FILE
from tfnas.threads import use_threads
from tfnas.train_config import TRAIN, TrainConfig
from tfnas.train_loop import BEST_FILE, TrainLoop
from tfnas.train_progress import TRAINING
from tfnas.versions import software_versions
from tfnas.weights import network_with
from tfnas_ext import accelerate


@dataclass(frozen=True)
class TrainResult:
    """What a training ends with: the best epoch (from 0), its validation accuracy, and the best weights' test accuracy.

    `best_accuracy` is None with `validation` `none`, `test` where the data has no test images. `network` has the best
    weights, in evaluation mode, on the training's device.
    """

    folder: Path
    network: Network
    best_epoch: int
    best_accuracy: float | None
    test: Accuracy | None


def train(config: TrainConfig, callbacks: Sequence[Callback] | None = None) -> TrainResult:
    """Train or resume the training of one network.

    Started by `torchrun` in several processes, each takes `batch_size` images of every pass (DistributedDataParallel);
    the first one writes and tells the callbacks, all return the result.

    The classifier gets as many outputs as the data has classes, whatever the architecture file says.

    Args:
        config: What to train, on what and how; see `TrainConfig`.
        callbacks: Who is told; None shows progress on standard output.

    Raises:
        ConfigError (a ValueError): a configuration that cannot be used.
        ValueError, OSError: data, architecture or checkpoint that cannot be used; the message says which and why.
        TrainingInterrupted (a KeyboardInterrupt): stopped by a signal, after a checkpoint.
        TrainingFailed: a loss that is not finite, not enough memory, or processes that no longer hold the same values.
        ProcessFailed: another process of this run failed or ended.

    On a CPU the result repeats bit for bit with the same configuration and numbers of threads and processes,
    interrupted or not.
    """
    start_s = time.monotonic()
    use_threads(config.threads)
    device = choose_device(config.device)
    file = _architecture_file(config)
    given, facts = load_architecture(file)
    with ExitStack() as stack:
        stack.enter_context(on_device(device))
        processes = stack.enter_context(open_processes(device))
        reporter = make_reporter(config.tensorboard, callbacks, TRAINING, processes)
        stack.callback(reporter.close)
        folder = open_run(config, TRAIN, f"train-{Path(config.architecture).stem}", processes, stack)
        config = dataclasses.replace(config, output=str(folder))
        reporter.config(config_to_dict(config))
        if file != config.architecture:
            reporter.say(f"{config.architecture} is gone; going on with {file}")
        state = stored_state(config, folder, device, processes, reporter.say)
        data = _data(config, given, device, processes)
        say_skipped(data, reporter.say)
        arch = _with_classes(given, data, reporter.say)
        loop = TrainLoop(config, make_network(config, arch, device), data, folder, reporter, state, processes)
        fresh, metrics_bytes = state is None, state["metrics_bytes"] if state else 0
        del state  # what nobody took over need not stay in a GPU's memory
        # not before the checkpoint is known to be this training's
        if processes.is_first:
            save_architecture(folder / ARCHITECTURE_FILE, arch, **facts)
        reporter.open(folder, metrics_bytes)
        reporter.record(_start_record(config, loop, data, device), write=fresh)
        loop.run()
        network = (
            processes.from_first(lambda: network_with(arch, folder / BEST_FILE))
            .to(device)
            .to(memory_format=torch.channels_last)
        )
        test = None
        if data.test is not None:
            test = evaluate_network(network, data.test.epoch(0), config.precision, processes)
        reporter.record(
            {
                "kind": "end",
                "best_epoch": loop.best_epoch,
                "best_accuracy": loop.best_accuracy,
                "test": dataclasses.asdict(test) if test is not None else None,
                "selected_by": config.validation,
                "weights_file": str(folder / BEST_FILE),
                "seconds": time.monotonic() - start_s,
            }
        )
    return TrainResult(folder, network, loop.best_epoch, loop.best_accuracy, test)


def make_network(config: TrainConfig, arch: Architecture, device: torch.device) -> Network:
    """The network on its engine, weights drawn by the seed; torch's global generator stays as it was.

    Raises `ConfigError` where `fused` is asked for and there are no kernels.
    """
    rates = config.regularization
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build_network(arch, dropout=rates.dropout, drop_connect=rates.drop_connect)
    network = network.to(device).to(memory_format=torch.channels_last)
    if config.engine != "eager":
        report = accelerate(network)
        if config.engine == "fused" and (report.left or not report.replaced):
            raise ConfigError(f"engine: fused cannot run every block on {device}; take auto or eager. {report}")
    return network


def _architecture_file(config: TrainConfig) -> str:
    """`architecture`; of a training that goes on, its own copy where the file is gone, as when its folder was moved."""
    known = config.architecture in builtin_architectures() or Path(config.architecture).exists()
    if not known and config.resume and config.output and has_checkpoint(config.output):
        return str(Path(config.output) / ARCHITECTURE_FILE)
    return config.architecture


def _data(config: TrainConfig, arch: Architecture, device: torch.device, processes: Processes) -> DataBundle:
    space = dataclasses.replace(arch.space, resolution=config.resolution or arch.space.resolution)
    require_batch_norm("batch_size", config.batch_size, space)
    options = data_options(config, space, device)
    data = build_data(options, config.seed, rank=processes.rank, world_size=processes.world_size)
    if config.validation == "test" and data.test is None:
        raise ConfigError(
            f"validation: test asked for, but {config.data} has no test images; name some by dataset.test_source, or "
            "take held_out or none"
        )
    if config.validation == "held_out" and not data.held_out.num_images:
        raise ConfigError(
            f"validation: dataset.held_out_fraction {config.dataset.held_out_fraction} of {config.data} holds out no "
            "image; raise it, or take test or none"
        )
    return data


def _with_classes(arch: Architecture, data: DataBundle, say: Callable[[str], None]) -> Architecture:
    if arch.space.num_classes == data.num_classes:
        return arch
    say(
        f"the architecture's classifier has {arch.space.num_classes} classes, the data {data.num_classes}: trained "
        f"with {data.num_classes}"
    )
    return Architecture(dataclasses.replace(arch.space, num_classes=data.num_classes), arch.stages)


def _start_record(config: TrainConfig, loop: TrainLoop, data: DataBundle, device: torch.device) -> Record:
    arch = loop.network.architecture
    return {
        "kind": "start",
        "output": config.output,
        "architecture": config.architecture,
        "data": config.data,
        "train_images": loop.data.num_images,
        "validation": config.validation,
        "validation_images": loop.validation.num_images if loop.validation is not None else 0,
        "skipped_images": len(data.skipped),
        "num_classes": data.num_classes,
        "multiply_adds": count_multiply_adds(arch),
        "parameters": count_parameters(arch),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "precision": config.precision,
        "seed": config.seed,
        "epochs": config.epochs,
        "steps_per_epoch": loop.steps_per_epoch,
        "images_per_step": loop.images_per_step,
        "processes": loop.processes.world_size,
        "step": loop.step,
        "versions": software_versions(),
    }
