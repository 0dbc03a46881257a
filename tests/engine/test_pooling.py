"""Vectors of prompts: those of the hidden states that the network itself has, whatever else runs beside them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from embedding_model import NORMALIZE, POOLING, TRANSFORMER, declare
from engine_driver import Driver, prefix_cache, reference, request
from numpy.typing import NDArray
from tiny_models import CONFIGS, CONTEXT, STATE_KINDS, model, prompt, save

from millpond.engine.prepare import OpenModel, open_model
from millpond.model.load import LoadedModel
from millpond.model.upstream import new_cache
from millpond.types import Finish, Request

KINDS = [kind for kind in CONFIGS if kind != "mamba"]
"""Mamba's body is called otherwise."""


@cache
def opened(kind: str, mode: str) -> OpenModel:
    return open_model(declare(save(kind, Path(mkdtemp())), mode))


def embed(name: str, tokens: list[int]) -> Request:
    asked = request(name, [*tokens, tokens[-1]], 1)
    return msgspec.structs.replace(asked, pooled=True)


def expected(loaded: LoadedModel, tokens: list[int], mode: str) -> NDArray[np.float64]:
    """By one forward of the whole prompt."""
    network = loaded.network
    hidden = np.array(network.model(mx.array([tokens]), cache=new_cache(network))[0].astype(mx.float32))
    vector = hidden[-1] if mode == "lasttoken" else hidden.mean(axis=0)
    return vector.astype(np.float64) / float(np.linalg.norm(vector))


def vector(found: bytes | None) -> NDArray[np.float64]:
    assert found is not None
    return np.frombuffer(found, "<f4").astype(np.float64)


@pytest.mark.often("gemma3_text", "deepseek_v2-mean", "lfm2-last")
@pytest.mark.parametrize("mode", ["lasttoken", "mean_tokens"])
@pytest.mark.parametrize("kind", KINDS)
def test_of_all_lengths_beside_answers(kind: str, mode: str) -> None:
    """(M9) Chunk by chunk, in a batch with others, whose answers are as if nobody were there."""
    found = opened(kind, mode)
    driven = Driver(found.model, capabilities=found.capabilities, cache=prefix_cache(found.model), max_chunk=64)
    answered = prompt(40, seed=3)
    driven.submit(request("answer", answered, 12))
    lengths = (1, 2, 63, 64, 65, 150)
    for length in lengths:
        driven.submit(embed(f"v{length}", prompt(length)))
    driven.run()
    for length in lengths:
        outcome = driven.outcomes[f"v{length}"]
        assert (outcome.tokens, outcome.finish) == ([], Finish.STOP)
        got = vector(outcome.embedding)
        assert abs(float(np.linalg.norm(got)) - 1) < 1e-5
        assert float(got @ expected(found.model, prompt(length), mode)) > 1 - 1e-5
    assert driven.outcomes["answer"].tokens == reference(found.model.network, answered, 12)


def test_the_cache_is_neither_asked_nor_filled() -> None:
    """(M9) Its hidden states are not kept, so none can be left out."""
    found = opened("llama", "mean_tokens")
    cached = prefix_cache(found.model)
    tokens = prompt(150)
    for number in range(2):
        driven = Driver(found.model, capabilities=found.capabilities, cache=cached)
        driven.submit(embed("x", tokens))
        driven.run()
        report = driven.outcomes["x"].prefix
        assert report is not None
        assert (report.cached, report.end) == (0, "unwanted"), number
        assert float(vector(driven.outcomes["x"].embedding) @ expected(found.model, tokens, "mean_tokens")) > 1 - 1e-5
    assert cached.blocks == 0


def test_begun_again_when_memory_is_short() -> None:
    """(M9) What is read twice counts once."""
    found = opened("llama", "mean_tokens")
    tokens = prompt(200)
    driven = Driver(found.model, capabilities=found.capabilities, max_chunk=64)
    driven.submit(embed("x", tokens))
    begun = False

    def set_aside(_turn: int) -> None:
        nonlocal begun
        sequence = driven.engine._sequences.get("x")
        if sequence is not None and sequence.prompt is not None and sequence.prompt.length > 64 and not begun:
            begun = True
            driven.engine._executor.set_aside("x")
            driven.scheduler.requeue("x", len(sequence.tokens), 0.0)

    driven.run(set_aside)
    assert begun
    assert float(vector(driven.outcomes["x"].embedding) @ expected(found.model, tokens, "mean_tokens")) > 1 - 1e-5


def test_numbers_that_are_none_are_an_error_of_that_prompt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """(M9)"""
    found = opened("llama", "lasttoken")
    driven = Driver(found.model, capabilities=found.capabilities)
    from millpond.model import pooling

    honest = pooling.Pooled.vector
    calls: list[int] = []

    def vector_or_not(pooled: pooling.Pooled) -> bytes:
        calls.append(1)
        if len(calls) == 1:
            pooled._sum = mx.array([float("nan")] * 64)
        return honest(pooled)

    monkeypatch.setattr(pooling.Pooled, "vector", vector_or_not)
    driven.submit(embed("bad", prompt(10)))
    driven.submit(embed("good", prompt(11)))
    driven.submit(request("answer", prompt(12), 4))
    driven.run()
    failure = driven.outcomes["bad"].failure
    assert failure is not None
    assert "not finite" in failure.message
    assert driven.outcomes["good"].embedding is not None
    assert driven.outcomes["answer"].finish is Finish.LENGTH


@pytest.mark.parametrize("kind", ["llama", *STATE_KINDS])
def test_a_model_that_declares_none_refuses(kind: str) -> None:
    """(M9) A chat model has hidden states, too, that mean nothing by themselves."""
    driven = Driver(model(kind))
    driven.submit(embed("x", prompt(10)))
    driven.run()
    failure = driven.outcomes["x"].failure
    assert failure is not None
    assert "this model makes no embeddings: it declares no pooling" in failure.message


@pytest.mark.parametrize(
    ("modules", "mode", "why"),
    [
        ((TRANSFORMER, POOLING, {**NORMALIZE, "type": "sentence_transformers.models.Dense"}), "lasttoken", "Dense"),
        ((TRANSFORMER,), "lasttoken", "has Transformer;"),
        ({"a": 1}, "lasttoken", "no list of modules"),
        ((TRANSFORMER, {**POOLING, "path": "../x"}), "lasttoken", "not said"),
        ((TRANSFORMER, POOLING), "cls_token", "pooling_mode_cls_token; supported"),
        ((TRANSFORMER, POOLING), "nothing", "its pooling is not said"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, modules: object, mode: str, why: str) -> None:
    """(M9)"""
    loaded = open_model(declare(save("llama", tmp_path / "m"), mode, modules)).model
    assert isinstance(loaded.embedder, str)
    assert why in loaded.embedder


def test_too_long(tmp_path: Path) -> None:
    """(M9)"""
    found = opened("llama", "lasttoken")
    driven = Driver(found.model, capabilities=found.capabilities)
    driven.submit(embed("x", prompt(CONTEXT)))
    driven.run()
    assert driven.outcomes["x"].failure is not None
