"""What is found out about a model when it is loaded for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
import tiny_models
from gpu_lane import as_on_a_gpu, in_half

from millpond.engine.boot_speculation import MOST_ON_CPU, MOST_ON_GPU, most_drafts
from millpond.model.load import SCORE_COPIES, LoadedModel, load
from millpond.native import device


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., LoadedModel]:
    def make(kind: str, dtype: mx.Dtype = mx.bfloat16, **config: object) -> LoadedModel:
        monkeypatch.setitem(tiny_models.CONFIGS, kind, {**tiny_models.config_of(kind), **config})
        folder = in_half(tiny_models.save(kind, tmp_path / kind), dtype)
        as_on_a_gpu(monkeypatch)
        return load(folder, 0, lambda _: None)

    return make


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "float16"), ("qwen3", "float16"), ("gemma3_text", "bfloat16")])
def test_a_type_that_holds_what_is_computed(kind: str, dtype: str, loaded: Callable[..., LoadedModel]) -> None:
    """Gemma's residual exceeds float16, in which files converted from GGUF have it; others stay as stored."""
    assert loaded(kind, mx.float16).dtype == dtype


@pytest.mark.parametrize(
    ("queries", "keys", "drafts"), [(4, 4, MOST_ON_GPU), (4, 1, MOST_ON_GPU), (8, 1, 3), (32, 1, 1), (64, 1, 1)]
)
def test_drafts_that_one_fast_kernel_verifies(
    queries: int, keys: int, drafts: int, loaded: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Metal. Columns times the queries of a key head are limited; at least one token is guessed."""
    model = loaded("llama", num_attention_heads=queries, num_key_value_heads=keys, head_dim=16)
    assert model.queries_per_head == queries // keys
    assert most_drafts(model) == MOST_ON_GPU, "where the limit is not known"
    monkeypatch.setattr(device, "on_metal", lambda: True)
    assert most_drafts(model) == drafts


def test_drafts_on_a_cpu() -> None:
    assert most_drafts(tiny_models.model("llama")) == MOST_ON_CPU


@pytest.mark.parametrize(("dim", "kept"), [(16, True), (64, False), (128, False), (96, True), (256, True)])
def test_scores_that_attention_keeps(dim: int, kept: bool, loaded: Callable[..., LoadedModel]) -> None:
    """Of a chunk, all at once, for head dimensions that have no kernel; 4 heads of 2 bytes."""
    model = loaded("llama", head_dim=dim)
    assert model.score_bytes == (4 * 2 * SCORE_COPIES if kept else 0)


def test_scores_of_latent_keys_are_those_of_all_heads(loaded: Callable[..., LoadedModel]) -> None:
    """One latent head is kept for all: what attention computes has as many as the queries."""
    assert loaded("deepseek_v2").score_bytes == 4 * 2 * SCORE_COPIES


def test_a_cpu_keeps_no_scores() -> None:
    assert tiny_models.model("llama").score_bytes == 0
