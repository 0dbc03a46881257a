"""Load a model folder into memory, ready to run, and say what it is.

On a CPU weights stay as they are stored where our own products take them (model/packed_linear), and the rest is held in
float32, as a fast BLAS knows nothing else (model/blas). Engine thread only.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from millpond.hub.errors import SourceError
from millpond.kv.arena import NO_LIMIT
from millpond.kv.format import KvFormat
from millpond.kv.slots import KvSpec, LeafSpec
from millpond.memory.budget import CacheSizes
from millpond.memory.machine import total_memory
from millpond.memory.shares import held_in_float32
from millpond.model import attention, layers, packed_linear, ragged, recurrences, replay
from millpond.model.blocks import BlockFormat, block_format
from millpond.model.checkpoint import WrongWeightsError
from millpond.model.config_keys import RefusedKeyError
from millpond.model.config_rope import UnmappedRopeError
from millpond.model.context import context_of
from millpond.model.headed import WithHead
from millpond.model.lanes import SlotsLane
from millpond.model.leaves import groups_of, leaf_specs, leaves_of
from millpond.model.pooling import MODULES, Embedder, NotPooled, embedder_of
from millpond.model.rotary import share_angles
from millpond.model.shard import CannotShard, shard
from millpond.model.twin import narrow_config, sharing
from millpond.model.upstream import (
    PromptCache,
    cache_arrays,
    cache_bytes,
    dequantized,
    load_weights,
    new_cache,
)
from millpond.native import decode, device, products
from millpond.prefix.records import Kind
from millpond.types import GROUP_SIZES, UNPACKED, KvPacking

log = logging.getLogger(__name__)

FILL = 8
"""Tokens that show what layers keep: states of some models grow with the first few."""
CACHE_STEP = 256
"""Tokens by which mlx-lm's caches grow."""
COMPILER = "g++"
"""What mx.compile calls at run time on a CPU."""
BEYOND_FLOAT16 = "gemma"
"""How model types begin whose activations exceed what float16 can hold; bfloat16 loses less than clipping does."""
FUSED_DIMS = (64, 80, 128)
"""Dimensions of keys and values in half precision for which Metal and CUDA keep no scores of a prompt's chunk."""
WIDTH_STEP = 64
"""Columns by which masked attention over rows gets wider on CUDA, whose products are slow for odd numbers of them."""
SCORE_COPIES = 3
"""Of those that they keep otherwise, at one time."""
UNDERSTOOD = (SourceError, WrongWeightsError, UnmappedRopeError, RefusedKeyError, FileNotFoundError, ValueError)
"""Errors whose text speaks for itself."""


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
    queries_per_head: int
    """Query heads that share a key head; 1 where config.json does not say."""
    score_bytes: int
    """What attention over a prompt's chunk keeps for each query and key, in all heads of a layer; 0: nothing."""
    kinds: list[str]
    """What each leaf is; see Leaf.name."""
    specs: list[LeafSpec] | str
    """What slots keep of each leaf, or which layers keep what slots cannot hold."""
    groups: tuple[int, ...]
    """Of each layer, how many leaves it keeps in a list; 0: one, which is in none."""
    form: KvFormat
    """How slots and cached blocks keep keys and values."""
    sizes: CacheSizes
    """What its caches take."""
    weight_bytes: int
    remarks: tuple[str, ...]
    """What of the folder is not used, or not as its files say; for people."""
    reading: str
    """What was done to the files' content on the way; empty for those that mlx-lm reads as they are."""
    blocks: BlockFormat | str
    """How its caches are cut into blocks for the prefix cache, or why they cannot be."""
    narrowed: Callable[[], nn.Module | None]
    """Makes another network of the same weights whose windows are all narrow; None where it has no wide ones."""
    embedder: Embedder | str = ""
    """What makes vectors of prompts, or why nothing does."""
    headless: str = ""
    """Why its MTP head, which somebody asked for, does not read along; empty where it does, and where nobody did."""
    steady: tuple[int, ...] = ()
    """Numbers of rows that decode forwards are filled up to, so that a row's numbers are the same whoever is beside it;
    none where that is not asked for."""

    @property
    def headed(self) -> WithHead | None:
        """The network, where its MTP head reads along."""
        return self.network if isinstance(self.network, WithHead) else None

    def slots_lane(self, limit_bytes: int = NO_LIMIT) -> SlotsLane:
        """A lane without rows yet, which may take so many bytes. Only for a model that slots can hold."""
        assert not isinstance(self.specs, str), self.specs
        step = WIDTH_STEP if device.on_cuda() else 1
        return SlotsLane(self.specs, limit_bytes, self.steady, step, self.groups)

    def identity(self, content: str) -> str:
        """What tells this model from others, hex: the digest of its files and, if they were changed on the way, how."""
        return sha256(f"{content}\0{self.reading}".encode()).hexdigest() if self.reading else content


