"""``millpond pull``: have a model on this machine before it is served."""

from __future__ import annotations

import argparse
import sys

from millpond.hub.errors import SourceError
from millpond.hub.progress import TerminalProgress
from millpond.hub.source import resolve


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("pull", help="fetch or convert a model", description="Fetch or convert a model.")
    parser.add_argument("model", metavar="MODEL", help="hub name, GGUF file, or demo")


def run(args: argparse.Namespace) -> int:
    """Pull the model that the command line names."""
    return pull(args.model)


def pull(model: str) -> int:
    """Fetch or convert ``model`` and print its folder on standard output. Returns the exit status."""
    try:
        resolved = resolve(model, TerminalProgress())
    except SourceError as error:
        print(f"millpond: {error}", file=sys.stderr)
        return 1
    print(resolved.path)
    return 0
