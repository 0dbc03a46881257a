"""The only importer of mlx_lm: model classes, weights, and per-sequence caches. Engine thread only."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from millpond.hub.weights import weight_files
from millpond.model.checkpoint import check_weights, read_arrays
from millpond.model.config_keys import pattern_change, remarks_of
from millpond.model.config_rope import check_scaling, rope_changes
from millpond.model.float8 import block_of, holds_float8, must_widen, quantization_of, widen_float8
from millpond.model.heads import LAYOUTS, PART, Arrays, HeadLayout, claimed, fitted, sorted_out, split, strange_heads
from millpond.model.lean_import import without_tokenizers
from millpond.model.mtp import Blocks, Head, body_of, norm_of
from millpond.model.open_files import limit_kept

with limit_kept(), without_tokenizers():
    from mlx_lm.models.activations import swiglu as swiglu
    from mlx_lm.models.base import BaseModelArgs, scaled_dot_product_attention
    from mlx_lm.models.cache import ArraysCache as ArraysCache
    from mlx_lm.models.cache import CacheList as CacheList
    from mlx_lm.models.cache import ChunkedKVCache as ChunkedKVCache
    from mlx_lm.models.cache import KVCache as KVCache
    from mlx_lm.models.cache import RotatingKVCache as RotatingKVCache
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear as QuantizedSwitchLinear
    from mlx_lm.models.switch_layers import SwitchLinear as SwitchLinear
    from mlx_lm.utils import MODEL_REMAPPING, _get_classes, dequantize_model, load_config, load_model
    from mlx_lm.utils import infer_quant_config as packing_of


class LayerCache(Protocol):
    """One layer's cache as mlx-lm's models use it; opaque to everybody but leaves.py."""

    @property
    def state(self) -> object: ...


PromptCache = list[LayerCache]
Model = Callable[..., mx.array]
"""A model: (tokens int [n, L], cache=...) -> logits [n, L, vocab]."""


@dataclass(frozen=True)
class Checkpoint:
    """A model folder, read: weights are lazy still."""

    network: nn.Module
    config: dict[str, object]
    """config.json as the model's class got it."""
    remarks: tuple[str, ...]
    """What of the folder is not used, or not as it says; for people."""
    reading: str
    """What was changed of the files' content on the way to the class; empty for those that it reads as they are."""
    head: Head | str
    """Its head for multi-token prediction (MTP), or why there is none; empty where nobody asked."""


