"""From settings to a Speculator and its proposers: a draft model is loaded and checked, the forward's pace measured."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from millpond.engine.group import ALONE, Group
from millpond.engine.orders import Trial
from millpond.engine.speculation import Speculator
from millpond.memory.shares import DRAFT_BLOCKS_SHARE
from millpond.model.lanes import Lane
from millpond.model.load import LoadedModel, ModelError
from millpond.model.opened import OpenModel, open_model
from millpond.model.probe import Capabilities
from millpond.model.prompt import new_prompt
from millpond.model.remember import remembered
from millpond.native import device
from millpond.native.packing import TILE
from millpond.schedule.costs import CostModel
from millpond.speculate.controller import Controller
from millpond.speculate.draft import Draft
from millpond.speculate.lookup import NgramProposer
from millpond.speculate.mtp import MtpProposer
from millpond.speculate.pace import Curve, Pace, measured
from millpond.speculate.proposer import Proposer
from millpond.speculate.vocabulary import vocabulary_differs
from millpond.text.tokenizer import TokenizerError
from millpond.types import MOST_DRAFT_TOKENS, SpecMode, SpecSettings

log = logging.getLogger(__name__)

MOST_ON_CPU, MOST_ON_GPU = 15, 7
"""Draft tokens per row and step unless told otherwise. Metal's fast attention ends at 8 columns."""
FAST_QUERIES = 32
"""It ends there, too: queries of a row that share a key head, all columns together. CUDA's has no such limit."""


def open_draft(folder: Path, target: Path, content: str) -> OpenModel:
    """A draft model that speaks of the same tokens as the served one, in ``target``, and fits slots. ``content``:
    digest of its folder. Raises ModelError."""
    try:
        differs = vocabulary_differs(folder, target)
        if differs:
            raise ModelError(f"it cannot guess for this model, for {differs}")
        opened = open_model(folder, lambda: content)
    except (TokenizerError, ModelError) as error:
        raise ModelError(f"draft_model: {error}") from error
    if not opened.capabilities.slots:
        raise ModelError(f"draft_model: it cannot be run in a batch: {opened.capabilities.reason}")
    assert not isinstance(opened.model.specs, str)
    if not all(spec.rewinds for spec in opened.model.specs):
        raise ModelError("draft_model: it has recurrent layers, which cannot go back to where the served model is")
    return opened


def open_speculator(
    settings: SpecSettings,
    model: LoadedModel,
    capabilities: Capabilities,
    costs: CostModel,
    content: str,
    draft: OpenModel | None,
    draft_bytes: int,
    rows: Callable[[], Lane],
    group: Group = ALONE,
    unguessed: str = "",
) -> Speculator:
    """With all proposers that this model can have; none where ``unguessed`` says why. ``content``: digest of the served
    model's folder; ``rows``: the running batch."""
    curve = Curve()
    if not unguessed and settings.default.mode is not SpecMode.OFF:
        where = (platform.node(), str(os.cpu_count()), str(group.world))
        about: tuple[str, ...] = (content, model.dtype, repr(model.form), *where)
        about += ("with its head",) if model.headed is not None else ()
        curve = remembered(Curve, about, lambda: _curve(model, capabilities, group), lambda found: found != Curve())
        costs.observe_decode(1, 0, curve.at(1))
    controller = Controller(costs, Pace(curve))
    proposers: dict[SpecMode, Proposer] = {}
    if not unguessed:
        proposers[SpecMode.NGRAM] = NgramProposer(model.vocab_size, shared=settings.shared)
    if draft is not None and not unguessed:
        cache_bytes = int(draft_bytes * DRAFT_BLOCKS_SHARE)
        proposers[SpecMode.DRAFT] = Draft(
            draft.model,
            model.vocab_size,
            draft_bytes - cache_bytes,
            cache_bytes,
            pipelined=draft.capabilities.pipelined,
        )
        controller.shares[SpecMode.DRAFT] = draft.model.weight_bytes / max(1, model.weight_bytes)
    if model.headed is not None and not unguessed:
        ngrams = NgramProposer(model.vocab_size, shared=settings.shared)
        proposers[SpecMode.MTP] = MtpProposer(
            model.headed, model.vocab_size, rows, ngrams, pipelined=capabilities.pipelined
        )
        controller.shares[SpecMode.MTP] = model.headed.share
    return Speculator(settings, proposers, most_drafts(model), controller, TILE if model.form.rotated else 0)


def most_drafts(model: LoadedModel) -> int:
    """Draft tokens per row and step that this device verifies at the price of a plain step, or nearly."""
    if model.on_cpu:
        return MOST_ON_CPU
    if not device.on_metal():
        return MOST_ON_GPU
    return max(1, min(MOST_ON_GPU, FAST_QUERIES // model.queries_per_head - 1))


def _curve(model: LoadedModel, capabilities: Capabilities, group: Group) -> Curve:
    forward_seconds = trial(model, capabilities)

    def together(tokens: int) -> float:
        group.tell(Trial(tokens))
        return forward_seconds(tokens)

    try:
        return measured(together, min(MOST_DRAFT_TOKENS + 1, model.context_length))
    except Exception:  # model code raises what it likes, and the model runs without this
        if group.world > 1:
            raise
        log.exception("the pace of forwards with draft tokens could not be measured")
        return Curve()


def trial(model: LoadedModel, capabilities: Capabilities) -> Callable[[int], float]:
    """What runs a row of so many tokens and tells how many seconds that took."""
    lane = capabilities.lane(model)
    lane.adopt("trial", new_prompt(model.network, model.form))

    def forward_seconds(tokens: int) -> float:
        begun = time.monotonic()
        varied = mx.arange(tokens, dtype=mx.int32)[None] * 7919 % model.vocab_size  # for mixtures of experts
        logits = lane.forward(model.network, varied)
        mx.eval(mx.argmax(logits, axis=-1), lane.arrays())
        lane.advance([tokens // 2])  # recurrent layers compute anew what is kept of a part
        mx.eval(lane.arrays())
        return time.monotonic() - begun

    return forward_seconds
