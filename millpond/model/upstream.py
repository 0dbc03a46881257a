"""The only importer of mlx_lm: model classes, weights, and per-sequence caches. Engine thread only.

Everything Millpond assumes about mlx-lm's caches is in this file; the probe checks at start that it still holds.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from millpond.hub.weights import weight_files
from millpond.kv.format import Arrays, KvFormat
from millpond.kv.leaf import LeafRow
from millpond.kv.slots import KvSpec, RingSpec
from millpond.model.checkpoint import check_weights, read_arrays
from millpond.model.config_keys import pattern_change, remarks_of
from millpond.model.config_rope import check_scaling, rope_changes
from millpond.model.float8 import block_of, holds_float8, must_widen, quantization_of, widen_float8
from millpond.model.open_files import limit_kept
from millpond.prefix.records import Kind

with limit_kept():
    from mlx_lm.models.activations import swiglu as swiglu
    from mlx_lm.models.base import BaseModelArgs, scaled_dot_product_attention
    from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache
    from mlx_lm.utils import MODEL_REMAPPING, _get_classes, dequantize_model, load_config, load_model


class LayerCache(Protocol):
    """One layer's cache as mlx-lm's models use it; opaque to everybody but this file."""

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


class _ConfigsOnly:
    """What mlx-lm's loader is given for a folder: its JSON files, and no weights, which are read here."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __truediv__(self, name: str) -> Path | str:
        return "" if name.endswith(".safetensors") else self._folder / name


