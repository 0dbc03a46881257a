"""A prefix on the SSD, as its reader sees it: TTFT of its prompt beside a bare sequential read of the same files.

    python benchmarks/restores.py FOLDER [--tokens 100000] [--layers 32 --heads 8 --dim 128] [--kv-bits 8] [--rounds 3]

FOLDER gets a model of noise whose keys and values have the shapes of a common 8B model (its weights are small: what is
restored does not depend on them), and a cache folder with the blocks of one long prompt, which nobody would want to
compute here: all hold the numbers of one block. Each round starts an engine, takes the files out of the page cache,
sends the prompt, and reads the same files without it, in turns. A restored prompt's TTFT is all there is: reading,
checking, copying into a row, and the forward that draws the first token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import queue
import random
import statistics
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
from msgspec.structs import replace

from millpond.client.engine import EngineClient
from millpond.client.start import start_message
from millpond.config import ServeConfig, read_config
from millpond.engine.group import ALONE
from millpond.engine.prepare import prepare
from millpond.model.blocks import BlockFormat, ReadRecord, agree, cut_prompt
from millpond.model.forwards import prefill
from millpond.model.prompt import new_prompt
from millpond.prefix.cache import PrefixCache
from millpond.prefix.disk.events import SsdEvent
from millpond.prefix.disk.tier import SsdTier
from millpond.prefix.keys import Namespace
from millpond.prefix.records import BLOCK, Kind
from millpond.settings import PrefixSettings, SavePolicy
from millpond.types import PrefixReport, Request, SamplingParams

VOCAB = 1024
PIECE = 8 * 1024 * 1024
MOST_TOUCHED = 4 * 1024**3


def make_model(folder: Path, layers: int, heads: int, dim: int, context: int) -> None:
    """Small random weights around keys and values of the given shapes."""
    width = 256
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": dim,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB,
        "max_position_embeddings": context,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    }
    shapes = {"model.embed_tokens.weight": (VOCAB, width), "model.norm.weight": (width,)}
    for layer in range(layers):
        start = f"model.layers.{layer}."
        shapes |= {start + f"self_attn.{name}_proj.weight": (heads * dim, width) for name in "qkv"}
        shapes[start + "self_attn.o_proj.weight"] = (width, heads * dim)
        shapes |= {start + f"mlp.{name}_proj.weight": (width, width) for name in ("gate", "up", "down")}
        shapes |= {start + f"{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    mx.random.seed(0)
    weights = {name: (mx.random.normal(shape) * 0.1).astype(mx.bfloat16) for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))


def fill(config: ServeConfig, folder: Path, cache_dir: Path, tokens: list[int]) -> None:
    """Put all whole blocks of ``tokens`` into the SSD tier, as a server with this configuration looks for them."""
    start = start_message(config, str(folder), "", "restores")
    ready = prepare(replace(start, prefix=PrefixSettings()), folder, _unheard, _unheard, ALONE)
    blocks = ready.model.blocks
    assert isinstance(blocks, BlockFormat)
    space = Namespace(weights=ready.content, kv_format=blocks.kept_as, layers=list(blocks.layers), rank=0, world=1)
    inbox: queue.SimpleQueue[SsdEvent] = queue.SimpleQueue()
    cache = PrefixCache(space.digest, blocks.layout, 1 << 60, ReadRecord, partial(agree, blocks.form))
    ssd = SsdTier(cache_dir, space.digest, config.prefix_settings("restores"), inbox.put)
    cache.attach(ssd, SavePolicy.ALL, lambda _start, count: count * 1.0)
    ssd.start()
    prompt = new_prompt(ready.model.network, ready.model.form)
    prefill(ready.model.network, prompt, tokens[:BLOCK])
    record = cut_prompt(blocks, prompt, 0, BLOCK, Kind.KV)
    mx.eval(record.arrays)
    query = cache.query(tokens, "")
    for begin in range(0, (len(tokens) - 1) // BLOCK * BLOCK, BLOCK):
        cache.keep(query, begin, begin + BLOCK, {Kind.KV: record})
        cache.housekeep()
        while cache.saving:
            cache.on_event(inbox.get())
            cache.housekeep()
    if not ssd.close(600):
        raise SystemExit("the files could not be written")


def _unheard(*_told: object) -> None:
    """Nobody wants to know."""


def record_files(cache_dir: Path) -> list[Path]:
    """In the order of their creation, as they lie on the disk."""
    return sorted(
        (path for path in cache_dir.rglob("*") if path.stat().st_size > PIECE // 64), key=lambda p: p.stat().st_mtime_ns
    )


def forget(files: list[Path]) -> None:
    """Take files out of the page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def touch(nbytes: int) -> None:
    """Use so much memory and give it back. A virtual machine's own host may have to find it first, which takes longer
    than any disk, and is neither the engine's fault nor the disk's."""
    nbytes = min(nbytes, MOST_TOUCHED)
    with mmap.mmap(-1, nbytes) as memory:
        for start in range(0, nbytes, PIECE):
            memory[start : start + PIECE] = bytes(min(PIECE, nbytes - start))


