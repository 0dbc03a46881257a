"""The C part, and whether this process uses it. Imports no mlx; ``millpond.model.blas`` loads it before mlx does."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import sys
import sysconfig
from hashlib import sha256
from pathlib import Path

INSTRUCTIONS = ("portable", "avx2", "avx512", "avx512-vnni")
"""Sets of a CPU's instructions that it is compiled for, the best one last; enum instructions of kernels.h."""
GPU_PACKAGES = ("mlx-cuda", "mlx-cuda-12", "mlx-cuda-13")


def needed() -> bool:
    """Whether this MLX computes on a Linux CPU."""
    if sys.platform != "linux":
        return False
    for package in GPU_PACKAGES:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return False
    return True


def shim_path() -> Path:
    """Where the compiled C files lie when they were built."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX") or ".so"
    return Path(__file__).parent / f"_rowblas{suffix}"


def instructions(shim: ctypes.CDLL) -> str:
    """Those that it uses."""
    return INSTRUCTIONS[shim.millpond_rowblas_instructions()]


@functools.cache
def build() -> str:
    """What tells this C part, as this process uses it, from others; empty where it does not."""
    shim = prepared()
    return "" if shim is None else f"{sha256(shim_path().read_bytes()).hexdigest()} {instructions(shim)}"


@functools.cache
def prepared() -> ctypes.CDLL | None:
    """Our library, if ``blas.prepare`` has put it in MLX's way. Ask after mlx has been imported."""
    path = shim_path()
    if not needed() or not path.is_file():
        return None
    shim = ctypes.CDLL(str(path))
    return shim if shim.millpond_rowblas_ready() else None
