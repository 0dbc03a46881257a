"""Packed keys and values in the engine, against one sequence that is packed in the same way (I1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import mlx.core as mx
import pytest
from engine_driver import (
    Driver,
    Outcome,
    assert_right,
    disk_cache,
    prefix_cache,
    request,
    settle,
)
from tiny_models import CONFIGS_WIDE, opened, prompt, save

from millpond.engine.link import Inbox
from millpond.kv.format import KvFormat
from millpond.kv.rotated import RING
from millpond.model.blocks import BlockFormat
from millpond.model.load import LoadedModel, ModelError, kept_as
from millpond.model.opened import open_model
from millpond.model.probe import Capabilities, probe
from millpond.native.packing import TILE
from millpond.prefix.cache import PrefixCache
from millpond.prefix.disk.events import Opened
from millpond.prefix.disk.tier import SsdTier
from millpond.prefix.records import BLOCK, Kind
from millpond.types import KvPacking, PrefixReport

INT8, INT4, EXACT_START = KvPacking(bits=8), KvPacking(bits=4), KvPacking(bits=8, start=128)
SMALL_GROUPS = KvPacking(bits=4, group_size=32)
ROTATED = KvPacking(bits=4, start=64, rotated=True)
PACKINGS = {"int8": INT8, "int4": INT4, "start": EXACT_START, "groups": SMALL_GROUPS, "rotated": ROTATED}
ANSWER = 10
Which = tuple[str, str, bool]
"""Kind of model, name of a packing, and whether in C."""


@cache
def model(kind: str, packing: str = "int8", native: bool = True) -> LoadedModel:
    loaded = opened(kind, PACKINGS[packing]).model
    return loaded if native else kept_as(loaded, dataclasses.replace(loaded.form, native=False))


@cache
def capabilities(kind: str, packing: str, native: bool) -> Capabilities:
    return probe(model(kind, packing, native))


def ask(
    which: Which,
    cached: PrefixCache | None,
    tokens: Sequence[int],
    beside: int = 0,
    most: int = ANSWER,
    **options: object,
) -> Outcome:
    """One request, and unrelated ones beside it."""
    driven = Driver(model(*which), capabilities=capabilities(*which), cache=cached, **options)  # type: ignore[arg-type]
    for other in range(beside):
        driven.submit(request(f"o{other}", prompt(5 + 23 * other, seed=other + 77), ANSWER + other))
    driven.submit(request("x", tokens, most, logprobs=5))
    driven.run()
    return driven.outcomes["x"]


def right(which: Which, tokens: Sequence[int], outcome: Outcome, packed_at: Sequence[int] = ()) -> None:
    """What one sequence answers that was packed at the same places: after its restored part, and after its prompt."""
    assert outcome.prefix is not None
    at = [*packed_at, *([outcome.prefix.cached] if outcome.prefix.cached else [])]
    check(which, tuple(tokens), tuple(outcome.tokens), tuple(at))


@cache
def check(which: Which, tokens: tuple[int, ...], answer: tuple[int, ...], packed_at: tuple[int, ...]) -> None:
    """Once for the same answer to the same prompt: the reference costs as much as what it is compared with."""
    assert_right(model(*which), tokens, list(answer), packed_at)


WAYS: list[Which] = [(kind, packing, True) for kind in CONFIGS_WIDE for packing in PACKINGS] + [
    ("wide_llama", "int8", False),
    ("wide_llama", "start", False),
    ("wide_gemma3_text", "int8", False),
    ("wide_gemma3_text", "int4", False),
    ("wide_llama", "rotated", False),
    ("wide_gemma3_text", "rotated", False),
]


@pytest.mark.often("wide_gemma3_text-int8", "wide_qwen3-groups", "wide_llama-start", "wide_llama-int4")
@pytest.mark.parametrize(("kind", "packing", "native"), WAYS)
def test_the_probe_lets_packed_slots_through(kind: str, packing: str, native: bool) -> None:
    found = capabilities(kind, packing, native)
    assert (found.slots, found.reason, found.uncached, found.native) == (True, "", "", native)


@contextmanager
def tiers(which: Which, folder: Path) -> Iterator[tuple[PrefixCache, SsdTier, Inbox]]:
    """A cache with both tiers, in which all that is on disk is known."""
    cached, ssd, inbox = disk_cache(model(*which), folder)
    opened = inbox.get(timeout=30)
    assert isinstance(opened, Opened)
    cached.on_event(opened)
    yield cached, ssd, inbox
    settle(cached, inbox)
    assert ssd.close(30)


def forget(cached: PrefixCache, inbox: Inbox) -> None:
    settle(cached, inbox)
    cached.fit(0)
    assert cached.nbytes == 0
    cached.fit(1 << 28)


IN_BATCHES = [("wide_llama", "int8", True), ("wide_gemma3_text", "int8", True)]


def quick(which: Which) -> bool:
    """Every packing on one kind of model, and every kind with one packing."""
    return which[0] == "wide_llama" or which[1] == "int8"


@pytest.mark.parametrize(
    ("which", "batch"),
    [
        pytest.param(
            which, batch, marks=[] if which in IN_BATCHES or (batch == 1 and quick(which)) else pytest.mark.slow
        )
        for which in WAYS
        for batch in (1, 3, 8)
    ],
)
def test_hit_equals_miss(which: Which, batch: int, tmp_path: Path) -> None:
    """The same prompt computed, from RAM, from the SSD, after a restart; alone and among others (I1, D4, E3, F1)."""
    tokens = prompt(3 * BLOCK + 40)
    found = []
    with tiers(which, tmp_path) as (cached, ssd, inbox):
        for tier in ("none", "memory", "disk"):
            if tier == "disk":
                forget(cached, inbox)
            found.append(ask(which, cached, tokens, beside=batch - 1, ssd=ssd, inbox=inbox))
    with tiers(which, tmp_path) as (cached, ssd, inbox):
        found.append(ask(which, cached, tokens, beside=batch - 1, ssd=ssd, inbox=inbox))
    miss, hit, read, restarted = found
    whole = len(tokens) - 1
    if "gemma3" not in which[0]:  # a model with windows resumes at the ends of blocks and answers
        assert miss.prefix is not None
        assert miss.prefix.cached == 0
        assert [one.prefix for one in found[1:]] == [
            PrefixReport(memory=whole, end="prompt", known=whole),
            PrefixReport(disk=whole, end="prompt", known=whole),
            PrefixReport(disk=whole, end="prompt", known=whole),
        ]
    for one in found:
        right(which, tokens, one)
    if batch == 1:
        # Packed once, and never again on the way through memory and disk.
        assert miss.logprobs == hit.logprobs == read.logprobs == restarted.logprobs


@pytest.mark.often("wide_gemma3_text", "wide_llama-int4")
@pytest.mark.parametrize(
    "which",
    [
        pytest.param(which, id="-".join(map(str, which)), marks=[] if quick(which) else pytest.mark.slow)
        for which in WAYS
    ],
)
def test_what_follows_a_restored_prefix(which: Which, tmp_path: Path) -> None:
    """A longer prompt attends to the packed beginning as restored: from RAM, SSD and after a restart the same bits."""
    tokens, longer = prompt(3 * BLOCK + 40), [*prompt(3 * BLOCK + 40), *prompt(BLOCK, seed=1)]
    found = []
    for tier in ("memory", "disk", "restart"):
        folder = tmp_path / tier
        with tiers(which, folder) as (cached, ssd, inbox):
            ask(which, cached, tokens, ssd=ssd, inbox=inbox)
            if tier == "disk":
                forget(cached, inbox)
            if tier != "restart":
                found.append(ask(which, cached, longer, ssd=ssd, inbox=inbox))
        if tier == "restart":
            with tiers(which, folder) as (cached, ssd, inbox):
                found.append(ask(which, cached, longer, ssd=ssd, inbox=inbox))
    for one in found:
        assert one.prefix is not None
        assert one.prefix.cached >= 3 * BLOCK
        # The last token of the first prompt went through a row, where it saw the others packed.
        right(which, longer, one, packed_at=[len(tokens) - 1] if one.prefix.cached == len(tokens) else [])
    assert found[0].logprobs == found[1].logprobs == found[2].logprobs


@pytest.mark.parametrize("packing", ["int8", "start"])
def test_an_answer_is_found_again(packing: str) -> None:
    """The next turn of a chat restores what was decoded, packed as it was in its row, and reads the new tokens only."""
    which = ("wide_llama", packing, True)
    cached = prefix_cache(model(*which))
    tokens = prompt(100)
    first = ask(which, cached, tokens, most=80)
    longer = [*tokens, *first.tokens, *prompt(20, seed=2)]
    second = ask(which, cached, longer)
    assert second.prefix is not None
    assert second.prefix.memory == len(tokens) + len(first.tokens) - 1
    right(which, longer, second, packed_at=[len(tokens) - 1])


def test_many_prompts_at_once() -> None:
    """Rows of very different lengths join and leave; each is what it would be alone (D4)."""
    which = ("wide_llama", "int8", True)
    driven = Driver(model(*which), capabilities=capabilities(*which), max_batch=8)
    prompts = {f"r{index}": prompt(length) for index, length in enumerate([5, 300, 64, 65, 17, 130, 1, 200, 90, 33])}
    for name in list(prompts)[:4]:
        driven.submit(request(name, prompts[name], ANSWER))
    later = {3 + 2 * index: request(name, prompts[name], ANSWER) for index, name in enumerate(list(prompts)[4:])}
    driven.run(arrivals=later)
    for name, tokens in prompts.items():
        right(which, tokens, driven.outcomes[name])


def test_a_neighbour_changes_no_bit() -> None:
    which = ("wide_qwen3", "int8", True)
    tokens = prompt(100)
    alone, among = ask(which, None, tokens), ask(which, None, tokens, beside=5)
    assert alone.tokens == among.tokens


@pytest.mark.parametrize("packing", PACKINGS)
def test_bytes_are_those_of_the_format(packing: str, tmp_path: Path) -> None:
    """Counted from the arrays of rows and blocks and from the files (I1)."""
    which = ("wide_llama", packing, True)
    loaded = model(*which)
    assert isinstance(loaded.blocks, BlockFormat)
    with tiers(which, tmp_path) as (cached, ssd, inbox):
        driven = Driver(loaded, capabilities=capabilities(*which), cache=cached, ssd=ssd, inbox=inbox)
        driven.submit(request("x", prompt(440), 30))
        rows: list[int] = []
        driven.run(lambda turn: rows.append(driven.engine._executor.lane.nbytes))
        settle(cached, inbox)
        records = [node.records[Kind.KV] for node in cached.tree.nodes() if node.full and Kind.KV in node.records]
        packed = [record for record in records if record.arrays[0].dtype == mx.uint32]  # type: ignore[attr-defined]
        exact = [record for record in records if record not in packed]
        assert len(exact) == loaded.form.packing.start // BLOCK
        sizes, capacity, start = loaded.sizes, 512, loaded.form.packing.start
        assert {record.nbytes / BLOCK for record in packed} == {sizes.token_bytes}
        assert {record.nbytes / BLOCK for record in exact} <= {sizes.exact_token_bytes}
        newest = RING * sizes.exact_token_bytes if loaded.form.rotated else 0
        assert sizes.row_bytes == newest
        assert max(rows) == start * sizes.exact_token_bytes + (capacity - start) * sizes.token_bytes + newest
        files = list(tmp_path.rglob("*.kv"))
        assert sum(path.stat().st_size for path in files) <= cached.nbytes + 4096 * len(files) + 8192
    bits, size = PACKINGS[packing].bits, PACKINGS[packing].group_size
    share = sizes.token_bytes / sizes.exact_token_bytes
    means = 16 / TILE / 2 if loaded.form.rotated else 0  # of keys
    assert share == (bits + 32 / size + means) / 32
    if size == 64:
        assert share <= {8: 0.28, 4: 0.29 / 2}[bits]  # of float32
        assert 2 * share <= {8: 0.54, 4: 0.29}[bits]  # of float16


@pytest.mark.slow
def test_more_conversations_run_at_once() -> None:
    """In the memory in which float16 holds so many, 8 bits hold at least 1.8 times as many (I1). Here everything is
    computed in float32, so float16 is what float32 does with twice the memory. The exact form of the prompt that is
    being read counts too; it matters less the more conversations there are."""
    most = {}
    limit = 80 * 256 * model("wide_llama").sizes.exact_token_bytes // 2
    for packing, memory in (("exact", 2 * limit), ("int8", limit)):
        loaded = model("wide_llama") if packing == "int8" else kept_as(model("wide_llama"), KvFormat(native=True))
        driven = Driver(loaded, max_batch=160, max_chunk=128, limit_bytes=memory)
        for number in range(150):
            driven.submit(request(f"r{number}", prompt(100, seed=number), 150))
        running: list[int] = []
        driven.run(lambda turn, driven=driven, running=running: running.append(len(driven.scheduler.rows)))
        assert driven.beat.counters.preemptions == 0
        most[packing] = max(running)
    assert most["int8"] >= 1.8 * most["exact"], most


@pytest.mark.parametrize(
    ("kind", "word"), [("deepseek_v2", "kv_"), ("mamba", "keeps no keys"), ("qwen3_next", "kv_group_size")]
)
def test_models_that_cannot_be_packed_say_so(kind: str, word: str) -> None:
    """Latent and recurrent caches: an error that names the setting, not a silent fall-back."""
    packing = KvPacking(bits=8, group_size=32)
    folder = save(kind, Path(mkdtemp()))
    with pytest.raises(ModelError, match=word) as caught:
        open_model(folder, packing=packing)
    assert "kv_" in str(caught.value)


def test_a_group_that_does_not_divide_a_head() -> None:
    with pytest.raises(ModelError, match=r"kv_group_size: 128 does not divide.*\(64\); allowed: 32, 64"):
        open_model(save("wide_llama", Path(mkdtemp())), packing=KvPacking(bits=8, group_size=128))


def test_formats_do_not_share_blocks() -> None:
    """(E1) What one wrote another cannot read."""
    kept = {packing: model("wide_llama", packing).blocks for packing in PACKINGS}
    kept["native"] = model("wide_llama", "int8", native=False).blocks
    kept["exact"] = kept_as(model("wide_llama"), KvFormat()).blocks
    names = [(blocks.kept_as, blocks.layers) for blocks in kept.values() if isinstance(blocks, BlockFormat)]
    assert len(set(names)) == len(kept)


@pytest.mark.parametrize(
    "which",
    [
        ("wide_llama", "int8", True),
        ("wide_gemma3_text", "int4", True),
        ("wide_gemma3_text", "rotated", True),
        ("wide_gemma3_text", "rotated", False),
    ],
    ids=str,
)
def test_selfcheck_agrees_with_what_was_packed(which: Which) -> None:
    """(E9) A block computed afresh is packed afresh: near enough, and a wrong one is not."""
    cached = prefix_cache(model(*which), selfcheck=1)
    tokens = prompt(3 * BLOCK + 40)
    for _ in range(3):
        ask(which, cached, tokens)
    assert cached.counters.checked > 0
    assert cached.counters.mismatches == 0
