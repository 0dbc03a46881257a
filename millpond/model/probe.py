"""Which lane can run this model, and what else can be done with it.

Probe, don't list: what a model's code assumes about its cache is found out by running it, so a new model, or a new
mlx-lm, that breaks an assumption costs speed (solo lane) and never a wrong answer. Engine thread only.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import msgspec

from millpond.kv.arena import NO_LIMIT
from millpond.kv.format import KvFormat
from millpond.kv.states import CannotRollBackError
from millpond.memory.machine import total_memory
from millpond.model.blocks import BlockFormat, cut_prompt
from millpond.model.canary import donates
from millpond.model.forwards import prefill, prefill_together
from millpond.model.lanes import Lane, SoloLane
from millpond.model.leaves import CARRIED, rounded
from millpond.model.load import LoadedModel, ModelError, kept_as
from millpond.model.packed_linear import in_whole_numbers
from millpond.model.parity import (
    COARSE,
    COARSE_NOISES,
    LOOSE,
    NOISES,
    PACKED,
    STRICT,
    WHOLE,
    ParityError,
    apart,
    behind,
    check,
    noise,
)
from millpond.model.prompt import Prompt, new_prompt
from millpond.model.rounding import alike
from millpond.model.twin import exact, largest_bytes
from millpond.model.upstream import cache_arrays, new_cache
from millpond.observe.log import fields
from millpond.prefix.keys import pack
from millpond.prefix.match import Part, RestorePlan
from millpond.prefix.records import BLOCK, Kind
from millpond.prefix.tree import Tree
from millpond.types import UNPACKED

log = logging.getLogger(__name__)

PROMPTS = (5, 9, 17)
"""Tokens of those that are read together."""
RESTORED = 150
"""Tokens of the prefix that is restored: two full blocks and a tail."""
MOST_WIDENED = 8
"""A model is not tried in float32 where one of its weights would take more than this part of the memory then."""


class Capabilities(msgspec.Struct, frozen=True):
    """What the probe found."""

    slots: bool
    reason: str
    """Why slots cannot be used; empty when they can."""
    forward_only: str
    """Why a step cannot be kept in part, so that nothing can be guessed ahead; empty when it can."""
    pipelined: bool
    """Writes stay in place while a step is in flight; otherwise a step may be built, but not launched, before the one
    ahead of it has been read."""
    uncached: str
    """Why prefixes of this model cannot be cached; empty when they can."""
    native: bool = False
    """Attention over its slots is computed in C."""
    together: bool = False
    """Several prompts can be read in one forward."""
    unpacked: bool = False
    """Packed keys and values are unpacked in each step: the model does its own arithmetic with them."""
    alike: list[list[int]] = []
    """Numbers of rows that were tried, grouped by the bits that a row gets in forwards of so many; see rounding."""

    def lane(self, model: LoadedModel, limit_bytes: int = NO_LIMIT) -> Lane:
        """A fresh lane of the right kind, whose rows and prompts together may take so many bytes."""
        return model.slots_lane(limit_bytes) if self.slots else SoloLane()

    def fitted(self, model: LoadedModel) -> LoadedModel:
        """The model as the probe ran it. Raises ModelError when it was to be packed and cannot be."""
        if not self.slots and model.form.packs:
            packing = model.form.packing
            name, value = ("kv_quant_mode", "rotated") if packing.rotated else ("kv_bits", str(packing.bits))
            others = ", and kv_bits if that is refused as well," if packing.rotated else ""
            raise ModelError(
                f"{name}: {value} cannot be used with this model: {self.reason}. Leave {name}{others} out to serve it"
            )
        form = replace(model.form, native=self.native, unpacked=self.unpacked)
        return model if form == model.form else kept_as(model, form)


def probe(model: LoadedModel) -> Capabilities:
    """Run the probe. Never raises for what the model does: an exception in it is an answer."""
    reason, forward_only = (model.specs, "") if isinstance(model.specs, str) else differences(model)
    if reason and model.form.native:
        return probe(kept_as(model, replace(model.form, native=False)))
    if reason and model.form.packs and not model.form.unpacked:
        log.info("packed keys and values are unpacked in each step", extra=fields(reason=reason))
        return probe(kept_as(model, replace(model.form, unpacked=True)))
    uncached = model.blocks if isinstance(model.blocks, str) else _attempt(lambda: restoring(model, model.blocks))
    pipelined = bool(reason) or donates(model)
    together = not reason and _readable_together(model) and not _attempt(lambda: _reading_together(model))
    form = model.form
    return Capabilities(
        slots=not reason,
        reason=reason,
        forward_only=reason or forward_only,
        pipelined=pipelined,
        uncached=uncached,
        native=form.native,
        together=together,
        unpacked=form.unpacked,
        alike=[] if reason else _alike(model),
    )


def _alike(model: LoadedModel) -> list[list[int]]:
    try:
        return alike(model)
    except Exception:  # model code and kernels raise what they like; the model is served without anybody knowing, then
        log.exception("how numbers of rows round could not be compared")
        return []


def _attempt(check: Callable[[], str | None]) -> str:
    try:
        return check() or ""
    except ParityError as error:
        return str(error)
    except CannotRollBackError as error:
        return f"its recurrent layers cannot go back: {error}"
    except Exception as error:  # noqa: BLE001 - model code fails in its own ways; each is a reason, and it is shown
        return f"{type(error).__name__}: {error}"


def differences(model: LoadedModel) -> tuple[str, str]:
    """What differs in slots, and what differs where steps are kept in part; or ''."""
    narrow = _narrow(model)
    if model.dtype == "float32":
        return _in_float32(narrow)
    reason, in_part = _compared(model, _coarse(model))
    if not reason and largest_bytes(model.network) <= total_memory() // MOST_WIDENED:
        with exact(narrow.network):
            reason, more = _in_float32(narrow)
            in_part = in_part or more
    return reason, in_part


def _in_float32(model: LoadedModel) -> tuple[str, str]:
    """The same of a model whose network computes in that, if only for now."""
    try:
        if model.dtype != "float32":
            model = replace(kept_as(model, model.form), dtype="float32")
        plain = kept_as(model, replace(model.form, packing=UNPACKED)) if model.form.packs else model
        tolerance = _tolerance(plain)
    except Exception as error:  # noqa: BLE001 - its code, or a kernel, knows one element type, or one sequence, only
        log.info("what the model's numbers do by themselves could not be tried: %s", error)
        return ("", "") if model.dtype != "float32" else _compared(model, STRICT)
    reason, in_part = _compared(plain, tolerance)
    if reason or not model.form.packs:
        return reason, in_part
    reason, more = _compared(model, PACKED)
    return reason, in_part or more


def _coarse(model: LoadedModel) -> float:
    """The same in the model's own element type, where a single row that rounds badly must not part all of them: what
    is wrong by less shows in float32."""
    if model.dtype == "float32":
        return LOOSE
    try:
        return min(COARSE, max(LOOSE, COARSE_NOISES * noise(model)))
    except Exception:  # noqa: BLE001 - as everywhere here: what the model's code raises says nothing about its rows
        return LOOSE


def _tolerance(model: LoadedModel) -> float:
    """How far a row's logits may be from those of the sequence alone. Raises what the model's code raises."""
    strict = WHOLE if in_whole_numbers(model.network) else STRICT
    return min(LOOSE, max(strict, NOISES * noise(model)))


def _compared(model: LoadedModel, tolerance: float) -> tuple[str, str]:
    in_part = _attempt(lambda: check(model, tolerance, in_part=True))
    return (_attempt(lambda: check(model, tolerance, in_part=False)), in_part) if in_part else ("", "")


def _narrow(model: LoadedModel) -> LoadedModel:
    """The model with windows that a short prompt fills, where its own are wider."""
    network = model.narrowed()
    if network is None:
        return model
    try:
        return kept_as(replace(model, network=network), model.form)
    except Exception as error:  # noqa: BLE001 - nobody has published such a model
        log.info("what the model does past its windows could not be tried: %s", error)
        return model


def _readable_together(model: LoadedModel) -> bool:
    return set(model.kinds) <= {Kind.KV, Kind.WINDOW, CARRIED} and not any(model.groups)


def _reading_together(model: LoadedModel) -> str:
    """Compare what follows prompts read in common forwards with what follows each alone. Returns what differs."""
    chooser = random.Random(2)  # noqa: S311 - any tokens do
    tokens = [[chooser.randrange(model.vocab_size) for _ in range(length)] for length in PROMPTS]
    prompts = [new_prompt(model.network, model.form) for _ in tokens]
    done = [0 for _ in tokens]
    for share in (0.5, 1.0):  # behind nothing, then behind beginnings of different lengths
        ends = [int(len(row) * share) for row in tokens]
        prefill_together(model.network, prompts, [row[at:end] for row, at, end in zip(tokens, done, ends, strict=True)])
        done = ends
    tolerance = _coarse(model)
    for row, prompt in zip(tokens, prompts, strict=True):
        apart_from_it = Prompt(new_cache(model.network), KvFormat())
        prefill(model.network, apart_from_it, row)
        alone, beside = (rounded(one.caches, model.form) for one in (apart_from_it, prompt))
        if not apart(behind(model, beside, [0]), behind(model, alone, [0])) <= tolerance:
            return f"logits differ from those of prompts that are read alone (prompt of {len(row)})"
    return ""


def restoring(model: LoadedModel, blocks: BlockFormat | str) -> str:
    """Compare what follows a prompt put together from blocks with what follows the original. Returns what differs."""
    assert isinstance(blocks, BlockFormat)
    chooser = random.Random(1)  # noqa: S311 - any tokens do
    length = min(RESTORED, model.context_length - 1)
    prompt = [chooser.randrange(model.vocab_size) for _ in range(length)]
    tree = Tree("")
    original, node = new_prompt(model.network, model.form), tree.root("")
    ends = [*range(BLOCK, length, BLOCK), length]
    parts = []
    for start, end in zip([0, *ends], ends, strict=False):
        prefill(model.network, original, prompt[start:end])
        node = tree.add(node, pack(prompt[start:end]))
        for kind in blocks.layout.kinds:
            node.records[kind] = cut_prompt(blocks, original, start, end, kind)
        parts.append(Part(node, end - start))
    restored = blocks.restored(model.network, RestorePlan(length, tuple(parts), ()), length + 2)
    caches = rounded(original.caches, model.form)
    copy = rounded(restored.caches, model.form, done=length)
    for step in range(2):
        token = mx.array([[chooser.randrange(model.vocab_size)]])
        logits = [model.network(token, cache=cache)[0, -1] for cache in (caches, copy)]
        mx.eval(logits, cache_arrays(original.caches), cache_arrays(restored.caches))
        if not apart(logits[1], logits[0]) <= LOOSE:
            return f"logits differ after a restored prefix (step {step})"
    return ""