def load(
    folder: Path,
    context_length: int,
    progress: Callable[[float], None],
    packing: KvPacking = UNPACKED,
    group: mx.distributed.Group | None = None,
    *,
    head: bool = False,
) -> LoadedModel:
    """Load ``folder``, or this rank's share of it; ``context_length`` 0 means the model's own. ``progress`` gets a
    fraction in [0, 1]. ``head``: its MTP head is to read along, if there is one.

    Raises ModelError when the folder is not a model that mlx-lm can run.
    """
    try:
        checkpoint = load_weights(folder, head=head)
    except Exception as error:  # whatever mlx-lm does with files that are not what it expects
        raise ModelError(f"cannot load the model in {str(folder)!r}: {_told(error)}") from error
    network, config = checkpoint.network, checkpoint.config
    headless, remarks = "", checkpoint.remarks
    if isinstance(checkpoint.head, str):
        headless = checkpoint.head
    elif headless := _unwanted_head(folder, group):
        remarks = (*remarks, f"its MTP head is not used: {headless}")
    else:
        network = WithHead(network, checkpoint.head)
    context_length = _context(config, context_length)
    on_cpu = device.on_cpu()
    if on_cpu:
        network = _on_a_cpu(network, 1 if group is None else group.size())
        share_angles(network)
    elif str(config.get("model_type")).startswith(BEYOND_FLOAT16):
        _converted(network, mx.float16, mx.bfloat16)
    if group is not None:
        try:
            shard(network, config, group)
        except CannotShard as error:
            raise ModelError(str(error)) from error
        if on_cpu and products.available():
            packed_linear.settle(network)  # a share may not have a size that stays
    if on_cpu and shutil.which(COMPILER) is None:
        mx.disable_compile()  # it would raise in the first forward; unfused operations are merely slower
    attention.install(network)
    ragged.install(network)
    recurrences.install()
    replay.install(network)
    _evaluate(network, progress)
    if on_cpu:
        packed_linear.install(network)
        layers.install(network)
    cache = new_cache(network)
    try:
        logits = _filled(network, cache)
    except Exception as error:  # whatever a class of mlx-lm does with shapes that do not go together
        if isinstance(network, WithHead):
            return without_head(load(folder, context_length, progress, packing, group), _told(error))
        raise ModelError(f"cannot run the model in {str(folder)!r}: {_told(error)}") from error
    specs, form, sizes, blocks = _kept(network, cache, _form(packing))
    try:
        embedder: Embedder | str = embedder_of(folder, network)
    except NotPooled as error:
        embedder = str(error)
    return LoadedModel(
        network=network,
        context_length=context_length,
        vocab_size=int(logits.shape[-1]),
        dtype=str(logits.dtype).removeprefix("mlx.core."),
        on_cpu=on_cpu,
        queries_per_head=_queries_per_head(config),
        score_bytes=0 if on_cpu else _score_bytes(cache, config, 1 if group is None else group.size()),
        kinds=[leaf.name for leaf in leaves_of(cache)],
        specs=specs,
        groups=groups_of(cache),
        form=form,
        sizes=sizes,
        weight_bytes=_bytes(network),
        remarks=remarks,
        reading=checkpoint.reading,
        blocks=blocks,
        narrowed=partial(_narrowed, network, config, group),
        embedder=embedder,
        headless=headless,
    )


def _unwanted_head(folder: Path, group: mx.distributed.Group | None) -> str:
    """Why the head of a model that has one does not read along; or ''."""
    if group is not None:
        return "heads are not divided over ranks"
    return "the model makes vectors of prompts" if (folder / MODULES).is_file() else ""


