"""``millpond doctor``: what this machine offers and what is missing, and what to do about it.

It takes the flags of ``serve``, reads the same environment and file, and says how serving with them would go. mlx is
looked at in a short process of its own, because this one must not import it and because a broken installation may take
the process down.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator

from millpond import __version__
from millpond.cli.doctor import address, device, disk, engine, machine, model, packages, settings, tls
from millpond.cli.doctor.finding import Finding
from millpond.config import ServeConfig, add_flags, read_config


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("doctor", help="look at this machine and the installation", description=__doc__)
    parser.add_argument("model", metavar="MODEL", nargs="?", help="load this model too, and say how it would be served")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--device",
        action="store_true",
        help="measure this device for two minutes with MODEL (or the demo model), and print a table for an issue",
    )
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print the findings, or what the self-test of the device has measured; returns 1 when there is a failure."""
    if args.device:
        return device.run(args)
    found = []
    for finding in findings(args):
        found.append(finding)
        if not args.json:
            print(finding.lines, flush=True)
    failed = any(finding.state == "fail" for finding in found)
    if args.json:
        listed = [dataclasses.asdict(finding) for finding in found]
        print(json.dumps({"millpond": __version__, "ok": not failed, "findings": listed}, indent=2))
    return int(failed)


def findings(args: argparse.Namespace) -> Iterator[Finding]:
    """Everything worth knowing, in the order of printing."""
    yield from packages.findings()
    probed = engine.probe()
    yield from engine.findings(probed)
    yield machine.memory()
    config, found = settings.read({name: getattr(args, name) for name in ServeConfig.model_fields}, args.config)
    yield from found
    yield from disk.caches()
    if config is not None:
        yield disk.ssd(config)
        yield machine.open_files(config)
        yield address.port(config)
        yield from tls.findings(config)
        yield from address.access(config)
    if args.model:
        yield from model.findings(args.model, config or read_config({}, {}), probed, quiet=args.json)
