"""MTP heads as families publish them: loaded apart, or not used with a sentence that says why (N4)."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from mlx_lm.utils import dequantize_model
from mtp_models import (
    HEADED,
    Weights,
    head_weights,
    layout_of,
    parameters,
    prefix_of,
    published,
    quantized,
    save_headed,
    trunk_weights,
    write,
)
from tiny_models import build, config_of, prompt

from millpond.model import opened
from millpond.model.heads import LAYOUTS
from millpond.model.load import LoadedModel, load
from millpond.model.mtp import Head
from millpond.model.probe import Capabilities, probe
from millpond.model.upstream import KVCache, new_cache


def loaded(folder: Path, *, head: bool = True) -> LoadedModel:
    return load(folder, 0, lambda _: None, head=head)


def head_of(model: LoadedModel) -> Head:
    assert model.headed is not None, model.headless
    return model.headed.head


def same(one: Weights, other: Weights) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert np.allclose(np.array(array), np.array(other[name]), atol=1e-6), name


def test_every_known_family_is_tried() -> None:
    assert HEADED.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("kind", HEADED)
def test_a_head_is_loaded_beside_its_model(kind: str, tmp_path: Path) -> None:
    folder = save_headed(kind, tmp_path / "headed")
    bare = loaded(write(tmp_path / "bare", HEADED[kind], trunk_weights(kind)), head=False)
    model, unheaded = loaded(folder), loaded(folder, head=False)
    assert (model.remarks, model.headless) == ((), "")
    assert unheaded.headed is None
    tokens = mx.array([prompt(20)])
    expected = bare.network(tokens, cache=new_cache(bare.network))
    for network in (model.network, unheaded.network):
        assert mx.array_equal(network(tokens, cache=new_cache(network)), expected)
    assert mx.array_equal(model.network(tokens), bare.network(tokens))
    assert len(model.kinds) == len(bare.kinds) + 2
    assert model.weight_bytes > unheaded.weight_bytes == bare.weight_bytes


@pytest.mark.parametrize("kind", HEADED)
def test_what_joins_the_two_vectors(kind: str, tmp_path: Path) -> None:
    """By the tensors as they are called in the file, and in the order that the family has."""
    head = head_of(loaded(save_headed(kind, tmp_path)))
    given, layout = head_weights(kind), layout_of(kind)
    named = {own: given[f"{prefix_of(kind)}{name}.weight"] for name, own in layout.joint.items()}
    mx.random.seed(1)
    embedded, hidden = mx.random.normal((1, 3, 64)), mx.random.normal((1, 3, 64))

    def normed(x: mx.array, weight: mx.array) -> mx.array:
        return x / mx.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * weight

    sides = [normed(embedded, named["embedding_norm"]), normed(hidden, named["hidden_norm"])]
    if kind == "mimo":
        sides.reverse()
    expected = mx.concatenate(sides, axis=-1) @ named["fc"].T
    assert np.allclose(np.array(head._joined(hidden, embedded)), np.array(expected), atol=1e-4)
    # Behind it: the model's own layer, and a norm.
    cache = KVCache()
    x = head._joined(hidden, embedded)
    layered = head.layer(x, KVCache().make_mask(3, return_array=True, window_size=None), KVCache())
    final = normed(layered, given[f"{prefix_of(kind)}{layout.final}.weight"])
    assert np.allclose(np.array(head(hidden, embedded, cache)), np.array(final), atol=1e-4)
    followed = KVCache()
    mx.eval(head.follow(hidden, embedded, followed))
    assert mx.array_equal(followed.keys, cache.keys)
    assert mx.array_equal(followed.values, cache.values)


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5", "qwen3_5_moe"])
def test_norms_around_zero_are_one_more_once(kind: str, tmp_path: Path) -> None:
    """Whether a head's experts are in arrays of their own or together."""
    converted = trunk_weights(kind) | head_weights(kind)
    first = loaded(write(tmp_path / "converted", HEADED[kind], converted))
    for number, fused in enumerate((lambda name: not name.startswith("mtp."), lambda _: True)):
        raw = published(converted, fused if kind == "qwen3_5_moe" else lambda _: False)
        second = loaded(write(tmp_path / str(number), HEADED[kind], raw))
        same(parameters(second.network), parameters(first.network))


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe_lite"])
def test_latent_keys_are_taken_apart_as_the_models_own_are(kind: str, tmp_path: Path) -> None:
    converted = trunk_weights(kind) | head_weights(kind)
    first = loaded(write(tmp_path / "converted", HEADED[kind], converted))
    whole: Weights = {}
    for name, array in converted.items():
        if name.endswith("self_attn.embed_q.weight"):
            values = converted[name.replace("embed_q", "unembed_out")]
            both = mx.concatenate([array.swapaxes(-1, -2), values], axis=1)
            whole[name.replace("embed_q", "kv_b_proj")] = both.reshape(-1, both.shape[-1])
        elif ".switch_mlp." in name:
            before, _, behind = name.partition("switch_mlp.")
            whole |= {f"{before}experts.{number}.{behind}": expert for number, expert in enumerate(array)}
        elif "unembed_out" not in name:
            whole[name] = array
    same(parameters(loaded(write(tmp_path / "published", HEADED[kind], whole)).network), parameters(first.network))


