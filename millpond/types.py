"""The plain data every part of Millpond speaks: requests, results and step plans.

Nothing here imports mlx. The structs are msgspec ones because the same objects travel between the front end and the
engine (see wire.py), so there is one definition of a request on both sides of the process border.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Literal, NewType

import msgspec

Salt = NewType("Salt", str)
"""What keeps the cached prefixes of some requests apart from those of others. For clients only http/tenants.py makes
one."""
GRID = 64
"""Chunks of a prompt end at multiples of this many tokens, whoever reads it and whatever was read before."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to pick the tokens of one request. The front end has validated every field.

    ``seed`` is always set: a client that gives none gets a random one at admission, so that any request can be
    replayed. ``seed`` and a token's position alone decide the draw (see sample/noise.py).
    """

    max_tokens: int
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and answer; 1 means off."""
    presence_penalty: float = 0.0
    """Over the answer; 0 means off."""
    frequency_penalty: float = 0.0
    """Over the answer; 0 means off."""
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    seed: int = 0
    """Unsigned 64-bit."""
    logprobs: int | None = None
    """None: none wanted. k >= 0: the chosen token's log-probability and the k likeliest alternatives."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens, from the second on. Such a prompt is read whole, without the prefix cache."""
    stop_token_ids: list[int] = msgspec.field(default_factory=list)
    """Ids that end the answer (end of sequence, end of turn). The front end knows the tokenizer; the engine obeys."""
    min_tokens: int = 0
    """Tokens that the answer has at least: until then none of ``stop_token_ids`` is drawn."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """True when the next draw depends on the tokens drawn before it (penalties)."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class SpecMode(StrEnum):
    """Who proposes draft tokens; see speculate/proposer.py."""

    AUTO = "auto"
    """MTP where the model has a head for it, else NGRAM."""
    OFF = "off"
    NGRAM = "ngram"
    """What followed the last tokens earlier in the prompt, in the answer or in the client's prediction."""
    DRAFT = "draft"
    """A second, smaller model."""
    MTP = "mtp"
    """A head of the model itself, for multi-token prediction; NGRAM where that knows a long match."""

    def among(self, offered: Collection[str]) -> SpecMode:
        """What it means where these can be had."""
        if self is not SpecMode.AUTO:
            return self
        return SpecMode.MTP if SpecMode.MTP in offered else SpecMode.NGRAM


SpecModeName = Literal["off", "ngram", "draft", "mtp"]
"""As requests say it."""
SpecChoice = Literal["auto", SpecModeName]
"""As settings do."""


MOST_DRAFT_TOKENS = 31
"""Draft tokens that one step can confirm for a row: with the row's newest token they fill a ring's slack."""


