"""Configuration of a search as typed dataclasses (read and written by `config_io`).

Flat keys are those that people change often; the rest is grouped. The defaults are those of the paper and its
published code; `configs/imagenet.yaml` names the source of each.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tfnas.files import is_text

# OpenMP ends the process where it cannot start as many as it was told.
MAX_THREADS = 4096
MAX_COUNT = sys.maxsize  # of anything that is counted through


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, what was expected and what came."""


def check_bounds(bounds: Iterable[tuple[str, float | None, float, float]]) -> None:
    """Raise `ConfigError` at the first (key, value, smallest, largest allowed value) out of range; None is no value."""
    for key, value, low, high in bounds:
        if high == math.inf and isinstance(value, int):
            high = MAX_COUNT
        if value is not None and not (low <= value <= high):
            wanted = f"at least {low}" if high in (math.inf, MAX_COUNT) and value < low else f"between {low} and {high}"
            raise ConfigError(f"{key} must be {wanted}, got {value}")


def check_text(values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise `ConfigError` at the first value that is no text: it could be neither a file's name nor stored and read."""
    for key, value in values.items():
        if isinstance(value, dict):
            check_text(value, f"{prefix}{key}.")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str) and not is_text(item):
                raise ConfigError(f"{prefix}{key}: expected text, got {item!a}; rename it, or reach it by a link")


@dataclass
class DatasetConfig:
    """How images are found, chosen, split and augmented.

    Attributes:
        format: How to read a path: `folder` of class folders, `list` file, `idx`, `npz`; `auto` decides by what is
            there.
        test_source: Path of test images, where `data` does not bring its own.
        list_root: Folder that relative paths of a list file start from; null takes the list file's own.
        label_map: Text file for a list file's labels, one `label class name` a line.
        classes: Names of the classes to use, or how many, chosen by the seed; null takes all.
        held_out_fraction: Share of every class held out for the architecture parameters.
        evaluation_batch_size: Images a step of held-out data; null takes `batch_size`.
        crop: Training crop: `pad` (zero-pad, crop back), `resized` (random area and aspect) or `none`; `auto` pads
            arrays and resizes image files.
        padding: Pixels of `pad`.
        flip: Mirror half of the training images left to right.
        color_jitter: Brightness, contrast, saturation, hue; null takes 0.4, 0.4, 0.4, 0.2 for image files, none for
            arrays.
        mean: Per channel, of intensities in 0..1; null takes ImageNet's for image files, the measured one for arrays.
        std: As `mean`.
        resident: Decode image files once and keep them on the device.
        workers: Processes that decode image files; the images do not depend on it.
        skip_bad_images: Leave out image files that cannot be decoded, where the default is to stop and name the file.
        fake_images_per_class: Training images of each class of the data `fake`.
    """

    format: Literal["auto", "folder", "list", "idx", "npz"] = "auto"
    test_source: str | None = None
    list_root: str | None = None
    label_map: str | None = None
    classes: int | list[str] | None = None
    held_out_fraction: float = 0.2
    evaluation_batch_size: int | None = None
    crop: Literal["auto", "pad", "resized", "none"] = "auto"
    padding: int = 2
    flip: bool = True
    color_jitter: tuple[float, float, float, float] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    resident: bool = False
    workers: int = 0
    skip_bad_images: bool = False
    fake_images_per_class: int = 20


@dataclass
class WeightsConfig:
    """The supernet weights' SGD with a cosine schedule over epochs.

    Attributes:
        lr: Learning rate of the first epoch.
        final_lr: Learning rate the cosine ends at.
        momentum: SGD momentum.
        weight_decay: L2 penalty on the supernet's weights.
        max_norm: Gradient norm above which gradients are scaled down.
        restart_each_epoch: Forget the momentum at each epoch's start.
    """

    lr: float = 0.025
    final_lr: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 1e-5
    max_norm: float = 5.0
    restart_each_epoch: bool = True


@dataclass
class ArchitectureConfig:
    """The architecture parameters' Adam (alphas and betas, on held-out data).

    Attributes:
        lr: Learning rate.
        betas: Adam's decay rates of the first and second moment.
        weight_decay: L2 penalty on the log-probabilities.
        max_norm: Gradient norm above which gradients are scaled down.
        every_steps: Weight steps for each architecture step.
        restart_each_epoch: Forget Adam's moments at each epoch's start.
    """

    lr: float = 0.01
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = 5e-4
    max_norm: float = 5.0
    every_steps: int = 2
    restart_each_epoch: bool = True


