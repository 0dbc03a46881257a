"""The limit of open files, against what others make of it.

mlx-lm sets it to 2048 of at most 4096 when it is imported. Where an administrator allows more, that takes it away for
good, from this process and its children; where fewer are allowed, the import fails.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def limit_kept() -> Iterator[None]:
    """Whatever is imported inside may only raise the limit of open files, and only as far as it may be raised."""
    original = resource.setrlimit

    def raising(kind: int, limits: tuple[int, int], /) -> None:
        original(kind, _raised(limits[0]) if kind == resource.RLIMIT_NOFILE else limits)

    resource.setrlimit = raising
    try:
        yield
    finally:
        resource.setrlimit = original


def _raised(wanted: int) -> tuple[int, int]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY in (soft, wanted):
        return soft, hard
    return max(soft, wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)), hard
