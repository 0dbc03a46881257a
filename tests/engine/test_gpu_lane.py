"""What a GPU runs, beside mlx-lm, in the formats that weights come in.

Every branch for a GPU is taken, on the CPU device; the arithmetic of a real one is for a machine that has it."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import mlx.core as mx
import pytest
from engine_driver import Driver, disk_cache, prefix_cache, reference, request, settle
from gpu_lane import FORMATS, as_on_a_gpu, assert_same_or_near, save_as
from tiny_models import CONFIGS_MIXED, CONFIGS_WIDE, SLOT_KINDS, VOCAB

from millpond.model.opened import OpenModel, open_model
from millpond.native import device
from millpond.types import KvPacking, SpecMode, SpecSettings, Speculation

SMALL = [
    *(("llama", "q4"), ("qwen3", "mxfp4"), ("gemma3_text", "bf16"), ("deepseek_v2", "bf16"), ("llama", "nvfp4")),
    ("qwen3_moe", "q4"),
]
CASES = [
    pytest.param((kind, stored), id=f"{kind}-{stored}", marks=[] if (kind, stored) in SMALL else pytest.mark.slow)
    for kind, stored in itertools.product((*SLOT_KINDS, *CONFIGS_MIXED), FORMATS)
    if kind not in CONFIGS_MIXED or stored != "bf16"  # MLX's gathered product knows float32 only, on a CPU
]
LENGTHS = (5, 33, 70, 150, 200)
ANSWER = 16


@pytest.fixture
def opened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> OpenModel:
    kind, stored = request.param
    folder = save_as(kind, stored, tmp_path / "model")
    as_on_a_gpu(monkeypatch)
    made = open_model(folder)
    assert not made.model.on_cpu
    assert made.model.dtype == "bfloat16"
    assert made.capabilities.slots, made.capabilities.reason
    assert not made.capabilities.uncached
    return made


def crowd(seed: int = 3) -> dict[str, list[int]]:
    """Prompts of different lengths."""
    chooser = random.Random(seed)
    return {f"r{length}": [chooser.randrange(VOCAB) for _ in range(length)] for length in LENGTHS}


def answers(opened: OpenModel, prompts: dict[str, list[int]], most: int = ANSWER, **options: object) -> Driver:
    """All at once, greedy; none may fail."""
    driven = Driver(opened.model, capabilities=opened.capabilities, **options)  # type: ignore[arg-type]
    for name, tokens in prompts.items():
        driven.submit(request(name, tokens, most))
    driven.run()
    assert not [outcome.failure for outcome in driven.outcomes.values() if outcome.failure]
    return driven


def assert_near(opened: OpenModel, prompts: dict[str, list[int]], ours: Driver, expected: Driver) -> None:
    for name, tokens in prompts.items():
        got, want = (driven.outcomes[name].tokens for driven in (ours, expected))
        assert_same_or_near(opened.model.network, tokens, got, want)


@pytest.mark.parametrize("opened", CASES, indirect=True)
def test_a_batch_answers_what_mlx_lm_does(opened: OpenModel) -> None:
    """Greedy, in ragged rows and alone."""
    prompts = crowd()
    batch = answers(opened, prompts)
    for name, tokens in prompts.items():
        expected = reference(opened.model.network, tokens, ANSWER)
        assert_same_or_near(opened.model.network, tokens, batch.outcomes[name].tokens, expected)
        alone = answers(opened, {name: tokens})
        assert_same_or_near(opened.model.network, tokens, alone.outcomes[name].tokens, expected)


@pytest.mark.parametrize("opened", CASES, indirect=True)
def test_a_hit_is_a_miss(opened: OpenModel, tmp_path: Path) -> None:
    """From memory, and from the SSD after a restart: the very same tokens, as the shapes of all forwards are."""
    prompts = crowd()
    cache, ssd, inbox = disk_cache(opened.model, tmp_path / "ssd")
    miss = answers(opened, prompts, cache=cache, ssd=ssd, inbox=inbox)
    hit = answers(opened, prompts, cache=cache, ssd=ssd, inbox=inbox)
    settle(cache, inbox)
    ssd.close(30)
    cache, ssd, inbox = disk_cache(opened.model, tmp_path / "ssd")
    read = answers(opened, prompts, cache=cache, ssd=ssd, inbox=inbox)
    ssd.close(30)
    for name, outcome in miss.outcomes.items():
        assert hit.outcomes[name].tokens == outcome.tokens, name
        assert read.outcomes[name].tokens == outcome.tokens, name
    longest = f"r{max(LENGTHS)}"
    for driven, place in ((hit, "memory"), (read, "disk")):
        assert getattr(driven.outcomes[longest].prefix, place) >= max(LENGTHS) // 64 * 64


@pytest.mark.parametrize("opened", CASES, indirect=True)
def test_draft_tokens_change_nothing(opened: OpenModel) -> None:
    repeated = {f"x{count}": ([11, 12, 13, 14, 15, 16, 17] * 12)[: 40 + count] for count in (0, 7, 14)}
    eager = SpecSettings(default=Speculation(mode=SpecMode.NGRAM, tokens=5, adaptive=False))
    guessed = answers(opened, repeated, 2 * ANSWER, spec=eager)
    assert sum(outcome.accepted + outcome.rejected for outcome in guessed.outcomes.values()) > 0
    assert_near(opened, repeated, guessed, answers(opened, repeated, 2 * ANSWER))


@pytest.mark.parametrize("opened", CASES, indirect=True)
def test_preempted_requests_go_on_where_they_were(opened: OpenModel) -> None:
    prompts = {name: tokens[:70] for name, tokens in crowd().items() if len(tokens) >= 70}
    sizes = opened.model.sizes
    limit = 1500 * sizes.token_bytes + 3 * sizes.row_bytes
    tight = answers(opened, prompts, 230, limit_bytes=limit, max_chunk=64)
    assert tight.beat.counters.preemptions > 0
    assert_near(opened, prompts, tight, answers(opened, prompts, 230))


@pytest.mark.parametrize("cuda", [True, False])
def test_widths_that_a_graph_is_compiled_for(cuda: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On CUDA masked attention over rows of different lengths has few widths, and on Metal no column too many."""
    folder = save_as("llama", "bf16", tmp_path / "model")
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(device, "on_metal", lambda: not cuda)
    opened = open_model(folder)
    attention, widths = mx.fast.scaled_dot_product_attention, set()

    def attend(queries: mx.array, keys: mx.array, *rest: object, **named: object) -> mx.array:
        if isinstance(named["mask"], mx.array):
            widths.add(int(keys.shape[2]))
        return attention(queries, keys, *rest, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attend)
    prompts = {name: tokens for name, tokens in crowd().items() if len(tokens) > 100}
    found = answers(opened, prompts, 80)
    assert (widths <= {256, 512}) == cuda
    assert len(widths) >= (1 if cuda else 70)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    for name, tokens in prompts.items():
        expected = reference(opened.model.network, tokens, 80)
        assert_same_or_near(opened.model.network, tokens, found.outcomes[name].tokens, expected)


