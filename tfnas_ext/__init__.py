"""Kernels for TF-NAS search: fused inverted residual blocks, the supernet engine, path sampling, timers.

Everything runs without the compiled module too, on the `reference` backend; `backend_report()` says what runs here.
"""

import tfnas_ext.operators  # noqa: F401 (registers them with torch)
from tfnas_ext.backends import Backend, BackendUnavailableError, BuildInfo, backend_report, build_info, choose_backend
from tfnas_ext.version import __version__

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "BuildInfo",
    "__version__",
    "backend_report",
    "build_info",
    "choose_backend",
]