def load_weights(folder: Path) -> Checkpoint:
    """Load a local MLX folder lazily: the weight files that its index names, keys of config.json in the class's words.

    Raises SourceError, WrongWeightsError, UnmappedRopeError, RefusedKeyError, and what mlx-lm raises for a folder that
    it cannot read.
    """
    files = weight_files(folder)
    config = _read_config(folder)
    module, level, taken = class_of(config)
    changes: dict[str, object] = {}
    remarks = [f"weights beside the model's own are ignored: {', '.join(files.ignored)}"] if files.ignored else []
    if taken is not None:
        changes = rope_changes(level, taken, module) | pattern_change(level, taken)
        check_scaling(level, taken, module)
        remarks += remarks_of(level, taken, module)
    arrays, dtypes = read_arrays(files)
    quantization = quantization_of(config, folder)
    widened = holds_float8(dtypes) and must_widen(quantization)
    if widened:
        arrays = widen_float8(arrays, dtypes, block_of(quantization))
    overrides: dict[str, object] = dict(changes)
    if level is not config:
        overrides = {"text_config": {**level, **changes}}
    if widened:
        overrides["quantization_config"] = None  # nothing is packed any more

    def build(arguments: object) -> nn.Module:
        network = cast(nn.Module, model_class(arguments))
        upstream_sanitize = getattr(network, "sanitize", dict)
        upstream_load = network.load_weights

        def load(weights: list[tuple[str, mx.array]], strict: bool) -> None:
            check_weights(dict(weights), dict(tree_flatten(network.parameters())), dtypes)
            upstream_load(weights, strict=strict)

        # Both are called once, by load_model, which has no weights to give.
        network.sanitize = lambda _: upstream_sanitize(arrays)
        network.load_weights = load
        return network

    model_class, arguments_class = _get_classes(config)
    view = cast(Path, _ConfigsOnly(folder))
    model, config = load_model(
        view, lazy=True, strict=False, model_config=overrides, get_model_classes=lambda **_: (build, arguments_class)
    )
    del model.sanitize, model.load_weights
    reading = repr((sorted(changes.items()), widened)) if changes or widened else ""
    return Checkpoint(cast(nn.Module, model), cast(dict[str, object], config), tuple(remarks), reading)


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
    module = sys.modules[model_class.__module__]
    name = module.__name__.rpartition(".")[2]
    keys = frozenset(inspect.signature(arguments).parameters)
    if "text_config" not in keys:
        own = "from_dict" in vars(arguments)
        return name, config, None if own else keys
    text = config.get("text_config")
    level = cast(dict[str, object], text) if isinstance(text, dict) else config
    inner = {
        held.__name__.rpartition(".")[2]: frozenset(inspect.signature(held.ModelArgs).parameters)
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


def _takes_keys(held: object) -> bool:
    return isinstance(held, type) and issubclass(held, BaseModelArgs) and held is not BaseModelArgs


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


def leaves(cache: PromptCache) -> list[LayerCache]:
    """The caches of all layers, those of layers that keep several one after the other."""
    flat: list[LayerCache] = []
    for layer in cache:
        flat += leaves(list(layer.caches)) if isinstance(layer, CacheList) else [layer]
    return flat


def cache_kind(cache: LayerCache) -> str:
    """``kv``, ``window``, ``state``, or the class name of a cache of which nothing is known."""
    if type(cache) is KVCache:
        return "kv"
    if isinstance(cache, RotatingKVCache) and type(cache) is RotatingKVCache and cache.keep == 0:
        return "window"
    if type(cache) is ArraysCache:
        return "state"
    return type(cache).__name__


def cache_arrays(cache: PromptCache) -> list[mx.array]:
    """Every array held by a prompt's caches."""
    return [array for _, array in tree_flatten([layer.state for layer in cache]) if isinstance(array, mx.array)]


def cache_bytes(cache: PromptCache) -> int:
    """Bytes held by a prompt's caches."""
    return sum(array.nbytes for array in cache_arrays(cache))


def layer_specs(cache: PromptCache, form: KvFormat) -> list[KvSpec]:
    """What each layer stores, read off caches that a forward has filled. Raises TypeError for other kinds."""
    specs: list[KvSpec] = []
    for index, layer in enumerate(cache):
        if not isinstance(layer, KVCache | RotatingKVCache):
            raise TypeError(f"layer {index} keeps a {type(layer).__name__}")
        keys, values = layer.keys, layer.values
        numbers = (keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, form)
        sliding = isinstance(layer, RotatingKVCache)
        specs.append(RingSpec(*numbers, window=layer.max_size) if sliding else KvSpec(*numbers))
    return specs


def nothing() -> LayerCache:
    """What stands in for a layer that has been given away."""
    return cast(LayerCache, KVCache())


def take_rows(cache: PromptCache) -> Iterator[LeafRow]:
    """Yield each layer of a finished prompt for adoption, dropping it from ``cache`` once it is copied."""
    for index, layer in enumerate(cache):
        if isinstance(layer, RotatingKVCache):
            keys, values = in_order(layer)
            kept = min(layer.offset, keys.shape[2], layer.max_size)
            yield LeafRow((keys[:, :, -kept:], values[:, :, -kept:]))
        elif isinstance(layer, KVCache):
            yield LeafRow((layer.keys, layer.values), layer.keys.shape[2] - layer.offset)
        else:
            raise TypeError(f"layer {index}: {type(layer).__name__} has no rows to adopt")
        cache[index] = nothing()


class Rounded:
    """A cache that packs and unpacks whatever it is given: what slots of that format hold, in a single sequence."""

    def __init__(self, leaf: LayerCache, form: KvFormat, done: int = 0) -> None:
        """``leaf``: a plain or sliding cache; what it holds behind the first ``done`` tokens is rounded at once."""
        assert isinstance(leaf, KVCache | RotatingKVCache)
        self._leaf = leaf
        self._form = form
        self._exact = form.packing.start if isinstance(leaf, KVCache) else 0
        end = leaf.offset
        held = end - in_order(leaf)[0].shape[2]
        first = max(held, done, min(self._exact, end))
        if first < end:
            packed = form.unpack(form.pack(*spans(leaf, first, end)))
            sides = zip(spans(leaf, held, first), packed, strict=True)
            keys, values = (mx.concatenate(list(side), axis=2) for side in sides)
            put_span(leaf, keys, values, end)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """As mlx-lm's, one token at a time."""
        if self._leaf.offset >= self._exact:
            keys, values = self._form.unpack(self._form.pack(keys, values))
        return cast(tuple[mx.array, mx.array], self._leaf.update_and_fetch(keys, values))

    def __getattr__(self, name: str) -> object:
        return getattr(self._leaf, name)


def rounded(caches: PromptCache, form: KvFormat, done: int = 0) -> PromptCache:
    """Caches that go on as slots of that format would; the same ones where nothing is packed. See ``Rounded``."""
    return [cast(LayerCache, Rounded(leaf, form, done)) for leaf in caches] if form.packs else caches


# --- parts of a cache, for the prefix cache ---------------------------------------------------------------------


def in_order(leaf: KVCache | RotatingKVCache) -> tuple[mx.array, mx.array]:
    """Keys and values of all positions held, in order."""
    if isinstance(leaf, KVCache):
        return leaf.keys[:, :, : leaf.offset], leaf.values[:, :, : leaf.offset]
    # Between chunks the ring may be stored rotated; only its own method knows the order.
    return leaf._temporal_order(leaf.keys), leaf._temporal_order(leaf.values)


def spans(leaf: LayerCache, start: int, end: int) -> Arrays:
    """Keys and values of positions [start, end) as lazy views; a window must still hold them."""
    if isinstance(leaf, RotatingKVCache):
        keys, values = in_order(leaf)
        first = leaf.offset - keys.shape[2]
        if start < first:
            raise ValueError(f"position {start} has left the window, which begins at {first}")
        return keys[:, :, start - first : end - first], values[:, :, start - first : end - first]
    assert isinstance(leaf, KVCache)
    return leaf.keys[:, :, start:end], leaf.values[:, :, start:end]


def spans_of(cache: PromptCache, start: int, end: int, kind: Kind) -> list[Arrays]:
    """The same for all caches of a prompt of one kind; an empty one for the others."""
    return [spans(leaf, start, end) if cache_kind(leaf) == kind else () for leaf in leaves(cache)]


def snapshot(leaf: LayerCache) -> list[mx.array]:
    """The arrays of a recurrent layer as they are now. Raises ValueError when it has none yet."""
    assert isinstance(leaf, ArraysCache)
    if leaf.empty() or leaf.lengths is not None or leaf.left_padding is not None:
        raise ValueError("the recurrent layer has no state of its own yet")
    return [array for array in leaf.cache if array is not None]


def window_of(leaf: LayerCache) -> int:
    """Sliding-window size in tokens; 0 for other layers."""
    return int(leaf.max_size) if isinstance(leaf, RotatingKVCache) else 0


def put_span(leaf: LayerCache, keys: mx.array, values: mx.array, length: int) -> None:
    """Fill a fresh cache with ``length`` positions, of which a window holds the last max_size, in order."""
    assert isinstance(leaf, KVCache | RotatingKVCache)
    leaf.keys, leaf.values, leaf.offset = keys, values, length
    if isinstance(leaf, RotatingKVCache):
        leaf._idx = keys.shape[2]


def put_state(leaf: LayerCache, arrays: list[mx.array]) -> None:
    """Fill a fresh recurrent cache."""
    assert isinstance(leaf, ArraysCache)
    leaf.cache = list(arrays)
