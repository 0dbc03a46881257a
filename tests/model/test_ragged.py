"""Models that mlx-lm writes for rows of one length share the batch, and the probe knows why they would not."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from architectures import folders

from millpond.kv.rows import Forward
from millpond.model import ragged
from millpond.model.load import LoadedModel, load
from millpond.model.probe import probe

MENDED = ("gemma2", "minimax_m3_vl", "afm7", "llama4")


@cache
def folder(name: str) -> Path:
    return folders.save(name, Path(mkdtemp()))


def model(name: str) -> LoadedModel:
    return load(folder(name), 0, lambda _done: None)


@pytest.mark.often("gemma2", "llama4", "longcat_flash_ngram")
@pytest.mark.parametrize(
    "name", [*MENDED, "gemma3n", "gemma4", "nemotron-nas", "longcat_flash_ngram", "deepseek_v32", "glm_moe_dsa"]
)
def test_rows_of_different_lengths_share_a_forward(name: str) -> None:
    found = probe(model(name))
    assert (found.slots, found.reason, found.uncached) == (True, "", "")


@pytest.mark.often("gemma2")
@pytest.mark.parametrize("name", MENDED)
def test_as_mlx_lm_writes_them_they_run_solo(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is mended is needed, and the probe would notice that it is gone."""
    monkeypatch.setattr(ragged, "MENDS", {})
    found = probe(model(name))
    assert not found.slots
    assert found.reason


@pytest.mark.parametrize("length", [1, 3, 50])
def test_a_chunk_ends_where_all_chunks_end(length: int) -> None:
    """Positions [0, 16), [16, 32), ...: a token sees those of its own up to itself."""
    lengths, chunk, capacity = [length, 0, 37], 16, 16 + 32
    seen = Forward(lengths, 3).mask(chunk, capacity, chunked=True)
    assert seen is not None
    for row, held in enumerate(lengths):
        for place in range(3):
            position = held + place
            wanted = {each % capacity for each in range(position // chunk * chunk, position + 1)}
            assert {column for column in range(seen.shape[3]) if seen[row, 0, place, column].item()} == wanted


def test_only_this_network_is_mended() -> None:
    """What else is made of mlx-lm's file stays as it is, and a layer is mended once."""
    network = model("gemma2").network
    kinds = type(network.layers[0].self_attn).__mro__
    assert kinds[1].__module__ == "mlx_lm.models.gemma2"
    assert vars(kinds[1])["__call__"] is not vars(kinds[0])["__call__"]
    ragged.install(network)
    assert type(network.layers[0].self_attn).__mro__ == kinds