class _ConfigsOnly:
    """What mlx-lm's loader is given for a folder: its JSON files, and no weights, which are read here."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __truediv__(self, name: str) -> Path | str:
        return "" if name.endswith(".safetensors") else self._folder / name


def load_weights(folder: Path, *, head: bool = False) -> Checkpoint:
    """Load a local MLX folder lazily: the weight files that its index names, keys of config.json in the class's words.
    ``head``: the model's MTP head is wanted, too.

    Raises SourceError, WrongWeightsError, UnmappedRopeError, RefusedKeyError, and what mlx-lm raises for a folder that
    it cannot read.
    """
    files = weight_files(folder)
    config = _read_config(folder)
    module, level, taken = class_of(config)
    changes: dict[str, object] = {}
    remarks = [f"weights beside the model's own are ignored: {', '.join(files.ignored)}"] if files.ignored else []
    if adapters := [name for name in ("adapter_config.json", "adapters") if (folder / name).exists()]:
        remarks.append(f"adapters are not applied: {', '.join(adapters)}")
    if taken is not None:
        changes = rope_changes(level, taken, module) | pattern_change(level, taken)
        check_scaling(level, taken, module)
        remarks += remarks_of(level, taken, module)
    arrays, dtypes = read_arrays(files)
    quantization = quantization_of(config, folder)
    widened = holds_float8(dtypes) and must_widen(quantization)
    if widened:
        arrays = widen_float8(arrays, dtypes, block_of(quantization))
    given = _Given(folder, config, level, changes, dtypes, widened)
    layout, heads = LAYOUTS.get(module), list[Arrays]()
    if layout is not None:
        arrays, heads = split(arrays, layout, level.get("num_hidden_layers"))
    found: Head | str = ""
    if head:
        found = _head(given, layout, heads, arrays)
        if isinstance(found, str) and (heads or claimed(level) or strange_heads(list(arrays), level)):
            remarks.append(f"its MTP head is not used: {found}")
    model, config = given.built(arrays)
    reading = repr((sorted(changes.items()), widened)) if changes or widened else ""
    return Checkpoint(model, config, tuple(remarks), reading, found)


@dataclass(frozen=True)
class _Given:
    """What a folder says, but for its tensors."""

    folder: Path
    config: dict[str, object]
    level: dict[str, object]
    """The part of config.json that is about the text model."""
    changes: dict[str, object]
    """Of that part."""
    dtypes: dict[str, str]
    widened: bool
    """Nothing is packed any more."""

    def built(
        self, arrays: Arrays, part: re.Pattern[str] | None = None, more: Mapping[str, object] | None = None
    ) -> tuple[nn.Module, dict[str, object]]:
        """A model with these weights, lazily, and config.json as its class got it. ``more``: further changes of it.
        ``part``: only parameters with such names are there."""
        changes = {**self.changes, **(more or {})}
        overrides: dict[str, object] = dict(changes)
        if self.level is not self.config:
            overrides = {"text_config": {**self.level, **changes}}
        if self.widened:
            overrides["quantization_config"] = None
        if part is not None and isinstance(packing := self.config.get("quantization"), dict):
            # What it says of single layers is about others; how these are packed is seen in their tensors.
            usual = {key: value for key, value in packing.items() if not isinstance(value, dict | bool)}
            overrides["quantization"] = usual

        def build(arguments: object) -> nn.Module:
            network = cast(nn.Module, model_class(arguments))
            upstream_sanitize = getattr(network, "sanitize", dict)
            upstream_load = network.load_weights

            def load(weights: list[tuple[str, mx.array]], strict: bool) -> None:
                wanted = dict(tree_flatten(network.parameters()))
                if part is not None:
                    wanted = {name: array for name, array in wanted.items() if part.search(name)}
                check_weights(dict(weights), wanted, self.dtypes)
                upstream_load(weights, strict=strict)

            # Both are called once, by load_model, which has no weights to give.
            network.sanitize = lambda _: upstream_sanitize(arrays)
            network.load_weights = load
            return network

        model_class, arguments_class = _get_classes(self.config)
        view = cast(Path, _ConfigsOnly(self.folder))
        model, config = load_model(
            view,
            lazy=True,
            strict=False,
            model_config=overrides,
            get_model_classes=lambda **_: (build, arguments_class),
        )
        del model.sanitize, model.load_weights
        return cast(nn.Module, model), cast(dict[str, object], config)


def _head(given: _Given, layout: HeadLayout | None, heads: Sequence[Arrays], arrays: Arrays) -> Head | str:
    """The first of a model's heads, lazily, or why there is none. ``arrays``: the other tensors."""
    if not heads:
        if strange_heads(list(arrays), given.level):
            return f"how heads of {given.config['model_type']} models are made is not known here"
        return "config.json speaks of one, but no tensor of it is there" if claimed(given.level) else "there is none"
    assert layout is not None
    try:
        raw = any(name.endswith("conv1d.weight") and array.shape[-1] != 1 for name, array in arrays.items())
        own, layout = fitted(heads[0], layout)
        tensors = sorted_out(own, layout, raw=raw)
        model, _ = given.built(tensors.layer, PART, layout.one_layer)
        body = body_of(model)
        layer = Blocks(body.layers) if layout.in_blocks else body.layers[0]
        found = Head(layer, norm_of(model), embedding_first=layout.embedding_first)
        nn.quantize(
            found,
            class_predicate=lambda path, module: (
                packing_of(path, module, tensors.joint) if f"{path}.scales" in tensors.joint else False
            ),
        )
        wanted = {name: array for name, array in tree_flatten(found.parameters()) if name.startswith(Head.OWN)}
        check_weights(tensors.joint, wanted, given.dtypes)
        found.load_weights(list(tensors.joint.items()), strict=False)
    except Exception as error:  # noqa: BLE001 - whatever mlx-lm does with files that are not what it expects
        return " ".join(str(error).split()) or type(error).__name__
    return found


