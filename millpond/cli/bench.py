"""``millpond bench``: measure any OpenAI-compatible server with named workloads."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

from rich.console import Console

from millpond.bench.connection import Unusable, key_from
from millpond.bench.report import BarProgress, print_report
from millpond.bench.runner import Run, Target, UnreachableError, fresh_salt, run_workloads
from millpond.bench.workloads import ALL, BY_NAME, Sizes, Workload
from millpond.cli.address import DEFAULT_URL, address
from millpond.cli.text import argument


def _workloads(text: str) -> list[Workload]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in BY_NAME]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"no workload {', '.join(unknown) or text!r}; there are {', '.join(BY_NAME)}")
    return [BY_NAME[name] for name in names]


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    about = "\n".join(f"  {workload.name:14} {workload.about}" for workload in ALL)
    parser = subparsers.add_parser(
        "bench",
        help="measure a running server (any OpenAI-compatible one)",
        description="Measure a running OpenAI-compatible server.",
        epilog=f"workloads:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", type=address, default=DEFAULT_URL, help="address of the server; default: %(default)s")
    parser.add_argument(
        "--model", type=argument, default="", help="model to name in requests; default: the first the server lists"
    )
    parser.add_argument(
        "--workload",
        type=_workloads,
        default=list(ALL),
        metavar="NAME[,NAME…]",
        help="which workloads, in this order; default: all",
    )
    parser.add_argument("--tokens", type=_positive_int, default=64, help="tokens of each answer; default: %(default)s")
    parser.add_argument("--repeats", type=_positive_int, default=3, help="requests of single; default: %(default)s")
    parser.add_argument(
        "--prompt-scale", type=_positive, default=1.0, help="factor on every prompt length; default: %(default)s"
    )
    parser.add_argument(
        "--timeout", type=_positive, default=300.0, help="seconds that one request may take; default: %(default)s"
    )
    parser.add_argument(
        "--salt", type=argument, default="", help="text that varies the prompts; default: a new one in every run"
    )
    parser.add_argument("--label", type=argument, default="", help="name of this run in the report")
    parser.add_argument("--json", default="", metavar="FILE", help="write all raw figures here; - for standard output")


def run(args: argparse.Namespace) -> int:
    """Run it; 0 when at least one request succeeded, 1 when none did, 130 after Ctrl-C."""
    results: list[Run] = []
    to_stdout = args.json == "-"
    console = Console(stderr=to_stdout)
    sizes = Sizes(args.salt or fresh_salt(), args.tokens, args.prompt_scale, args.repeats)
    interrupted = False
    try:
        target = Target(args.url, args.model, args.timeout, key_from(("OPENAI_API_KEY",)))
        with BarProgress(Console(stderr=True)) as progress:
            work = run_workloads(
                target, args.workload, sizes, label=args.label, progress=progress, on_run=results.append
            )
            asyncio.run(work)
    except (UnreachableError, Unusable) as error:
        print(f"millpond bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        interrupted = True
    for result in results:
        print_report(console, result)
        _write(args.json, result)
    if interrupted:
        return 130
    return 1 if not results or results[0].all_failed else 0


def _write(path: str, result: Run) -> None:
    if not path:
        return
    text = json.dumps(result.as_json())  # in ASCII, for pipes and terminals of any encoding
    if path == "-":
        print(text)
    else:
        Path(path).write_text(text + "\n", encoding="utf-8")
