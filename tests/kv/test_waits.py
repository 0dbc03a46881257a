"""How often the host waits for the device while rows come, go and grow: for many leaves at once, whatever their number.

A wait costs a GPU some tenths of a millisecond; one per layer would be felt by every row at each arrival."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest
from tiny_models import model as tiny_model
from tiny_models import prompt as some_tokens

from millpond.kv import arena as arenas
from millpond.kv.arena import Arena
from millpond.kv.format import KvFormat
from millpond.kv.leaf import LeafRow
from millpond.kv.slots import KvSpec, RingSpec
from millpond.model.prompt import new_prompt
from millpond.types import KvPacking

LAYERS = 12
PACKED = KvFormat(KvPacking(bits=8, group_size=32))


def specs(form: KvFormat) -> list[KvSpec]:
    sizes = (2, 32, 32, mx.float16, form)
    return [*(KvSpec(*sizes) for _ in range(LAYERS - 2)), *(RingSpec(*sizes, window=8) for _ in range(2))]


def prompt(spec: KvSpec, length: int) -> LeafRow:
    kept = min(length, spec.window) if isinstance(spec, RingSpec) else length
    sides = (mx.ones((1, 2, kept, 32), dtype=mx.float16), mx.ones((1, 2, kept, 32), dtype=mx.float16))
    return LeafRow(spec.format.pack(*sides) if spec.format.packs else sides)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Tells how often somebody has waited since it was asked before."""
    seen = 0
    for name in ("eval", "synchronize"):
        original = getattr(mx, name)

        def counting(*arrays: object, _original: Callable[..., None] = original) -> None:
            nonlocal seen
            seen += 1
            _original(*arrays)

        monkeypatch.setattr(mx, name, counting)

    def since() -> int:
        nonlocal seen
        found, seen = seen, 0
        return found

    return since


@pytest.mark.parametrize("form", [KvFormat(), PACKED])
def test_rows_that_come_go_and_grow(form: KvFormat, waits: Callable[[], int]) -> None:
    held = specs(form)
    arena = Arena(held)
    for name in "abc":
        waits()
        arena.put(name, [prompt(spec, 40) for spec in held], 40)
        assert waits() <= 2, "one for room, one for what is copied"
    arena.release("a")
    assert waits() == 2, "one before the last row is written over the first, one after it"
    arena.release("b", scrub=True)
    assert waits() <= 1
    arena.put("d", [prompt(spec, 400) for spec in held], 400)
    assert waits() <= 2
    arena.trim()
    assert waits() <= 1


def test_what_is_copied_at_once_is_bounded(monkeypatch: pytest.MonkeyPatch, waits: Callable[[], int]) -> None:
    """Long rows are copied a few layers at a time: what is there twice meanwhile must not be the whole arena."""
    held = specs(KvFormat())
    row_bytes = 256 * 2 * 64 * 2
    monkeypatch.setattr(arenas, "AT_ONCE_BYTES", 3 * row_bytes)
    arena = Arena(held)
    waits()
    arena.put("a", [prompt(spec, 200) for spec in held], 200)
    assert LAYERS // 4 <= waits() <= LAYERS // 2
    arena.put("b", [prompt(spec, 200) for spec in held], 200)
    waits()
    arena.release("a")
    assert LAYERS // 3 <= waits() // 2 <= LAYERS // 2


def test_a_prompt_that_is_packed(waits: Callable[[], int]) -> None:
    """All leaves of a chunk are packed together."""
    served = tiny_model("wide_llama")
    reading = new_prompt(served.network, KvFormat(KvPacking(bits=8, group_size=64)))
    for start, end in ((0, 64), (64, 100)):
        logits = served.network(mx.array([some_tokens(100)[start:end]]), cache=reading.caches)
        mx.eval(logits)
        waits()
        reading.packed_after(start, end - start)
        assert waits() == 1
