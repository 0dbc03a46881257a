"""What was found out about a model on this machine, kept in the cache folder so that the next start need not find out.

A folder that cannot be read or written costs a repetition at each start, nothing else.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import msgspec

from kvarn import __version__
from kvarn.hub.cache import cache_root

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
    try:
        return msgspec.json.decode(_path(kind, about).read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None


def keep(found: msgspec.Struct, about: tuple[str, ...]) -> None:
    """Remember it for the next start."""
    path = _path(type(found), about)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(msgspec.json.encode(found))
        Path(file.name).replace(path)
    except OSError:
        return


def _path(kind: type[msgspec.Struct], about: tuple[str, ...]) -> Path:
    versions = [metadata.version(name) for name in ("mlx", "mlx-lm")]
    identity = "|".join([kind.__name__, *about, __version__, *versions, str(mx.default_device())])
    return cache_root() / "probes" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
