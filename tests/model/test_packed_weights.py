"""On a CPU weights stay as they are on disk, and a model says what it would with weights in float32 (R4)."""

from __future__ import annotations

import pytest

from millpond.native import products

if not products.available():
    pytest.skip("only where MLX computes on a Linux CPU and the C part is built", allow_module_level=True)

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from types import MappingProxyType
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import tiny_models
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import dequantize_model, load_model

from millpond.model.load import _on_a_cpu, load
from millpond.model.packed_linear import READING
from millpond.model.probe import probe
from millpond.text.tokenizer import Tokenizer
from millpond.types import UNPACKED, KvPacking

FORMS: dict[str, tuple[mx.Dtype, dict[str, object]]] = {
    "float16": (mx.float16, {}),
    "bfloat16": (mx.bfloat16, {}),
    "2 bits": (mx.bfloat16, {"bits": 2, "group_size": 32}),
    "4 bits": (mx.float16, {"bits": 4, "group_size": 64}),
    "6 bits": (mx.bfloat16, {"bits": 6, "group_size": 32}),
    "8 bits": (mx.float32, {"bits": 8, "group_size": 64}),
    "mxfp4": (mx.bfloat16, {"bits": 4, "group_size": 32, "mode": "mxfp4"}),
    "nvfp4": (mx.bfloat16, {"bits": 4, "group_size": 16, "mode": "nvfp4"}),
    "mxfp8": (mx.bfloat16, {"bits": 8, "group_size": 32, "mode": "mxfp8"}),
}
KINDS = ("llama", "deepseek_v2", "qwen3_moe")
MOST = 0.75
"""Of the matrices' bytes: the inner ones of latent attention are MLX's to multiply."""
CLOSE = 1e-3
"""Of the spread of logits."""


SEED_OSS = {"head_dim": 16, "attention_bias": False, "attention_out_bias": False, "mlp_bias": False}


def written(place: Path, kind: str, form: str, changes: Mapping[str, object] = MappingProxyType({})) -> Path:
    """A model whose layers have sizes that all forms can have."""
    dtype, packing = FORMS[form]
    config = {**tiny_models.config_of(kind), "hidden_size": 128, "intermediate_size": 256}
    config |= {key: 64 for key in ("moe_intermediate_size", "head_dim") if key in config}
    config |= changes
    network = tiny_models.build(kind, config=config)
    network.update(tree_map(lambda array: array.astype(dtype), network.parameters()))
    if packing:
        fits = lambda _, layer: hasattr(layer, "to_quantized") and layer.weight.shape[-1] % 64 == 0  # noqa: E731
        nn.quantize(network, class_predicate=fits, **packing)
        config["quantization"] = packing
    mx.save_safetensors(str(place / "model.safetensors"), dict(tree_flatten(network.parameters())))
    (place / "config.json").write_text(json.dumps(config))
    return place


def in_float32(folder: Path) -> nn.Module:
    """By mlx-lm alone."""
    network, _ = load_model(folder)
    network.update(
        tree_map(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a, network.parameters())
    )
    return dequantize_model(network)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_they_stay_as_they_are(kind: str, form: str, tmp_path: Path) -> None:
    """What is not multiplied with, norms and biases, is in float32."""
    folder = written(tmp_path, kind, form)
    stored = mx.load(str(folder / "model.safetensors"))
    found = load(folder, 0, lambda _: None)
    held = dict(tree_flatten(found.network.parameters()))
    matrices = [name for name, array in stored.items() if name.endswith("weight") and array.ndim > 1]
    assert len(matrices) > 10
    kept = [name for name in matrices if held[name].dtype == stored[name].dtype]
    assert sum(stored[name].nbytes for name in kept) > MOST * sum(stored[name].nbytes for name in matrices)
    assert found.weight_bytes < 1.2 * sum(array.nbytes for array in stored.values())
    tokens = mx.array([tiny_models.prompt(50)])
    ours, theirs = found.network(tokens), in_float32(folder)(tokens)
    assert ours.dtype == mx.float32
    assert float(mx.abs(ours - theirs).max().item()) < CLOSE * float((theirs.max() - theirs.min()).item())


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_packed_weights_where_groups_can_be_divided(ranks: int, tmp_path: Path) -> None:
    network, _ = load_model(written(tmp_path, "llama", "4 bits"), lazy=True)
    found = _on_a_cpu(network, ranks)
    packed = [module for module in found.modules() if isinstance(module, nn.QuantizedLinear)]
    assert bool(packed) == (ranks != 3)


