"""Models that mlx-lm writes for rows of one length share the batch, and the probe knows why they would not."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import cast

import mlx.core as mx
import pytest
from architectures import folders
from engine_driver import Driver, assert_same_or_tied, reference, request

from millpond.kv.format import AS_COMPUTED, KvFormat
from millpond.kv.leaf import LeafRow
from millpond.kv.rows import Forward
from millpond.kv.slots import KvSpec
from millpond.model import ragged
from millpond.model.load import LoadedModel, kept_as, load
from millpond.model.probe import differences, probe

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


def many_blocks(tmp_path: Path) -> LoadedModel:
    """It chooses among blocks of keys once there are more of them than a start's prompts have."""
    config = folders.config_of("minimax_m3_vl")
    text = cast(dict[str, dict[str, object]], config["text_config"])
    text["sparse_attention_config"] |= {"sparse_block_size": 32, "sparse_topk_blocks": 14}
    wider = {**text, "max_position_embeddings": 2048}
    return load(folders.save("minimax_m3_vl", tmp_path, {**config, "text_config": wider}), 0, lambda _done: None)


def test_blocks_that_no_prompt_of_a_start_fills(tmp_path: Path) -> None:
    """C knows nothing of blocks, so it is not used, and rows answer as they do alone."""
    loaded = many_blocks(tmp_path)
    found = probe(loaded)
    assert (found.slots, found.reason, found.native) == (True, "", False)
    driven = Driver(found.fitted(loaded), capabilities=found)
    prompts = {str(length): [length * place % folders.VOCAB for place in range(1, length + 1)] for length in (40, 700)}
    for name, tokens in prompts.items():
        driven.submit(request(name, tokens, 8))
    driven.run()
    for name, tokens in prompts.items():
        expected = reference(loaded.network, tokens, 8)
        assert_same_or_tied(loaded.network, tokens, driven.outcomes[name].tokens, expected)


def test_many_blocks_hide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What mlx-lm computes for rows of one length shows in a model of the same weights that chooses few."""
    monkeypatch.setattr(ragged, "MENDS", {})
    loaded = many_blocks(tmp_path)
    assert "differ" in differences(kept_as(loaded, AS_COMPUTED))[0]


def test_keys_that_nobody_attends_to_are_not_lost_in_silence() -> None:
    """Where C does attention, it writes the keys as well."""
    side = mx.zeros((1, 2, 1, 32))
    slot = KvSpec(2, 32, 32, mx.float32, KvFormat(native=True)).slot(LeafRow((side, side)), 1, 8)
    slot.begin(Forward([1], 1))
    slot.update_and_fetch(side, side)
    with pytest.raises(RuntimeError, match="without attending"):
        slot.keep([1])


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
