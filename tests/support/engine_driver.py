"""Drives a real Engine in the test's own thread, turn by turn, and compares with mlx-lm's own generation."""

from __future__ import annotations

import queue
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

from millpond.engine.executor import Executor
from millpond.engine.link import Inbox
from millpond.engine.loop import Engine
from millpond.engine.prefixes import Prefixes
from millpond.engine.prepare import Prepared
from millpond.engine.speculation import Speculator
from millpond.grammar.lexicon import Lexicon
from millpond.kv.format import KvFormat
from millpond.memory.budget import MemoryBudget
from millpond.model.blocks import BlockFormat, ReadRecord, agree
from millpond.model.leaves import rounded
from millpond.model.load import LoadedModel
from millpond.model.probe import Capabilities, probe
from millpond.model.recurrences import OURS
from millpond.model.upstream import UPSTREAM_MATH, cache_arrays, new_cache
from millpond.native.packing import TILE
from millpond.prefix.cache import PrefixCache
from millpond.prefix.disk.tier import SsdTier
from millpond.schedule.costs import CostModel
from millpond.schedule.scheduler import Limits, Scheduler
from millpond.settings import PrefixSettings, SavePolicy
from millpond.speculate.controller import Controller
from millpond.speculate.lookup import NgramProposer
from millpond.speculate.mtp import MtpProposer
from millpond.speculate.pace import Curve, Pace
from millpond.speculate.proposer import Proposer
from millpond.types import Finish, PrefixReport, Request, SamplingParams, SpecMode, SpecSettings, TokenLogprob
from millpond.wire import Beat, Cancel, Deltas, Failed, FromEngine, Submit

TIE = 2e-3
"""Two logits this close may swap between kernels of different row counts; the models' logits spread over 10 or more."""
PACKED_TIE = 0.05
"""The same where a number that is half-way between two steps may have been rounded to the other one."""
FLIPPED = 0.5
"""Most that such a number may make of it: in Gemma 3 270M, changes by 1e-7 move what parts two logits by 0.33."""
NUDGE = 1e-7
"""As float32's last bit, in shares of a number."""
NUDGES = 100
"""References tried with such changes, where about one in twenty may draw what the batch has drawn."""


