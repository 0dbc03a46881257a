"""How many conversations of 2000 tokens run at once within a memory limit.

    python benchmarks/conversations.py URL [--requests 24]

The server is to be started with ``--kv-memory-mb``, a ``--max-batch`` that does not matter, and ``--kv-bits`` or not.
All requests have the same beginning, which is read once; what is counted is how many have a row at the same time.
"""

from __future__ import annotations

import argparse
import asyncio

import httpx

from millpond.bench.prompts import story

PROMPT, ANSWER = 2000, 140


async def most_running(client: httpx.AsyncClient, name: str, over: asyncio.Event) -> int:
    """The most answers that were ever decoded together."""
    most = 0
    while not over.is_set():
        page = (await client.get("/metrics")).text
        line = next(line for line in page.splitlines() if line.startswith(name))
        most = max(most, int(float(line.rsplit(" ", 1)[1])))
        await asyncio.sleep(0.2)  # as often as the engine tells
    return most


async def measure(url: str, requests: int) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=1800.0, trust_env=False) as client:
        model = (await client.get("/v1/models")).json()["data"][0]
        text = story("conversations", PROMPT)
        over = asyncio.Event()
        watching = asyncio.create_task(most_running(client, "vllm:num_requests_running{", over))

        async def ask(number: int) -> int:
            body = {
                "model": model["id"],
                "prompt": f"{text}\nNumber {number}:",
                "max_tokens": ANSWER,
                "ignore_eos": True,
            }
            reply = (await client.post("/v1/completions", json={**body, "temperature": 0})).json()
            return int(reply["usage"]["total_tokens"])

        await ask(0)
        sizes = await asyncio.gather(*(ask(number) for number in range(1, requests + 1)))
        over.set()
        print(
            f"{model['millpond']['kv_format']}: {await watching} at once, of {min(sizes)} to {max(sizes)} tokens each"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Conversations within a memory limit.")
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=24)
    given = parser.parse_args()
    asyncio.run(measure(given.url, given.requests))


if __name__ == "__main__":
    main()
