"""The group of mlx.distributed: what its backend wants from the environment, and versions that have to agree."""

from __future__ import annotations

import os
import platform
import tempfile
import uuid
from importlib import metadata
from pathlib import Path

from millpond import __version__
from millpond.types import GroupSettings

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def versions() -> dict[str, str]:
    """Of everything that decides what is computed, by name."""
    return {"millpond": __version__, **{name: metadata.version(name) for name in ("mlx", "mlx-lm")}}


def machine() -> str:
    """Equal for processes on one machine, containers on it included."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return f"{platform.node()} {uuid.getnode():x}"


def set_environment(settings: GroupSettings) -> list[Path]:
    """Put in place what the backend looks for. Returns the files made for it, which nobody needs once it has been
    opened. Call it before mlx is imported."""
    os.environ.update(settings.environment)
    made = []
    for name, content in settings.files.items():
        with tempfile.NamedTemporaryFile("w", prefix="millpond-", suffix=".json", delete=False) as file:
            file.write(content)
        os.environ[name] = file.name
        made.append(Path(file.name))
    return made
