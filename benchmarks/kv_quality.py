"""What packed keys and values cost in quality, against full precision: one markdown table.

    python benchmarks/kv_quality.py FOLDER [TEXT]

FOLDER is a model in MLX's format, TEXT a long text in UTF-8; without it the topics of Python's own help are read. Every
row reads a prompt out of its part of the text; then the text itself is fed token by token, never what the model would
have said. All formats go through it in lock step with full precision, so that no logits need be kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple, Protocol, cast

from millpond.model import blas

print(blas.prepare())

import mlx.core as mx  # noqa: E402 - the BLAS comes first
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from tqdm import tqdm  # noqa: E402

from millpond.kv.format import Arrays, KvFormat  # noqa: E402
from millpond.model.forwards import decode, prefill  # noqa: E402
from millpond.model.lanes import SlotsLane  # noqa: E402
from millpond.model.leaves import Leaf  # noqa: E402
from millpond.model.load import LoadedModel, kept_as, load  # noqa: E402
from millpond.model.prompt import Piece, Prompt, new_prompt  # noqa: E402
from millpond.model.upstream import cache_arrays  # noqa: E402
from millpond.native.decode import available  # noqa: E402
from millpond.text.tokenizer import Tokenizer  # noqa: E402
from millpond.types import KvPacking  # noqa: E402

ROWS, PROMPT, STEPS, CHUNK = 8, 640, 512, 256
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Bfloat16Scales(KvFormat):
    """As MLX packs it, with scales and biases of bfloat16."""

    casts: bool = False
    """Keys and values are of bfloat16 too, as they would be in a model of that type."""

    def pack(self, keys: mx.array, values: mx.array) -> Arrays:
        kind = mx.bfloat16 if self.casts else mx.float32
        arrays = super().pack(keys.astype(kind), values.astype(kind))
        return tuple(array if array.dtype == mx.uint32 else array.astype(mx.bfloat16) for array in arrays)


class Way(NamedTuple):
    """One line of the table."""

    name: str
    form: KvFormat
    through_prefill: bool = False
    """The prompt, too, is read with keys and values that have been packed and unpacked."""


def ways() -> list[Way]:
    """The first is full precision: the one that the others are compared with."""
    native = available()
    packings = {
        "int8, groups of 64": KvPacking(bits=8),
        "int4, groups of 64": KvPacking(bits=4),
        "int4, groups of 32": KvPacking(bits=4, group_size=32),
        "int4, groups of 64, first 64 tokens as computed": KvPacking(bits=4, start=64),
    }
    rotated = {
        f"int4 rotated, groups of {size}": KvPacking(bits=4, group_size=size, start=64, rotated=True)
        for size in (64, 32)
    }
    full = KvFormat(native=native)
    plain = KvFormat(KvPacking(bits=8))
    return [
        Way("full precision", full),
        Way("full precision against itself", full),
        *(Way(name, KvFormat(packing, native)) for name, packing in packings.items()),
        *(Way(name, KvFormat(packing, native)) for name, packing in rotated.items()),
        *(Way(f"{name}; within the prompt too", KvFormat(packing, native), True) for name, packing in packings.items()),
        Way("int8, groups of 64, by MLX: scales of float32", plain),
        Way("… scales of bfloat16", Bfloat16Scales(plain.packing)),
        Way("… keys, values and scales of bfloat16", Bfloat16Scales(plain.packing, casts=True)),
        Way("int4, groups of 64, by MLX: scales of float32", KvFormat(KvPacking(bits=4))),
        *(Way(f"{name}, by MLX: scales of float32", KvFormat(packing)) for name, packing in rotated.items()),
    ]


# --- prompts ----------------------------------------------------------------------------------------------------


class Growing(Protocol):
    """What we use of mlx-lm's caches here."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]: ...


class Unpacked:
    """A prompt's cache whose attention sees what packing leaves of each chunk; the packed arrays become ``pieces``."""

    def __init__(self, leaf: Leaf, form: KvFormat, pieces: list[Piece]) -> None:
        self._cache = leaf.cache
        self._form = form
        self._pieces = pieces
        self._exact = leaf.exact(form)
        self._end = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        start, self._end = self._end, self._end + keys.shape[2]
        exact = min(max(0, self._exact - start), keys.shape[2])
        if start + exact < self._end:
            arrays = self._form.pack(keys[:, :, exact:], values[:, :, exact:])
            self._pieces.append(Piece(start + exact, self._end, arrays))
            rest = self._form.unpack(arrays)
            keys, values = (
                mx.concatenate([whole[:, :, :exact], part], axis=2)
                for whole, part in zip((keys, values), rest, strict=True)
            )
        return cast(Growing, self._cache).update_and_fetch(keys, values)

    def __getattr__(self, name: str) -> object:
        return getattr(self._cache, name)


def read_through(network: nn.Module, prompt: Prompt, tokens: Sequence[int]) -> None:
    """Read a whole prompt with caches of that sort; what they packed is adopted, and not packed again."""
    wrapped = [Unpacked(leaf, prompt.form, pieces) for leaf, pieces in zip(prompt.leaves, prompt.pieces, strict=True)]
    for start in range(0, len(tokens), CHUNK):
        network(mx.array([tokens[start : start + CHUNK]], dtype=mx.int32), cache=wrapped)
        mx.eval(cache_arrays(prompt.caches))
    prompt.length = len(tokens)