class Speculation(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of answers are guessed ahead; what is guessed never changes what is drawn."""

    mode: SpecMode = SpecMode.OFF
    tokens: int = 0
    """Most draft tokens per row and step; 0: chosen by device."""
    adaptive: bool = True
    """Guess only as much as pays; False: always as much as allowed."""


class Symbol(msgspec.Struct, frozen=True, array_like=True):
    """A text with a meaning in answers."""

    text: str
    token: int = -1
    """Its id where it is a token of its own."""


class Thinking(msgspec.Struct, frozen=True, array_like=True):
    """How thoughts show in an answer, where both of their marks are tokens."""

    begins: int
    """Id of the token that begins one."""
    ends: int
    begun: bool = False
    """The prompt ends within one."""
    most: int | None = None
    """Tokens of thoughts after which they are ended; None: no limit."""
    blanks: list[int] = []
    """Ids of line ends: some may stand behind a thought."""


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer has to look like; see grammar/constraint.py."""

    text: str = ""
    """In llguidance's form of Lark, thoughts left out; empty: it may look like anything."""
    triggers: list[Symbol] = []
    """Only what begins with one of these has to; none: all of it."""
    thinking: Thinking | None = None


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate. ``tokens`` is the whole prompt, at least one id, special tokens included."""

    id: str
    tokens: list[int]
    params: SamplingParams
    priority: int = 0
    """Higher goes first."""
    client: str = ""
    """Whose request this is, for fair sharing."""
    cache_salt: Salt = Salt("")
    """Requests share cached prefixes only with requests of the same salt."""
    speculation: Speculation | None = None
    """None: as the engine was started with."""
    prediction: list[int] = []
    """What the client expects of the answer, for guessing."""
    grammar: Grammar | None = None
    """None: the answer may look like anything."""
    shared: list[int] = []
    """Positions in the prompt behind which others will go on in their own ways, as its client says."""
    pooled: bool = False
    """One vector is to be made of the prompt but for its last token, which is never read, and no answer."""


class Finish(StrEnum):
    """Why the engine ended a request. Stop strings are the front end's: it cancels and reports ``stop`` itself."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class ErrorKind(StrEnum):
    """Why a request failed, as the front end has to tell it apart to choose an HTTP status."""

    ENGINE = "engine_error"
    """Something raised in a forward, in sampling, or produced non-finite logits: 500."""
    DIED = "engine_died"
    """The engine process is gone: 500."""
    UNAVAILABLE = "unavailable"
    """Not ready, restarting or shutting down: 503."""
    OVERRUN = "slow_reader"
    """The client did not read its stream fast enough: told in the stream."""
    QUEUE_TIMEOUT = "queue_timeout"
    FIRST_TOKEN_TIMEOUT = "first_token_timeout"  # noqa: S105 - no password
    TOKEN_TIMEOUT = "token_timeout"  # noqa: S105
    REQUEST_TIMEOUT = "request_timeout"
    """The four time-outs, each named like its setting: 504."""
    GRAMMAR = "grammar_stuck"
    """No token fits what the answer has to look like: 500."""
    INVALID = "invalid_request"
    """The engine refuses the request (for example, it can never fit in memory): 400."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, natural log, of the model's own distribution (before any sampling change)."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The likeliest tokens, best first; as many as asked for."""
    rank: int = 0
    """Of a prompt's token: its place among all, from 1; 0: not looked for."""


class PrefixReport(msgspec.Struct, frozen=True, array_like=True):
    """What the prefix cache did for one prompt; all numbers are tokens."""

    memory: int = 0
    """Restored from RAM."""
    disk: int = 0
    """Restored from the SSD."""
    end: str = "off"
    """Why no more was restored; see prefix/cache.py."""
    known: int = 0
    """Leading tokens that the cache knows at all; the prompt differs from everything known after them."""

    @property
    def cached(self) -> int:
        return self.memory + self.disk

    @property
    def differs(self) -> bool:
        return self.end == "differs"


GROUP_SIZES = (32, 64, 128)


class KvPacking(msgspec.Struct, frozen=True, kw_only=True):
    """How keys and values are packed once a prompt has been read; ``rotated``: keys a tile at a time, see kv/format."""

    bits: int = 0
    """8 or 4; 0: they are kept as computed."""
    group_size: int = 64
    """Neighbouring numbers that share a scale and a bias."""
    start: int = 0
    """Tokens from the start of a sequence that are kept as computed, whole blocks of them."""
    rotated: bool = False

    def described(self, dtype: str) -> str:
        """In words; ``dtype`` is the element type of what is computed."""
        if not self.bits:
            return dtype
        mode, start = " rotated" if self.rotated else "", f" from token {self.start}" if self.start else ""
        return f"int{self.bits}{mode} in groups of {self.group_size}{start}"


UNPACKED = KvPacking()


class SpecSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How speculative decoding is set up; see config.py for what each means to the user."""

    default: Speculation = Speculation()
    draft_path: str = ""
    """Folder of the draft model; empty without one."""
    shared: bool = False
    """Guesses may come from past answers, too."""

    @property
    def head(self) -> bool:
        """The model's own MTP head is to guess, if it has one."""
        return self.default.mode in (SpecMode.AUTO, SpecMode.MTP)


class GroupSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's place in a group of processes that run a model together."""

    rank: int
    world: int
    backend: str
    """As mlx.distributed names it: ring, jaccl, nccl, mpi."""
    host: str
    port: int
    """Where rank 0 takes the control connections of the others."""
    secret: str
    """What they prove to know, hex."""
    model: str
    """The model for ranks that have to find it themselves: a local folder, or as it was named to serve."""
    environment: dict[str, str] = {}
    """What the backend wants to find in the environment."""
    files: dict[str, str] = {}
    """Environment variables that name a file, and what is to be in it."""
    flags: dict[str, str] = {}
    """What this rank was given for the engine, where each is started with flags of its own: must be rank 0's."""
    silence_seconds: float = 5.0
    """A rank that has not been heard of for so long is given up, and the whole group with it."""
    listen_fd: int = -1
    """Rank 0's inherited socket, bound to host and port and listening; -1: it binds one itself."""


class Distribution(msgspec.Struct, frozen=True, array_like=True):
    """How often measured values fell where: ``counts[i]`` of them above ``bounds[i - 1]`` and up to ``bounds[i]``."""

    bounds: tuple[float, ...] = ()
    """Rising."""
    counts: tuple[int, ...] = (0,)
    """One more than bounds: the last is of the values above them all."""
    total: float = 0.0
    """The sum of all values."""


class SpecCounters(msgspec.Struct, frozen=True, kw_only=True):
    """What guessing has done since the engine's start."""

    steps: int = 0
    """Steps that verified draft tokens."""
    rows: int = 0
    """Rows that had draft tokens in them, a row counted once per step."""
    proposed: int = 0
    """Draft tokens verified."""
    accepted: int = 0
    """Those of them that were drawn."""
    bonus: int = 0
    """Tokens drawn behind draft tokens that were all accepted."""
    drawn: int = 0
    """All tokens drawn for rows that had draft tokens."""
    fallbacks: int = 0
    """Steps without draft tokens although some could have been had: they would not have paid."""
    proposed_at: tuple[int, ...] = ()
    """By place: the first draft token of a step, the second, ..."""
    accepted_at: tuple[int, ...] = ()
    depth: float = 0.0
    """Draft tokens per row in the latest step."""


class EngineCounters(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine has done since its start."""

    prefill_tokens: int = 0
    """Prompt tokens computed, again after a preemption included."""
    drawn_tokens: int = 0
    """Those that end an answer included."""
    preemptions: int = 0
    failed_steps: int = 0
    step_seconds: Distribution = Distribution()
    step_rows: Distribution = Distribution()
    """Rows of each step's decode forward; 0 for a step that only reads prompts."""
    step_tokens: Distribution = Distribution()
    """Tokens that each step's forwards take in, of prompts and rows."""
    spec: SpecCounters = SpecCounters()


class PrefixCounters(msgspec.Struct):
    """What the prefix cache has done since the engine's start. Tokens are prompt tokens."""

    hits: int = 0
    disk_hits: int = 0
    """Of those, the ones that were restored in part or in whole from the SSD."""
    misses: int = 0
    memory_tokens: int = 0
    disk_tokens: int = 0
    computed_tokens: int = 0
    evicted: int = 0
    snapshots_dropped: int = 0
    unsaved: int = 0
    """Evicted although the policy wanted them saved first."""
    checked: int = 0
    mismatches: int = 0


class PrefixLoad(msgspec.Struct, frozen=True, kw_only=True):
    """How the prefix cache is doing."""

    ram_bytes: int = 0
    ram_blocks: int = 0
    ram_snapshots: int = 0
    """Of recurrent layers; their bytes are among those of the blocks."""
    ram_snapshot_bytes: int = 0
    ram_limit: int = 0
    saving_records: int = 0
    """Records that wait for the SSD's writer or are being written."""
    saving_bytes: int = 0
    """Bytes of those being written, each held as a copy."""
    counters: PrefixCounters = msgspec.field(default_factory=PrefixCounters)
    ssd: dict[str, int] = {}
    """Counters and sizes of the SSD tier by name; empty without one."""


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """What became of one request's draft tokens in one step."""

    accepted: int
    """The first so many tokens of the step had been guessed."""
    rejected: int


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """What one step produced for one request. ``tokens`` never contains an end-of-sequence id that ended it."""

    id: str
    tokens: list[int]
    finish: Finish | None = None
    logprobs: list[TokenLogprob] | None = None
    """One per token, when asked for."""
    prefix: PrefixReport | None = None
    """Which prompt tokens were restored instead of computed; with a request's first delta, which comes when its prompt
    is begun and has no tokens."""
    verdict: Verdict | None = None
    """Where the step had draft tokens."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """Of the prompt's next tokens, when asked for; before the first delta with ``tokens``."""
    embedding: bytes | None = None
    """The prompt's vector, float32, little-endian; with the end of a request that asked for it."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine found out about the model it loaded."""

    context_length: int
    """Most tokens of prompt and answer together."""
    vocab_size: int
    lane: str
    """``slots`` when requests share one batched forward, ``solo`` when each takes its own."""
    lane_reason: str
    """Why the lane is what it is; empty for slots."""
    cache_kinds: list[str]
    """Distinct cache kinds of the layers: kv, window, state, other."""
    dtype: str
    device: str
    blas: str
    """Which matrix library a CPU run uses; empty on a GPU."""
    kv_bytes_per_token: int
    """Of keys and values in a row, in a cached block and on the SSD, in layers whose cache grows with the context."""
    max_batch: int
    pipelined: bool = False
    """What a step writes into rows stays in place while another is in flight; else a GPU gets each step once the one
    before it has been read."""
    ranks: int = 1
    """Processes that run it together; bytes are of each."""
    fingerprint: str
    """sha256 over the content of weights and config, hex."""
    weight_bytes: int = 0
    kv_limit_bytes: int = 0
    """Most memory for keys and values."""
    kv_format: str = ""
    """How they are kept: an element type, or bits and group size."""
    prefix_cache: str = ""
    """Kinds of records that the prefix cache keeps of this model, joined by +; empty when it keeps none."""
    prefix_cache_reason: str = ""
    """Why it keeps none; empty when it does."""
    speculation: list[str] = []
    """Modes that requests may use besides off."""
    speculation_reason: str = ""
    """Why there are none; empty when there are."""
    alike: list[list[int]] = []
    """Numbers of rows that were tried at start, grouped: within a group, a row's logits are equal bit by bit."""
    deterministic: str = ""
    """What is done for answers that are the same whatever the load, and what it costs; empty where nothing is."""
    grammars: str = ""
    """Why answers cannot be made to follow a grammar; empty when they can."""
    embedding_size: int = 0
    """Numbers in a prompt's vector; 0: none can be made."""
    embedding_reason: str = ""
    """Why; empty where they can."""
    remarks: list[str] = []
    """What of the model's files is not used, or not as they say."""


# --- step plans -------------------------------------------------------------------------------------------------


class PrefillChunk(msgspec.Struct, frozen=True):
    """Compute prompt tokens [start, end) of a request into its own cache. ``last``: then adopt it into a row.

    A request's first chunk begins where its restored prefix ends: that many tokens come from the prefix cache.
    """

    id: str
    start: int
    end: int
    last: bool
    joins: bool = False
    """Read in one forward with the chunk before it, which is another request's."""


class StepPlan(msgspec.Struct, frozen=True):
    """Everything one engine step does, decided before it starts.

    Plain data. Order of execution: the preemptions, the prefill chunks, each adopted into a row when it is the last of
    its prompt, and one decode forward over ``rows`` plus the rows adopted in this very step.
    """

    step: int
    preempt: tuple[str, ...] = ()
    """Requests that lose their row, in this order; they wait again and are recomputed later."""
    prefill: tuple[PrefillChunk, ...] = ()
    rows: tuple[str, ...] = ()
    """Requests that hold a row once the preemptions are done, in no order: who has which is the batch's to say."""

    @property
    def empty(self) -> bool:
        return not self.prefill and not self.rows

    @property
    def reads(self) -> list[tuple[PrefillChunk, ...]]:
        """The prefill chunks of each forward, in order."""
        found: list[list[PrefillChunk]] = []
        for chunk in self.prefill:
            if chunk.joins:
                found[-1].append(chunk)
            else:
                found.append([chunk])
        return list(map(tuple, found))