@dataclass
class SamplingConfig:
    """Bi-sampling and its temperature.

    Attributes:
        second_path: What the second path takes among the operations the first left: `random`, `gumbel`, `min`, `max`
            (of alpha), or `none` for one path only (paper, Table 3).
        tau: Temperature of the Gumbel softmax through warm-up and at the first epoch after it.
        tau_schedule: `exponential` multiplies by `tau_decay` each epoch after warm-up; `linear` goes to `tau_final`.
        tau_decay: Factor of the exponential schedule.
        tau_final: Last epoch's temperature in the linear schedule.
    """

    second_path: Literal["random", "gumbel", "min", "max", "none"] = "random"
    tau: float = 5.0
    tau_schedule: Literal["exponential", "linear"] = "exponential"
    tau_decay: float = 0.96
    tau_final: float = 0.2


@dataclass
class ObjectiveConfig:
    """The latency term of Eq. 1, on the expected latency of the mixture.

    Attributes:
        name: `hinge` (Eq. 9), `absolute` (the published code's variant), `c1` or `c2` (paper, Table 5).
        latency_weight: The factor lambda before the latency term (lambda_1 in C1 and C2).
        exponent: lambda_2 of `c1`.
    """

    name: Literal["hinge", "absolute", "c1", "c2"] = "hinge"
    latency_weight: float = 0.1
    exponent: float = 1.0


@dataclass
class ProfileConfig:
    """How a latency table is measured where `lut` names none, and how the derived network is measured.

    Attributes:
        engine: What runs the network while measuring, which should be what will be deployed: `eager`, `compile`,
            `fused` (on a CPU) or `onnxruntime`.
        batch_size: Images a forward pass.
        threads: CPU threads.
        dtype: `float32`, `bfloat16` or `float16`.
        layout: Memory layout of the activations, `nchw` or `channels_last`.
        budget_s: Time to spend on measuring a table, in seconds.
    """

    engine: Literal["eager", "compile", "fused", "onnxruntime"] = "eager"
    batch_size: int = 32
    threads: int = 1
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    layout: Literal["nchw", "channels_last"] = "nchw"
    budget_s: float = 600.0


@dataclass
class CheckpointConfig:
    """When a run is checkpointed besides each epoch's end and Ctrl-C.

    Attributes:
        every_steps: Weight steps between two checkpoints within an epoch; null leaves it to `every_s`.
        every_s: Seconds between two checkpoints; null leaves it to `every_steps`.
    """

    every_steps: int | None = None
    every_s: float | None = 300.0


@dataclass
class LogConfig:
    """What is written down while searching.

    Attributes:
        every_steps: Weight steps between two lines of `metrics.jsonl`; losses are read back only then.
        held_out_every_epochs: Epochs between two measurements of the supernet's held-out accuracy; 0 for none.
        held_out_batches: Held-out batches of one such measurement; null takes all.
    """

    every_steps: int = 10
    held_out_every_epochs: int = 1
    held_out_batches: int | None = None


@dataclass
class SearchConfig:
    """A search from data and a target latency to a derived network.

    Attributes:
        space: Search space: a built-in name or a YAML file.
        data: Images: `quickstart` (a shipped part of Fashion-MNIST), `fashion-mnist`, `fake`, or a path
            (`dataset.format`).
        lut: Latency table (`.json`, `.csv`, or the published `.pkl`); null measures one on this machine first.
        lut_conditions: `require` refuses a `lut` measured on another device or otherwise than `profile` says, as far as
            the table tells; `ignore` takes it as it is.
        target_latency_ms: Latency that the derived network must meet, in ms; null takes the middle of the reachable
            range. Several (`10,12,15`) make one search each, which share the warm-up epochs.
        epochs: Epochs in all, warm-up included.
        warmup_epochs: First epochs, which train weights only.
        steps_per_epoch: Weight steps an epoch; null goes through the training images once.
        batch_size: Images a step, in each process.
        output: Folder of the run; null makes `runs/<config>-<date>-<time>`.
        resume: Go on where the run in `output` stopped; begins it where there is nothing yet.
        seed: Decides weights, sampling, data order and augmentation.
        engine: Supernet engine: `auto` (the fastest that runs here), `reference` (plain PyTorch), or another by name.
        precision: Type of the supernet's activations, `float32` or `bfloat16` (weights, statistics, sums and optimizers
            stay float32). bfloat16 is faster where the processor has dot products of it (`tfnas info`: avx512_bf16).
        device: `auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`.
        cuda_graphs: Capture each step once and replay it, where the CUDA engine runs; off runs kernel by kernel.
        threads: CPU threads; null takes PyTorch's choice. Bit-exact repetition needs the same number.
        tensorboard: Write the figures for TensorBoard, too, into the run's folder (extra `track`).
        derive: What follows when the most probable network cannot meet the target at any width: `repair` takes the
            most probable network that can, `paper` keeps the network and ends with exit code 3.
        tolerance: Relative distance to the target up to which it counts as met.
        elasticity_scaling: Refit the widths after each epoch past warm-up (Algorithm 1).
        num_classes: Classes of the derived network; null takes the data's.
        resolution: Height and width of the images; null takes the space's.
        image_channels: Channels of the images; null takes the space's.
        dataset: How images are chosen, split and augmented.
        weights: Optimizer of the supernet's weights.
        architecture: Optimizer of alphas and betas.
        sampling: Bi-sampling and its temperature.
        objective: The latency term.
        profile: Measuring latencies.
        checkpoint: When to checkpoint.
        log: What is written down.
    """

    space: str = "imagenet"
    data: str = "fake"
    lut: str | None = None
    lut_conditions: Literal["require", "ignore"] = "require"
    target_latency_ms: float | list[float] | None = None
    epochs: int = 90
    warmup_epochs: int = 10
    steps_per_epoch: int | None = None
    batch_size: int = 32
    output: str | None = None
    resume: bool = False
    seed: int = 0
    engine: str = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    cuda_graphs: bool = True
    threads: int | None = None
    tensorboard: bool = False
    derive: Literal["repair", "paper"] = "repair"
    tolerance: float = 0.01
    elasticity_scaling: bool = True
    num_classes: int | None = None
    resolution: int | None = None
    image_channels: int | None = None
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check_text(asdict(self))
        check_bounds(_bounds(self))
        if self.warmup_epochs > self.epochs:
            raise ConfigError(f"warmup_epochs ({self.warmup_epochs}) must not exceed epochs ({self.epochs})")
        targets = self.target_latency_ms
        for target in targets if isinstance(targets, list) else [] if targets is None else [targets]:
            if not 0 < target < math.inf:
                raise ConfigError(f"target_latency_ms must be a positive number of milliseconds, got {target}")
        if isinstance(targets, list) and (not targets or len(set(targets)) != len(targets)):
            raise ConfigError(f"target_latency_ms must be one number or several different ones, got {targets}")


