"""Keys and values in 8 bits where a model does its own arithmetic with them, and beside states (I1)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from architectures import folders
from engine_driver import Driver, assert_right, prefix_cache, request

from millpond.model.load import ModelError, load
from millpond.model.opened import OpenModel, open_model
from millpond.types import KvPacking

ANSWER = 12
LENGTHS = (5, 70, 150)
OWN = ("stablelm", "deepseek_v3", "gpt_oss", "mimo_v2_flash", "gemma4", "gemma2", "plamo")
"""Their keys and values are of different sizes, latent, shared by layers, or multiplied in a way of their own."""
STATES = ("qwen3_5", "lfm2", "nemotron_h", "kimi_linear", "falcon_h1", "deepseek_v32")


@cache
def opened(name: str) -> OpenModel:
    packing = KvPacking(bits=8, group_size=32)
    return open_model(folders.save(name, Path(mkdtemp())), packing=packing)


@pytest.mark.often("stablelm", "gpt_oss", "qwen3_5")
@pytest.mark.parametrize("name", [*OWN, *STATES])
def test_rows_of_different_lengths(name: str) -> None:
    """Each as the sequence alone whose keys and values are packed at the same places; again from the prefix cache."""
    found = opened(name)
    model, cached = found.model, prefix_cache(found.model)
    assert model.form.packs
    for _ in range(2):
        driven = Driver(model, capabilities=found.capabilities, cache=cached)
        # Each begins with a token of its own: what one finds of another's would be packed where it ends.
        prompts = {
            str(length): [length * place % folders.VOCAB for place in range(1, length + 1)] for length in LENGTHS
        }
        for asked, tokens in prompts.items():
            driven.submit(request(asked, tokens, ANSWER))
        driven.run()
        for asked, tokens in prompts.items():
            assert_right(model, tokens, driven.outcomes[asked].tokens)
    assert cached.counters.hits >= len(LENGTHS)


@pytest.mark.parametrize("name", ["gemma4", "deepseek_v3", "gpt_oss"])
def test_they_take_half_of_half_precision(name: str) -> None:
    """Of float32 here: 8 bits, and a scale and a bias for each group."""
    plain = load(folders.save(name, Path(mkdtemp())), 0, lambda _done: None)
    assert opened(name).model.sizes.token_bytes < 0.32 * plain.sizes.token_bytes
    assert opened(name).capabilities.unpacked


def test_what_no_group_divides_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"does not divide this model's head dimensions \(80\); no group has fewer than"
    ):
        load(folders.save("phi", tmp_path), 0, lambda _done: None, KvPacking(bits=8, group_size=32))
