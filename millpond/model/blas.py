"""The matrix library of a Linux machine without a GPU: must be in place before mlx is imported.

MLX for Linux CPUs is built against a reference BLAS that is tens of times slower than the machine. Symbols loaded
globally first win, so OpenBLAS under the names MLX looks for, with our own products of a few rows in front of it
(native/rowblas.c), takes its place without touching MLX.

Called once, on the engine's main thread, before anything else. On other machines it does nothing.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib
import importlib.util
import os
import platform
import sys
from pathlib import Path

import msgspec

from millpond.hub.cache import keep, recalled
from millpond.memory.cgroups import ControlGroups
from millpond.native.library import INSTRUCTIONS, instructions, needed, shim_path

SPIN_US = 50
"""How long a worker thread stays awake after a product: long enough for the next one of a layer, and no longer, as the
front end may want the core."""

KERNELS = "MILLPOND_KERNELS"
"""Environment variable: the best instructions of the CPU that may be used; those that it has, unless it is set."""

HOW_TO_INSTALL = (
    "install Millpond with the extra that brings it: pip install 'millpond[cpu]', or with [cuda12] or [cuda13] for an "
    "NVIDIA GPU"
    if sys.platform == "linux"
    else "install Millpond again, which brings it"
)

MEASURED = "rowblas.json"
"""Name of the measurements in the cache."""
MEASURED_ROWS = (1, 2, 4, 8, 16, 32)
MEASURED_SHAPE = (1536, 1024)
"""Weights of the measurement, 6 MiB: too large for a core's own cache."""
MEASURED_TRIES = 5
MEASURED_ROUNDS = 3
MARGIN = 1.1
"""Our own product may be this much slower: its results do not depend on the number of rows, OpenBLAS's do."""


class OpenBlas(msgspec.Struct, frozen=True):
    """A loaded OpenBLAS, and what its functions' names begin with."""

    library: ctypes.CDLL
    prefix: str
    origin: str

    def address(self, name: str) -> ctypes.c_void_p:
        return ctypes.cast(getattr(self.library, self.prefix + name), ctypes.c_void_p)

    @property
    def version(self) -> str:
        config = getattr(self.library, f"{self.prefix}openblas_get_config")
        config.restype = ctypes.c_char_p
        return " ".join((config() or b"OpenBLAS").decode().split()[:2]).lower()

    def use_threads(self, count: int) -> None:
        getattr(self.library, f"{self.prefix}openblas_set_num_threads")(ctypes.c_int(count))


@functools.cache
def prepare() -> str:
    """Put a fast BLAS where mlx will find it, import mlx, and say in one line which BLAS; empty where MLX needs none.

    Raises RuntimeError when mlx is already imported, because it is then too late, and when it cannot be.
    """
    library = _library() if needed() else ""
    try:
        importlib.import_module("mlx.core")
    except ImportError as error:
        raise RuntimeError(f"mlx cannot be imported ({error}); {HOW_TO_INSTALL}") from error
    return library


def _library() -> str:
    if "mlx.core" in sys.modules:
        raise RuntimeError("millpond.model.blas.prepare() must be called before mlx is imported")
    openblas = find_openblas()
    if openblas is None:
        return "MLX's reference BLAS (slow): install millpond[cpu] for a fast one"
    threads = thread_count()
    shim = load_shim(openblas, threads)
    if shim is None:
        if openblas.prefix:
            return (
                "MLX's reference BLAS (slow): millpond's C part is not built; install a C compiler, then millpond again"
            )
        openblas.use_threads(threads)
        ctypes.CDLL(openblas.library._name, mode=ctypes.RTLD_GLOBAL)
        return f"{openblas.origin} {openblas.version}, {threads} threads"
    # The shim's own pool cuts large products up.
    openblas.use_threads(1)
    limit = row_limit(shim, f"{openblas.version} {threads} {platform.processor() or platform.machine()}")
    for rows in range(1, limit + 1):
        shim.millpond_rowblas_take(rows, 1)
    own = f"own products ({instructions(shim)}; of float32 up to {limit} rows)"
    return f"{openblas.origin} {openblas.version} + {own}, {threads} threads"


