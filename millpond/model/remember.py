"""What was found out about a model on this machine, kept in the cache folder so that the next start need not find out.

A folder that cannot be read or written costs a repetition at each start, nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib import metadata
from typing import TypeVar

import mlx.core as mx
import msgspec

from millpond import __version__
from millpond.hub import cache
from millpond.native.library import build

Finding = TypeVar("Finding", bound=msgspec.Struct)


def remembered(
    kind: type[Finding], about: tuple[str, ...], find: Callable[[], Finding], worth: Callable[[Finding], bool]
) -> Finding:
    """What these versions found ``about`` something before, else what ``find`` finds, kept if it is ``worth`` it."""
    found = recall(kind, about)
    if found is None:
        found = find()
        if worth(found):
            keep(found, about)
    return found


def recall(kind: type[Finding], about: tuple[str, ...]) -> Finding | None:
    """What these versions found ``about`` something before; None when nothing, or it cannot be read."""
    kept = cache.recalled(_name(kind, about))
    try:
        return None if kept is None else msgspec.json.decode(kept, type=kind)
    except msgspec.MsgspecError:
        return None


def keep(found: msgspec.Struct, about: tuple[str, ...]) -> None:
    """Remember it for the next start."""
    cache.keep(_name(type(found), about), msgspec.json.encode(found))


def _name(kind: type[msgspec.Struct], about: tuple[str, ...]) -> str:
    versions = [metadata.version(name) for name in ("mlx", "mlx-lm")]
    identity = "|".join(
        [kind.__name__, *kind.__struct_fields__, *about, __version__, *versions, str(mx.default_device()), build()]
    )
    return f"probes/{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