@dataclass
class Outcome:
    """What a client would have seen of one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    embedding: bytes | None = None
    finish: Finish | None = None
    failure: Failed | None = None
    endings: int = 0
    prefix: PrefixReport | None = None
    accepted: int = 0
    rejected: int = 0
    """Draft tokens."""


class Driver:
    """An engine with its two ends in hand."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        max_batch: int = 8,
        max_chunk: int = 256,
        max_itl_ms: float = 400,
        limit_bytes: int = 1 << 30,
        capabilities: Capabilities | None = None,
        cache: PrefixCache | None = None,
        ssd: SsdTier | None = None,
        inbox: Inbox | None = None,
        spec: SpecSettings | None = None,
        draft: Proposer | None = None,
        steady: int = 0,
        vocabulary: Lexicon | None = None,
    ) -> None:
        """``ssd`` notifies ``inbox`` and is attached to ``cache``; see ``disk_cache``. Without ``spec``, no guesses.
        ``max_itl_ms``: more than any step takes, where shapes of forwards must not depend on time."""
        self.inbox: Inbox = inbox or queue.SimpleQueue()
        self.outcomes: dict[str, Outcome] = {}
        self.beat = Beat(step=0, running=0, waiting=0, kv_bytes=0)
        self.capabilities = capabilities or probe(model)
        model = self.model = self.capabilities.fitted(model)
        form = model.blocks if isinstance(model.blocks, BlockFormat) and cache is not None else None
        self.prefixes = Prefixes(model.network, model.form, form, cache if form is not None else None, ssd)
        ready = Prepared(
            model=model,
            capabilities=self.capabilities,
            costs=CostModel(),
            budget=MemoryBudget(model.sizes, limit_bytes, max_chunk),
            prefixes=self.prefixes,
            vocabulary=vocabulary,
        )
        spec = spec or SpecSettings()
        proposers: dict[SpecMode, Proposer] = {}
        if not self.capabilities.forward_only:
            proposers[SpecMode.NGRAM] = NgramProposer(model.vocab_size, shared=spec.shared)
        if draft is not None:
            proposers[SpecMode.DRAFT] = draft
        executor = Executor(ready)
        if model.headed is not None:
            ngrams = NgramProposer(model.vocab_size, shared=spec.shared)
            proposers[SpecMode.MTP] = MtpProposer(model.headed, model.vocab_size, lambda: executor.lane, ngrams)
        self.controller = Controller(ready.costs, Pace(Curve()))
        self.speculator = Speculator(spec, proposers, 7, self.controller, TILE if model.form.rotated else 0)
        limits = Limits(max_batch, max_itl_ms, max_chunk, together=self.capabilities.together, steady=steady)
        self.scheduler = Scheduler(limits, ready.budget, ready.costs)
        self.engine = Engine(ready, self.scheduler, executor, self.speculator, self.inbox, self)

    # the engine's Outbox

    def send(self, message: FromEngine) -> None:
        if isinstance(message, Failed):
            outcome = self.outcomes[message.id]
            outcome.failure = message
            outcome.endings += 1
            return
        assert isinstance(message, Deltas)
        for delta in message.items:
            outcome = self.outcomes[delta.id]
            assert outcome.endings == 0, "a token after the end"
            outcome.tokens += delta.tokens
            if delta.prefix is not None:
                assert outcome.prefix is None, "told twice"
                outcome.prefix = delta.prefix
            outcome.logprobs += delta.logprobs or []
            assert not delta.prompt_logprobs or not outcome.tokens, "after the first token"
            outcome.prompt_logprobs += delta.prompt_logprobs or []
            if delta.verdict is not None:
                assert 0 <= delta.verdict.accepted <= len(delta.tokens)
                outcome.accepted += delta.verdict.accepted
                outcome.rejected += delta.verdict.rejected
            if delta.finish is not None:
                outcome.embedding = delta.embedding
                outcome.finish = delta.finish
                outcome.endings += 1

    def report(self, beat: Beat) -> None:
        self.beat = beat

    # the test's side

    def submit(self, request: Request) -> None:
        self.outcomes[request.id] = Outcome()
        self.inbox.put(Submit(request))

    def cancel(self, name: str) -> None:
        self.inbox.put(Cancel(name))

    @property
    def open(self) -> bool:
        return any(outcome.endings == 0 for outcome in self.outcomes.values())

    def run(
        self,
        each_turn: Callable[[int], None] | None = None,
        arrivals: Mapping[int, Request] | None = None,
        most_turns: int = 20_000,
    ) -> None:
        """Turn until every request has ended and the engine has let go; ``arrivals`` are submitted at their turns."""
        arrivals = arrivals or {}
        for turn in range(most_turns):
            if turn in arrivals:
                self.submit(arrivals[turn])
            if each_turn is not None:
                each_turn(turn)
            self.scheduler.check()
            idle = not self.open and self.scheduler.idle
            if idle and turn >= max(arrivals, default=0):
                break
            if not idle:
                self.engine.turn()
        else:
            raise AssertionError(f"requests still open after {most_turns} turns")
        self.engine.rest()
        assert all(outcome.endings == 1 for outcome in self.outcomes.values())
        assert not self.engine._sequences
        assert not self.controller._rows
        assert (self.beat.running, self.beat.waiting, self.beat.kv_bytes) == (0, 0, 0)
        assert not self.speculator._requests, "what proposes for a request goes with it"


def prefix_cache(
    model: LoadedModel, limit_bytes: int = 1 << 28, selfcheck: int = 0, namespace: str = "0" * 64
) -> PrefixCache:
    """A cache for one model, memory only."""
    assert isinstance(model.blocks, BlockFormat), model.blocks
    same = partial(agree, model.form, loose=model.blocks.loose)
    return PrefixCache(namespace, model.blocks.layout, limit_bytes, ReadRecord, same, selfcheck)


def disk_cache(
    model: LoadedModel, folder: Path, policy: SavePolicy = SavePolicy.ALL, limit_bytes: int = 1 << 28, **limits: object
) -> tuple[PrefixCache, SsdTier, Inbox]:
    """A cache with both tiers, for one Driver; the SSD tier has been started."""
    inbox: Inbox = queue.SimpleQueue()
    cache = prefix_cache(model, limit_bytes)
    fields = {"cache_ssd": 1 << 32, "ssd_policy": policy, **limits}
    ssd = SsdTier(folder, "0" * 64, PrefixSettings(**fields), inbox.put)  # type: ignore[arg-type]
    cache.attach(ssd, policy, lambda start, tokens: tokens * 0.01)
    ssd.start()
    return cache, ssd, inbox


def request(name: str, prompt: Sequence[int], max_tokens: int, **params: object) -> Request:
    """A request, greedy unless told otherwise."""
    fields = {"temperature": 0.0, **params}
    return Request(id=name, tokens=list(prompt), params=SamplingParams(max_tokens=max_tokens, **fields))  # type: ignore[arg-type]


def reference(network: nn.Module, prompt: Sequence[int], max_tokens: int, chunk: int = 256) -> list[int]:
    """mlx-lm's own greedy generation of one sequence, with mlx-lm's own attention and activations."""
    with upstream_math():
        steps = generate_step(mx.array(list(prompt)), network, max_tokens=max_tokens, prefill_step_size=chunk)
        return [int(token) for token, _ in steps]


