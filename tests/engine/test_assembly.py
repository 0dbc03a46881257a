"""(F8) A lone request's prefix goes into its row while the disk still reads; who comes in between changes nothing."""

from __future__ import annotations

import queue
from pathlib import Path

import mlx.core as mx
import pytest
from engine_driver import Driver, disk_cache, prefix_cache, request, settle
from tiny_models import opened, prompt

from millpond.model.assembly import Assembly
from millpond.model.blocks import ReadRecord
from millpond.model.opened import OpenModel
from millpond.prefix.cache import PrefixCache
from millpond.prefix.disk import reader
from millpond.prefix.disk.events import Loaded, Opened, SsdEvent
from millpond.prefix.disk.tier import SsdTier
from millpond.prefix.match import Part
from millpond.settings import PrefixSettings, SavePolicy
from millpond.types import UNPACKED, KvPacking

KINDS = {
    "llama": ("llama", UNPACKED),
    "windows": ("gemma3_text", UNPACKED),
    "latent": ("deepseek_v2", UNPACKED),
    "states": ("qwen3_next", UNPACKED),
    "int8": ("wide_llama", KvPacking(bits=8)),
    "rotated": ("wide_llama", KvPacking(bits=4, start=64, rotated=True)),
    "rotated beside windows": ("wide_gemma3_text", KvPacking(bits=4, group_size=32, start=64, rotated=True)),
    "int8-start": ("wide_gemma3_text", KvPacking(bits=8, start=128)),
}
LENGTH = 390
ANSWER = 8
PATIENCE = 30.0


class SlowStart:
    """A server that has begun anew on a folder where a prompt is cached, and whose disk answers when it is told to."""

    def __init__(self, made: OpenModel, folder: Path, selfcheck: int = 0) -> None:
        self._told: queue.SimpleQueue[SsdEvent] = queue.SimpleQueue()
        cache = prefix_cache(made.model, selfcheck=selfcheck)
        self.ssd = SsdTier(
            folder, "0" * 64, PrefixSettings(cache_ssd=1 << 32, ssd_policy=SavePolicy.ALL), self._told.put
        )
        cache.attach(self.ssd, SavePolicy.ALL, lambda _start, tokens: tokens * 10.0)
        self.ssd.start()
        self.driver = Driver(made.model, capabilities=made.capabilities, cache=cache, ssd=self.ssd)
        event = self._told.get(timeout=PATIENCE)
        assert isinstance(event, Opened)
        self.driver.inbox.put(event)
        self.held: list[SsdEvent] = []

    def answer(self, most: int) -> None:
        """Let the disk answer so many reads, the engine taking a turn after each."""
        for _ in range(most):
            event = self._told.get(timeout=PATIENCE)
            self.driver.inbox.put(event)
            self.driver.engine.turn()
            assert isinstance(event, Loaded)

    def finish(self) -> None:
        """Answer what is left, and run until all requests have ended."""

        def pump(_turn: int) -> None:
            while not self._told.empty():
                self.driver.inbox.put(self._told.get())

        waiting = self.driver.prefixes
        while waiting.patience(0.0) is not None and self.driver.scheduler.running == 0:
            self.driver.inbox.put(self._told.get(timeout=PATIENCE))
            self.driver.engine.turn()
        self.driver.run(pump)
        self.ssd.close(PATIENCE)


@pytest.fixture(autouse=True)
def one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two readers may overtake each other."""
    monkeypatch.setattr(reader, "READERS", 1)


@pytest.fixture(params=list(KINDS))
def made(request: pytest.FixtureRequest) -> OpenModel:
    kind, packing = KINDS[request.param]
    return opened(kind, packing)


def stored(made: OpenModel, folder: Path, tokens: list[int]) -> list[int]:
    """Have the blocks of a prompt on disk; what it is answered."""
    cache, ssd, inbox = disk_cache(made.model, folder)
    driver = Driver(made.model, capabilities=made.capabilities, cache=cache, ssd=ssd, inbox=inbox)
    driver.submit(request("first", tokens, ANSWER))
    driver.run()
    settle(cache, inbox)
    ssd.close(PATIENCE)
    return driver.outcomes["first"].tokens


def from_memory(made: OpenModel, tokens: list[int], wanted: list[int]) -> list[int]:
    """The answer to ``wanted`` behind a prompt that is cached in memory."""
    cache = prefix_cache(made.model)
    for name, asked in (("first", tokens), ("then", wanted)):
        driver = Driver(made.model, capabilities=made.capabilities, cache=cache)
        driver.submit(request(name, asked, ANSWER))
        driver.run()
    return driver.outcomes["then"].tokens


@pytest.mark.often("-70")
@pytest.mark.parametrize("more", [0, 70])
def test_a_lone_prompt_is_put_together_while_the_disk_reads(
    more: int, made: OpenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and with something to compute behind it."""
    tokens = prompt(LENGTH)
    answer = stored(made, tmp_path, tokens)
    wanted = tokens + prompt(more)
    begun: list[int] = []
    put = Assembly.put

    def counted(self: Assembly, part: Part) -> None:
        begun.append(part.node.start)
        put(self, part)

    monkeypatch.setattr(Assembly, "put", counted)
    slow = SlowStart(made, tmp_path)
    slow.driver.submit(request("x", wanted, ANSWER))
    slow.driver.engine.turn()
    slow.answer(5)
    early = len(begun)
    assert early > 0, "nothing was put into place while the disk read on"
    assert slow.driver.prefixes.assembling_bytes > 0
    slow.finish()
    assert slow.driver.prefixes.assembling_bytes == 0
    found = slow.driver.outcomes["x"]
    assert found.prefix is not None
    assert found.prefix.disk >= LENGTH // 64 * 64
    assert found.tokens == (from_memory(made, tokens, wanted) if more else answer)


