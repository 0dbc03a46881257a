"""Every flag of the prefix cache changes what a real server does, on tiny models that answer within milliseconds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import tiny_models
from prefix_client import (
    MODEL,
    Answer,
    blocks_of,
    complete,
    explain,
    figures,
    records,
    settled,
    ssd,
    until_ssd,
    wait_until,
)

from millpond.config import ConfigError, ServeConfig, read_config
from millpond.hub.cache import prefix_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from conftest import Launch, Server

    StartTiny = Callable[..., AbstractContextManager[Server]]

RECORD = 64 * 1024
"""Bytes of a block of the tiny model, without what the file says about itself."""
PROMPT = 448
"""Tokens of a test prompt: seven blocks."""


# --- one schema --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("8GB", 8 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1.5 GiB", 3 * 2**29),
        ("8g", 8 * 10**9),
        ("123", 123),
        ("100kb", 100_000),
    ],
)
@pytest.mark.parametrize("name", ["cache_ram", "cache_ssd", "ssd_daily_writes", "ssd_min_free"])
def test_sizes_are_read(name: str, text: str, size: int) -> None:
    """(J1)"""
    assert getattr(read_config({name: text}, {}), name) == size
    assert getattr(read_config({}, {f"MILLPOND_{name.upper()}": text}), name) == size


@pytest.mark.parametrize("text", ["", "-1", "lots", "8 apples", "1e9", "0.5", "8bit", "1 B B", "nan", "2EB", "1001PB"])
@pytest.mark.parametrize("name", ["cache_ram", "cache_ssd", "ssd_daily_writes", "ssd_min_free"])
def test_bad_sizes_are_refused(name: str, text: str) -> None:
    """(J2) With the flag's name, the value, and what is allowed; also what no message to the engine could hold."""
    with pytest.raises(ConfigError) as refused:
        read_config({name: text}, {})
    message = str(refused.value)
    assert message.startswith(f"--{name.replace('_', '-')}: ")
    assert repr(text) in message
    assert "such as 8GB" in message or "less than or equal to 1000000000000000000" in message


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("90", 90), ("90s", 90), ("1.5m", 90), ("12h", 43_200), ("30d", 2_592_000)]
)
def test_durations_are_read(text: str, seconds: float) -> None:
    """(J1)"""
    assert read_config({"ssd_ttl": text}, {}).ssd_ttl == seconds


@pytest.mark.parametrize("text", ["", "d", "soon", "1y", "-1", "-1d", "nan", "inf", "1e400d"])
def test_bad_durations_are_refused(text: str) -> None:
    """(J2)"""
    with pytest.raises(ConfigError) as refused:
        read_config({"ssd_ttl": text}, {})
    assert str(refused.value).startswith("--ssd-ttl: must be ")
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("ssd_policy", "ALL", "'all', 'second-use', 'evicted' or 'off'"),
        ("ssd_policy", "", "'all', 'second-use', 'evicted' or 'off'"),
        ("ssd_durability", "safe", "'best-effort' or 'durable'"),
        ("cache_selfcheck", "-1", "greater than or equal to 0"),
        ("cache_selfcheck", "1.5", "valid integer"),
        ("cache_selfcheck", "99999999999999999999999", "less than or equal to 1000000000"),
        ("kv_memory_mb", "99999999999999999999999", "less than or equal to 1000000000"),
        ("context_length", "99999999999999999999999", "less than or equal to 1000000000"),
        ("cache_dir", "", "must be a path"),
        ("cache_dir", "a\0b", "must be a path"),
        ("cache_dir", "~nobody-of-this-name/cache", "no such user"),
    ],
)
def test_bad_values_are_refused(name: str, text: str, allowed: str) -> None:
    """(J2) From flags and from the environment, each by its own name."""
    for flags, environ, shown in (
        ({name: text}, {}, f"--{name.replace('_', '-')}"),
        ({}, {f"MILLPOND_{name.upper()}": text}, f"MILLPOND_{name.upper()}"),
    ):
        with pytest.raises(ConfigError) as refused:
            read_config(flags, environ)
        message = str(refused.value)
        assert message.startswith(f"{shown}: ")
        assert allowed in message
        assert repr(text) in message


def test_the_cache_folder_is_where_it_is_said_to_be() -> None:
    """(J1)"""
    assert ServeConfig().cache_folder == prefix_folder()
    assert read_config({"cache_dir": "~/somewhere"}, {}).cache_folder == Path.home() / "somewhere"


