"""``millpond agents``: the line that starts each coding agent against a running server, ready to be pasted.

Nothing is written into anybody's settings: a line holds all that the agent has to know.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping

from millpond.cli.address import DEFAULT_URL, address

KEYS = ("MILLPOND_API_KEY", "OPENAI_API_KEY")
"""Variables with the key to show, the first one set."""
NO_KEY = "none"
"""Where the server has no keys any word does."""
MOST_OUTPUT = 8192
"""Tokens of an answer that opencode plans for; a quarter of the context where that is less."""
SECONDS = 10.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    text = "Print the lines that start Claude Code, Codex and opencode against a running server."
    parser = subparsers.add_parser("agents", help="how coding agents use a server", description=text)
    parser.add_argument("--url", type=address, default=DEFAULT_URL, help=f"the server (default: {DEFAULT_URL})")


def run(args: argparse.Namespace) -> int:
    """Ask the server what it serves, and print the lines. Returns the exit status."""
    from millpond.bench.connection import Unusable, key_from

    try:
        key = key_from(KEYS)
        model, context = _served(args.url, key)
    except (Unusable, NoServer) as error:
        print(f"millpond agents: {error}", file=sys.stderr)
        return 1
    for name, line in lines(args.url, model, context, key or NO_KEY).items():
        print(f"# {name}\n{line}\n")
    return 0


class NoServer(Exception):  # noqa: N818 - it names what was found
    """There is none that can be asked; the message says why."""


def lines(url: str, model: str, context: int, key: str) -> Mapping[str, str]:
    """Agent → a line of shell that starts it; more arguments may follow. ``context``: the model's, in tokens."""
    base = url.rstrip("/").removesuffix("/v1")
    return {
        "Claude Code": _line(
            {
                "ANTHROPIC_BASE_URL": base,
                "ANTHROPIC_API_KEY": key,
                "ANTHROPIC_MODEL": model,
                "CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(context),
                "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            },
            "claude",
        ),
        "Codex": _line({"MILLPOND_KEY": key}, "codex", *_codex(base, model, context)),
        "opencode": _line({"OPENCODE_CONFIG_CONTENT": json.dumps(_opencode(base, model, context, key))}, "opencode"),
    }


def _line(environment: Mapping[str, str], *command: str) -> str:
    return " ".join((*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command)))


def _codex(base: str, model: str, context: int) -> list[str]:
    provider = f'{{name="Millpond",base_url={json.dumps(base + "/v1")},env_key="MILLPOND_KEY",wire_api="responses"}}'
    settings = (
        f"model={json.dumps(model)}",
        "model_provider=millpond",
        f"model_context_window={context}",
        f"model_providers.millpond={provider}",
    )
    return [part for setting in settings for part in ("-c", setting)]


def _opencode(base: str, model: str, context: int, key: str) -> dict[str, object]:
    limit = {"context": context, "output": min(MOST_OUTPUT, max(1, context // 4))}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{base}/v1", "apiKey": key},
        "models": {model: {"limit": limit}},
    }
    named = f"millpond/{model}"
    return {"provider": {"millpond": provider}, "model": named, "small_model": named}


def _served(url: str, key: str) -> tuple[str, int]:
    """The model's name and the length of its context. Raises NoServer, Unusable."""
    import httpx

    from millpond.bench.connection import connection

    try:
        with httpx.Client(timeout=SECONDS, **connection(url, key)) as client:
            answer = client.get("/v1/models")
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise NoServer(f"{url} wants a key: set {KEYS[0]}")
        found = answer.raise_for_status().json()["data"][0]
        name, context = found["id"], found.get("max_model_len")
    except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise NoServer(f"there is no server to be asked at {url}: {error}") from error
    if not isinstance(name, str) or not isinstance(context, int):
        raise NoServer(f"{url} does not say yet how long its model's context is; is it still starting?")
    return name, context
