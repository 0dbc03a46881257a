"""The C part with fewer of the CPU's instructions than it has: everything passes, slower (R4)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_python import run_python

from millpond.native.library import INSTRUCTIONS, instructions, prepared

shim = prepared()
if shim is None:
    pytest.skip("only where MLX computes on a Linux CPU and the C part is built", allow_module_level=True)

TESTS = Path(__file__).parents[1]
BEST = INSTRUCTIONS.index(instructions(shim))
FEWER = INSTRUCTIONS[:BEST]
FEW = [
    "native/test_products.py",
    "native/test_decode_attention.py",
    "model/test_layers.py::test_a_row_alone_has_the_same_bits",
]
MANY = ["native", "model", "engine/test_loop.py", "engine/test_packed.py"]


@pytest.mark.parametrize("asked", INSTRUCTIONS)
def test_fewer_instructions(asked: str) -> None:
    """Those that the CPU does not have are not taken."""
    told = run_python("from millpond.model import blas\nprint(blas.prepare())", MILLPOND_KERNELS=asked).stdout
    assert f"own products ({INSTRUCTIONS[min(BEST, INSTRUCTIONS.index(asked))]};" in told


def test_instructions_that_nobody_knows() -> None:
    told = run_python("from millpond.model import blas\nblas.prepare()", MILLPOND_KERNELS="sse9").stderr
    assert "MILLPOND_KERNELS: 'sse9' is not known; allowed: portable, avx2, avx512, avx512-vnni" in told


def passes(kernels: str, *tests: str) -> None:
    environment = {**os.environ, "MILLPOND_KERNELS": kernels}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    told = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout[-4000:]


def test_products_and_layers_with_none() -> None:
    passes(INSTRUCTIONS[0], *(str(TESTS / name) for name in FEW))


@pytest.mark.slow
@pytest.mark.parametrize("kernels", FEWER)
def test_everything_with_fewer_instructions(kernels: str) -> None:
    passes(kernels, *(str(TESTS / name) for name in MANY), "--ignore", __file__)
