"""Every test of this folder has a Millpond cache of its own, except those that ask for a real model."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that Millpond uses during the test."""
    root = tmp_path / "cache"
    monkeypatch.setenv("MILLPOND_CACHE", str(root))
    return root