def _bounds(config: SearchConfig) -> Iterator[tuple[str, float | None, float, float]]:
    """Every numeric key with its smallest and largest allowed value."""
    # beyond the largest float32 there is an error instead of a step
    tiny, huge, inf = 1e-30, 1e30, math.inf
    yield "epochs", config.epochs, 1, inf
    yield "warmup_epochs", config.warmup_epochs, 0, inf
    yield "steps_per_epoch", config.steps_per_epoch, 1, inf
    yield "batch_size", config.batch_size, 1, inf
    yield "seed", config.seed, 0, 2**63 - 1
    yield "threads", config.threads, 1, MAX_THREADS
    yield "tolerance", config.tolerance, tiny, 0.99
    yield "num_classes", config.num_classes, 2, inf
    yield "resolution", config.resolution, 1, inf
    yield "image_channels", config.image_channels, 1, inf
    yield "dataset.evaluation_batch_size", config.dataset.evaluation_batch_size, 1, inf
    yield "dataset.padding", config.dataset.padding, 0, 4096
    yield "dataset.fake_images_per_class", config.dataset.fake_images_per_class, 2, inf
    yield "dataset.held_out_fraction", config.dataset.held_out_fraction, 0.01, 0.99
    yield "dataset.workers", config.dataset.workers, 0, 4096
    yield "weights.lr", config.weights.lr, 0, huge
    yield "weights.final_lr", config.weights.final_lr, 0, huge
    yield "weights.momentum", config.weights.momentum, 0, 1
    yield "weights.weight_decay", config.weights.weight_decay, 0, huge
    yield "weights.max_norm", config.weights.max_norm, tiny, inf
    yield "architecture.lr", config.architecture.lr, 0, huge
    yield "architecture.betas[0]", config.architecture.betas[0], 0, 1 - 1e-9
    yield "architecture.betas[1]", config.architecture.betas[1], 0, 1 - 1e-9
    yield "architecture.weight_decay", config.architecture.weight_decay, 0, huge
    yield "architecture.max_norm", config.architecture.max_norm, tiny, inf
    yield "architecture.every_steps", config.architecture.every_steps, 1, inf
    yield "sampling.tau", config.sampling.tau, tiny, huge
    yield "sampling.tau_decay", config.sampling.tau_decay, tiny, 1
    yield "sampling.tau_final", config.sampling.tau_final, tiny, huge
    yield "objective.latency_weight", config.objective.latency_weight, 0, huge
    yield "objective.exponent", config.objective.exponent, -huge, huge
    yield "profile.batch_size", config.profile.batch_size, 1, inf
    yield "profile.budget_s", config.profile.budget_s, tiny, inf
    yield "profile.threads", config.profile.threads, 1, MAX_THREADS
    yield "checkpoint.every_steps", config.checkpoint.every_steps, 1, inf
    yield "checkpoint.every_s", config.checkpoint.every_s, 0, inf
    yield "log.every_steps", config.log.every_steps, 1, inf
    yield "log.held_out_every_epochs", config.log.held_out_every_epochs, 0, inf
    yield "log.held_out_batches", config.log.held_out_batches, 1, inf
