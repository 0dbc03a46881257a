"""Content decides the fingerprint; unchanged files are not read twice."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from millpond.hub.fingerprint import file_digest, folder_fingerprint
from millpond.hub.progress import SilentProgress

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.safetensors").write_bytes(b"weights")
    return model


def fingerprint(folder: Path) -> str:
    return folder_fingerprint(folder, SilentProgress())


def test_a_copy_has_the_same_fingerprint(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(folder) == fingerprint(copy)
    assert len(fingerprint(folder)) == 64


def test_it_is_the_one_under_which_prefixes_were_kept(folder: Path) -> None:
    """Of a folder with nothing beside its weights: sha256 over the name and digest of each file."""
    (folder / "model-2.safetensors").write_bytes(b"more")
    parts = [
        f"{name}\0{hashlib.sha256((folder / name).read_bytes()).hexdigest()}\0"
        for name in ("config.json", "model-2.safetensors", "model.safetensors")
    ]
    assert fingerprint(folder) == hashlib.sha256("".join(parts).encode()).hexdigest()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_weights_and_config_both_count(folder: Path, name: str) -> None:
    before = fingerprint(folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + b"!")
    assert fingerprint(folder) != before


def test_the_tokenizer_does_not_count(folder: Path) -> None:
    before = fingerprint(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert fingerprint(folder) == before


def test_an_unchanged_file_is_not_read_again(folder: Path) -> None:
    weights = folder / "model.safetensors"
    first, stat = file_digest(weights, SilentProgress()), weights.stat()
    weights.write_bytes(b"WEIGHTS")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_digest(weights, SilentProgress()) == first, "same path, size, time and inode: remembered"
    weights.write_bytes(b"others!")
    assert file_digest(weights, SilentProgress()) == hashlib.sha256(b"others!").hexdigest()


def test_a_damaged_memo_is_written_anew(folder: Path, cache: Path) -> None:
    before = fingerprint(folder)
    (cache / "digests.json").write_text("{ damaged")
    assert fingerprint(folder) == before


def test_hub_blobs_carry_their_digest(folder: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(b"weights").hexdigest()
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    shutil.move(folder / "model.safetensors", blobs / digest)
    before = fingerprint_of_plain_copy(folder, blobs / digest, tmp_path)
    (folder / "model.safetensors").symlink_to(blobs / digest)
    (blobs / digest).write_bytes(b"never read")
    assert fingerprint(folder) == before


def fingerprint_of_plain_copy(folder: Path, weights: Path, tmp_path: Path) -> str:
    plain = shutil.copytree(folder, tmp_path / "plain")
    shutil.copy(weights, plain / "model.safetensors")
    return fingerprint(plain)