def packed_gaps(
    network: nn.Module,
    form: KvFormat,
    prompt: Sequence[int],
    answer: Sequence[int],
    packed_at: Sequence[int] = (),
    *,
    upstream: bool = True,
    nudge: int = 0,
) -> list[float]:
    """By how much each token of an answer is beaten, as a logit, in one sequence in mlx-lm's caches, whose keys and
    values are rounded as ``form`` packs them: those before each of ``packed_at`` when the prompt has been read so far,
    those of its rest at its end, and those of each token of the answer as it comes. ``upstream``: with mlx-lm's own
    attention; otherwise with ours for single sequences. ``nudge``: a seed for changes of keys and values, before they
    are rounded, by as much as float32 leaves open; 0 for none."""
    with upstream_math() if upstream else nullcontext():
        caches, done = new_cache(network), 0
        for end in (*packed_at, len(prompt) - 1):
            for start in range(done, end, 256):
                network(mx.array([prompt[start : min(end, start + 256)]]), cache=caches)
                mx.eval(cache_arrays(caches))
            if nudge:
                nudged(caches, nudge)
            rounding = rounded(caches, form, done)
            done = end
        gaps = []
        for fed, drawn in zip([prompt[-1], *answer], answer, strict=False):
            logits = network(mx.array([[fed]]), cache=rounding)[0, -1]
            gaps.append((logits.max() - logits[drawn]).item())
        return gaps


def nudged(caches: Sequence[object], seed: int) -> None:
    """Change keys and values in place."""
    for number, cache in enumerate(caches):
        nudged(getattr(cache, "caches", ()), seed * len(caches) + number)
        for side in ("keys", "values"):
            if (held := getattr(cache, side, None)) is not None:
                noise = mx.random.normal(held.shape, key=mx.random.key(seed * 1000 + number))
                setattr(cache, side, held * (1 + NUDGE * noise).astype(held.dtype))


def assert_right(model: LoadedModel, prompt: Sequence[int], answer: list[int], packed_at: Sequence[int] = ()) -> None:
    """Greedy and unstopped: what mlx-lm answers alone, or one sequence that is packed at the same places."""
    if not model.form.packs:
        assert_same_or_tied(model.network, prompt, answer, reference(model.network, prompt, len(answer)))
        return
    gaps = partial(packed_gaps, model.network, model.form, prompt, answer, packed_at)
    # Where a number falls to the other side of the middle between two steps, all that follows is a little different:
    # little with 255 steps and most models. Then the reference begins with the same bits, of our own attention; and
    # where the batch's last bits were others, with bits as near to them.
    if model.form.packing.bits == 8:
        beaten = gaps()
        assert len(beaten) == len(answer) > 0
        assert max(beaten) < FLIPPED
        if max(beaten) < PACKED_TIE:
            return
    tries = [max(gaps(upstream=False))]
    while min(tries) >= PACKED_TIE and len(tries) <= NUDGES:
        tries.append(max(gaps(upstream=False, nudge=len(tries))))
    assert min(tries) < PACKED_TIE, tries


def settle(cached: PrefixCache, inbox: Inbox) -> None:
    """Until everything that should be on disk is."""
    cached.housekeep()
    while cached.saving:
        cached.on_event(inbox.get(timeout=30))  # type: ignore[arg-type]
        cached.housekeep()


@contextmanager
def upstream_math() -> Iterator[None]:
    """Undo, for a while, what stands in mlx-lm's model files instead of its own functions."""
    replaced = [(module, name, vars(module)[name]) for module, name, _ in their_math()]
    for module, name, theirs in their_math():
        setattr(module, name, theirs)
    try:
        yield
    finally:
        for module, name, ours in replaced:
            setattr(module, name, ours)


def their_math() -> list[tuple[ModuleType, str, object]]:
    """What millpond.model.attention and recurrences replace: a loaded module of mlx-lm's, a name in it, and its own."""
    modules = {key: module for key, module in sys.modules.items() if key.startswith("mlx_lm.models.")}
    found: list[tuple[ModuleType, str, object]] = [
        (module, name, theirs)
        for module in modules.values()
        for name, theirs in UPSTREAM_MATH.items()
        if name in vars(module)
    ]
    for key, name in OURS:
        if key in modules:
            current = vars(modules[key])[name]
            found.append((modules[key], name, getattr(current, "__wrapped__", current)))
    return found


def assert_same_or_tied(network: nn.Module, prompt: Sequence[int], ours: list[int], expected: list[int]) -> None:
    """Token for token the same; at a difference, the two logits must be a tie. What follows it is another text."""
    assert len(ours) == len(expected)
    for index, (got, want) in enumerate(zip(ours, expected, strict=True)):
        if got != want:
            logits = network(mx.array([[*prompt, *expected[:index]]]))[0, -1].astype(mx.float32)
            gap = (logits[want] - logits[got]).item()
            assert abs(gap) < TIE, f"token {index}: {got} instead of {want}, whose logit is {gap} higher"
            return
