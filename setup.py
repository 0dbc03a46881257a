"""The one thing pyproject.toml cannot say: the C part is built on Linux only, and may be missing."""

import sys
from pathlib import Path

from setuptools import Extension, setup

ROWBLAS = Extension(
    "millpond.native._rowblas",
    sources=sorted(str(source) for source in Path("millpond/native").glob("*.c")),
    depends=[str(header) for header in Path("millpond/native").glob("*.h")],
    extra_compile_args=["-O3", "-fvisibility=hidden", "-Wall", "-Wextra"],
    libraries=["pthread"],
    # Without a compiler the package installs all the same; millpond.model.blas then says what is missing.
    optional=True,
)

setup(ext_modules=[ROWBLAS] if sys.platform == "linux" else [])