def lane_of(model: LoadedModel, prompts: Sequence[Sequence[int]], through_prefill: bool) -> SlotsLane:
    """Slots that have adopted all prompts."""
    lane = model.slots_lane()
    for row, tokens in enumerate(prompts):
        prompt = new_prompt(model.network, model.form)
        if through_prefill:
            read_through(model.network, prompt, tokens)
        else:
            for start in range(0, len(tokens), CHUNK):
                prefill(model.network, prompt, tokens[start : start + CHUNK])
        lane.adopt(str(row), prompt)
    return lane


# --- comparing --------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What is known of one line; each list has one array [rows] per step."""

    divergence: list[Numbers] = field(default_factory=list)
    """KL(full || this), nats."""
    surprise: list[Numbers] = field(default_factory=list)
    """-log of the probability of the token that came, nats."""
    same: list[NDArray[np.bool_]] = field(default_factory=list)
    """Whether the likeliest token is that of full precision."""

    def line(self, name: str) -> str:
        """A line of the table."""
        kl = np.stack(self.divergence)
        error = kl.mean(axis=0).std(ddof=1) / np.sqrt(kl.shape[1]) if kl.shape[1] > 1 else np.nan
        numbers = (
            f"{kl.mean():.2e} ± {error:.0e}",
            f"{np.quantile(kl, 0.99):.2e}",
            f"{kl.max():.2e}",
            f"{np.exp(np.mean(self.surprise)):.4f}",
            f"{np.mean(self.same):.2%}",
        )
        return f"| {name} | " + " | ".join(numbers) + " |"


HEADER = """\
| keys and values | KL, mean | KL, 99th percentile | KL, max | perplexity | same greedy token |
|---|---|---|---|---|---|"""


class Distributions:
    """Next-token distributions of all rows, in float64: differences of 1e-6 must not drown in rounding."""

    def __init__(self, logits: mx.array) -> None:
        """``logits``: [rows, vocab]."""
        numbers = np.asarray(logits.astype(mx.float32)).astype(np.float64)
        numbers -= numbers.max(axis=-1, keepdims=True)
        numbers -= np.log(np.exp(numbers).sum(axis=-1, keepdims=True))
        self.logs: Numbers = numbers

    @cached_property
    def chances(self) -> Numbers:
        return np.exp(self.logs)


def compare(full: Distributions, other: Distributions, came: NDArray[np.intp], tally: Tally) -> None:
    """Add one step. ``came``: the tokens that the text goes on with."""
    tally.divergence.append(np.einsum("rv,rv->r", full.chances, full.logs - other.logs))
    tally.surprise.append(-other.logs[np.arange(len(came)), came])
    tally.same.append(full.logs.argmax(axis=-1) == other.logs.argmax(axis=-1))


def measure(models: Sequence[LoadedModel], chosen: Sequence[Way], rows: NDArray[np.intp], prompt: int) -> list[Tally]:
    """Feed each row's tokens behind its prompt of that length; the last one is only predicted."""
    prompts = [[int(token) for token in row[:prompt]] for row in rows]
    reading = tqdm(zip(models, chosen, strict=True), "prompts", len(chosen))
    lanes = [lane_of(model, prompts, way.through_prefill) for model, way in reading]
    tallies = [Tally() for _ in chosen]
    for place in tqdm(range(prompt, rows.shape[1] - 1), "steps"):
        tokens, came = mx.array(rows[:, place].astype(np.int32)), rows[:, place + 1]
        full: Distributions | None = None
        for model, lane, tally in zip(models, lanes, tallies, strict=True):
            logits = decode(model.network, lane, tokens)
            mx.eval(logits, lane.arrays())
            other = Distributions(logits)
            full = full or other
            compare(full, other, came, tally)
    return tallies


def rows_of(text: str, tokenizer: Tokenizer, rows: int, length: int) -> NDArray[np.intp]:
    """Token ids [rows, length]: parts of the text, evenly spread, each begun as the tokenizer begins a text."""
    start = tokenizer.encode("")
    body = tokenizer.encode(text)[len(start) :]
    length -= len(start)
    apart = len(body) // rows
    if apart < length:
        raise SystemExit(f"the text has {len(body)} tokens; {rows * length} are needed")
    return np.array([start + body[row * apart :][:length] for row in range(rows)], dtype=np.intp)


def main() -> None:
    parser = argparse.ArgumentParser(description="What packed keys and values cost in quality.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path, nargs="?", help="default: the topics of Python's help")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens")
    parser.add_argument("--steps", type=int, default=STEPS, help="tokens predicted per row")
    parser.add_argument("--ways", nargs="*", default=[""], help="lines that have one of these words")
    given = parser.parse_args()
    text = given.text.read_text(encoding="utf-8") if given.text else "\n\n".join(topics.values())
    rows = rows_of(text, Tokenizer.load(given.folder), given.rows, given.prompt + given.steps + 1)
    loaded = load(given.folder, 0, lambda _: None)
    whole, itself, *others = ways()
    chosen = [whole, itself, *(way for way in others if any(word in way.name for word in given.ways))]
    models = [kept_as(loaded, way.form) for way in chosen]
    # C knows float32 only; the line then shows how MLX packs.
    chosen = [way._replace(form=model.form) for way, model in zip(chosen, models, strict=True)]
    tallies = measure(models, chosen, rows, given.prompt)
    print(f"{given.folder.name}, {loaded.dtype}: {given.rows} rows x {given.steps} tokens behind {given.prompt}")
    print(HEADER)
    for way, tally in list(zip(chosen, tallies, strict=True))[1:]:
        print(tally.line(way.name))
    if (worst := np.abs(tallies[1].divergence).max()) != 0:
        raise SystemExit(f"full precision differs from itself by {worst:.1e}: the figures cannot be trusted")


if __name__ == "__main__":
    main()
