"""What answers that follow a grammar cost, and what they cost their neighbours, on a running server.

    millpond serve demo --port 8123
    python benchmarks/grammars.py --url http://127.0.0.1:8123 [--streams 8] [--tokens 150] [--rounds 5]

Each round has, in turn: all streams free, all of them bound by a schema, and one free stream beside bound ones and
beside free ones, with nothing guessed ahead, so that what is left is what grammars cost, and as it usually is. The
answers are equally long, so that rates can be compared; ratios are within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx

SCHEMA = {
    "type": "array",
    "minItems": 200,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "kind": {"enum": ["red", "green", "blue"]},
            "size": {"type": "integer", "minimum": 0, "maximum": 9999},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
        },
        "required": ["name", "kind", "size", "tags"],
        "additionalProperties": False,
    },
}
PROMPT = "List some things in your kitchen as JSON."


def large_schema(size: int) -> dict[str, object]:
    """An object's, of about so many characters."""
    fields: dict[str, object] = {}
    while len(json.dumps(fields)) < size:
        fields[f"field_{len(fields)}"] = {"type": "string", "description": "x" * 20, "maxLength": 20 + len(fields)}
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


@dataclass
class Stream:
    """One answer, as its client sees it."""

    first_seconds: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """Seconds between its tokens."""


def answer(http: httpx.Client, tokens: int, seed: int, schema: object = None, *, plain: bool = False) -> Stream:
    """``plain``: without draft tokens."""
    body: dict[str, object] = {
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": tokens,
        "seed": seed,
        "temperature": 1.0,
        "stream": True,
        "ignore_eos": True,
    }
    if plain:
        body["speculative"] = {"mode": "off"}
    if schema is not None:
        body["structured_outputs"] = {"json": schema}
    found, began = Stream(), time.perf_counter()
    last = began
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {") or '"content":""' in line:
                continue
            now = time.perf_counter()
            if found.first_seconds:
                found.gaps.append(now - last)
            else:
                found.first_seconds = now - began
            last = now
    return found


def together(http: httpx.Client, count: int, tokens: int, schema: object, seed: int) -> float:
    """Tokens per second of so many streams."""
    began = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda number: answer(http, tokens, seed + number, schema), range(count)))
    return count * tokens / (time.perf_counter() - began)


def beside(http: httpx.Client, count: int, tokens: int, schema: object, seed: int, *, plain: bool) -> Stream:
    """One free stream beside others that began before it."""
    with ThreadPoolExecutor(count) as pool:
        others = [
            pool.submit(answer, http, 2 * tokens, seed + number, schema, plain=plain) for number in range(count - 1)
        ]
        time.sleep(0.5)
        found = answer(http, tokens, seed, plain=plain)
        for other in others:
            other.result()
    return found


def spread_of(values: list[float]) -> str:
    return f"({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="What answers that follow a grammar cost.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    rates: list[float] = []
    gaps: dict[bool, list[float]] = {True: [], False: []}
    worst: dict[bool, list[float]] = {True: [], False: []}
    first: dict[str, list[float]] = {"free": [], "2 KB schema, new": [], "the same again": []}
    with httpx.Client(base_url=given.url, timeout=600, trust_env=False) as http:
        together(http, given.streams, 20, None, 0)
        together(http, given.streams, 20, SCHEMA, 0)
        for number in range(given.rounds):
            seed = 1000 * number
            free = together(http, given.streams, given.tokens, None, seed)
            bound = together(http, given.streams, given.tokens, SCHEMA, seed)
            rates.append(bound / free)
            for plain in gaps:
                near_free = beside(http, given.streams, given.tokens, None, seed, plain=plain).gaps
                near_bound = beside(http, given.streams, given.tokens, SCHEMA, seed, plain=plain).gaps
                gaps[plain].append(1000 * (statistics.median(near_bound) - statistics.median(near_free)))
                worst[plain].append(1000 * (sorted(near_bound)[-3] - sorted(near_free)[-3]))
            schema = large_schema(2000 + number)
            first["free"].append(answer(http, 3, seed).first_seconds)
            first["2 KB schema, new"].append(answer(http, 3, seed, schema).first_seconds)
            first["the same again"].append(answer(http, 3, seed, schema).first_seconds)
            print(f"round {number + 1}: {free:.1f} tok/s free, {bound:.1f} bound, ratio {rates[-1]:.3f}", flush=True)
    spread = f"({min(rates):.3f} to {max(rates):.3f})"
    print(f"{given.streams} bound streams / free ones: {statistics.median(rates):.3f} {spread}")
    for plain, more in gaps.items():
        how, most = "nothing guessed" if plain else "as usual", worst[plain]
        print(f"a neighbour's median gap, {how}, ms more: {statistics.median(more):.2f} {spread_of(more)}")
        print(f"its third longest, ms more: {statistics.median(most):.2f} {spread_of(most)}")
    for name, seconds in first.items():
        print(f"first token, {name}: {1000 * statistics.median(seconds):.1f} ms")


if __name__ == "__main__":
    main()