def without_head(model: LoadedModel, why: str) -> LoadedModel:
    """A model that was loaded without its head, and says why."""
    return replace(model, remarks=(*model.remarks, f"its MTP head is not used: {why}"), headless=why)


def _narrowed(network: nn.Module, config: dict[str, object], group: mx.distributed.Group | None) -> nn.Module | None:
    if (changed := narrow_config(config)) is None:
        return None
    headed = network if isinstance(network, WithHead) else None
    trunk = network if headed is None else headed.trunk
    try:
        twin = sharing(changed, trunk, lambda twin: None if group is None else shard(twin, config, group))
        ragged.install(twin)
        if device.on_cpu():
            packed_linear.install(twin)
            layers.install(twin)
        return twin if headed is None else headed.over(twin)
    except Exception:  # whatever a class of mlx-lm does with a configuration that nobody has published
        log.exception("what the model does past its windows could not be tried")
        return None


def _form(packing: KvPacking) -> KvFormat:
    """How slots keep keys and values on this device."""
    # MLX's CUDA kernels multiply with packed numbers of a few shapes only, and raise for others when asked.
    return KvFormat(packing, native=decode.available(), unpacked=device.on_cuda())


def _level(config: dict[str, object]) -> dict[str, object]:
    """The part of config.json that is about the text model."""
    text = config.get("text_config")
    return cast(dict[str, object], text) if isinstance(text, dict) else config


