"""Jobs in C that travel through MLX's graph as matrix products (carried.h): lazily, and in MLX's own thread."""

from __future__ import annotations

import ctypes
import functools

from millpond.native.library import prepared

PASSWORD_BYTES = 32
BEGIN_BYTES = PASSWORD_BYTES + 8
"""Of what ``begin`` gives."""
JOBS = ZEROS, ATTENTION, RECURRENCE, WEIGHTS, LAYERS, READING = range(6)
"""The table of carried.c."""


@functools.cache
def _password() -> bytes:
    library = prepared()
    assert library is not None
    library.millpond_carried_password.restype = ctypes.c_void_p
    return ctypes.string_at(library.millpond_carried_password(), PASSWORD_BYTES)


def begin(job: int) -> bytes:
    """What the left matrix of such a job begins with; its own description follows."""
    return _password() + bytes(ctypes.c_int64(job))
