"""Load a model folder into memory, ready to run, and say what it is.

On a CPU the weights are held in float32: MLX's quantised and 16-bit products run on one thread there, and a fast BLAS
knows float32 only (see model/blas.py). Engine thread only.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from kvarn.kv.arena import LayerSpec
from kvarn.model import cpu_math
from kvarn.model.blocks import BlockFormat, block_format
from kvarn.model.memory import total_memory
from kvarn.model.rotary import share_angles
from kvarn.model.upstream import (
    cache_arrays,
    cache_bytes,
    cache_kind,
    dequantized,
    layer_specs,
    leaves,
    load_weights,
    new_cache,
)

CACHE_STEP = 256
"""Tokens by which mlx-lm's caches grow."""
COMPILER = "g++"
"""What mx.compile calls at run time on a CPU."""
DEFAULT_CONTEXT = 4096
"""Context length of a model whose config names none."""


class ModelError(Exception):
    """The model cannot be served; the message says why and what would help."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory."""

    network: nn.Module
    context_length: int
    vocab_size: int
    dtype: str
    on_cpu: bool
    kinds: list[str]
    """Cache kind of each layer; see upstream.cache_kind."""
    specs: list[LayerSpec]
    """What slots need to know of each layer; empty when some layer's cache does not fit slots."""
    token_bytes: int
    """Bytes that one token adds to the caches that grow."""
    row_bytes: int
    """Bytes of what does not grow: windows and recurrent states of one request."""
    chunk_token_bytes: int
    """Bytes that one token of a prompt chunk adds to the windows while the chunk is being read."""
    weight_bytes: int
    blocks: BlockFormat | str
    """How its caches are cut into blocks for the prefix cache, or why they cannot be."""


def load(folder: Path, context_length: int, progress: Callable[[float], None]) -> LoadedModel:
    """Load ``folder``; ``context_length`` 0 means the model's own. ``progress`` gets a fraction in [0, 1].

    Raises ModelError when the folder is not a model that mlx-lm can run.
    """
    try:
        network, config = load_weights(folder)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot load the model in {folder.name!r}: {error}") from error
    on_cpu = mx.default_device() == mx.cpu
    if on_cpu:
        network = _in_float32(network)
        share_angles(network)
        cpu_math.install(network)
        if shutil.which(COMPILER) is None:
            mx.disable_compile()  # it would raise in the first forward; unfused operations are merely slower
    _evaluate(network, progress)
    own_context = _own_context(config)
    if context_length > own_context:
        raise ModelError(f"context_length: {context_length} is more than the model's own {own_context}")
    specs, blocks, vocab_size, dtype = _measure(network)
    token_bytes, row_bytes = _sizes(specs) if specs else _measured_sizes(network)
    return LoadedModel(
        network=network,
        context_length=context_length or own_context,
        vocab_size=vocab_size,
        dtype=str(dtype).removeprefix("mlx.core."),
        on_cpu=on_cpu,
        kinds=[cache_kind(leaf) for leaf in leaves(new_cache(network))],
        specs=specs,
        token_bytes=token_bytes,
        row_bytes=row_bytes,
        chunk_token_bytes=sum(spec.token_bytes for spec in specs if spec.capacity is not None),
        weight_bytes=_bytes(network),
        blocks=blocks,
    )


def _in_float32(network: nn.Module) -> nn.Module:
    if float_bytes(network) > total_memory() * 0.8:
        return network  # better slow than swapped out; packed weights run as they are
    network.update(
        tree_map(
            lambda array: array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array,
            network.parameters(),
        )
    )
    return dequantized(network)  # with float32 scales, so that no value is rounded to half precision on the way


def float_bytes(network: nn.Module) -> int:
    """What the weights take in float32, packed ones unpacked."""
    count = sum(int(array.size) for _, array in tree_flatten(network.parameters()))
    for module in network.modules():
        if "scales" in module:
            packed, *others = (module[name] for name in ("weight", "scales", "biases") if name in module)
            count += int(packed.size) * 32 // module.bits - sum(int(array.size) for array in (packed, *others))
    return 4 * count


def _evaluate(network: nn.Module, progress: Callable[[float], None]) -> None:
    arrays = [array for _, array in tree_flatten(network.parameters())]
    total, done = max(1, sum(array.nbytes for array in arrays)), 0
    for array in arrays:
        mx.eval(array)
        done += array.nbytes
        progress(done / total)


def _bytes(network: nn.Module) -> int:
    return sum(int(array.nbytes) for _, array in tree_flatten(network.parameters()))


def _own_context(config: dict[str, object]) -> int:
    text = config.get("text_config")
    for source in (config, text if isinstance(text, dict) else {}):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length"):
            value = source.get(name)
            if isinstance(value, int) and value > 0:
                return value
    return DEFAULT_CONTEXT


def _measure(network: nn.Module) -> tuple[list[LayerSpec], BlockFormat | str, int, mx.Dtype]:
    """Run one token to learn what the layers store and how wide the logits are; config files lie more often."""
    cache = new_cache(network)
    logits = network(mx.array([[0]]), cache=cache)
    mx.eval(logits, cache_arrays(cache))
    try:
        specs = layer_specs(cache)
    except TypeError:
        specs = []
    return specs, block_format(cache), int(logits.shape[-1]), logits.dtype


def _sizes(specs: list[LayerSpec]) -> tuple[int, int]:
    growing = sum(spec.token_bytes for spec in specs if spec.capacity is None)
    return growing, sum(spec.token_bytes * spec.capacity for spec in specs if spec.capacity is not None)


def _measured_sizes(network: nn.Module) -> tuple[int, int]:
    """Bytes per token and per request of caches whose layout is not known, from what they hold at two lengths."""
    cache, held = new_cache(network), []
    for _ in range(2):
        network(mx.zeros((1, CACHE_STEP), dtype=mx.int32), cache=cache)
        mx.eval(cache_arrays(cache))
        held.append(cache_bytes(cache))
    per_token = max(0, held[1] - held[0]) // CACHE_STEP
    return per_token, max(0, held[0] - per_token * CACHE_STEP)