PACKED = [pytest.param((kind, "bf16"), bits, id=f"{kind}-int{bits}") for kind in CONFIGS_WIDE for bits in (8, 4)]


@pytest.mark.parametrize(("kind", "bits"), PACKED)
def test_packed_keys_and_values(
    kind: tuple[str, str], bits: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model in bfloat16 is not refused for its own rounding; a hit is a miss."""
    folder = save_as(*kind, tmp_path / "model")
    as_on_a_gpu(monkeypatch)
    opened = open_model(folder, packing=KvPacking(bits=bits, group_size=64))
    assert opened.capabilities.slots, opened.capabilities.reason
    cache = prefix_cache(opened.model)
    miss, hit = (answers(opened, crowd(), cache=cache) for _ in range(2))
    for name, outcome in miss.outcomes.items():
        assert hit.outcomes[name].tokens == outcome.tokens
    assert hit.outcomes[f"r{max(LENGTHS)}"].prefix is not None


def test_packed_where_products_take_no_gaps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on CUDA, whose packed product wants its numbers without gaps: they are copied, and answers are as usual."""
    folder = save_as("wide_llama", "bf16", tmp_path / "model")
    as_on_a_gpu(monkeypatch)
    packing = KvPacking(bits=8, group_size=64)
    usual = open_model(folder, packing=packing)
    assert not usual.capabilities.contiguous
    product = mx.quantized_matmul
    refused = 0

    def strict(x: mx.array, w: mx.array, *rest: object, **named: object) -> mx.array:
        nonlocal refused
        if not memoryview(w).c_contiguous:
            refused += 1
            raise ValueError("[quantized_matmul] weights must be contiguous")
        return product(x, w, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(mx, "quantized_matmul", strict)
    opened = open_model(folder, packing=packing)
    assert opened.capabilities.contiguous
    assert refused > 0
    refused = 0
    found = answers(opened, crowd())
    monkeypatch.undo()
    as_on_a_gpu(monkeypatch)
    expected = answers(usual, crowd())
    assert refused == 0
    assert_near(opened, crowd(), found, expected)
