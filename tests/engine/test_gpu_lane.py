"""What a GPU runs, beside mlx-lm, in the formats that weights come in.

Every branch for a GPU is taken, on the CPU device; the arithmetic of a real one is for a machine that has it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from engine_driver import Driver, disk_cache, prefix_cache, reference, request, settle
from gpu_lane import FORMATS, TIE, as_on_a_gpu, assert_same_or_near, save_as
from tiny_models import CONFIGS_MIXED, CONFIGS_WIDE, SLOT_KINDS, VOCAB

from millpond.model import cuda_attention
from millpond.model.load import WIDTH_STEP
from millpond.model.opened import OpenModel, open_model
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
EACH_ONCE = [*SMALL, ("gemma3_text", "q8")]
"""Every kind and every format, but not each with each."""
LENGTHS = (5, 33, 70, 150, 200)
PACKED_TIE = 0.1
"""Of the spread of logits, where packed numbers were rounded once more."""
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
    """All at once, greedy; none may fail. What is rounded depends on shapes here, and those must not on time."""
    driven = Driver(opened.model, capabilities=opened.capabilities, max_itl_ms=60_000, **options)  # type: ignore[arg-type]
    for name, tokens in prompts.items():
        driven.submit(request(name, tokens, most))
    driven.run()
    assert not [outcome.failure for outcome in driven.outcomes.values() if outcome.failure]
    return driven


def assert_near(
    opened: OpenModel, prompts: dict[str, list[int]], ours: Driver, expected: Driver, tie: float = TIE
) -> None:
    for name, tokens in prompts.items():
        got, want = (driven.outcomes[name].tokens for driven in (ours, expected))
        assert_same_or_near(opened.model.network, tokens, got, want, tie)


@pytest.mark.often("llama-q4", "gemma3_text")
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


@pytest.mark.often("gemma3_text")
@pytest.mark.parametrize("opened", EACH_ONCE, indirect=True, ids="-".join)
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


@pytest.mark.often("llama-q4")
@pytest.mark.parametrize("opened", EACH_ONCE, indirect=True, ids="-".join)
def test_draft_tokens_change_nothing(opened: OpenModel) -> None:
    repeated = {f"x{count}": ([11, 12, 13, 14, 15, 16, 17] * 12)[: 40 + count] for count in (0, 7, 14)}
    eager = SpecSettings(default=Speculation(mode=SpecMode.NGRAM, tokens=5, adaptive=False))
    guessed = answers(opened, repeated, 2 * ANSWER, spec=eager)
    assert sum(outcome.accepted + outcome.rejected for outcome in guessed.outcomes.values()) > 0
    assert_near(opened, repeated, guessed, answers(opened, repeated, 2 * ANSWER))


@pytest.mark.slow
@pytest.mark.parametrize("opened", EACH_ONCE, indirect=True, ids="-".join)
def test_preempted_requests_go_on_where_they_were(opened: OpenModel) -> None:
    prompts = {name: tokens[:70] for name, tokens in crowd().items() if len(tokens) >= 70}
    sizes = opened.model.sizes
    limit = 1500 * sizes.token_bytes + 3 * sizes.row_bytes
    tight = answers(opened, prompts, 230, limit_bytes=limit, max_chunk=64)
    assert tight.beat.counters.preemptions > 0
    assert_near(opened, prompts, tight, answers(opened, prompts, 230))


@pytest.mark.often("True")
@pytest.mark.parametrize("metal", [False, True])
def test_rows_of_different_lengths_need_no_kernel_of_their_own(
    metal: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On CUDA the fused kernel would be made for each width; plain products want even ones. Metal's takes any, and no
    column too many."""
    folder = save_as("llama", "bf16", tmp_path / "model")
    as_on_a_gpu(monkeypatch, metal=metal)
    opened = open_model(folder)
    fused, plain = set[int](), set[int]()

    def spied(function: Callable[..., mx.array], widths: set[int]) -> Callable[..., mx.array]:
        def attend(queries: mx.array, keys: mx.array, *rest: object, **named: object) -> mx.array:
            if isinstance(named.get("mask", rest[-1] if rest else None), mx.array):
                widths.add(int(keys.shape[2]))
            return function(queries, keys, *rest, **named)

        return attend

    prompts = {name: tokens for name, tokens in crowd().items() if len(tokens) > 100}
    with monkeypatch.context() as patch:
        patch.setattr(mx.fast, "scaled_dot_product_attention", spied(mx.fast.scaled_dot_product_attention, fused))
        patch.setattr(cuda_attention, "plain_attention", spied(cuda_attention.plain_attention, plain))
        found = answers(opened, prompts, 80)
    if metal:
        assert len(fused) >= 70
        assert not plain
    else:
        assert not fused
        assert 2 <= len(plain) <= 5
        assert all(width % WIDTH_STEP == 0 for width in plain)
    for name, tokens in prompts.items():
        expected = reference(opened.model.network, tokens, 80)
        assert_same_or_near(opened.model.network, tokens, found.outcomes[name].tokens, expected)


PACKINGS = {
    "int8": KvPacking(bits=8),
    "int4": KvPacking(bits=4),
    "rotated": KvPacking(bits=4, start=64, rotated=True),
}
PACKED = [pytest.param((kind, "bf16"), name, id=f"{kind}-{name}") for kind in CONFIGS_WIDE for name in PACKINGS]


@pytest.mark.often("wide_gemma3_text-int4", "wide_llama-rotated")
@pytest.mark.parametrize("metal", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "packing"), PACKED)
def test_packed_keys_and_values(
    kind: tuple[str, str], packing: str, metal: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model in bfloat16 is not refused for its own rounding; a hit is a miss."""
    folder = save_as(*kind, tmp_path / "model")
    as_on_a_gpu(monkeypatch, metal=metal)
    opened = open_model(folder, packing=PACKINGS[packing])
    assert opened.capabilities.slots, opened.capabilities.reason
    cache = prefix_cache(opened.model)
    miss, hit = (answers(opened, crowd(), cache=cache) for _ in range(2))
    for name, outcome in miss.outcomes.items():
        assert hit.outcomes[name].tokens == outcome.tokens
    assert hit.outcomes[f"r{max(LENGTHS)}"].prefix is not None


@pytest.mark.slow
def test_packed_where_no_product_takes_packed_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On CUDA, where MLX multiplies with packed numbers of a few shapes only: they are unpacked, also behind tokens
    that are kept as computed, and answers are those of products that take them."""
    folder = save_as("wide_llama", "bf16", tmp_path / "model")
    for packing in (KvPacking(bits=8), KvPacking(bits=8, start=64), PACKINGS["rotated"]):
        as_on_a_gpu(monkeypatch, metal=True)
        usual = open_model(folder, packing=packing)
        expected = answers(usual, crowd())
        as_on_a_gpu(monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(mx, "quantized_matmul", None)
            opened = open_model(folder, packing=packing)
            assert opened.capabilities.slots, opened.capabilities.reason
            found = answers(opened, crowd())
        assert_near(opened, crowd(), found, expected, PACKED_TIE)
