"""A server as a service: the text of a systemd unit and of a launchd property list.

Both restart what fails and leave an orderly stop the time it needs. Neither sandboxes what MLX needs: devices, memory
that is written and then executed, and a C compiler on Linux CPUs.
"""

from __future__ import annotations

import plistlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

RESTART_SECONDS = 5
STARTS, STARTS_SECONDS = 5, 300
"""After so many starts within so many seconds systemd leaves it: something is wrong that a restart does not mend."""
THROTTLE_SECONDS = 10
USAGE_STATUS = 2
"""Exit status for a command line that cannot be understood."""
PRIVATE_FOLDERS = (Path("/tmp"), Path("/var/tmp"))  # noqa: S108 - named, not used
READ_ONLY_FOLDERS = (Path("/usr"), Path("/boot"), Path("/efi"), Path("/etc"))
"""What PrivateTmp hides, and what ProtectSystem=full makes read-only."""
UNPRIVILEGED_PORT = 1024
UNFIT_IN_PROGRAM = re.compile(r"[\"'\\$\x00-\x1f\x7f]")
_BARE = re.compile(r"[A-Za-z0-9_@+=:,./-]+")
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(1, 32), 127)} | {ord("\\"): "\\\\", ord('"'): '\\"'}


class Unwritable(Exception):  # noqa: N818 - it names what is wrong
    """Something that this kind of file cannot express; the message is for the user."""


@dataclass(frozen=True)
class Plan:
    """What is to be run, whoever runs it."""

    name: str
    """Of the service; letters, digits, dots, dashes and underscores."""
    model: str
    """As people know it."""
    command: tuple[str, ...]
    """Absolute program, then its arguments."""
    environment: Mapping[str, str]
    stop_seconds: int
    """How long an orderly stop may take."""
    open_files: int
    port: int
    read: tuple[Path, ...]
    """Absolute paths that must be visible."""
    written: tuple[Path, ...]
    """Absolute folders that must be writable."""


def systemd_unit(plan: Plan, system: bool, user: str = "") -> str:
    """The unit, of the system and running as ``user``, or of the user's own manager. Raises Unwritable."""
    program = plan.command[0]
    if UNFIT_IN_PROGRAM.search(program):
        raise Unwritable(f"systemd cannot start a program with a quote, \\ or $ in its path: {program}")
    arguments = " ".join(_word(argument).replace("$", "$$") for argument in plan.command[1:])
    lines = [
        "[Unit]",
        f"Description=Millpond serving {_plain(plan.model)}",
        *(("Wants=network-online.target", "After=network-online.target") if system else ()),
        f"StartLimitIntervalSec={STARTS_SECONDS}",
        f"StartLimitBurst={STARTS}",
        "",
        "[Service]",
        "Type=exec",
        *((f"User={user}",) if system else ()),
        "WorkingDirectory=/",
        *(f"Environment={_word(f'{name}={value}')}" for name, value in plan.environment.items()),
        f"ExecStart={_word(program)} {arguments}",
        "# API keys and the TLS certificate are read again.",
        "ExecReload=/bin/kill -HUP $MAINPID",
        "Restart=on-failure",
        f"RestartSec={RESTART_SECONDS}",
        f"RestartPreventExitStatus={USAGE_STATUS}",
        "# The front end alone is told to stop: it drains, and the engine saves the prefix cache.",
        "KillMode=mixed",
        f"TimeoutStopSec={plan.stop_seconds}",
        "# An engine that the kernel kills for memory is restarted by the front end.",
        "OOMPolicy=continue",
        f"LimitNOFILE={plan.open_files}",
        "StandardOutput=journal",
        "StandardError=journal",
        f"SyslogIdentifier={plan.name}",
        *_hardening(plan, system, user),
        "",
        "[Install]",
        f"WantedBy={'multi-user' if system else 'default'}.target",
    ]
    return _encodable("\n".join(lines) + "\n")


def launchd_plist(plan: Plan, label: str, log: Path) -> str:
    """The property list of an agent that writes to ``log``. Raises Unwritable."""
    content = {
        "Label": label,
        "ProgramArguments": list(plan.command),
        "EnvironmentVariables": dict(plan.environment),
        "WorkingDirectory": "/",
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": THROTTLE_SECONDS,
        "ExitTimeOut": plan.stop_seconds,
        # Anything else is slowed down in favour of what is in front of the user.
        "ProcessType": "Interactive",
        "SoftResourceLimits": {"NumberOfFiles": plan.open_files},
        "HardResourceLimits": {"NumberOfFiles": plan.open_files},
        "StandardOutPath": str(log),
        "StandardErrorPath": str(log),
    }
    if any("\r" in word for word in (*plan.command, *plan.environment.values())):
        raise Unwritable("an argument has a carriage return, which XML makes a newline")
    try:
        return _encodable(plistlib.dumps(content, sort_keys=False).decode())
    except ValueError as error:  # an unencodable or control character
        raise Unwritable(f"an argument cannot be written into a property list: {error}") from error


def _hardening(plan: Plan, system: bool, user: str) -> Iterable[str]:
    yield "NoNewPrivileges=yes"
    yield "RestrictSUIDSGID=yes"
    yield "LockPersonality=yes"
    if not system:
        return  # the rest needs mount namespaces, which a user's manager cannot make everywhere
    if not _below((*plan.read, *plan.written), PRIVATE_FOLDERS):
        yield "PrivateTmp=yes"
    if not _below(plan.written, READ_ONLY_FOLDERS):
        yield "ProtectSystem=full"
    yield "ProtectControlGroups=yes"
    if 0 < plan.port < UNPRIVILEGED_PORT and user != "root":
        yield "AmbientCapabilities=CAP_NET_BIND_SERVICE"


def _below(paths: Iterable[Path], folders: Iterable[Path]) -> bool:
    kept = tuple(folders)
    return any(place.is_relative_to(folder) for path in paths for place in (path, path.resolve()) for folder in kept)


def _word(text: str) -> str:
    """A word that systemd reads back as ``text``; in a command line $ has to be doubled as well."""
    if _BARE.fullmatch(text):
        return text
    return '"' + text.translate(_ESCAPES).replace("%", "%%") + '"'


def _plain(text: str) -> str:
    return "".join(character if character.isalnum() or character in " ./_:@+-" else "?" for character in text)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unwritable("an argument is not valid UTF-8") from error
    return text
