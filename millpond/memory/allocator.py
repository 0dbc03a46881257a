"""What becomes of the memory that arrays leave, where they come from the C library's allocator (MLX on a CPU)."""

from __future__ import annotations

import ctypes
import platform

KEPT_BYTES = 512 * 1024 * 1024
"""Freed memory that stays with the process for the next array."""
LARGEST_KEPT = 32 * 1024 * 1024
"""Larger arrays go back to the system when they are freed; the C library allows no more."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h


AHEAD_BYTES = 256 * 1024 * 1024
"""Most memory that is taken from the system before anybody needs it."""
PIECE_BYTES = 8 * 1024 * 1024


def keep_freed_memory() -> None:
    """Let glibc reuse freed arrays instead of returning each to the kernel, which hands out empty pages one by one.

    MLX on a CPU takes every array from malloc and frees it after the step. Call it before MLX is imported; does nothing
    where there is no glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        for option, value in (
            (M_MMAP_THRESHOLD, LARGEST_KEPT),
            (M_TRIM_THRESHOLD, KEPT_BYTES),
            (M_ARENA_MAX, 1),  # one heap, or what one thread freed would not serve another
        ):
            library.mallopt(option, value)


def take_ahead(nbytes: int) -> None:
    """Have the system hand out up to so many bytes now, instead of page by page when a request waits for them.

    Only where freed memory is kept (see above): it is freed at once, and the next arrays are made of it. Releases the
    GIL.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    pieces = [library.malloc(ctypes.c_size_t(PIECE_BYTES)) for _ in range(min(nbytes, AHEAD_BYTES) // PIECE_BYTES)]
    for piece in filter(None, pieces):
        ctypes.memset(piece, 0, PIECE_BYTES)
    for piece in filter(None, pieces):
        library.free(ctypes.c_void_p(piece))
