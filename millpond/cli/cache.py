"""``millpond cache``: look at the prefix cache on disk, verify it, make it smaller. Works beside running servers."""

from __future__ import annotations

import argparse
import os
import sqlite3
import stat
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from pydantic import ByteSize, TypeAdapter, ValidationError

from millpond.hub.cache import NoCache, prefix_folder
from millpond.hub.progress import TerminalProgress
from millpond.paths import expanded
from millpond.prefix.disk import upkeep
from millpond.prefix.disk.index import UnusableIndex
from millpond.prefix.disk.upkeep import Removed
from millpond.values import Duration


def default_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the prefix cache lies: MILLPOND_CACHE_DIR, else where ``serve`` puts it by itself. Raises NoCache."""
    if given := environ.get("MILLPOND_CACHE_DIR"):
        try:
            return expanded(given)
        except ValueError as error:
            raise NoCache(f"MILLPOND_CACHE_DIR: {error}; --cache-dir FOLDER names another folder") from None
    return prefix_folder(environ)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its own ones."""
    parser = subparsers.add_parser(
        "cache", help="look after the prefix cache on disk", description="Look after the prefix cache on disk."
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _action(actions, "ls", "show what each model has on disk", _list)
    _action(actions, "verify", "read every file, set damaged ones aside, remove leftovers", _verify)
    prune = _action(actions, "prune", "remove what is old or least recently used", _prune)
    prune.add_argument("--max-size", type=size, metavar="SIZE", help="keep at most this much, for example 8GB")
    prune.add_argument("--older-than", type=duration, metavar="DURATION", help="remove what is unused for, say, 30d")
    clear = _action(actions, "clear", "remove everything, or all of one model", _clear)
    clear.add_argument("--model", metavar="LABEL", help="name or digest as ls shows them")
    for shrinking in (prune, clear):
        shrinking.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    explanation: str,
    do: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=explanation, description=f"{explanation[0].upper()}{explanation[1:]}.")
    parser.add_argument(
        "--cache-dir", type=_folder, metavar="FOLDER", help="default: MILLPOND_CACHE_DIR, else where serve puts it"
    )
    parser.set_defaults(do=do)
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for. Returns the exit status: 1 for damage found or a folder that is no use."""
    do: Callable[[argparse.Namespace], int] = args.do
    try:
        args.cache_dir = args.cache_dir or default_folder()
    except NoCache as error:
        print(f"millpond: {error}", file=sys.stderr)
        return 1
    try:
        if not stat.S_ISDIR(args.cache_dir.stat().st_mode):
            raise NotADirectoryError("it is no folder")
        return do(args)
    except FileNotFoundError:
        print(f"There is no cache in {args.cache_dir}")
        return 0
    except (OSError, sqlite3.Error, UnusableIndex) as error:
        print(f"millpond: {args.cache_dir}: {error}", file=sys.stderr)
        return 1


def _folder(text: str) -> Path:
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def size(text: str) -> int:
    """Bytes from ``8GB`` or ``512MiB``."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 8GB or 512MiB") from None


def duration(text: str) -> float:
    """Seconds from ``30d``, ``12h``, ``90m``, ``45s`` or ``2w``."""
    try:
        return TypeAdapter(Duration).validate_python(text)
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration like 30d, 12h or 90m") from None


def _list(args: argparse.Namespace) -> int:
    uses = upkeep.usage(args.cache_dir)
    if not uses:
        print(f"Nothing is cached in {args.cache_dir}")
        return 0
    names = [use.label or "(unknown model)" for use in uses]
    width = max(map(len, names))
    print(f"{'MODEL':<{width}}  {'NAMESPACE':<12}  {'RECORDS':>8}  {'SIZE':>9}  LAST USE (UTC)")
    for name, use in zip(names, uses, strict=True):
        used = time.strftime("%Y-%m-%d %H:%M", time.gmtime(use.used_at))
        print(f"{name:<{width}}  {use.digest[:12]}  {use.files:>8}  {_shown(use.bytes):>9}  {used}")
    print(f"{sum(use.files for use in uses)} records, {_shown(sum(use.bytes for use in uses))} in {args.cache_dir}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    with ExitStack() as stack:
        advance: Callable[[int], None] | None = None

        def begin(total: int) -> None:
            nonlocal advance
            advance = stack.enter_context(TerminalProgress().bar("Verifying", total, "B"))

        def step(nbytes: int) -> None:
            assert advance is not None
            advance(nbytes)

        result = upkeep.verify(args.cache_dir, begin, step)
    print(f"{result.sound} records are sound")
    for damage, count in sorted(result.damaged.items()):
        print(f"{count} damaged ({damage}), set aside in {args.cache_dir / 'quarantine'}")
    for count, what in (
        (result.missing, "removed from the index, their file or one they depend on is gone"),
        (result.adopted, "files taken into the index"),
        (result.leftovers, "leftover temporary files removed"),
    ):
        if count:
            print(f"{count} {what}")
    return 1 if result.damaged else 0


def _prune(args: argparse.Namespace) -> int:
    if args.max_size is None and args.older_than is None:
        print("millpond: give --max-size, --older-than or both", file=sys.stderr)
        return 2
    removed = upkeep.prune(args.cache_dir, max_bytes=args.max_size, older_than=args.older_than, dry_run=args.dry_run)
    return _say(removed, args.dry_run)


def _clear(args: argparse.Namespace) -> int:
    return _say(upkeep.clear(args.cache_dir, model=args.model, dry_run=args.dry_run), args.dry_run)


def _say(removed: Removed, dry_run: bool) -> int:
    print(f"{'Would remove' if dry_run else 'Removed'} {removed.files} records, {_shown(removed.bytes)}")
    return 0


def _shown(nbytes: int) -> str:
    return ByteSize(nbytes).human_readable()
