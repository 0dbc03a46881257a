"""Which lane can run this model: a parity probe of slots against mlx-lm's own caches, and the donation canary.

Probe, don't list: what a model's code assumes about its cache is found out by running it, so a new model, or a new
mlx-lm, that breaks an assumption costs speed (solo lane) and never a wrong answer. Engine thread only.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import mlx.core as mx
import msgspec

from millpond.kv.arena import NO_LIMIT
from millpond.kv.format import KvFormat
from millpond.kv.slots import RingSpec
from millpond.model.blocks import BlockFormat, cut_prompt
from millpond.model.forwards import decode, prefill, prefill_together
from millpond.model.lanes import Lane, SoloLane
from millpond.model.leaves import rounded
from millpond.model.load import LoadedModel, ModelError, kept_as
from millpond.model.prompt import Prompt, new_prompt
from millpond.model.rounding import alike
from millpond.model.upstream import cache_arrays, new_cache
from millpond.prefix.keys import pack
from millpond.prefix.match import Part, RestorePlan
from millpond.prefix.records import BLOCK
from millpond.prefix.tree import Tree

log = logging.getLogger(__name__)

PROMPTS = (5, 9, 17)
RESTORED = 150
"""Tokens of the prefix that is restored: two full blocks and a tail."""
STEPS = 4
ROLLED_BACK = 2
TOLERANCE = 0.05
"""Largest accepted difference of two logits, as a share of the row's spread; a wrong mask moves them far more."""
PACKED_TOLERANCE = 0.3
"""The same between attention over packed numbers and over the same ones unpacked to half precision, which rounds them
once more: up to 0.16 in models of random weights. What a neighbour does to a row is held to the other one even then."""
CANARY_BYTES = 96 * 1024 * 1024
"""Of the canary's long row, in all layers."""
CANARY_SHORT = 64
"""Of it, the part that the short row has."""
CANARY_STEPS = 3
CANARY_MARGIN = 2 * CANARY_STEPS + 2
CANARY_LOGIT_BYTES = 16
"""Of one logit, in all the forms in which a step has it at once."""
COPIED = 0.4
"""Of a layer, what is no copy yet: the scores of unfused attention grow with the row, too."""


class Capabilities(msgspec.Struct, frozen=True):
    """What the probe found."""

    slots: bool
    reason: str
    """Why slots cannot be used; empty when they can."""
    pipelined: bool
    """Writes stay in place while a step is in flight; otherwise a step may be built, but not launched, before the one
    ahead of it has been read."""
    uncached: str
    """Why prefixes of this model cannot be cached; empty when they can."""
    native: bool = False
    """Attention over its slots is computed in C."""
    together: bool = False
    """Several prompts can be read in one forward."""
    alike: list[list[int]] = []
    """Numbers of rows that were tried, grouped by the bits that a row gets in forwards of so many; see rounding."""

    def lane(self, model: LoadedModel, limit_bytes: int = NO_LIMIT) -> Lane:
        """A fresh lane of the right kind, whose rows and prompts together may take so many bytes."""
        return model.slots_lane(limit_bytes) if self.slots else SoloLane()

    def fitted(self, model: LoadedModel) -> LoadedModel:
        """The model as the probe ran it. Raises ModelError when it was to be packed and cannot be."""
        if not self.slots and model.form.packs:
            raise ModelError(
                f"kv_bits: {model.form.packing.bits} cannot be used with this model: {self.reason}. "
                "Leave kv_bits out to serve it"
            )
        form = replace(model.form, native=self.native)
        return model if form == model.form else kept_as(model, form)


def probe(model: LoadedModel) -> Capabilities:
    """Run the probe. Never raises for what the model does: an exception in it is an answer."""
    reason = model.specs if isinstance(model.specs, str) else _attempt(lambda: _parity(model))
    if reason and model.form.native:
        return probe(kept_as(model, replace(model.form, native=False)))
    uncached = model.blocks if isinstance(model.blocks, str) else _attempt(lambda: restoring(model, model.blocks))
    pipelined = bool(reason) or donates(model)
    together = not reason and not _attempt(lambda: _reading_together(model))
    form = model.form
    return Capabilities(
        slots=not reason,
        reason=reason,
        pipelined=pipelined,
        uncached=uncached,
        native=form.native,
        together=together,
        alike=[] if reason else _alike(model),
    )


def _alike(model: LoadedModel) -> list[list[int]]:
    try:
        return alike(model)
    except Exception:  # model code and kernels raise what they like; the model is served without anybody knowing, then
        log.exception("how numbers of rows round could not be compared")
        return []


def _attempt(check: Callable[[], str]) -> str:
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - model code fails in its own ways; each is a reason, and it is shown
        return f"{type(error).__name__}: {error}"


