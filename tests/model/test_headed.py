"""What an MTP head guesses from rows is what it guesses in a fresh pass over the same tokens, whatever rows have gone
through (N4)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gpu_lane import as_on_a_gpu
from mtp_models import HEADED, WITH_STATES, opened_headed, save_headed
from tiny_models import VOCAB, prompt

from millpond.model.blocks import BlockFormat, cut_prompt
from millpond.model.forwards import prefill, prefill_together
from millpond.model.headed import WithHead, guess
from millpond.model.lanes import SlotsLane
from millpond.model.leaves import CARRIED
from millpond.model.load import LoadedModel
from millpond.model.mtp import body_of
from millpond.model.opened import open_model
from millpond.model.prompt import new_prompt
from millpond.model.upstream import KVCache, new_cache
from millpond.prefix.keys import pack
from millpond.prefix.match import Part, RestorePlan
from millpond.prefix.records import BLOCK, Kind
from millpond.prefix.tree import Tree
from millpond.types import KvPacking

COUNT = 3
NEAR = 1e-4
"""Of the spread of logits, what the kernels of rows and of single sequences may part them by."""


def model_of(kind: str, packing: KvPacking | None = None) -> LoadedModel:
    return opened_headed(kind, packing or KvPacking()).model


def network_of(model: LoadedModel) -> WithHead:
    assert model.headed is not None
    return model.headed


def alone(network: WithHead, tokens: Sequence[int], newest: int) -> tuple[list[int], list[mx.array]]:
    """Guesses behind a sequence from nothing: the model reads all tokens, the head all pairs, and then its own."""
    given = mx.array([list(tokens)])
    hidden = body_of(network.trunk)(given, cache=new_cache(network.trunk))
    before = mx.concatenate([mx.zeros_like(hidden[:, :1]), hidden[:, :-1]], axis=1)
    keys = KVCache()
    network.head(before, network.embedded(given), keys)
    hidden, token, guesses, logits = hidden[:, -1:], newest, [], []
    for _ in range(COUNT):
        hidden = network.head(hidden, network.embedded(mx.array([[token]])), keys)
        logits.append(network.logits(hidden)[0, -1])
        token = int(mx.argmax(logits[-1]).item())
        guesses.append(token)
    return guesses, logits


def guessed(network: WithHead, lane: SlotsLane, newest: Sequence[int]) -> tuple[list[list[int]], list[mx.array]]:
    """Of each row the greedy guesses, and logits [rows, vocab] of each place."""
    tokens: list[mx.array] = []
    logits: list[mx.array] = []

    def draw(found: mx.array, place: int) -> mx.array:
        assert place == len(tokens)
        logits.append(found)
        tokens.append(mx.argmax(found, axis=-1).astype(mx.int32))
        return tokens[-1]

    guess(network, lane, mx.array(list(newest), dtype=mx.int32), COUNT, draw)
    return np.array(mx.stack(tokens, axis=1)).tolist(), logits


def assert_same(network: WithHead, lane: SlotsLane, rows: Sequence[Sequence[int]], newest: Sequence[int]) -> int:
    """How many guesses were compared: those behind the same ones."""
    found, logits = guessed(network, lane, newest)
    compared = 0
    for row, tokens in enumerate(rows):
        expected, alone_logits = alone(network, tokens, newest[row])
        assert found[row] == expected
        for place in range(COUNT):
            spread = (alone_logits[place].max() - alone_logits[place].min()).item()
            assert mx.abs(logits[place][row] - alone_logits[place]).max().item() < NEAR * spread
            compared += 1
    return compared


@pytest.mark.parametrize("kind", HEADED)
def test_guesses_are_those_of_a_fresh_pass(kind: str) -> None:
    """Rows join, are read in one chunk or two, keep any part of what was verified, and leave; draft tokens that
    nobody kept leave nothing behind."""
    check_a_story(model_of(kind))


@pytest.mark.parametrize("kind", ["qwen3_5", "deepseek_v3"])
def test_the_same_without_what_is_computed_in_c(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_headed(kind, tmp_path)
    as_on_a_gpu(monkeypatch)
    opened = open_model(folder, head=True)
    assert not opened.capabilities.native
    check_a_story(opened.model)


def check_a_story(model: LoadedModel) -> None:
    network, lane = network_of(model), model.slots_lane()
    chooser, compared = random.Random(1), 0
    rows: dict[str, list[int]] = {}
    for step in range(14):
        if len(rows) < 4 and chooser.random() < 0.7:
            tokens = [chooser.randrange(VOCAB) for _ in range(chooser.randint(2, 50))]
            read, half = new_prompt(network, model.form), max(1, len(tokens) // 2)
            for chunk in (tokens[:half], tokens[half:]):
                prefill(network, read, chunk)
            lane.adopt(str(step), read)
            rows[str(step)] = tokens
        names = lane.batch.names
        if not names:
            continue
        newest = [chooser.randrange(VOCAB) for _ in names]
        compared += assert_same(network, lane, [rows[name] for name in names], newest)
        found, _ = guessed(network, lane, newest)
        verified = [[token, *drafts] for token, drafts in zip(newest, found, strict=True)]
        logits = lane.forward(network, mx.array(verified, dtype=mx.int32))
        mx.eval(logits)
        kept = [chooser.randint(1, COUNT + 1) for _ in names]
        lane.advance(kept)
        mx.eval(lane.arrays())
        for name, row, count in zip(names, verified, kept, strict=True):
            rows[name] += row[:count]
        if chooser.random() < 0.3:
            leaving = chooser.choice(names)
            lane.release(leaving)
            del rows[leaving]
    assert compared > 60


@pytest.mark.parametrize("kind", ["qwen3_5", "deepseek_v3", "mimo"])
def test_plain_steps_are_followed(kind: str) -> None:
    """What a step without draft tokens evaluates is enough for the head to have read along."""
    model = model_of(kind)
    network, lane, tokens = network_of(model), model.slots_lane(), prompt(30)
    read = new_prompt(network, model.form)
    prefill(network, read, tokens)
    lane.adopt("row", read)
    for token in prompt(12, 1):
        logits = lane.forward(network, mx.array([[token]], dtype=mx.int32))
        lane.advance([1])
        mx.eval(logits)
        tokens.append(token)
    assert_same(network, lane, [tokens], [5])


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe", "mimo"])
def test_prompts_that_are_read_together(kind: str) -> None:
    opened = opened_headed(kind)
    model = opened.model
    assert opened.capabilities.together
    assert CARRIED in model.kinds
    network, lane = network_of(model), model.slots_lane()
    texts = [prompt(length, length) for length in (9, 30, 17)]
    prompts = [new_prompt(network, model.form) for _ in texts]
    for share in (0.5, 1.0):
        chunks = [text[read.length : int(len(text) * share)] for text, read in zip(texts, prompts, strict=True)]
        prefill_together(network, prompts, chunks)
    for number, read in enumerate(prompts):
        lane.adopt(str(number), read)
    assert_same(network, lane, texts, [1, 2, 3])


def restored(model: LoadedModel, tokens: Sequence[int], *, whole: bool) -> SlotsLane:
    """A row whose prompt was cut into blocks and put together again."""
    assert isinstance(model.blocks, BlockFormat)
    network, tree = network_of(model), Tree("")
    original, node, parts = new_prompt(network, model.form), tree.root(""), []
    ends = [*range(BLOCK, len(tokens), BLOCK), len(tokens)]
    for start, end in zip([0, *ends], ends, strict=False):
        prefill(network, original, tokens[start:end])
        node = tree.add(node, pack(tokens[start:end]))
        for kind in model.blocks.layout.kinds:
            node.records[kind] = cut_prompt(model.blocks, original, start, end, kind)
        parts.append(Part(node, end - start))
    plan = RestorePlan(len(tokens), tuple(parts), ())
    lane = model.slots_lane()
    lane.adopt("row", model.blocks.restored(network, plan, len(tokens) + 2, whole=whole))
    return lane


@pytest.mark.parametrize("kind", HEADED)
def test_a_restored_prompt_needs_no_second_reading(kind: str) -> None:
    """Where the model has states the head goes on exactly as it was; elsewhere one key is a little off."""
    model = model_of(kind)
    network, tokens = network_of(model), prompt(150)
    assert isinstance(model.blocks, BlockFormat)
    assert model.blocks.layout.state == (kind in WITH_STATES)
    for whole in (False, True):
        lane = restored(model, tokens, whole=whole)
        if kind in WITH_STATES:
            assert_same(network, lane, [tokens], [5])
        else:
            held = lane.spans("row", 0, len(tokens), Kind.KV)[-2]
            keys = KVCache()
            hidden = body_of(network.trunk)(mx.array([tokens]), cache=new_cache(network.trunk))
            before = mx.concatenate([mx.zeros_like(hidden[:, :1]), hidden[:, :-1]], axis=1)
            network.head(before, network.embedded(mx.array([tokens])), keys)
            assert np.allclose(np.array(held[0]), np.array(keys.keys[:, :, : len(tokens)]), atol=1e-4)
            lane.forward(network, mx.array([[5]], dtype=mx.int32))
            lane.advance([1])
            guessed(network, lane, [6])


def test_a_head_is_packed_as_its_model_is() -> None:
    model = model_of("qwen3_5", KvPacking(bits=8, group_size=32))
    network, tokens = network_of(model), prompt(90)
    assert model.form.packs
    read = new_prompt(network, model.form)
    prefill(network, read, tokens)
    lane = model.slots_lane()
    lane.adopt("row", read)
    [*_, keys, carried] = lane.slots
    assert len(keys.arrays) == 6
    assert len(carried.arrays) == 1
    _, logits = guessed(network, lane, [5])
    _, expected = alone(network, tokens, 5)
    spread = (expected[0].max() - expected[0].min()).item()
    assert mx.abs(logits[0][0] - expected[0]).max().item() < 0.1 * spread