def _read_config(folder: Path) -> dict[str, object]:
    try:
        config = load_config(folder)
    except RecursionError as error:
        raise ValueError("config.json is nested too deeply") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError("config.json names no model_type")
    return cast(dict[str, object], config)


def class_of(config: dict[str, object]) -> tuple[str, dict[str, object], frozenset[str] | None]:
    """Module of the class that runs the text model, the part of config.json that it gets, and the keys that it takes.

    The keys are None for classes that read the configuration in a way of their own.
    """
    try:
        model_class, arguments = _get_classes(config)
    except SystemExit as error:  # a class that needs a package of its own ends the process when it is imported
        raise ValueError(f"model_type {config['model_type']!r} needs a package that is not installed") from error
    except ValueError as error:
        raise ValueError(
            f"model_type {config['model_type']!r} is not supported by mlx-lm {version('mlx-lm')}, which is installed; "
            "a newer one may have it"
        ) from error
    module = sys.modules[model_class.__module__]
    name = module.__name__.rpartition(".")[2]
    keys = frozenset(inspect.signature(arguments).parameters)
    if "text_config" not in keys:
        own = "from_dict" in vars(arguments)
        return name, config, None if own else keys
    text = config.get("text_config")
    level = cast(dict[str, object], text) if isinstance(text, dict) else config
    inner = {
        held.__name__.rpartition(".")[2]: _keys_in(held)
        for held in vars(module).values()
        if isinstance(held, ModuleType) and hasattr(held, "ModelArgs")
    }
    kind = str(level.get("model_type", ""))
    kind = MODEL_REMAPPING.get(kind, kind)
    if kind in inner:
        return kind, level, inner[kind]
    if len(inner) == 1:
        return next((held, level, taken) for held, taken in inner.items())
    others = [held for held in vars(module).values() if _takes_keys(held) and held is not arguments]
    keys = frozenset().union(*inner.values(), *(inspect.signature(held).parameters for held in others))
    return name, level, keys or None


def _keys_in(module: ModuleType) -> frozenset[str]:
    """What a file's text model takes."""
    own = frozenset(inspect.signature(module.ModelArgs).parameters)
    if "text_config" not in own:
        return own
    inner = (inspect.signature(held).parameters for held in vars(module).values() if _takes_keys(held))
    return own.union(*inner)


def _takes_keys(held: object) -> bool:
    return isinstance(held, type) and issubclass(held, BaseModelArgs) and held is not BaseModelArgs


def empty_model(config: dict[str, object]) -> nn.Module:
    """A model that config.json, as its class got it, describes; its weights are random, and not computed yet."""
    model_class, arguments = _get_classes(config)
    return cast(nn.Module, model_class(arguments.from_dict(config)))


def dequantized(model: nn.Module) -> nn.Module:
    """Replace quantised layers by plain ones."""
    return cast(nn.Module, dequantize_model(model))


Mask = mx.array | str | None
"""What is seen: everything, "causal", or a bool or additive array."""

UPSTREAM_MATH = {"scaled_dot_product_attention": scaled_dot_product_attention, "swiglu": swiglu}
"""mlx-lm's own functions by the names under which its model files import them."""


def upstream_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: LayerCache | None,
    scale: float,
    mask: Mask,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's attention: queries [n, H, L, D] over keys and values [n, G, K, D]."""
    return cast(mx.array, scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks))


def upstream_swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """mlx-lm's silu(gate) * x."""
    return cast(mx.array, swiglu(gate, x))


def new_cache(model: nn.Module) -> PromptCache:
    """Fresh per-sequence caches, one per layer."""
    return cast(PromptCache, make_prompt_cache(model))


def cache_arrays(cache: PromptCache) -> list[mx.array]:
    """Every array held by a prompt's caches."""
    return [array for _, array in tree_flatten([layer.state for layer in cache]) if isinstance(array, mx.array)]


def cache_bytes(cache: PromptCache) -> int:
    """Bytes held by a prompt's caches."""
    return sum(array.nbytes for array in cache_arrays(cache))