def _parity(model: LoadedModel) -> str:
    """Compare slots with upstream caches over ragged rows, a departure and a rollback. Returns what differs, or ''."""
    chooser = random.Random(0)  # noqa: S311 - any tokens do
    prompts = [[chooser.randrange(model.vocab_size) for _ in range(length)] for length in PROMPTS]
    answers = [[chooser.randrange(model.vocab_size) for _ in range(STEPS)] for _ in prompts]
    expected = [_upstream(model, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    if model.form.packs and model.dtype != "float32":
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            alone = _alone(model, prompt, answer)
            if any(map(partial(differs, tolerance=PACKED_TOLERANCE), alone, expected[row])):
                return f"logits over packed keys differ from those over unpacked ones (prompt of {len(prompt)})"
            expected[row] = alone
    lane = _rows(model, prompts)
    rows = list(range(len(prompts)))

    # A forward of several columns whose tokens are then all refused: what it wrote must never be seen again.
    refused = mx.array([[token + 1 for token in answers[row][:ROLLED_BACK]] for row in rows]) % model.vocab_size
    mx.eval(lane.forward(model.network, refused))
    lane.advance([0] * len(rows))

    for step in range(STEPS):
        logits = decode(model.network, lane, mx.array([answers[row][step] for row in rows], dtype=mx.int32))
        mx.eval(logits)
        for place, row in enumerate(rows):
            if differs(logits[place], expected[row][step]):
                return f"logits differ from the single-sequence ones (prompt of {PROMPTS[row]}, step {step})"
        if step == 1:
            lane.release("0")
            rows = [int(name) for name in lane.batch.names]
    return ""


def _rows(model: LoadedModel, prompts: Sequence[Sequence[int]]) -> Lane:
    """A lane of slots with these prompts, named by their numbers."""
    lane = model.slots_lane()
    for row, tokens in enumerate(prompts):
        prompt = new_prompt(model.network, model.form)
        prefill(model.network, prompt, tokens)
        lane.adopt(str(row), prompt)
    return lane


def _alone(model: LoadedModel, tokens: list[int], answer: list[int]) -> list[mx.array]:
    """As ``_upstream``, in a row of its own."""
    lane, logits = _rows(model, [tokens]), []
    for token in answer:
        logits.append(decode(model.network, lane, mx.array([token], dtype=mx.int32))[0])
        mx.eval(logits[-1])
    return logits


def _upstream(model: LoadedModel, tokens: list[int], answer: list[int]) -> list[mx.array]:
    prompt, logits = Prompt(new_cache(model.network), KvFormat()), []
    prefill(model.network, prompt, tokens)
    caches = rounded(prompt.caches, model.form)
    for token in answer:
        logits.append(model.network(mx.array([[token]]), cache=caches)[0, -1])
        mx.eval(logits[-1])
    return logits


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
    for row, prompt in zip(tokens, prompts, strict=True):
        (expected,) = _upstream(model, row, [0])
        logits = model.network(mx.array([[0]]), cache=rounded(prompt.caches, model.form))[0, -1]
        if differs(logits, expected):
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
        if differs(logits[1], logits[0]):
            return f"logits differ after a restored prefix (step {step})"
    return ""


def differs(ours: mx.array, reference: mx.array, tolerance: float = TOLERANCE) -> bool:
    """True when two rows of logits [vocab] are further apart than kernels of different shapes may be."""
    ours, reference = ours.astype(mx.float32), reference.astype(mx.float32)
    spread = (reference.max() - reference.min()).item()
    return not bool((mx.abs(ours - reference).max() <= tolerance * spread).item())


def donates(model: LoadedModel) -> bool:
    """Whether steps in flight write in place: none may copy what the rows hold, not even a part of one layer.

    What steps over a long row take beyond those over a short one is copies: the rest is of the same size in both.
    """
    assert not isinstance(model.specs, str)
    token_bytes = sum(spec.token_bytes for spec in model.specs)
    longest = min(model.context_length, max(CANARY_SHORT, CANARY_BYTES // token_bytes)) - CANARY_MARGIN
    (short, least), (long, most) = (_in_flight(model, length) for length in (longest // CANARY_SHORT, longest))
    growing = sum(not isinstance(spec, RingSpec) for spec in model.specs)
    if long == short:  # rings are as large whatever they hold
        least, short, growing = CANARY_STEPS * model.vocab_size * CANARY_LOGIT_BYTES, 0, len(model.specs)
    scores = model.score_bytes * (longest - longest // CANARY_SHORT)
    return most - least < COPIED * (long - short) / growing + scores


def _in_flight(model: LoadedModel, length: int) -> tuple[int, int]:
    """Bytes of a row of ``length`` tokens, and the most that steps in flight took beyond it."""
    assert not isinstance(model.specs, str)
    lane = model.slots_lane()
    lane.adopt("canary", new_prompt(model.network, model.form))
    lane.advance([length])  # positions that were never written are zeros: the canary looks at memory, not at values
    tokens = mx.zeros((1,), dtype=mx.int32)
    before = 0
    for warm in (True, False):
        flights = []
        if not warm:
            mx.eval(tokens, lane.arrays())
            mx.synchronize()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
        for _ in range(CANARY_STEPS):
            tokens = mx.argmax(decode(model.network, lane, tokens), axis=-1).astype(mx.int32)
            mx.async_eval(tokens)
            flights.append(tokens)
        mx.eval(flights)
    return lane.nbytes, mx.get_peak_memory() - before