def find_openblas() -> OpenBlas | None:
    """The OpenBLAS of the scipy-openblas32 package, else the system's, else None."""
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is not None and spec.origin is not None:
        for file in sorted(Path(spec.origin).parent.glob("lib/libscipy_openblas*.so")):
            return OpenBlas(ctypes.CDLL(str(file)), "scipy_", "bundled")
    name = ctypes.util.find_library("openblas")
    if name is None:
        return None
    try:
        library = ctypes.CDLL(name)
    except OSError:
        # A broken system library is no reason not to run.
        return None
    return OpenBlas(library, "", "system") if hasattr(library, "cblas_sgemm") else None


def load_shim(openblas: OpenBlas, threads: int) -> ctypes.CDLL | None:
    """Load rowblas.c for every library loaded later, passing on to ``openblas``. None when it was not built."""
    path = shim_path()
    if not path.is_file():
        return None
    shim = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    shim.millpond_rowblas_measure.restype = ctypes.c_long
    shim.millpond_rowblas_own_calls.restype = ctypes.c_uint64
    shim.millpond_rowblas_passed_calls.restype = ctypes.c_uint64
    gemms = [openblas.address(f"cblas_{kind}gemm") for kind in "sdc"]
    shim.millpond_rowblas_init(*gemms, ctypes.c_int(threads), ctypes.c_long(SPIN_US), ctypes.c_int(_most()))
    return shim


def _most() -> int:
    """The best instructions that may be used, by their place in INSTRUCTIONS. Raises RuntimeError."""
    given = os.environ.get(KERNELS) or INSTRUCTIONS[-1]
    if given not in INSTRUCTIONS:
        raise RuntimeError(f"{KERNELS}: {given!r} is not known; allowed: {', '.join(INSTRUCTIONS)}")
    return INSTRUCTIONS.index(given)


def thread_count() -> int:
    """Physical cores this process may use, no more than its control groups allow; OPENBLAS_NUM_THREADS overrides it."""
    given = os.environ.get("OPENBLAS_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    cores = {_core_of(cpu) for cpu in os.sched_getaffinity(0)}
    share = ControlGroups.own().cpu_limit()
    return max(1, len(cores) if share is None else min(len(cores), int(share)))


def _core_of(cpu: int) -> str:
    """Hardware threads of one core have the same list of siblings."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


# --- own products or OpenBLAS -----------------------------------------------------------------------------------


class Measured(msgspec.Struct):
    """Row limits found so far, by machine. Kept, because the choice decides the last bits of every logit: without it
    two starts of the same server could answer differently."""

    limits: dict[str, int] = {}


_measured_decoder = msgspec.json.Decoder(Measured)


def row_limit(shim: ctypes.CDLL, machine: str) -> int:
    """Most rows for which our own products are about as fast as OpenBLAS's, or faster; 0 when they never are."""
    try:
        measured = _measured_decoder.decode(recalled(MEASURED) or b"{}")
    except msgspec.MsgspecError:
        # Damaged: measure again.
        measured = Measured()
    key = f"{machine} {instructions(shim)} v{KERNELS_VERSION}"
    if key not in measured.limits:
        measured.limits[key] = measure_row_limit(shim)
        keep(MEASURED, msgspec.json.encode(measured))
    return measured.limits[key]


KERNELS_VERSION = 3
"""Raise it when rowblas.c changes speed."""


def measure_row_limit(shim: ctypes.CDLL) -> int:
    """Time both at growing row counts, again where it fails in case something else ran: some tens of milliseconds."""
    limit = 0
    for rows in MEASURED_ROWS:
        if not any(_own_is_good(shim, rows) for _ in range(MEASURED_ROUNDS)):
            break
        limit = rows
    return limit


def _own_is_good(shim: ctypes.CDLL, rows: int) -> bool:
    own, passed = (shim.millpond_rowblas_measure(rows, *MEASURED_SHAPE, yes, MEASURED_TRIES) for yes in (1, 0))
    return bool(own >= 0 and passed >= 0 and own <= passed * MARGIN)