def _queries_per_head(config: dict[str, object]) -> int:
    level = _level(config)
    queries, keys = level.get("num_attention_heads"), level.get("num_key_value_heads")
    if level.get("kv_lora_rank") or not isinstance(queries, int) or not isinstance(keys, int):
        return 1
    return max(1, queries // max(1, keys))


def _score_bytes(cache: PromptCache, config: dict[str, object], ranks: int) -> int:
    """``cache`` is filled. Latent keys and capped scores have no kernel of their own, whatever the dimension."""
    level, kept = _level(config), [0]
    latent, queries = bool(level.get("kv_lora_rank")), level.get("num_attention_heads")
    for leaf in leaves_of(cache):
        if leaf.kind not in {Kind.KV, Kind.WINDOW}:
            continue
        keys, values = leaf.span(0, 1)
        dims = {int(keys.shape[3]), int(values.shape[3])}
        fused = len(dims) == 1 and dims <= set(FUSED_DIMS) and keys.dtype != mx.float32
        if not fused or latent or level.get("attn_logit_softcapping"):
            heads = (
                queries // ranks if latent and isinstance(queries, int) else keys.shape[1] * _queries_per_head(config)
            )
            kept.append(int(heads * keys.dtype.size) * SCORE_COPIES)
    return max(kept)


def _told(error: Exception) -> str:
    """One line; what others raise bare, such as a KeyError, gets its name before it."""
    text = " ".join(str(error).split())
    if isinstance(error, UNDERSTOOD):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _on_a_cpu(network: nn.Module, ranks: int) -> nn.Module:
    """With weights as products on a CPU take them: as they are stored, where C can and ``ranks`` can divide them so;
    else in float32; and where there is no room for that, as they are, slowly."""
    stays = (
        products.available() and packed_linear.divisible(network, ranks) and not packed_linear.reads_weights(network)
    )
    if not stays and held_in_float32(packed_linear.float_bytes(network), total_memory()):
        _converted(network, mx.floating, mx.float32)
        return dequantized(network)  # with float32 scales, so that no value is rounded to half precision on the way
    if products.available():
        packed_linear.settle(network)
    return network


def _converted(network: nn.Module, kind: mx.Dtype | mx.DtypeCategory, dtype: mx.Dtype) -> None:
    """Have the parameters of a ``kind`` in ``dtype``, lazily."""
    network.update(
        tree_map(lambda array: array.astype(dtype) if mx.issubdtype(array.dtype, kind) else array, network.parameters())
    )


def _evaluate(network: nn.Module, progress: Callable[[float], None]) -> None:
    arrays = [array for _, array in tree_flatten(network.parameters())]
    total, done = max(1, sum(array.nbytes for array in arrays)), 0
    for array in arrays:
        mx.eval(array)
        done += array.nbytes
        progress(done / total)


def _bytes(network: nn.Module) -> int:
    return sum(int(array.nbytes) for _, array in tree_flatten(network.parameters()))


def _context(config: dict[str, object], asked: int) -> int:
    """Tokens to serve: those ``asked`` for, or the model's own. Raises ModelError for more than it was made for."""
    context = context_of(config)
    if context.most is not None and asked > context.most:
        raise ModelError(
            f"context_length: {asked} is more than the {context.most} that the model was made for ({context.reason}); "
            f"allowed are 0 to {context.most}"
        )
    return asked or context.usual


def kept_as(model: LoadedModel, form: KvFormat) -> LoadedModel:
    """The same model with its keys and values kept in another way. Raises ModelError when that cannot be."""
    cache = new_cache(model.network)
    _filled(model.network, cache)
    specs, form, sizes, blocks = _kept(model.network, cache, form)
    return replace(model, specs=specs, form=form, sizes=sizes, blocks=blocks)


def _filled(network: nn.Module, cache: PromptCache) -> mx.array:
    """Run some tokens to learn what the layers store; config files lie more often. Logits, [1, FILL, vocab]."""
    logits: mx.array = network(mx.zeros((1, FILL), dtype=mx.int32), cache=cache)
    mx.eval(logits, cache_arrays(cache))
    return logits


def _kept(
    network: nn.Module, cache: PromptCache, form: KvFormat
) -> tuple[list[LeafSpec] | str, KvFormat, CacheSizes, BlockFormat | str]:
    """See LoadedModel. ``cache`` is filled; ``form`` is what is wished for."""
    specs = leaf_specs(cache, form)
    if isinstance(specs, str) or {spec.dtype for spec in keeping_keys(specs)} != {mx.float32}:
        form = replace(form, native=False)
        specs = leaf_specs(cache, form)
    if form.packs:
        _check_packing(specs, form.packing)
    sizes = _measured_sizes(network) if isinstance(specs, str) else _sizes(specs, form)
    return specs, form, sizes, block_format(cache, form)


def keeping_keys(specs: Sequence[LeafSpec]) -> list[KvSpec]:
    """Those that keep keys and values."""
    return [spec for spec in specs if isinstance(spec, KvSpec)]


def _sizes(specs: list[LeafSpec], form: KvFormat) -> CacheSizes:
    totals = map(sum, zip(*(astuple(spec.sizes) for spec in specs), strict=True))
    return replace(CacheSizes(*totals), exact_tokens=form.packing.start if form.packs else 0)


def _check_packing(specs: list[LeafSpec] | str, packing: KvPacking) -> None:
    if isinstance(specs, str):
        raise ModelError(f"kv_bits: {packing.bits} cannot be used with this model: {specs}")
    if any(not spec.heads for spec in keeping_keys(specs)):
        raise ModelError(
            f"kv_bits: {packing.bits} cannot be used with this model: some of its layers have no attention"
        )
    dims = sorted({dim for spec in keeping_keys(specs) for dim in (spec.key_dim, spec.value_dim)} - {0})
    if not dims:
        raise ModelError(f"kv_bits: {packing.bits} cannot be used with this model: it keeps no keys and values")
    fitting = [size for size in GROUP_SIZES if not any(dim % size for dim in dims)]
    if packing.group_size not in fitting:
        allowed = f"allowed: {', '.join(map(str, fitting))}" if fitting else f"no group has fewer than {GROUP_SIZES[0]}"
        raise ModelError(
            f"kv_group_size: {packing.group_size} does not divide this model's head dimensions "
            f"({', '.join(map(str, dims))}); {allowed}"
        )


def _measured_sizes(network: nn.Module) -> CacheSizes:
    """Of caches whose layout is not known, from what they hold at two lengths."""
    cache, held = new_cache(network), []
    for _ in range(2):
        network(mx.zeros((1, CACHE_STEP), dtype=mx.int32), cache=cache)
        mx.eval(cache_arrays(cache))
        held.append(cache_bytes(cache))
    per_token = max(0, held[1] - held[0]) // CACHE_STEP
    return CacheSizes(per_token, max(0, held[0] - per_token * CACHE_STEP))
