"""Ranks as ``millpond serve`` sets them up: the plan of its own groups, or a place in one that somebody else starts."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from millpond.cli.given import find_model
from millpond.config import ServeConfig
from millpond.launch.followers import RANK_COMMAND, GroupPlan
from millpond.launch.keeper import Keeper
from millpond.launch.layout import GroupLayout, group_layout


def layout_of(config: ServeConfig, environ: Mapping[str, str] = os.environ) -> GroupLayout | None:
    """The ranks that are asked for; None: one engine. Raises ConfigError."""
    own = socket.gethostname()
    short = own.partition(".")[0]
    names = frozenset({"127.0.0.1", "::1", "localhost", own, short, f"{short}.local"} - {""})
    return group_layout(config, environ, names)


def group_plan(layout: GroupLayout, config: ServeConfig, given: str, folder: Path) -> GroupPlan:
    """What groups are started from; ``given`` is the model as it was named."""
    return GroupPlan(
        layout=layout,
        given=given,
        folder=str(folder),
        python=config.tp_python or sys.executable,
        ssh=shlex.split(config.tp_ssh),
        environment=config.log_environment,
        options=("--log-level", config.log_level, "--log-format", config.log_format),
    )


def keep(layout: GroupLayout, config: ServeConfig, given: str, command: Sequence[str] = RANK_COMMAND) -> int:
    """Be the keeper of this process's rank; returns the exit code. Raises StartError when there is no such model."""
    model = find_model(given)
    assert layout.launch is not None
    settings = layout.settings(layout.port, (), layout.secret, dict.fromkeys(range(layout.world), str(model.path)))
    keeper = Keeper(settings[layout.launch.rank], config, layout.restarts, command)
    return asyncio.run(keeper.run())