def bare(files: list[Path]) -> float:
    """Seconds to read them one after the other into one buffer."""
    buffer = bytearray(PIECE)
    began = time.perf_counter()
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        while os.readv(descriptor, [buffer]):
            pass
        os.close(descriptor)
    return time.perf_counter() - began


async def restored(
    config: ServeConfig, folder: Path, tokens: list[int], files: list[Path] | None, room: int
) -> tuple[float, PrefixReport]:
    """TTFT in a new engine; ``files`` are taken out of the page cache before, and ``room`` bytes of memory used."""
    client = EngineClient(start_message(config, str(folder), "", "restores"), environment=config.log_environment)
    await client.start()
    try:
        await client.settled()
        if files is not None:
            forget(files)
        touch(room)
        params = SamplingParams(max_tokens=2, temperature=0.0)
        report = PrefixReport()
        began = time.perf_counter()
        async with client.submit(Request(id="one", tokens=tokens, params=params)) as stream:
            async for delta in stream:
                report = delta.prefix or report
                if delta.tokens:
                    return time.perf_counter() - began, report
        raise SystemExit("no token came")
    finally:
        await client.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description="A restored prefix beside a bare read of its files.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--kv-bits", type=int)
    parser.add_argument("--kv-memory-mb", type=int, default=0)
    parser.add_argument("--cache-ram-mb", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    folder, cache_dir = given.folder / "model", given.folder / "cache"
    make_model(folder, given.layers, given.heads, given.dim, 2 * given.tokens)
    flags: dict[str, str | None] = {
        "cache_dir": str(cache_dir),
        "ssd_policy": "all",
        "kv_memory_mb": str(given.kv_memory_mb),
        "log_level": "warning",
    }
    if given.kv_bits:
        flags["kv_bits"] = str(given.kv_bits)
    if given.cache_ram_mb:
        flags["cache_ram"] = f"{given.cache_ram_mb}MiB"
    config = read_config(flags, {})
    chooser = random.Random(0)
    tokens = [chooser.randrange(VOCAB) for _ in range(given.tokens // BLOCK * BLOCK + 1)]
    if not cache_dir.exists():
        fill(config, folder, cache_dir, tokens)
    files = record_files(cache_dir)
    total = sum(path.stat().st_size for path in files)
    print(f"{len(files)} files, {total / 1e6:.0f} MB, {len(tokens) - 1} tokens", flush=True)
    for place in ("on the disk", "in the page cache"):
        cold, ratios = place == "on the disk", []
        for _ in range(given.rounds):
            seconds, report = asyncio.run(restored(config, folder, tokens, files if cold else None, 3 * total))
            if cold:
                forget(files)
            touch(2 * total)
            alone = bare(files)
            ratios.append(alone / seconds)
            rates = [total / 1e6 / each for each in (seconds, alone)]
            print(
                f"{place}: restored in {seconds:.2f} s ({rates[0]:.0f} MB/s, {report.disk} tokens from disk), "
                f"bare read in {alone:.2f} s ({rates[1]:.0f} MB/s): {alone / seconds:.2f}",
                flush=True,
            )
        print(f"median {statistics.median(ratios):.2f}", flush=True)


if __name__ == "__main__":
    main()
