"""What guessing gains and costs: answers per second with it, beside the same answers without, on one server.

    python benchmarks/speculation.py URL [--mode ngram|draft|mtp] [--streams 1,4,8]

Requests choose for themselves (``speculative`` in the body), so both ways run in turns on the same process, and figures
are ratios of neighbouring runs. Prompts are read once before: this is about decoding. The texts must be the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import dataclass

import httpx

CODE = '''class Basket:
    """What a customer wants to buy."""

    def __init__(self, owner):
        self.owner = owner
        self.items = {}

    def add(self, name, price, count=1):
        if count < 1:
            raise ValueError("count must be at least 1")
        old_price, old_count = self.items.get(name, (price, 0))
        self.items[name] = (price, old_count + count)

    def remove(self, name):
        if name not in self.items:
            raise KeyError(name)
        del self.items[name]

    def total(self):
        return sum(price * count for price, count in self.items.values())
'''
PASSAGE = """The mill stood at the bend of the river, where the water ran fast enough even in August. Its wheel was
older than the church, people said, and had been mended so often that hardly a plank of the first one was left. The
miller's daughter kept the books in a tin box under the stairs, with the names of all the farmers who had ever
brought their rye, and what each of them owed. When the flood came in the spring of that year she carried the
box to the loft before she thought of the cat, and was ashamed of it for the rest of her life."""
RECORDS = "\n".join(
    json.dumps({"id": number, "name": f"sensor-{number:03d}", "unit": "celsius", "value": 20 + number % 7, "ok": True})
    for number in range(1, 13)
)
SUBJECTS = (
    "a lighthouse",
    "baking bread",
    "a storm at sea",
    "the bicycle",
    "an old library",
    "bees",
    "a train",
    "snow",
)


@dataclass(frozen=True)
class Workload:
    """A prompt to be continued; ``{n}`` is the stream's number, so that streams differ."""

    name: str
    prompt: str
    temperature: float = 0.0


WORKLOADS = (
    Workload("edit code", "# file {n}\n" + CODE + "\n# The same file {n} again, with one comment added:\n" + CODE[:60]),
    Workload(
        "quote",
        f"Text {{n}}:\n{PASSAGE}\n\nText {{n}} once more, word for word:\n{PASSAGE[:60]}".replace("{{n}}", "{n}"),
    ),
    Workload("json", '{"batch": {n}}\n' + RECORDS + "\n"),
    Workload("prose", "Here is a long and thoughtful essay about {subject}, number {n}.\n\n", 0.8),
)


@dataclass(frozen=True)
class Result:
    """Of one run of all streams."""

    rate: float
    """Tokens per second, all streams together."""
    texts: tuple[str, ...]
    accepted: int
    rejected: int


async def answer(
    client: httpx.AsyncClient, model: str, workload: Workload, number: int, tokens: int, mode: str
) -> tuple[str, int, int, int]:
    body = {
        "model": model,
        "prompt": workload.prompt.replace("{n}", str(number)).replace("{subject}", SUBJECTS[number % len(SUBJECTS)]),
        "max_tokens": tokens,
        "temperature": workload.temperature,
        "top_p": 0.95 if workload.temperature else 1.0,
        "seed": number,
        "ignore_eos": True,
        "speculative": {"mode": mode},
    }
    response = await client.post("/v1/completions", json=body)
    response.raise_for_status()
    reply = response.json()
    details = reply["usage"]["completion_tokens_details"]
    counted = reply["usage"]["completion_tokens"]
    text = reply["choices"][0]["text"]
    return text, counted, details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]


async def run(
    client: httpx.AsyncClient, model: str, workload: Workload, streams: int, tokens: int, mode: str
) -> Result:
    began = time.perf_counter()
    found = await asyncio.gather(*(answer(client, model, workload, number, tokens, mode) for number in range(streams)))
    seconds = time.perf_counter() - began
    texts, counted, accepted, rejected = zip(*found, strict=True)
    return Result(sum(counted) / seconds, texts, sum(accepted), sum(rejected))


async def measure(url: str, mode: str, streams: list[int], tokens: int, rounds: int, names: list[str]) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=900.0, trust_env=False) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        print("| text | streams | without, tok/s | with, tok/s | ratio | ratios | drafts accepted |")
        print("|---|---|---|---|---|---|---|")
        for workload in WORKLOADS:
            if names and workload.name not in names:
                continue
            for count in streams:
                await run(client, model, workload, count, 2, "off")
                pairs = []
                for number in range(rounds):
                    order = ("off", mode) if number % 2 == 0 else (mode, "off")
                    results = {way: await run(client, model, workload, count, tokens, way) for way in order}
                    pairs.append((results["off"], results[mode]))
                without, guessed = (statistics.median(pair[way].rate for pair in pairs) for way in (0, 1))
                ratios = [pair[1].rate / pair[0].rate for pair in pairs]
                accepted, rejected = pairs[-1][1].accepted, pairs[-1][1].rejected
                share = f"{accepted} of {accepted + rejected}"
                if any(pair[0].texts != pair[1].texts for pair in pairs):
                    share += "; TEXTS DIFFER"
                each = " ".join(f"{ratio:.2f}" for ratio in ratios)
                print(
                    f"| {workload.name} | {count} | {without:.1f} | {guessed:.1f} | {statistics.median(ratios):.2f} "
                    f"| {each} | {share} |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description="What guessing gains and costs.")
    parser.add_argument("url")
    parser.add_argument("--mode", default="ngram", choices=["ngram", "draft", "mtp"])
    parser.add_argument("--streams", default="1,4,8")
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="texts, separated by commas")
    given = parser.parse_args()
    counts = [int(count) for count in given.streams.split(",")]
    names = [name for name in given.only.split(",") if name]
    asyncio.run(measure(given.url, given.mode, counts, given.tokens, given.rounds, names))


if __name__ == "__main__":
    main()
