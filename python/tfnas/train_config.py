"""Configuration of a training as typed dataclasses; `TRAIN` reads and writes it (`config_io.ConfigKind`).

The defaults are the published recipe; `configs/training/imagenet.yaml` names the source of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Literal

from tfnas.config import MAX_THREADS, CheckpointConfig, ConfigError, DatasetConfig, check_bounds, check_text
from tfnas.config_io import CONFIG_FOLDER, ConfigKind


@dataclass
class OptimizerConfig:
    """SGD with a linear warm-up, then a cosine, both step by step.

    Attributes:
        lr: Learning rate that the warm-up ends at and the cosine begins with.
        final_lr: Learning rate the cosine ends at.
        warmup_epochs: Epochs, perhaps a part of one, of linear warm-up from zero.
        momentum: SGD momentum.
        nesterov: Nesterov's momentum.
        weight_decay: L2 penalty on all parameters.
        max_norm: Gradient norm above which gradients are scaled down.
    """

    lr: float = 0.2
    final_lr: float = 0.0
    warmup_epochs: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-5
    max_norm: float = 5.0


@dataclass
class RegularizationConfig:
    """What keeps the network from learning its images by heart.

    Attributes:
        label_smoothing: Share of the target that is spread over all classes.
        dropout: Rate before the classifier.
        drop_connect: Rate at which the last residual branch is left out; grows linearly with depth up to it.
    """

    label_smoothing: float = 0.1
    dropout: float = 0.2
    drop_connect: float = 0.2


@dataclass
class TrainLogConfig:
    """What is written down while training.

    Attributes:
        every_steps: Steps between two lines of `metrics.jsonl`; losses are read back only then.
        validate_every_epochs: Epochs between two measurements of the accuracy; the last epoch is always measured.
    """

    every_steps: int = 50
    validate_every_epochs: int = 1


@dataclass
class TrainConfig:
    """A training of one network from scratch.

    Attributes:
        architecture: Architecture file, or a built-in name (`tf-nas-a`).
        data: Images: `quickstart` (a shipped part of Fashion-MNIST), `fashion-mnist`, `fake`, or a path
            (`dataset.format`).
        epochs: Epochs in all, warm-up included.
        steps_per_epoch: Steps an epoch; null goes through the training images once.
        batch_size: Images of one forward and backward pass, in each process.
        accumulation_steps: Passes whose gradients make up one step.
        engine: `fused` runs the blocks on this package's CPU kernels, `eager` on PyTorch's; `auto` is `fused` where
            there are kernels for the device.
        precision: `float32`, or `bfloat16` for autocast (parameters and optimizer stay float32).
        validation: Images whose accuracy chooses `best`: `held_out` keeps `dataset.held_out_fraction` of the training
            images apart; `test` trains on all of them and chooses by the test images, whose accuracy is then
            optimistic; `none` trains on all of them, and the last epoch is the best.
        ema_decay: Decay of the exponential moving average of weights and statistics, which is then validated and
            saved instead of the weights themselves; smaller over the first updates. null for none.
        output: Folder of the training; null makes `runs/train-<architecture>-<date>-<time>`.
        resume: Go on where the training in `output` stopped; begins it where there is nothing yet.
        seed: Decides initial weights, data order, augmentation and dropout.
        device: `auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`.
        threads: CPU threads; null takes PyTorch's choice. Bit-exact repetition needs the same number.
        tensorboard: Write the figures for TensorBoard, too, into the run's folder (extra `track`).
        resolution: Height and width of the images; null takes the architecture's space's.
        dataset: How images are chosen, split and augmented.
        optimizer: SGD and its schedule.
        regularization: Label smoothing, dropout, drop-connect.
        checkpoint: When to checkpoint.
        log: What is written down.
    """

    architecture: str = "tf-nas-a"
    data: str = "fake"
    epochs: int = 250
    steps_per_epoch: int | None = None
    batch_size: int = 512
    accumulation_steps: int = 1
    engine: Literal["auto", "fused", "eager"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    validation: Literal["held_out", "test", "none"] = "test"
    ema_decay: float | None = None
    output: str | None = None
    resume: bool = False
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    tensorboard: bool = False
    resolution: int | None = None
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    regularization: RegularizationConfig = field(default_factory=RegularizationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: TrainLogConfig = field(default_factory=TrainLogConfig)

    def __post_init__(self) -> None:
        check_text(asdict(self))
        check_bounds(_bounds(self))
        if self.optimizer.nesterov and self.optimizer.momentum == 0:
            raise ConfigError("optimizer.nesterov needs optimizer.momentum above 0, got 0")


def _bounds(config: TrainConfig) -> Iterator[tuple[str, float | None, float, float]]:
    """Every numeric key with its smallest and largest allowed value."""
    tiny, huge, inf, below_one = 1e-30, 1e30, math.inf, 1 - 1e-9
    optimizer, regularization = config.optimizer, config.regularization
    yield "epochs", config.epochs, 1, inf
    yield "steps_per_epoch", config.steps_per_epoch, 1, inf
    yield "batch_size", config.batch_size, 1, inf
    yield "accumulation_steps", config.accumulation_steps, 1, inf
    yield "ema_decay", config.ema_decay, 0, below_one
    yield "seed", config.seed, 0, 2**63 - 1
    yield "threads", config.threads, 1, MAX_THREADS
    yield "resolution", config.resolution, 1, inf
    yield "dataset.held_out_fraction", config.dataset.held_out_fraction, 0.001, 0.99
    yield "optimizer.lr", optimizer.lr, 0, huge
    yield "optimizer.final_lr", optimizer.final_lr, 0, huge
    yield "optimizer.warmup_epochs", optimizer.warmup_epochs, 0, config.epochs
    yield "optimizer.momentum", optimizer.momentum, 0, 1
    yield "optimizer.weight_decay", optimizer.weight_decay, 0, huge
    yield "optimizer.max_norm", optimizer.max_norm, tiny, inf
    yield "regularization.label_smoothing", regularization.label_smoothing, 0, 1
    yield "regularization.dropout", regularization.dropout, 0, below_one
    yield "regularization.drop_connect", regularization.drop_connect, 0, below_one
    yield "checkpoint.every_steps", config.checkpoint.every_steps, 1, inf
    yield "checkpoint.every_s", config.checkpoint.every_s, 0, inf
    yield "log.every_steps", config.log.every_steps, 1, inf
    yield "log.validate_every_epochs", config.log.validate_every_epochs, 1, inf


TRAIN = ConfigKind(
    TrainConfig, "tfnas train", "Train a network of an architecture file from scratch.", CONFIG_FOLDER / "training"
)
