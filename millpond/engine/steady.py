"""Answers that are the same whatever the load: what is fixed for them when an engine starts, and what that costs.

Rounding depends on the shapes of forwards, and their shapes on who else is there. Here they do not: decode forwards are
filled up to numbers of rows that round alike, each row attends alone, prompts are read in chunks of one size, nothing
is restored but what such chunks have computed, nobody is preempted, and no tokens are guessed ahead
(docs/decisions/0036-deterministic-answers.md). Engine thread only.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata

import mlx.core as mx
from msgspec.structs import replace as with_fields

from millpond import __version__
from millpond.memory.budget import MemoryBudget
from millpond.model.blocks import BlockFormat
from millpond.model.load import ModelError
from millpond.model.opened import OpenModel
from millpond.model.rounding import fitting, slower, steady_rows
from millpond.native import device

CHUNK = 256
"""Tokens of a prompt in one forward. Longer ones are read faster on a GPU; restored prefixes end at multiples."""
NO_GUESSES = "answers are deterministic, and verifying draft tokens rounds in other ways than drawing"


def steadied(opened: OpenModel, max_batch: int, chunk: int, world: int) -> tuple[OpenModel, str]:
    """The model as it is to be run, with ``chunk`` tokens of a prompt in each forward, and what that costs, for people.
    Raises ModelError where it cannot be had."""
    model, capabilities = opened.model, opened.capabilities
    if model.form.packs:
        raise ModelError(
            f"deterministic: not with kv_bits: {model.form.packing.bits}: what is restored was rounded when it was "
            "packed, and what is computed was not yet. Leave one of them out"
        )
    told = "each row is computed in a forward of its own"
    if capabilities.slots:
        try:
            widths = steady_rows(model, max_batch, world)
        except Exception as error:  # noqa: BLE001 - model code and kernels raise what they like; it is told
            widths = f"{type(error).__name__}: {error}"
        if isinstance(widths, str):
            raise ModelError(f"deterministic: not with this model on this device: {widths}. Leave it out to serve it")
        most = fitting(model, max_batch)
        told = (
            f"forwards have {' or '.join(map(str, widths))} rows; a step of one takes {slower(model, widths, 1):.2f} "
            f"times as long as usual, one of {most} takes {slower(model, widths, most):.2f} times"
        )
        model = replace(model, steady=widths)
    if isinstance(model.blocks, BlockFormat):
        blocks = replace(model.blocks, layout=replace(model.blocks.layout, step=chunk))
        model = replace(model, blocks=blocks)
    return replace(opened, model=model, capabilities=with_fields(capabilities, together=False)), told


def made_by(blas: str) -> str:
    """What rounds: blocks that others have computed are not what computing them here would give. ``blas``: what a CPU
    multiplies with, in words."""
    mlx = metadata.version("mlx")
    return f"millpond {__version__}, mlx {mlx}, {mx.default_device()}, {device.name()}, {blas}"


def check_chunk(chunk: int, budget: MemoryBudget, context_length: int) -> None:
    """That such a chunk may come behind so many tokens. Raises ModelError."""
    if budget.chunk_after(context_length) < chunk:
        raise ModelError(
            f"deterministic: reading {chunk} tokens of a prompt behind {context_length} others takes too much memory; "
            "allow fewer with context_length"
        )
