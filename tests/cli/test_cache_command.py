"""``millpond cache`` on real folders, also beside a running tier."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from ssd_support import NAMESPACE, OTHER, SetClock, chain, file_of, record_files, running

from millpond.cli.cache import default_folder, duration, size
from millpond.cli.main import main
from millpond.prefix.disk.block_file import file_bytes
from millpond.prefix.disk.index import DiskIndex

SIZE = file_bytes(chain(1)[0], NAMESPACE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four records of a model, two of another."""
    with running(tmp_path / "cache") as tier:
        tier.save(*chain(4))
    with running(tmp_path / "cache", namespace=OTHER) as tier:
        tier.save(*chain(2, namespace=OTHER))
    return tmp_path / "cache"


def cache(folder: Path, *arguments: str) -> int:
    return main(["cache", *arguments, "--cache-dir", str(folder)])


def left(folder: Path) -> set[str]:
    return {path.name for path in record_files(folder)}


def test_ls_shows_each_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache(folder, "ls") == 0
    header, first, second, total = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["MODEL", "NAMESPACE", "RECORDS", "SIZE"]
    assert first.split()[:4] == ["a", "model", OTHER[:12], "2"]
    assert second.split()[:4] == ["a", "model", NAMESPACE[:12], "4"]
    assert total.startswith("6 records")


def test_ls_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache(tmp_path, "ls") == 0
    assert list(tmp_path.iterdir()) == []
    assert cache(tmp_path / "absent", "verify") == 0
    assert not (tmp_path / "absent").exists()
    assert "no cache" in capsys.readouterr().out


def test_a_folder_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cache(tmp_path / "file", "ls") == 1
    assert cache(tmp_path / "file" / "below", "verify") == 1
    for variable in ("MILLPOND_CACHE_DIR", "MILLPOND_CACHE"):
        monkeypatch.setenv(variable, "~nobody-of-this-name/cache")
        assert main(["cache", "ls"]) == 1
        monkeypatch.delenv(variable)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert ["no folder" in lines[0], "Not a directory" in lines[1]] == [True, True]
    assert all("no such user" in line and "FOLDER names another folder" in line for line in lines[2:])


def test_verify_of_a_sound_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache(folder, "verify") == 0
    assert capsys.readouterr().out == "6 records are sound\n"


def test_verify_sets_damaged_files_aside(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heads = chain(4)
    damaged = file_of(folder, heads[2])
    content = bytearray(damaged.read_bytes())
    content[-100] ^= 1
    damaged.write_bytes(content)
    file_of(folder, chain(2, namespace=OTHER)[1], OTHER).unlink()
    leftover = damaged.with_name(f"{damaged.name}.999999999.1.tmp")
    leftover.write_bytes(b"half")
    assert cache(folder, "verify") == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "3 records are sound"
    assert out[1].startswith("1 damaged (checksum)")
    assert out[2].startswith("3 removed from the index")
    assert out[3] == "1 leftover temporary files removed"
    assert len(left(folder)) == 3
    assert len(list((folder / "quarantine").iterdir())) == 1
    assert cache(folder, "verify") == 0


def test_verify_makes_a_broken_index_anew(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "index.sqlite").write_bytes(b"broken" * 1000)
    assert cache(folder, "verify") == 0
    assert capsys.readouterr().out.splitlines() == ["6 records are sound", "6 files taken into the index"]


def test_prune_to_a_size(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = left(folder)
    assert cache(folder, "prune", "--max-size", str(3 * SIZE), "--dry-run") == 0
    assert left(folder) == before
    assert cache(folder, "prune", "--max-size", str(3 * SIZE)) == 0
    dry, real = capsys.readouterr().out.splitlines()
    assert dry.removeprefix("Would remove") == real.removeprefix("Removed")
    assert "3 records" in real
    kept = [*chain(1), *chain(2, namespace=OTHER)]
    assert left(folder) == {f"{record.key.hex()}.kv" for record in kept}


def test_prune_by_age(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = SetClock()
    with running(tmp_path, clock=old.clock()) as tier:
        tier.save(*chain(2))
    with running(tmp_path) as tier:
        tier.save(*chain(3, salt=1))
    assert cache(tmp_path, "prune", "--older-than", "2h", "--dry-run") == 0
    assert cache(tmp_path, "prune", "--older-than", "2h") == 0
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "Would remove 2 records",
        "Removed 2 records",
    ]
    assert len(left(tmp_path)) == 3


def test_prune_wants_a_limit(folder: Path) -> None:
    assert cache(folder, "prune") == 2


@pytest.mark.parametrize("model", ["a model", None, OTHER[:8]])
def test_clear(folder: Path, model: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--model", model] if model else []
    assert cache(folder, "clear", *chosen, "--dry-run") == 0
    assert len(left(folder)) == 6
    assert cache(folder, "clear", *chosen) == 0
    count = 2 if model == OTHER[:8] else 6
    assert [f"{count} records" in line for line in capsys.readouterr().out.splitlines()] == [True, True]
    assert len(left(folder)) == 6 - count
    assert (folder / OTHER[:16]).exists() is False


def test_clear_of_an_unknown_model_removes_nothing(folder: Path) -> None:
    assert cache(folder, "clear", "--model", "another") == 0
    assert len(left(folder)) == 6


def test_all_of_it_beside_a_running_server(folder: Path) -> None:
    heads = chain(4)
    with running(folder) as tier:
        tier.swept()
        assert cache(folder, "verify") == 0
        assert cache(folder, "prune", "--max-size", str(4 * SIZE)) == 0
        assert tier.load(heads[3]).problem == "the file is missing"
        assert tier.load(heads[0]).problem == ""
        assert cache(folder, "clear") == 0
        assert tier.load(heads[0]).problem == "the file is missing"
        assert set(tier.save(*heads).values()) == {""}
        assert tier.load(heads[3]).problem == ""
        assert tier.tier.stats.write_errors == 0


def test_a_locked_index_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millpond.prefix.disk.index.BUSY_SECONDS", 0.01)
    other = DiskIndex(folder / "index.sqlite")
    with other.transaction():
        assert cache(folder, "clear") == 1
    assert "locked" in capsys.readouterr().err
    other.close()


def test_sizes_and_durations() -> None:
    assert [size(text) for text in ("8GB", "512MiB", "1000")] == [8 * 10**9, 512 << 20, 1000]
    assert [duration(text) for text in ("30d", "12h", "1.5h", "10")] == [30 * 86400, 43200, 5400, 10]
    for text in ("", "8 apples", "d", "nan", "-5d"):
        with pytest.raises(argparse.ArgumentTypeError):
            duration(text)
    with pytest.raises(argparse.ArgumentTypeError):
        size("8 apples")


def test_where_the_cache_is() -> None:
    assert default_folder({"MILLPOND_CACHE_DIR": "/a/b", "MILLPOND_CACHE": "/c"}) == Path("/a/b")
    assert default_folder({"MILLPOND_CACHE": "/c"}) == Path("/c/prefix")