def test_nemotrons_experts_are_put_together_in_the_head_too(tmp_path: Path) -> None:
    converted = trunk_weights("nemotron_h") | head_weights("nemotron_h")
    first = loaded(write(tmp_path / "converted", HEADED["nemotron_h"], converted))
    apart: Weights = {}
    for name, array in converted.items():
        before, _, behind = name.partition("switch_mlp.")
        if behind:
            projection = {"fc1.weight": "up_proj.weight", "fc2.weight": "down_proj.weight"}[behind]
            apart |= {f"{before}experts.{number}.{projection}": expert for number, expert in enumerate(array)}
        else:
            apart[name] = array.moveaxis(1, 2) if "conv1d.weight" in name else array
    # transformers' newer files have the layers' kinds in words, and do not count them.
    words = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
    config = dict(HEADED["nemotron_h"])
    pattern = cast(list[str], config.pop("hybrid_override_pattern"))
    del config["num_hidden_layers"]
    config["layers_block_type"] = [words[sign] for sign in pattern]
    second = loaded(write(tmp_path / "published", config, apart))
    same(parameters(second.network), parameters(first.network))


def test_blocks_that_a_head_cannot_be_made_of(tmp_path: Path) -> None:
    """A head without attention, one with a recurrent block, and one that nothing ends."""
    trunk, head = trunk_weights("nemotron_h"), head_weights("nemotron_h")
    recurrent = {name.replace("q_proj", "A_log"): array for name, array in head.items()}
    twice = {name.replace("layers.1.mixer", "layers.0.mixer"): array for name, array in head.items()}
    endless = {name: array for name, array in head.items() if "final" not in name}
    for number, (tensors, signs) in enumerate(((recurrent, "?E"), (endless, ""), (twice, "*?"))):
        model = loaded(write(tmp_path / str(number), HEADED["nemotron_h"], trunk | tensors))
        assert model.headed is None
        assert f"made of the blocks {signs!r}" in model.headless
    second = {
        name.replace("layers.0.", "layers.2.").replace("layers.1.", "layers.3."): 0 * a for name, a in head.items()
    }
    model = loaded(write(tmp_path / "two", HEADED["nemotron_h"], trunk | head | second))
    same(parameters(head_of(model)), parameters(head_of(loaded(save_headed("nemotron_h", tmp_path / "one")))))


@pytest.mark.parametrize("kind", ["qwen3_5", "mimo", "glm4_moe", "nemotron_h"])
def test_heads_that_are_packed_otherwise_than_their_model(kind: str, tmp_path: Path) -> None:
    """Eight bits in a model of four, or none. What config.json says of the model's first layer is not about a head."""
    trunk = quantized(trunk_weights(kind), lambda name: "layers.0." not in name)
    layer = {"qwen3_5": "language_model.model.layers.0", "nemotron_h": "backbone.layers.0"}.get(kind, "model.layers.0")
    packing = {"group_size": 32, "bits": 4, f"{layer}.self_attn.k_proj": False, f"{layer}.mlp.up_proj": False}
    config = {**HEADED[kind], "quantization": packing}
    head = head_weights(kind)
    plain = loaded(write(tmp_path / "plain", config, trunk | head))
    packed = loaded(write(tmp_path / "packed", config, trunk | quantized(head, lambda _: True, bits=8)))
    unpacked = parameters(dequantize_model(head_of(packed)))
    for name, array in parameters(head_of(plain)).items():
        assert np.allclose(np.array(array), np.array(unpacked[name]), atol=0.05), name