def test_files_of_mlx_lm_that_read_weights_themselves() -> None:
    """They would meet what is packed, or narrow: whoever joins them is to be told of."""
    folder = Path(cast(str, mlx_lm.models.__path__[0]))
    reads = re.compile(r"(embed_tokens|embeddings?|lm_head|gate|wte|embed)\.weight(\.T\b|\.dtype)")
    found = {f"mlx_lm.models.{file.stem}" for file in folder.glob("*.py") if reads.search(file.read_text())}
    assert found == set(READING)


@pytest.mark.parametrize("form", ["4 bits", "bfloat16"])
def test_their_weights_are_in_float32(form: str, tmp_path: Path) -> None:
    folder = written(tmp_path, "llama", form, {"model_type": "seed_oss", "tie_word_embeddings": True, **SEED_OSS})
    network = load(folder, 0, lambda _: None).network
    assert {array.dtype for _, array in tree_flatten(network.parameters())} == {mx.float32}


def test_where_there_is_no_room_weights_stay_narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the C part nothing is multiplied as it is but by MLX, slowly: better than to be killed."""
    folder = written(tmp_path, "llama", "bfloat16")
    monkeypatch.setattr(products, "available", lambda: False)
    assert load(folder, 0, lambda _: None).network.layers[0].mlp.up_proj.weight.dtype == mx.float32
    monkeypatch.setattr("millpond.model.load.total_memory", lambda: 10_000)
    assert load(folder, 0, lambda _: None).network.layers[0].mlp.up_proj.weight.dtype == mx.bfloat16


@pytest.fixture(scope="module")
def text(smollm2_folder: Path) -> list[int]:
    return Tokenizer.load(smollm2_folder).encode("\n\n".join(topics.values())[:4000])[:513]


@pytest.mark.slow
def test_the_demo_model_says_what_it_does_with_weights_in_float32(smollm2_folder: Path, text: list[int]) -> None:
    """The same tokens, and a perplexity within 1e-4 of it."""
    ours, theirs = load(smollm2_folder, 0, lambda _: None).network, in_float32(smollm2_folder)

    def perplexity(network: nn.Module) -> float:
        logits = network(mx.array([text[:-1]]))[0]
        chosen = mx.take_along_axis(logits, mx.array(text[1:])[:, None], axis=-1)[:, 0]
        return math.exp(float((mx.logsumexp(logits, axis=-1) - chosen).mean().item()))

    assert perplexity(ours) == pytest.approx(perplexity(theirs), rel=1e-4)
    for start in range(0, 480, 60):
        assert greedy(ours, text[start : start + 40]) == greedy(theirs, text[start : start + 40])


def greedy(network: nn.Module, prompt: list[int], count: int = 24) -> list[int]:
    cache, tokens, said = network.make_cache() if hasattr(network, "make_cache") else None, prompt, []
    if cache is None:
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(network)
    for _ in range(count):
        tokens = [int(mx.argmax(network(mx.array([tokens]), cache=cache)[0, -1]).item())]
        said += tokens
    return said


@pytest.mark.slow
@pytest.mark.parametrize("packing", [UNPACKED, KvPacking(bits=8), KvPacking(bits=4, rotated=True)], ids=str)
def test_the_demo_model_runs_in_c(packing: KvPacking, smollm2_folder: Path) -> None:
    """Vectors in whole numbers are rounded, and what they become is rounded to another step when it is packed: the
    probe has to know that from a fault."""
    found = probe(load(smollm2_folder, 0, lambda _: None, packing))
    assert (found.slots, found.native, found.unpacked) == (True, True, False), found