# --- servers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(byte_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny models with a byte-level tokenizer, as whole folders."""

    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("tiny") / kind
        tiny_models.save(kind, folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(byte_tokenizer / name, folder / name)
        return folder

    return make


@pytest.fixture(scope="module")
def start(tiny: Callable[[str], Path], millpond: Launch) -> StartTiny:
    """Start the real server with a tiny llama: ``with start(*flags) as server``."""
    folder = tiny("llama")

    def started(*flags: str) -> AbstractContextManager[Server]:
        return millpond(command(folder, *flags))

    return started


def command(folder: Path, *flags: str) -> list[str]:
    return ["serve", str(folder), "--port", "0", "--model-name", MODEL, *flags]


def on_disk(cache: Path, *flags: str) -> list[str]:
    """Flags for a server that writes everything, however full the machine's disk is; later flags win."""
    return ["--cache-dir", str(cache), "--cache-ssd", "1GB", "--ssd-min-free", "0", "--ssd-policy", "all", *flags]


def prompt(number: int) -> list[int]:
    """A prompt that differs from every other from its first token on."""
    return [number, *((number * 31 + i * 17) % 250 for i in range(PROMPT - 1))]


def ask(server: Server, *numbers: int) -> list[Answer]:
    """Ask several distinct prompts, one after the other."""
    return [complete(server, prompt(number), ignore_eos=True) for number in numbers]


def stored_bytes(cache: Path) -> int:
    """Bytes of all record files, those being written included, that were there together at one moment.

    Looks twice and counts what is there both times: files that come and go while one look takes do not add up.
    """
    first = sizes_of([path for path in cache.rglob("*.kv*") if path.parent.name != "quarantine"])
    return sum(sizes_of(list(first)).values())


def sizes_of(paths: list[Path]) -> dict[Path, int]:
    """The sizes of those files that are there."""
    sizes = {}
    for path in paths:
        with suppress(FileNotFoundError):
            sizes[path] = path.stat().st_size
    return sizes


def test_recurrent_models_show_what_is_kept(tiny: Callable[[str], Path], millpond: Launch) -> None:
    """(E7) A Mamba model caches snapshots besides its (empty) blocks, and its hits are real."""
    with millpond(command(tiny("mamba"))) as server:
        shown = httpx.get(f"{server.url}/v1/models").json()["data"][0]["millpond"]
        assert (shown["prefix_cache"], shown["prefix_cache_reason"]) == ("kv+state", "")
        assert shown["cache_kinds"] == ["state"]
        first, second = ask(server, 1, 1)
        assert (first.cached, second.cached) == (0, PROMPT - 1)
        assert first.text == second.text
        assert figures(server)["ram_bytes"] > 0


def test_cache_ram_bounds_memory(start: StartTiny) -> None:
    """(E5, E6, J1) The bytes held stay within it; what had to go is explained; the newest is still there."""
    with start("--cache-ram", "1MB") as server:
        first, *_ = ask(server, *range(1, 7))
        counted = figures(server)
        assert counted["ram_limit"] == 10**6
        assert 10**6 - 2 * RECORD < counted["ram_bytes"] <= 10**6
        assert counted["evicted"] > 0
        assert counted["checked"] == 0
        assert explain(server, prompt=prompt(1))[0]["end"] == "evicted"
        assert explain(server, prompt=prompt(6))[0]["cached_tokens"] == PROMPT - 1
        [again] = ask(server, 1)
        assert (again.cached < PROMPT - 1, again.text) == (True, first.text)


def test_selfcheck_compares_every_hit(start: StartTiny, tmp_path: Path) -> None:
    """(J1) --cache-selfcheck 1: hits are computed afresh and answered alike. --cache-ssd 0 creates nothing."""
    cache = tmp_path / "cache"
    with start(*on_disk(cache, "--cache-ssd", "0", "--cache-selfcheck", "1")) as server:
        answers = ask(server, 1, 1, 1)
        assert {answer.text for answer in answers} == {answers[0].text}
        assert [answer.end for answer in answers[1:]] == ["selfcheck"] * 2
        # The last block is compared after its request has ended.
        wait_until(server, lambda _: figures(server)["checked"] >= 2 * (PROMPT // 64))
        assert figures(server)["mismatches"] == 0
        assert ssd(server) == {}
    assert not cache.exists()


def test_cache_ssd_bounds_the_files(start: StartTiny, tmp_path: Path) -> None:
    """(F4, J1) The sum of the files never exceeds it, however much is written, and the newest stay."""
    cap = 10**6
    most = 0
    with start(*on_disk(tmp_path, "--cache-ssd", "1MB")) as server, watching(tmp_path) as sizes:
        answers = ask(server, *range(1, 9))
        total = sum(map(blocks_of, answers))
        counted = until_ssd(server, lambda disk: disk["writes"] + disk["skipped_full"] >= total)
        most = max(sizes())
        assert counted["evicted"] > 0
        assert counted["written_bytes"] > cap
        assert counted["skipped_full"] == 0
        assert counted["bytes"] <= cap
    assert cap - 3 * RECORD < stored_bytes(tmp_path) <= cap
    assert most <= cap


@contextmanager
def watching(folder: Path) -> Iterator[Callable[[], list[int]]]:
    """Look at the size of a folder all the time."""
    sizes = [0]
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.01):
            sizes.append(stored_bytes(folder))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lambda: sizes
    finally:
        over.set()
        thread.join()


def test_ssd_ttl_removes_what_was_not_used(start: StartTiny, tmp_path: Path) -> None:
    """(F4, J1) What is older than a tiny age is gone after a restart, files and all; within its age it stays."""
    with start(*on_disk(tmp_path, "--ssd-ttl", "1h")) as server:
        [answer] = ask(server, 1)
        until_ssd(server, lambda disk: disk["writes"] >= blocks_of(answer))
    kept = records(tmp_path)
    assert len(kept) >= blocks_of(answer)
    with start(*on_disk(tmp_path, "--ssd-ttl", "0.001s")) as server:
        counted = until_ssd(server, lambda disk: disk["expired"] >= len(kept))
        assert (counted["files"], counted["bytes"]) == (0, 0)
        assert explain(server, prompt=prompt(1))[0]["known_tokens"] == 0
        assert not records(tmp_path) & kept


def test_ssd_daily_writes_stop_for_the_day(start: StartTiny, tmp_path: Path) -> None:
    """(J1) Nothing is written beyond them; requests go on."""
    with start(*on_disk(tmp_path, "--ssd-daily-writes", "300KB")) as server:
        answers = ask(server, 1, 2)
        total = sum(map(blocks_of, answers))
        counted = until_ssd(server, lambda disk: disk["writes"] + disk["skipped_daily"] >= total)
        assert 0 < counted["written_bytes"] <= 300_000
        assert counted["skipped_daily"] > 0
        assert [answer.cached for answer in ask(server, 2)] == [PROMPT - 1]
    assert 0 < stored_bytes(tmp_path) <= 300_000


def test_ssd_min_free_is_left_free(start: StartTiny, tmp_path: Path) -> None:
    """(F4, J1) Where more is asked for than the disk has, nothing is written; requests go on."""
    with start(*on_disk(tmp_path, "--ssd-min-free", "900PB")) as server:
        first, second = ask(server, 1, 1)
        assert (second.cached, second.text) == (PROMPT - 1, first.text)
        counted = until_ssd(server, lambda disk: disk["skipped_full"] >= blocks_of(first))
        assert counted["writes"] == 0
        assert server.stop() == 0
    assert not records(tmp_path)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace counts the calls, and is not here")
@pytest.mark.parametrize("durability", ["best-effort", "durable"])
def test_ssd_durability_syncs_every_file_or_none(start: StartTiny, tmp_path: Path, durability: str) -> None:
    """(F1, J1) durable: each file is synced before it gets its name, then its folder. best-effort: neither."""
    cache, calls = tmp_path / "cache", tmp_path / "calls"
    with start(*on_disk(cache, "--ssd-durability", durability)) as server:
        traced = "trace=fsync,fdatasync,rename,renameat,renameat2"
        options = ["-f", "-y", "-s", "4096", "-e", traced, "-o", str(calls), "-p", str(server.engine_pid())]
        tracer = subprocess.Popen(["strace", *options], stderr=subprocess.PIPE, text=True)
        try:
            assert tracer.stderr is not None
            if "attached" not in (said := tracer.stderr.readline()):
                pytest.skip(f"strace may not look at the engine: {said.strip()}")
            [answer] = ask(server, 1)
            until_ssd(server, lambda disk: disk["writes"] >= blocks_of(answer))
        finally:
            tracer.terminate()
            tracer.communicate()
    lines = calls.read_text().splitlines()
    files = [line for line in lines if re.search(r"f(data)?sync\(\d+<[^>]*\.kv\.[^>]*\.tmp>", line)]
    folders = [line for line in lines if re.search(rf"fsync\(\d+<{re.escape(str(cache))}/[0-9a-f]{{16}}/", line)]
    published = [line for line in lines if "rename" in line and '.tmp"' in line]
    assert len(published) >= blocks_of(answer)
    if durability == "best-effort":
        assert not files
    else:
        assert len(files) == len(published)
        assert len(folders) > len(files)
        for line in published:
            temporary = re.search(r'"([^"]*\.tmp)"', line)
            assert temporary is not None
            synced = next(i for i, each in enumerate(lines) if temporary[1] in each and "sync(" in each)
            assert synced < lines.index(line)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes, where this process may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or sys.platform != "linux":
        pytest.skip("no small file system can be mounted here")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_stops_writes_only(start: StartTiny, small_disk: Path) -> None:
    """(F7, L) Requests go on, what is there is read, and once there is room writes go on."""
    stuffing = small_disk / "stuffing"
    with start(*on_disk(small_disk / "cache")) as server:
        [first] = ask(server, 1)
        until_ssd(server, lambda disk: disk["writes"] >= blocks_of(first))
        stuff(stuffing)
        texts = [answer.text for answer in ask(server, 2, 3, 4, 5)]
        counted = until_ssd(server, lambda disk: disk["skipped_full"] + disk["skipped_off"] + disk["write_errors"] > 0)
        assert counted["damaged"] == 0
        assert [answer.text for answer in ask(server, 2, 3, 4, 5)] == texts
        assert ask(server, 1)[0].text == first.text
        stuffing.unlink()
        before = ssd(server)["writes"]
        numbers = iter(range(10, 250))
        wait_until(server, lambda _: bool(ask(server, next(numbers))) and ssd(server)["writes"] > before)
        assert server.stop() == 0


def stuff(path: Path) -> None:
    """Fill the file system up to its last byte."""
    with path.open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue


def test_a_folder_that_cannot_be_made(start: StartTiny, tmp_path: Path) -> None:
    """(L) A file is in its place: the server says so and serves."""
    (tmp_path / "file").write_text("in the way")
    with start(*on_disk(tmp_path / "file")) as server:
        server.wait_for_line("SSD tier")
        assert [answer.cached for answer in ask(server, 1, 1)] == [0, PROMPT - 1]
        assert ssd(server)["writing"] == 0
        assert server.stop() == 0
    assert (tmp_path / "file").read_text() == "in the way"


def test_no_cache_folder_costs_time_only(tiny: Callable[[str], Path], launch: Launch, tmp_path: Path) -> None:
    """(A6) Neither what a start finds out nor prefixes on disk can be kept: that is said, and requests are served."""
    (tmp_path / "file").touch()
    started = [sys.executable, "-m", "millpond.cli.main", *command(tiny("llama"), "--cache-ssd", "1GB")]
    with launch(["env", "-u", "MILLPOND_CACHE_DIR", f"MILLPOND_CACHE={tmp_path / 'file'}", *started]) as server:
        server.wait_for_line("Not a directory; MILLPOND_CACHE=FOLDER names another folder")
        server.wait_for_line("the SSD tier only reads")
        assert [answer.cached for answer in ask(server, 1, 1)] == [0, PROMPT - 1]
        assert ssd(server)["writing"] == 0
        assert server.stop() == 0
        assert not [line for line in server.lines if "Traceback" in line]


# --- for hours ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_and_files_stay_bounded_for_long(start: StartTiny, tmp_path: Path) -> None:
    """(E6, F4, L) Distinct prompts until both pools were filled ten times over."""
    ram, cap = 4 * 10**6, 8 * 10**6
    rounds = 10 * cap // (PROMPT * 1024) + 1
    resident: list[int] = []
    with start(*on_disk(tmp_path, "--cache-ram", "4MB", "--cache-ssd", "8MB")) as server, watching(tmp_path) as sizes:
        for number in range(rounds):
            tokens = [number % 250, number // 250, *prompt(number)[2:]]
            answer = complete(server, tokens, ignore_eos=True)
            assert answer.completion_tokens == 4
            resident.append(resident_bytes(server.engine_pid()))
            if number % 20 == 0:
                assert figures(server)["ram_bytes"] <= ram
        health = settled(server)
        assert health["requests"]["failed"] == 0
        assert health["prefix_cache"]["ssd"]["write_errors"] == 0  # type: ignore[index]
        until_ssd(server, lambda disk: disk["written_bytes"] + disk["skipped_full"] * RECORD >= 10 * cap)
        # The longest prompt that the model's context allows, into full pools.
        big = complete(server, [7] * 507, ignore_eos=True)
        assert big.completion_tokens == 4
    half = resident[len(resident) // 2 :]
    third = len(half) // 3
    begin, end = sum(half[:third]) / third, sum(half[-third:]) / third
    assert end < begin * 1.1, (begin, end)
    assert max(sizes()) <= cap
    assert not list(tmp_path.rglob("*.tmp"))


def resident_bytes(pid: int) -> int:
    """Resident memory of a process (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
