"""Every test of this folder has a Kvarn cache of its own, except those that ask for a real model."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that Kvarn uses during the test."""
    root = tmp_path / "cache"
    monkeypatch.setenv("KVARN_CACHE", str(root))
    return root
