"""PEP 517 build backend: setuptools, compiling against the torch of the environment that pip installs into.

pip builds in an isolated environment that hides the target's packages. A native module fits one torch only, so the
target's folders are appended to `sys.path` (appended: the build environment's own setuptools and ninja come first)
and its torch is used; only where there is none does pip fetch one for the build.
"""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from importlib import metadata
from typing import Any

import _toolchain
from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# The upper bound keeps pip from building against a newer torch than the one it then installs.
TORCH_RANGE = "torch>=2.10,<2.15"


def target_folders() -> list[str]:
    """The site-packages folders of the environment that is installed into, in its own order."""
    paths = sysconfig.get_paths()
    folders = [paths["purelib"], paths["platlib"], *site.getsitepackages()]
    if site.ENABLE_USER_SITE is not False or os.environ.get("PIP_USER"):
        folders.append(site.getusersitepackages())
    return [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]


def find_torch(folders: list[str] | None = None) -> str | None:
    """Version of the first torch in `folders` (default: those of the target), without importing it."""
    for folder in target_folders() if folders is None else folders:
        for distribution in metadata.distributions(name="torch", path=[folder]):
            return distribution.version
    return None


def torch_requirement(version: str | None) -> str:
    """What the package depends on. The torch that is there stays, whatever newer one the other packages would bring."""
    return f"torch=={version}" if version else TORCH_RANGE.split(",")[0]


def _required_torch() -> list[str]:
    if find_torch(sys.path) or find_torch() or _toolchain.native_problem():
        return []
    return [os.environ.get("TFNAS_TORCH", TORCH_RANGE)]


def _show_target() -> None:
    sys.path.extend(folder for folder in target_folders() if folder not in sys.path)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _required_torch()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _required_torch()


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    _show_target()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Any = None) -> str:
    _show_target()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    _show_target()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    _show_target()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