def test_who_goes_leaves_nothing(made: OpenModel, tmp_path: Path) -> None:
    tokens = prompt(LENGTH)
    stored(made, tmp_path, tokens)
    slow = SlowStart(made, tmp_path)
    slow.driver.submit(request("x", tokens, ANSWER))
    slow.driver.engine.turn()
    slow.answer(5)
    assert slow.driver.prefixes.assembling_bytes > 0
    slow.driver.cancel("x")
    slow.driver.engine.turn()
    assert slow.driver.prefixes.assembling_bytes == 0
    slow.finish()


def test_who_comes_is_served(made: OpenModel, tmp_path: Path) -> None:
    """Another request, in the middle of it: both are answered as they would be."""
    tokens = prompt(LENGTH)
    answer = stored(made, tmp_path, tokens)
    slow = SlowStart(made, tmp_path)
    slow.driver.submit(request("x", tokens, ANSWER))
    slow.driver.engine.turn()
    slow.answer(5)
    slow.driver.submit(request("y", prompt(40, seed=9), 3))
    slow.driver.engine.turn()
    assert slow.driver.prefixes.assembling_bytes == 0, "rows come first"
    slow.finish()
    assert slow.driver.outcomes["x"].tokens == answer


def test_what_cannot_be_put_together_ahead_is_when_it_begins(
    made: OpenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure beside the disk is nobody's."""
    tokens = prompt(LENGTH)
    answer = stored(made, tmp_path, tokens)
    put, calls = Assembly.put, 0

    def failing(self: Assembly, part: Part) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("no memory for that")
        put(self, part)

    monkeypatch.setattr(Assembly, "put", failing)
    slow = SlowStart(made, tmp_path)
    slow.driver.submit(request("x", tokens, ANSWER))
    slow.driver.engine.turn()
    slow.answer(5)
    assert calls >= 2
    assert slow.driver.prefixes.assembling_bytes == 0
    slow.finish()
    assert slow.driver.outcomes["x"].tokens == answer


def test_what_is_computed_afresh_leaves_nothing(made: OpenModel, tmp_path: Path) -> None:
    """A request that is to be compared with what is cached begins at its beginning."""
    tokens = prompt(LENGTH)
    stored(made, tmp_path, tokens)
    slow = SlowStart(made, tmp_path, selfcheck=1)
    slow.driver.submit(request("x", tokens, ANSWER))
    slow.driver.engine.turn()
    slow.finish()
    assert slow.driver.prefixes.assembling_bytes == 0
    found = slow.driver.outcomes["x"].prefix
    assert found is not None
    assert found.disk == 0


def test_nothing_is_put_together_where_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what cached blocks take already."""
    made = opened("llama")
    tokens = prompt(LENGTH)
    answer = stored(made, tmp_path, tokens)
    monkeypatch.setattr(PrefixCache, "nbytes", property(lambda _: 1 << 30))
    slow = SlowStart(made, tmp_path)
    slow.driver.submit(request("x", tokens, ANSWER))
    slow.driver.engine.turn()
    slow.answer(5)
    assert slow.driver.prefixes.assembling_bytes == 0
    slow.finish()
    assert slow.driver.outcomes["x"].tokens == answer


def test_arrays_are_made_once_of_each_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each layer that looks into it."""
    made = opened("gemma3_text")
    tokens = prompt(LENGTH)
    answer = stored(made, tmp_path, tokens)
    copied: list[int] = []
    arrays = ReadRecord.arrays.fget
    assert arrays is not None

    def counted(self: ReadRecord) -> tuple[mx.array, ...]:
        copied.append(id(self))
        return arrays(self)

    monkeypatch.setattr(ReadRecord, "arrays", property(counted))
    slow = SlowStart(made, tmp_path)
    slow.driver.submit(request("x", tokens, ANSWER))
    slow.driver.engine.turn()
    slow.finish()
    assert slow.driver.outcomes["x"].tokens == answer
    assert copied
    assert len(copied) == len(set(copied))
