"""A run's figures for TensorBoard, in the folder `tensorboard` of the run (`tensorboard: true`; extra `track`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import yaml

from tfnas.callbacks import Callback, Record, scalars
from tfnas.config import ConfigError

TENSORBOARD_FOLDER = "tensorboard"


class TensorBoard(Callback):
    """Writes every number of step, epoch and end records as a scalar, under the records' names (`epoch/loss`).

    A resumed run goes on in the same folder; what an interrupted one wrote beyond its checkpoint is hidden.
    Raises `ConfigError` where TensorBoard is not installed.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError("tensorboard: it is not installed; pip install 'tfnas-ext[track]', or leave it off")
        self._config: dict[str, Any] = {}
        self._writer: Any = None
        self._step = 0

    def on_config(self, config: dict[str, Any]) -> None:
        self._config = config

    def on_start(self, record: Record) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._step = record["step"]
        folder = Path(self._config["output"]) / TENSORBOARD_FOLDER
        self._writer = SummaryWriter(str(folder), purge_step=self._step + 1 if self._step else None)
        if not self._step:
            self._writer.add_text("configuration", f"```\n{yaml.safe_dump(self._config, sort_keys=False)}```", 0)

    def on_step(self, record: Record) -> None:
        self._add(record)

    def on_epoch(self, record: Record) -> None:
        self._add(record)
        self._writer.flush()

    def on_end(self, record: Record) -> None:
        self._add(record)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _add(self, record: Record) -> None:
        self._step = record.get("step", self._step)
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, self._step)
