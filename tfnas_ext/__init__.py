"""Kernels for TF-NAS search: fused inverted residual blocks, the supernet engine, path sampling, timers.

`accelerate(model)` runs the blocks of other people's networks on them.

Everything runs without the compiled module too, on the `reference` backend; `backend_report()` says what runs here.
"""

import tfnas_ext.operators  # noqa: F401 (registers them with torch)
from tfnas_ext.adapters import BlockParts, NotAccelerated, SqueezeExciteParts, register_block
from tfnas_ext.backends import Backend, BackendUnavailableError, BuildInfo, backend_report, build_info, choose_backend
from tfnas_ext.drop_in import AccelerateError, accelerate, restore
from tfnas_ext.drop_in_report import LeftBlock, ReplacedBlock, Report
from tfnas_ext.version import __version__

__all__ = [
    "AccelerateError",
    "Backend",
    "BackendUnavailableError",
    "BlockParts",
    "BuildInfo",
    "LeftBlock",
    "NotAccelerated",
    "ReplacedBlock",
    "Report",
    "SqueezeExciteParts",
    "__version__",
    "accelerate",
    "backend_report",
    "build_info",
    "choose_backend",
    "register_block",
    "restore",
]
