"""A model folder is used as its files say, or refused with one sentence that names what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import CONTEXT, save

from millpond.hub.fingerprint import folder_fingerprint
from millpond.hub.progress import SilentProgress
from millpond.hub.weights import INDEX
from millpond.model.load import LoadedModel, ModelError, load

Weights = dict[str, mx.array]
Header = dict[str, dict[str, object]]
PROMPT = mx.array([list(range(5, 200, 3))])
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("original") / "tiny")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def loaded(folder: Path, context: int = 0) -> LoadedModel:
    return load(folder, context, lambda _: None)


def logits(folder: Path) -> mx.array:
    return loaded(folder).network(PROMPT)


def same(one: mx.array, other: mx.array) -> bool:
    return bool(mx.allclose(one, other, rtol=1e-4, atol=1e-4))


def refusal(folder: Path, context: int = 0) -> str:
    """What is said instead of loading; always one line."""
    with pytest.raises(ModelError) as caught:
        loaded(folder, context)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weights_of(folder: Path) -> Weights:
    found = mx.load(str(folder / "model.safetensors"))
    assert isinstance(found, dict)
    return found


def put(folder: Path, weights: Weights, name: str = "model.safetensors") -> None:
    mx.eval(weights)
    mx.save_safetensors(str(folder / name), weights)


def retype(folder: Path, name: str, dtype: str, change: Callable[[mx.array], mx.array]) -> None:
    """Store one tensor changed, under a type name that MLX does not write."""
    weights = weights_of(folder)
    put(folder, weights | {name: change(weights[name])})
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header: Header = json.loads(content[8 : 8 + length])
    header[name]["dtype"] = dtype
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + content[8 + length :])


def configure(folder: Path, drop: tuple[str, ...] = (), **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))


# --- types of elements ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [Q_PROJ, "model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize(
    ("dtype", "to"),
    [("I8", mx.int8), ("U8", mx.uint8), ("I32", mx.int32), ("U32", mx.uint32), ("I64", mx.int64), ("BOOL", mx.bool_)],
)
def test_integers_are_not_floats(name: str, dtype: str, to: mx.Dtype, folder: Path) -> None:
    weights = weights_of(folder)
    put(folder, weights | {name: weights[name].astype(to)})
    told = refusal(folder)
    assert name in told
    assert dtype in told
    assert "allowed are F16, BF16 and F32" in told


@pytest.mark.parametrize(("dtype", "to"), [("F64", mx.int64), ("F8_E5M2", mx.uint8), ("NONSENSE", mx.uint8)])
def test_types_that_cannot_be_read_are_named(dtype: str, to: mx.Dtype, folder: Path) -> None:
    retype(folder, Q_PROJ, dtype, lambda array: array.astype(to))
    told = refusal(folder)
    assert f"{Q_PROJ!r} in model.safetensors is {dtype}" in told


def blocks(weight: mx.array, scale_shape: tuple[int, ...]) -> tuple[mx.array, mx.array, mx.array]:
    """A weight in eight bits, its scales, and what the two mean."""
    generator = np.random.default_rng(0)
    scales = generator.uniform(0.5, 2.0, scale_shape).astype(np.float32)
    full = np.broadcast_to(scales, weight.shape) if scales.size == 1 else scales
    for axis, size in enumerate(weight.shape):
        if scales.size > 1 and scales.shape[axis] > 1:
            full = np.repeat(full, -(-size // scales.shape[axis]), axis=axis)[(slice(None),) * axis + (slice(size),)]
    packed = mx.to_fp8(weight)
    return packed, mx.array(scales), mx.from_fp8(packed, mx.float32) * mx.array(np.ascontiguousarray(full))


@pytest.mark.parametrize(
    ("scale_shape", "end", "quantization"),
    [
        ((2, 3), "_scale_inv", {"quant_method": "fp8", "weight_block_size": [32, 24]}),
        ((1,), "_scale", {"quant_method": "modelopt", "quant_algo": "FP8"}),
        ((64, 1), "_scale", {"quant_method": "compressed-tensors", "format": "float-quantized"}),
        ((), "_scale", None),
    ],
)
def test_eight_bit_floats_are_read_with_their_scales(
    scale_shape: tuple[int, ...], end: str, quantization: dict[str, object] | None, folder: Path, original: Path
) -> None:
    """down_proj is [64, 96], so that blocks of 24 columns leave a shorter scale row than its transpose would."""
    name = "model.layers.0.mlp.down_proj.weight"
    weights = weights_of(folder)
    shape = (2, 4) if scale_shape == (2, 3) else scale_shape
    packed, scales, meant = blocks(weights[name], shape)
    put(folder, weights | {name: packed, name + end: scales, name.replace("weight", "input_scale"): mx.array(3.0)})
    retype(folder, name, "F8_E4M3", lambda array: array)
    if quantization is not None:
        configure(folder, quantization_config=quantization)
    got, reference = logits(folder), folder.parent / "reference"
    shutil.copytree(original, reference)
    put(reference, weights | {name: meant.astype(mx.bfloat16)})
    assert same(got, logits(reference))
    assert loaded(folder).identity("0") != "0"


def test_eight_bit_floats_without_scales_or_with_others_are_refused(folder: Path) -> None:
    retype(folder, Q_PROJ, "F8_E4M3", mx.to_fp8)
    assert f"{Q_PROJ!r} is F8_E4M3 and has no scales" in refusal(folder)
    put(folder, weights_of(folder) | {Q_PROJ + "_scale": mx.ones((5, 7))})
    retype(folder, Q_PROJ, "F8_E4M3", lambda array: array)
    assert "scales of (5, 7): they do not fit" in refusal(folder)
    configure(folder, quantization_config={"quant_method": "quark"})
    assert "'quark'" in refusal(folder)


def test_what_is_missing_too_much_or_of_another_shape_is_named(folder: Path) -> None:
    weights = weights_of(folder)
    put(folder, weights | {"model.extra.weight": mx.ones((2, 2))})
    assert "no parameter for tensor 'model.extra.weight'" in refusal(folder)
    put(folder, {name: array for name, array in weights.items() if name != Q_PROJ})
    assert f"no tensor is there for tensor {Q_PROJ!r}" in refusal(folder)
    put(folder, weights | {Q_PROJ: mx.ones((8, 64))})
    assert f"{Q_PROJ!r} has the shape (8, 64): the model needs (64, 64)" in refusal(folder)


# --- which files count ------------------------------------------------------------------------------------------


def split(folder: Path, weights: Weights, count: int) -> dict[str, str]:
    """Write shards; returns the map of an index."""
    names, places = sorted(weights), {}
    for part in range(count):
        file = f"model-{part + 1:05d}-of-{count:05d}.safetensors"
        put(folder, {name: weights[name] for name in names[part::count]}, file)
        places |= dict.fromkeys(names[part::count], file)
    return places


def index(folder: Path, places: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_the_index_decides_and_what_lies_beside_is_named(folder: Path, original: Path) -> None:
    right = logits(original)
    weights = weights_of(folder)
    (folder / "model.safetensors").unlink()
    index(folder, split(folder, weights, 2))
    fingerprint = folder_fingerprint(folder, SilentProgress())
    split(folder, {name: array * 2 for name, array in weights.items()}, 3)
    (folder / "model-broken.safetensors").write_bytes(b"broken")
    model = loaded(folder)
    assert same(model.network(PROMPT), right)
    assert "model-00001-of-00003.safetensors" in model.remarks[0]
    assert model.identity("0") == "0"
    assert folder_fingerprint(folder, SilentProgress()) == fingerprint


def test_files_of_any_name_count_when_the_index_names_them(folder: Path, original: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert "'weights.safetensors'" in refusal(folder)
    index(folder, dict.fromkeys(mx.load(str(folder / "weights.safetensors")), "weights.safetensors"))
    assert same(logits(folder), logits(original))


def test_a_missing_shard_and_a_missing_tensor_are_sentences(folder: Path) -> None:
    places = dict.fromkeys(weights_of(folder), "model.safetensors")
    index(folder, places | {"more": "model-00002-of-00002.safetensors"})
    assert f"{INDEX} names 'model-00002-of-00002.safetensors'" in refusal(folder)
    index(folder, places | {"more": "model.safetensors"})
    assert "tensor 'more' is in model.safetensors, which does not have it" in refusal(folder)
    for nonsense in ("[]", "{", '{"weight_map": {"a": 1}}', "[" * 100_000, '{"weight_map": {"a": "../b.safetensors"}}'):
        (folder / INDEX).write_text(nonsense)
        assert INDEX in refusal(folder)


def test_without_an_index_two_files_must_not_hold_the_same_tensor(folder: Path) -> None:
    put(folder, {Q_PROJ: mx.ones((64, 64))}, "model-old.safetensors")
    assert f"{Q_PROJ!r} is in model-old.safetensors and in model.safetensors" in refusal(folder)


def test_damaged_files_are_sentences(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (
        b"",
        b"\xff" * 100,
        whole[:100],
        whole[:-1],
        b"\x02" + bytes(7) + b"[]",
        b"\x01" + bytes(7) + b"\xff",
    ):
        path.write_bytes(content)
        assert "model.safetensors" in refusal(folder)
    head = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(4))
    assert "tensor 'a' has 4 bytes, which is not (3,) of F32" in refusal(folder)


# --- config.json ------------------------------------------------------------------------------------------------

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "scaling",
    [{}, {"rope_type": "llama3", **LLAMA3}, {"rope_type": "linear", "factor": 2.0}],
    ids=["none", "llama3", "linear"],
)
def test_rope_parameters_mean_what_their_two_keys_meant(scaling: dict[str, object], folder: Path) -> None:
    configure(folder, rope_theta=500000.0, **({"rope_scaling": scaling} if scaling else {}))
    before = logits(folder)
    configure(
        folder, ("rope_theta", "rope_scaling"), rope_parameters={"rope_type": "default", "rope_theta": 5e5} | scaling
    )
    assert same(before, logits(folder))
    assert loaded(folder).identity("0") != "0"
    configure(folder, ("rope_parameters",))
    assert not same(before, logits(folder))


def test_rope_parameters_of_each_layer_type(tmp_path: Path) -> None:
    folder = save("gemma3_text", tmp_path / "gemma")
    entries = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
    }
    scaling = {"rope_type": "linear", "factor": 8.0}
    configure(folder, rope_theta=1e6, rope_local_base_freq=5e3, rope_scaling=scaling)
    before = logits(folder)
    configure(folder, ("rope_theta", "rope_local_base_freq", "rope_scaling"), rope_parameters=entries)
    assert same(before, logits(folder))
    configure(
        folder,
        ("sliding_window_pattern",),
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )
    assert same(before, logits(folder))
    configure(folder, model_type="llama", rms_norm_eps=1e-5)
    assert "rope_parameters differ between" in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"final_logit_softcapping": 30.0},
        {"attn_logit_softcapping": 50.0},
        {"logit_scale": 0.25},
        {"embedding_multiplier": 12},
        {"residual_multiplier": 0.22},
        {"query_pre_attn_scalar": 144},
        {"partial_rotary_factor": 0.5},
        {"clip_qkv": 8.0},
        {"hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "unheard-of", "factor": 2.0}},
        {"model_type": "lfm2", "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
        {"model_type": "starcoder2", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"model_type": "phi3", "rope_scaling": {"type": "yarn", "factor": 4.0, "long_factor": [1.0]}},
        {"model_type": "olmo"},
    ],
)
def test_keys_that_change_every_answer_are_refused_by_name(change: dict[str, object], folder: Path) -> None:
    configure(folder, **change)
    told = refusal(folder)
    assert "unheard-of" in told or any(key in told for key in change)


@pytest.mark.parametrize("key", ["final_logit_softcapping", "rope_scaling", "sliding_window", "rope_parameters"])
def test_keys_that_ask_for_nothing_are_harmless(key: str, folder: Path, original: Path) -> None:
    configure(
        folder, **{key: None, "hidden_act": "silu", "logit_scale": 1.0, "attention_dropout": 0.0, "rope_theta": 1e4}
    )
    assert same(logits(folder), logits(original))
    assert loaded(folder).remarks == ()


@pytest.mark.parametrize("change", [{"sliding_window": 64}, {"dual_chunk_attention_config": {"chunk_size": 8}}])
def test_keys_that_matter_sometimes_are_told(change: dict[str, object], folder: Path) -> None:
    configure(folder, **change)
    assert any(next(iter(change)) in remark for remark in loaded(folder).remarks)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "[" * 100_000, "{}", '{"model_type": 3}', '{"model_type": "llama"}', '{"model_type": "../x"}'],
)
def test_a_config_that_is_none_is_a_sentence(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    assert refusal(folder)


def test_numbers_that_do_not_go_together_are_sentences(folder: Path) -> None:
    for change in (
        {"num_key_value_heads": 3},
        {"num_attention_heads": 0},
        {"head_dim": "x"},
        {"rope_scaling": {"type": "linear"}},
    ):
        copy = Path(shutil.copytree(folder, folder.parent / "copy", dirs_exist_ok=True))
        configure(copy, **change)
        assert refusal(copy)


# --- context ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drop", "change", "usual", "most"),
    [
        ((), {}, CONTEXT, CONTEXT),
        (
            (),
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
            2048,
            2048,
        ),
        ((), {"rope_scaling": {"type": "linear", "factor": 4.0}}, 512, 2048),
        ((), {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 512, 1024),
        ((), {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 512, 512),
        ((), {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 512, 2048),
        (("max_position_embeddings",), {"seq_length": 700}, 700, 700),
        (("max_position_embeddings",), {"n_ctx": 700}, 700, 700),
        (("max_position_embeddings",), {"max_sequence_length": 700}, 700, 700),
    ],
)
def test_the_context_is_what_the_config_scales_it_to(
    drop: tuple[str, ...], change: dict[str, object], usual: int, most: int, folder: Path
) -> None:
    configure(folder, drop, **change)
    assert loaded(folder).context_length == usual
    assert loaded(folder, most).context_length == most
    told = refusal(folder, most + 1)
    assert f"allowed are 0 to {most}" in told
    assert next((key for key in change if "rope" not in key), "max_position_embeddings") in told


def test_a_context_that_is_named_nowhere_can_be_given(folder: Path) -> None:
    configure(folder, ("max_position_embeddings",))
    assert loaded(folder).context_length == 4096
    assert loaded(folder, 8192).context_length == 8192


@pytest.mark.parametrize("kind", ["qwen9", "deepseek_v99"])
def test_a_type_that_mlx_lm_lacks_is_named_with_its_version(kind: str, tmp_path: Path) -> None:
    """(N5) Users see what to upgrade."""
    folder = save("llama", tmp_path)
    configure(folder, model_type=kind)
    with pytest.raises(ModelError, match=rf"model_type '{kind}' is not supported by mlx-lm {version('mlx-lm')}"):
        loaded(folder)


def test_adapters_beside_the_weights_are_told(tmp_path: Path) -> None:
    """The base model is served, and nobody is led to believe anything else."""
    folder = save("llama", tmp_path)
    (folder / "adapters").mkdir()
    (folder / "adapter_config.json").write_text("{}")
    assert loaded(folder).remarks == ("adapters are not applied: adapter_config.json, adapters",)
