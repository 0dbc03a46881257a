"""The whole command with packed keys and values: what it tells, what it keeps on disk, and what it refuses (I1)."""

from __future__ import annotations

import os
import shutil
import signal
from typing import TYPE_CHECKING

import httpx
import pytest
import tiny_models
from prefix_client import MODEL, complete, until_ssd

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Launch, Server

PROMPT = [(7 * place) % 250 for place in range(300)]
ROTATED = "int4 rotated in groups of 64 from token 64"
RESTARTED = ("int4 in groups of 32", "int8 in groups of 64 from token 128", ROTATED)
"""Formats that a second server finds on disk here; tests/engine/test_packed.py restarts the cache with each."""


@pytest.fixture(scope="module")
def folder_of(byte_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model with a byte-level tokenizer."""

    def make(kind: str) -> Path:
        made = tiny_models.save(kind, tmp_path_factory.mktemp("packed") / kind)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(byte_tokenizer / name, made / name)
        return made

    return make


def command(folder: Path, cache: Path, *flags: str) -> list[str]:
    disk = ["--cache-dir", str(cache), "--cache-ssd", "1GB", "--ssd-min-free", "0", "--ssd-policy", "all"]
    return ["serve", str(folder), "--port", "0", "--model-name", MODEL, *disk, *flags]


def told(server: Server) -> dict[str, object]:
    return dict(httpx.get(f"{server.url}/v1/models").json()["data"][0]["millpond"])


def metric(server: Server, start: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    [line] = [line for line in lines if line.startswith(start)]
    return float(line.rsplit(" ", 1)[1])


def record_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*.kv"))


def test_bits_groups_and_exact_tokens(folder_of: Callable[[str], Path], millpond: Launch, tmp_path: Path) -> None:
    """(I1, J1, K1) The format is told everywhere, the SSD gets about so many bytes less, and a killed server's cache is
    found again in that format only."""
    folder = folder_of("wide_llama")
    ways = {
        "float32": (),
        "int8 in groups of 64": ("--kv-bits", "8"),
        "int4 in groups of 32": ("--kv-bits", "4", "--kv-group-size", "32"),
        "int8 in groups of 64 from token 128": ("--kv-bits", "8", "--kv-quant-start", "128"),
        ROTATED: ("--kv-bits", "4", "--kv-quant-mode", "rotated"),
    }
    each, files, texts = {}, {}, {}
    for number, (name, flags) in enumerate(ways.items()):
        cache = tmp_path / str(number)
        with millpond(command(folder, cache, *flags)) as server:
            texts[name] = complete(server, PROMPT, ignore_eos=True).text
            info = told(server)
            assert info["kv_format"] == name
            each[name] = info["kv_bytes_per_token"]
            assert metric(server, f'millpond_kv_bytes_per_token{{kv_format="{name}"') == each[name]
            until_ssd(server, lambda ssd: ssd["files"] >= 4)
            again = complete(server, PROMPT, ignore_eos=True)
            assert (again.cached, again.text) == (len(PROMPT) - 1, texts[name])
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait()
        files[name] = record_bytes(cache)
        if name not in RESTARTED:
            continue
        with millpond(command(folder, cache, *flags)) as server:
            restarted = complete(server, PROMPT, ignore_eos=True)
            assert restarted.disk > 0
            assert restarted.text == texts[name]
    floats, packed = "float32", "int8 in groups of 64"
    assert each[packed] == each["int8 in groups of 64 from token 128"] == each[floats] * 17 // 64
    assert each["int4 in groups of 32"] == each[floats] * 10 // 64
    assert each[ROTATED] == each[floats] * 37 // 256
    assert files[packed] < 0.35 * files[floats]
    assert files[packed] < files["int8 in groups of 64 from token 128"] < files[floats]
    with millpond(command(folder, tmp_path / "0", "--kv-bits", "8")) as server:
        assert complete(server, PROMPT, ignore_eos=True).cached == 0


@pytest.mark.often("wide_llama", "mamba")
@pytest.mark.parametrize(
    ("kind", "flags", "says"),
    [
        ("deepseek_v2", ("--kv-bits", "8", "--kv-group-size", "32"), "kv_group_size: 32 does not divide"),
        ("wide_llama", ("--kv-bits", "8", "--kv-group-size", "128"), "allowed: 32, 64"),
        ("mamba", ("--kv-bits", "4"), "kv_bits: 4 cannot be used with this model"),
        ("lfm2", ("--kv-bits", "8"), "kv_group_size: 64 does not divide"),
    ],
)
def test_what_cannot_be_packed_is_an_error_at_start(
    kind: str, flags: tuple[str, ...], says: str, folder_of: Callable[[str], Path], millpond: Launch, tmp_path: Path
) -> None:
    """Not a silent fall-back: the command ends with a line that names the setting."""
    with millpond(command(folder_of(kind), tmp_path, *flags), ready=False) as server:
        assert server.process.wait(120) != 0
        server.wait_for_line(says)
