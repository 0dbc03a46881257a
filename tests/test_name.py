"""The project has one name; the one it had before means something else in this field."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORMER = re.compile(rb"kv[a]rn|kv[r]n|4b56[5]24e", re.IGNORECASE)
"""In every spelling that it had: of the package, of file magics, of the index's header. Does not find itself."""
BUILT = re.compile(r"(\.(git|venv|hypothesis|\w+_cache|mutants\.json)|.*\.(egg-info|so|pyc)|__pycache__|build|dist)$")


def ours(folder: Path) -> list[Path]:
    """All files below a folder but what was built, installed or cached there."""
    inside = sorted(path for path in folder.iterdir() if not BUILT.match(path.name))
    return [file for path in inside for file in (ours(path) if path.is_dir() else [path])]


def test_the_former_name_is_nowhere() -> None:
    files = ours(ROOT)
    assert {ROOT / "pyproject.toml", Path(__file__).resolve()} <= set(files)
    named = [str(path) for path in files if FORMER.search(str(path.relative_to(ROOT)).encode())]
    inside = [str(path) for path in files if FORMER.search(path.read_bytes())]
    assert named + inside == []
