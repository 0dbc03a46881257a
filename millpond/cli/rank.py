"""``millpond rank``, internal: what ``millpond serve`` starts over ssh to have a follower on another machine.

It reads the follower's GroupSettings from standard input, finds the model, and runs the follower, whose standard error
is its own. When the input ends, ssh or the front end is gone: the follower is killed that moment. Its exit status is
the follower's; a signal's is 128 and its number, as in a shell. mlx is never imported.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys

import msgspec

from millpond.cli.given import StartError, find_model
from millpond.launch.followers import RANK_COMMAND, SIGNALLED
from millpond.launch.keeper import read_input, start_follower
from millpond.launch.process import send_signal
from millpond.observe.log import configure
from millpond.types import GroupSettings

_settings_decoder = msgspec.json.Decoder(GroupSettings)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("rank", description="Internal: started by millpond serve on other machines.")
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-format", default="text")
    parser.add_argument("--command", dest="program", nargs="+", default=list(RANK_COMMAND), help="the follower")


def run(args: argparse.Namespace) -> int:
    """Hold a follower; returns its exit code."""
    configure(args.log_level, args.log_format)
    environment = {"MILLPOND_LOG_LEVEL": args.log_level, "MILLPOND_LOG_FORMAT": args.log_format}
    try:
        return asyncio.run(_hold(args.program, environment))
    except (msgspec.MsgspecError, ValueError) as error:
        print(f"millpond rank: standard input must be a pipe with the settings of a rank: {error}", file=sys.stderr)
    except (StartError, OSError) as error:
        print(f"millpond rank: {error}", file=sys.stderr)
    return 1


async def _hold(command: list[str], environment: dict[str, str]) -> int:
    reader = await read_input()
    settings = _settings_decoder.decode(await reader.readline())
    gone = asyncio.create_task(reader.read(1))
    finding = asyncio.create_task(asyncio.to_thread(find_model, settings.model))
    await asyncio.wait({gone, finding}, return_when=asyncio.FIRST_COMPLETED)
    if gone.done():
        os._exit(1)  # a download does not let itself be cancelled
    here = msgspec.structs.replace(settings, model=str(finding.result().path))
    process = await start_follower(here, environment, command)
    exited = asyncio.create_task(process.wait())
    await asyncio.wait({gone, exited}, return_when=asyncio.FIRST_COMPLETED)
    if not exited.done():
        send_signal(process, signal.SIGKILL)
        await exited
        return 1
    gone.cancel()
    status = exited.result()
    return status if status >= 0 else SIGNALLED - status
