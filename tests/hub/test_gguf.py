"""Whole GGUF files to MLX folders: every family loads, every value arrives where it belongs."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
import tiny_gguf as tiny
from mlx_lm import load

from millpond.hub import shards
from millpond.hub.errors import SourceError
from millpond.hub.gguf import convert_gguf
from millpond.hub.progress import SilentProgress

FAMILIES = ["llama", "qwen2", "qwen3", "gemma3"]


def convert(tmp_path: Path, arch: str, **options: object) -> Path:
    source, target = tmp_path / "model.gguf", tmp_path / "model"
    target.mkdir()
    weights = options.pop("weights", None) or tiny.random_weights(arch)
    tiny.write_gguf(source, arch, weights, **options)  # type: ignore[arg-type]
    convert_gguf(source, target, SilentProgress())
    return target


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_loads_and_computes(arch: str, tmp_path: Path) -> None:
    model, tokenizer = load(str(convert(tmp_path, arch)))
    logits = model(mx.array([tokenizer.encode("hello")]))
    assert logits.shape == (1, 4, tiny.VOCAB)
    assert bool(mx.isfinite(logits).all())


def test_values_arrive_unchanged(tmp_path: Path) -> None:
    weights = tiny.random_weights("llama")
    got = mx.load(str(convert(tmp_path, "llama", weights=weights) / "model.safetensors"))
    places = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "ffn_down": "mlp.down_proj"}
    for name, place in places.items():
        expected = weights[f"blk.2.{name}.weight"].astype(np.float16)
        assert np.array_equal(np.array(got[f"model.layers.2.{place}.weight"]), expected)
    assert all(array.dtype == mx.float16 for array in got.values())


@pytest.mark.parametrize("kind", [tiny.Q4_1, tiny.Q8_0])
def test_quantised_matrices_stay_quantised(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    weights = tiny.random_weights("llama")
    folder = convert(tmp_path, "llama", weights=weights, kind=kind)
    model, _ = load(str(folder))
    q = model.layers[1].self_attn.q_proj
    assert q.bits == (4 if kind == tiny.Q4_1 else 8)
    values = mx.dequantize(q.weight, q.scales.astype(mx.float32), q.biases.astype(mx.float32), q.group_size, q.bits)
    stored = gguf.quants.dequantize(gguf.quants.quantize(weights["blk.1.attn_q.weight"], kind), kind)
    assert np.array_equal(np.array(values), stored)


def test_gemma_norms_lose_the_one(tmp_path: Path) -> None:
    weights = tiny.random_weights("gemma3")
    got = mx.load(str(convert(tmp_path, "gemma3", weights=weights) / "model.safetensors"))
    for name, place in (("ffn_norm", "pre_feedforward_layernorm"), ("attn_q_norm", "self_attn.q_norm")):
        expected = weights[f"blk.0.{name}.weight"] - 1
        assert np.allclose(np.array(got[f"model.layers.0.{place}.weight"]), expected, atol=1e-3)


def test_bfloat16_files_stay_bfloat16(tmp_path: Path) -> None:
    weights = tiny.random_weights("llama")
    got = mx.load(str(convert(tmp_path, "llama", weights=weights, kind=tiny.BF16) / "model.safetensors"))
    down = got["model.layers.0.mlp.down_proj.weight"]
    assert down.dtype == mx.bfloat16
    assert mx.array_equal(down, mx.array(weights["blk.0.ffn_down.weight"]).astype(mx.bfloat16))


def test_big_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    folder = convert(tmp_path, "llama")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 1
    assert sorted(set(index.values())) == files
    assert all(name in mx.load(str(folder / file)) for name, file in index.items())
    load(str(folder))


def test_config_says_what_the_file_says(tmp_path: Path) -> None:
    config = json.loads((convert(tmp_path, "gemma3") / "config.json").read_text())
    assert config["model_type"] == "gemma3_text"
    assert (config["sliding_window"], config["sliding_window_pattern"]) == (32, 6)
    assert config["rms_norm_eps"] == 1e-6
    assert config["eos_token_id"] == [2, 0]
    assert config["tie_word_embeddings"] is True


def test_an_output_head_of_its_own(tmp_path: Path) -> None:
    weights = tiny.random_weights("llama")
    weights["output.weight"] = weights["token_embd.weight"] * 2
    folder = convert(tmp_path, "llama", weights=weights)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in mx.load(str(folder / "model.safetensors"))
    load(str(folder))


def test_llama3_frequency_scaling_is_recovered(tmp_path: Path) -> None:
    weights = tiny.random_weights("llama")
    frequency = 10000.0 ** (-np.arange(0, tiny.HEAD_DIM, 2) / tiny.HEAD_DIM)
    smooth = np.clip((8192 * frequency / (2 * np.pi) - 1) / 3, 0, 1)
    weights["rope_freqs.weight"] = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
    scaling = json.loads((convert(tmp_path, "llama", weights=weights) / "config.json").read_text())["rope_scaling"]
    assert scaling["rope_type"] == "llama3"
    assert scaling["factor"] == 8.0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.expert_count": 8}, "without experts"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ({"llama.rope.dimension_count": 8}, "dimension_count is 8"),
        ({"tokenizer.ggml.pre": "unheard-of"}, "'unheard-of'"),
        ({"tokenizer.ggml.model": "rwkv"}, "'rwkv'"),
    ],
)
def test_what_we_cannot_convert_is_refused_by_name(
    extra: dict[str, int | float | str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=message):
        convert(tmp_path, "llama", extra=extra)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="'mamba': allowed are gemma3, llama, qwen2, qwen3"):
        convert(tmp_path, "mamba", weights=tiny.random_weights("llama"))


@pytest.mark.parametrize("content", [b"", b"not a gguf file at all", b"GGUF\x03\x00\x00\x00"])
def test_a_file_that_is_no_gguf(content: bytes, tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(content)
    with pytest.raises(SourceError, match="not a readable GGUF"):
        convert_gguf(source, tmp_path, SilentProgress())
