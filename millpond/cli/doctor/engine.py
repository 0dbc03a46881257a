"""mlx and what it computes with, looked at from a short process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from millpond.child import python
from millpond.cli.doctor.finding import Finding, fail, ok, shown, warn
from millpond.cli.doctor.packages import PIP

PROGRAM = """
import json
from millpond.model import blas
from millpond.native.library import instructions, needed, prepared, shim_path
found = {"needed": needed(), "built": shim_path().is_file()}
print(json.dumps(found), flush=True)
found["blas"] = blas.prepare()
import mlx.core as mx
from millpond.native import device
mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))
found["device"] = str(mx.default_device())
found["on_cpu"] = device.on_cpu()
shim = prepared()
if shim is not None:
    found["instructions"] = instructions(shim)
if (memory := device.memory()) is not None:
    found["memory"], found["free"] = memory.total, memory.free
found["name"] = device.name()
print(json.dumps(found))
"""
PROBE_SECONDS = 120
"""The first run may build and measure."""
COMPILER = "g++"
"""What mlx calls at run time on a Linux CPU."""
OPENBLAS = f"{PIP} scipy-openblas32; without a C part, see to that first"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Probe:
    """What was found out; ``error`` says why no more was."""

    error: str = ""
    needed: bool = False
    """Whether mlx computes on a Linux CPU, and so wants a fast BLAS and Millpond's C part."""
    built: bool = False
    device: str = ""
    name: str = ""
    """Of the GPU, as its maker calls it; empty on a CPU, or unknown."""
    on_cpu: bool = True
    blas: str = ""
    instructions: str = ""
    """Of the C part, when it is in use."""
    memory: int = 0
    """Bytes that a GPU's programs may use; 0 on a CPU, or unknown."""
    free: int | None = None
    """Of them, what nobody used before we did; None where that is not told."""


def probe() -> Probe:
    """Let mlx compute something."""
    command = python("-c", PROGRAM)
    error = ""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Probe(error=f"mlx did not finish a small product within {PROBE_SECONDS} s")
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        error = f"mlx does not work: {lines[-1]}"
    printed = result.stdout.strip().splitlines()
    return Probe(error=error, **json.loads(printed[-1])) if printed else Probe(error=error)


def findings(probed: Probe) -> Iterator[Finding]:
    """Device, C part, BLAS and compiler."""
    yield _device(probed)
    yield _native(probed)
    if probed.blas:
        slow = "slow" in probed.blas
        yield warn("BLAS", probed.blas, OPENBLAS) if slow else ok("BLAS", probed.blas)
    yield _compiler(probed)


def _device(probed: Probe) -> Finding:
    if probed.error:
        problem, told, remedy = probed.error.partition("; install ")
        if told:  # who cannot import mlx says what would bring it
            return fail("device", problem, f"install {remedy}")
        return fail(
            "device", probed.error, f"{PIP} --force-reinstall mlx mlx-lm, of the versions that Millpond asks for"
        )
    if probed.on_cpu and NVIDIA_DRIVER.exists():
        remedy = f"{PIP} 'mlx[cuda12]' or 'mlx[cuda13]', by the driver's version (nvidia-smi tells)"
        return warn("device", f"{probed.device}, although there is an NVIDIA GPU", remedy)
    if not probed.memory:
        return ok("device", probed.device)
    free = "" if probed.free is None else f", {shown(probed.free)} of them free"
    return ok("device", f"{probed.device}, {shown(probed.memory)} for programs on it{free}")


def _native(probed: Probe) -> Finding:
    if not probed.needed:
        return ok("C part", "not needed on this device")
    if not probed.built:
        remedy = f"install a C compiler, then, in Millpond's folder, {PIP} --force-reinstall --no-deps ."
        return warn("C part", "not built: answers come many times slower", remedy)
    if probed.error:
        return ok("C part", "built")
    if not probed.instructions:
        return warn("C part", "built, but not in use: there is no OpenBLAS", f"{PIP} scipy-openblas32")
    return ok("C part", f"built, uses {probed.instructions}")


def _compiler(probed: Probe) -> Finding:
    if path := shutil.which(COMPILER):
        return ok("compiler", path)
    if not probed.needed:
        return ok("compiler", f"no {COMPILER}, and none is needed on this device")
    text = f"no {COMPILER}: operations are not fused, which is slower"
    return warn("compiler", text, f"install it: apt install {COMPILER}, dnf install gcc-c++ or the like")
