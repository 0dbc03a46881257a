"""From the name a user gives to a model folder on this machine."""

from __future__ import annotations

from pathlib import Path

import msgspec

from millpond.hub.cache import build_once
from millpond.hub.demo import WHEEL_MODELS, wheel_model
from millpond.hub.errors import SourceError
from millpond.hub.fingerprint import file_digest
from millpond.hub.progress import Progress
from millpond.hub.weights import weight_files
from millpond.paths import expanded

ALLOWED = "demo, gemma3-270m, an MLX folder (config.json and *.safetensors), a .gguf file, or a hub name (owner/model)"


class ResolvedModel(msgspec.Struct, frozen=True):
    """A model on this machine: the name clients see by default, and its MLX folder."""

    name: str
    path: Path


def resolve(name: str, progress: Progress) -> ResolvedModel:
    """Find, fetch or convert a model. Raises SourceError, which names what was given and what is allowed."""
    if name in WHEEL_MODELS:
        return ResolvedModel(name, wheel_model(WHEEL_MODELS[name], progress))
    try:
        name.encode()
        path = expanded(name)
    except UnicodeEncodeError:
        raise SourceError(f"model {name!r} is not UTF-8 text; allowed are {ALLOWED}") from None
    except ValueError as error:
        raise SourceError(f"model {name!r}: {error}; allowed are {ALLOWED}") from None
    try:
        resolved = _found(name, path, progress)
        str(resolved.path).encode()
        return resolved
    except UnicodeEncodeError:
        raise SourceError(f"model {name!r} is in a folder whose path is not UTF-8 text; rename it") from None
    except OSError as error:
        raise SourceError(f"model {name!r} cannot be read: {error.strerror or type(error).__name__}") from error


def _found(name: str, path: Path, progress: Progress) -> ResolvedModel:
    if path.is_dir():
        return _folder(name, path)
    if path.suffix == ".gguf":
        return _gguf(name, path, progress)
    if path.exists():
        raise SourceError(f"model {name!r} is a file; allowed are {ALLOWED}")
    if name.count("/") != 1:
        raise SourceError(f"model {name!r} does not exist; allowed are {ALLOWED}")
    # Imported only where needed: together these take as long as everything else before the engine is started.
    from millpond.hub.repository import snapshot

    return ResolvedModel(name, snapshot(name, progress))


def _folder(name: str, path: Path) -> ResolvedModel:
    if not (path / "config.json").is_file():
        raise SourceError(f"model {name!r} has no config.json; allowed are {ALLOWED}")
    try:
        weight_files(path)
    except SourceError as error:
        raise SourceError(f"model {name!r}: {error}; allowed are {ALLOWED}") from error
    # A link's own name is what it was given for: models/current stays "current" when it leads elsewhere one day.
    own, real = path.absolute().name, path.resolve()
    return ResolvedModel(real.name if own == ".." else own, real)


def _gguf(name: str, path: Path, progress: Progress) -> ResolvedModel:
    if not path.is_file():
        raise SourceError(f"model {name!r} does not exist; allowed are {ALLOWED}")
    from millpond.hub.gguf import FORMAT, convert_gguf

    key = f"{path.stem}-{file_digest(path, progress)[:12]}-{FORMAT}"
    return ResolvedModel(path.stem, build_once(key, lambda target: convert_gguf(path, target, progress), progress))
