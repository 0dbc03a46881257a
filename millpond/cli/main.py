"""Entry point of the ``millpond`` command.

Only the module of the subcommand that is asked for is imported, so that ``serve`` starts without the others' libraries.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from millpond import __version__
from millpond.cli.text import forgive_terminal

COMMANDS = ("serve", "chat", "agents", "bench", "pull", "doctor", "cache", "service")
INTERNAL = ("rank",)
"""Commands that people do not give, so that no help names them."""


class Command(Protocol):
    """What a subcommand's module offers."""

    add_parser: Callable[[argparse._SubParsersAction[argparse.ArgumentParser]], object]
    run: Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    forgive_terminal()
    given = sys.argv[1:] if arguments is None else list(arguments)
    wanted = [name for name in (*COMMANDS, *INTERNAL) if name == (given[0] if given else "")] or list(COMMANDS)
    parser = argparse.ArgumentParser(prog="millpond", description="Serve language models on MLX.")
    parser.add_argument("--version", action="version", version=f"millpond {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {name: _command(name) for name in wanted}
    for module in modules.values():
        module.add_parser(subparsers)
    parsed = parser.parse_args(given)
    try:
        return modules[parsed.command].run(parsed)
    except KeyboardInterrupt:
        return 130


def _command(name: str) -> Command:
    return cast(Command, importlib.import_module(f"millpond.cli.{name}"))


if __name__ == "__main__":
    sys.exit(main())