def test_of_several_heads_the_first_is_taken(tmp_path: Path) -> None:
    weights = trunk_weights("glm4_moe") | head_weights("glm4_moe")
    again = {name: array for name, array in weights.items() if "layers.3." in name}
    second = {name.replace("layers.3.", "layers.4."): 0 * array for name, array in again.items()}
    model = loaded(write(tmp_path, HEADED["glm4_moe"], weights | second))
    same(parameters(head_of(model)), parameters(head_of(loaded(save_headed("glm4_moe", tmp_path / "one")))))


def test_what_only_claims_a_head_says_so(tmp_path: Path) -> None:
    model = loaded(write(tmp_path, HEADED["qwen3_5"], trunk_weights("qwen3_5")))
    assert model.headed is None
    [remark] = model.remarks
    assert remark == "its MTP head is not used: config.json speaks of one, but no tensor of it is there"
    assert model.headless in remark
    silent = loaded(tmp_path, head=False)
    assert (silent.remarks, silent.headless) == ((), "")
    plain = loaded(write(tmp_path / "llama", config_of("llama"), parameters(build("llama"))))
    assert (plain.remarks, plain.headless) == ((), "there is none")


def test_a_head_that_nobody_knows_is_left_out_with_a_sentence(tmp_path: Path) -> None:
    weights = parameters(build("kimi_linear")) | {"model.mtp.layers.0.eh_proj.weight": mx.zeros((64, 128))}
    model = loaded(write(tmp_path / "unknown", config_of("kimi_linear"), weights))
    assert model.headed is None
    assert model.remarks == ("its MTP head is not used: how heads of kimi_linear models are made is not known here",)
    head = head_weights("qwen3_5")
    for number, (changed, said) in enumerate(
        (
            ({"mtp.layers.1.input_layernorm.weight": mx.ones(64)}, "'layers.1.input_layernorm.weight'"),
            ({"mtp.fc.weight": mx.zeros((64, 64))}, "shape"),
            ({"mtp.norm.weight": None}, "model.norm.weight"),
        )
    ):
        odd = {name: array for name, array in (head | changed).items() if array is not None}
        model = loaded(write(tmp_path / str(number), HEADED["qwen3_5"], trunk_weights("qwen3_5") | odd))
        assert model.headed is None
        [remark] = model.remarks
        assert remark.startswith("its MTP head is not used: ")
        assert said in remark
        tokens = mx.array([prompt(9)])
        assert mx.isfinite(model.network(tokens)).all().item()


def test_a_head_that_cannot_run_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its code fails, or nothing could be guessed beside it."""
    folder = save_headed("qwen3_5", tmp_path)
    with monkeypatch.context() as patch:

        def failing(*_: object) -> mx.array:
            raise ValueError("no such thing")

        patch.setattr(Head, "follow", failing)
        model = loaded(folder)
        assert (model.headed, model.remarks) == (None, ("its MTP head is not used: no such thing",))

    def probed(model: LoadedModel) -> Capabilities:
        found = probe(model)
        return msgspec.structs.replace(found, forward_only="it may not") if model.headed is not None else found

    monkeypatch.setattr(opened, "probe", probed)
    made = opened.open_model(folder, head=True)
    assert made.model.headed is None
    assert made.model.remarks == ("its MTP head is not used: it may not",)
    assert (made.model.headless, made.capabilities.forward_only) == ("it may not", "")


def test_ranks_and_models_of_vectors_do_without(tmp_path: Path) -> None:
    folder = save_headed("mimo", tmp_path / "vectors")
    (folder / "modules.json").write_text("[]")
    model = loaded(folder)
    assert (model.headed, model.headless) == (None, "the model makes vectors of prompts")
    group = mx.distributed.init()  # of one rank
    model = load(save_headed("qwen3_5", tmp_path / "group"), 0, lambda _: None, group=group, head=True)
    assert (model.headed, model.headless) == (None, "heads are not divided over ranks")
    assert model.remarks == ("its MTP head is not used: heads are not divided over ranks",)
