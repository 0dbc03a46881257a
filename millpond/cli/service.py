"""``millpond service``: a systemd unit or a launchd property list that serves a model with the settings given.

The settings are checked now, with nothing of this shell's environment, because a service does not see it.
"""

from __future__ import annotations

import argparse
import getpass
import math
import os
import pwd
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from millpond.child import python
from millpond.cli.units import Plan, Unwritable, launchd_plist, systemd_unit
from millpond.config import ConfigError, ServeConfig, add_flags, read_config
from millpond.hub.cache import NoCache, cache_root
from millpond.hub.demo import WHEEL_MODELS
from millpond.hub.errors import SourceError
from millpond.hub.progress import SilentProgress
from millpond.hub.source import ALLOWED, resolve
from millpond.paths import expanded

STOP_MARGIN = 20
"""Seconds for a stop beyond those for draining: errors are written, live conversations saved, connections closed."""
SPARE_FILES = 1024
"""Open files beyond the connections."""
CARRIED = ("MILLPOND_CACHE", "MILLPOND_KERNELS", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE")
"""Variables that say where models lie: paths, none of them secret. The service gets them as they are now."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
SYSTEM_UNITS = Path("/etc/systemd/system")


class Refused(Exception):  # noqa: N818 - it names what happened
    """The service cannot be made; the message is for the user."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand and its two kinds."""
    parser = subparsers.add_parser(
        "service", help="make a systemd unit or a launchd agent", description="Let systemd or launchd run a server."
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    systemd = _kind(kinds, "systemd", "a unit for systemd", "the user's unit folder, or the system's with --system")
    systemd.add_argument("--system", action="store_true", help="a unit of the system instead of the user")
    systemd.add_argument("--run-as", metavar="ACCOUNT", help="account of a --system unit; default: who asks for it")
    _kind(kinds, "launchd", "a property list for launchd", "~/Library/LaunchAgents")


def _kind(
    kinds: argparse._SubParsersAction[argparse.ArgumentParser], kind: str, what: str, folder: str
) -> argparse.ArgumentParser:
    parser = kinds.add_parser(kind, help=what, description=f"Print {what}, or write it.")
    parser.add_argument("model", metavar="MODEL", help="hub name, local folder, GGUF file, or demo")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--output", type=Path, metavar="FILE", help="write it to this file")
    place.add_argument("--install", action="store_true", help=f"write it to {folder}")
    parser.add_argument("--force", action="store_true", help="replace a file that is already there")
    parser.add_argument("--name", default="millpond", help="name of the service; default: %(default)s")
    add_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print or write what is asked for; returns the exit code."""
    try:
        plan = planned(args)
        _systemd(args, plan) if args.kind == "systemd" else _launchd(args, plan)
    except (ConfigError, SourceError, NoCache, Unwritable, Refused) as error:
        print(f"millpond service: {error}", file=sys.stderr)
        return 1
    for note in _unseen(os.environ):
        print(f"millpond service: note: {note}", file=sys.stderr)
    return 0


def planned(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Plan:
    """What the service will run. Raises ConfigError, SourceError, Refused."""
    if not NAME.fullmatch(args.name):
        raise Refused(f"--name: must be letters, digits, dots, dashes and underscores (got {args.name!r})")
    if args.api_key is not None:
        raise Refused(
            "--api-key: everybody on this machine can read the file of a service; write the key into a file that only "
            "the service's account can read, and give --api-key-file"
        )
    config = read_config({name: getattr(args, name) for name in ServeConfig.model_fields}, {}, args.config)
    _check_importable()
    model = _model(args.model)
    draft = _model(args.draft_model) if args.draft_model else ""
    flags = [f"--config={_absolute(args.config)}"] if args.config else []
    read = [Path(place) for place in (model, draft, sys.executable) if place]
    for name in ServeConfig.model_fields:
        given: str | None = getattr(args, name)
        if given is not None:
            value = getattr(config, name)
            placed = _absolute(given) if isinstance(value, Path) else draft if name == "draft_model" else given
            flags.append(f"--{name.replace('_', '-')}={placed}")
    read += [
        _absolute(given)
        for given in (
            *(args.config, args.api_key_file, args.tls_certificate, args.tls_key),
            *(args.hostfile, args.tp_secret_file),
        )
        if given
    ]
    carried = {name: str(_absolute(environ[name])) for name in CARRIED if environ.get(name)}
    return Plan(
        name=args.name,
        model=config.model_name or args.model,
        command=python("-m", "millpond.cli.main", "serve", model, *flags),
        environment=carried,
        stop_seconds=math.ceil(config.drain_seconds) + STOP_MARGIN,
        open_files=config.max_connections + SPARE_FILES,
        port=config.port,
        read=tuple(path for path in read if path.is_absolute()),
        written=(cache_root(environ).absolute(), *([_absolute(args.cache_dir)] if args.cache_dir else [])),
    )


def _model(name: str) -> str:
    """The model as it can be named from any folder. Raises SourceError."""
    if name in WHEEL_MODELS:
        return name
    path = _expanded(name)
    if path.is_dir() or (path.suffix != ".gguf" and (path.exists() or name.count("/") != 1)):
        resolve(name, SilentProgress())  # refuses what is no model; local, so nothing is fetched
        return str(path.absolute())
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SourceError(f"model {name!r} does not exist; allowed are {ALLOWED}")
        return str(path.absolute())
    return name


def _expanded(path: str) -> Path:
    try:
        return expanded(path)
    except ValueError as error:
        raise Refused(f"{path}: {error}") from error


def _absolute(path: str) -> Path:
    return _expanded(path).absolute()


def _check_importable() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = python("-c", "import millpond.cli.main")
    if subprocess.run(command, cwd="/", env=environment, capture_output=True, check=False).returncode != 0:
        raise Refused(
            f"millpond is not installed for {sys.executable}: it is only found from this folder or through PYTHONPATH. "
            f"Install it with {shlex.quote(sys.executable)} -m pip install FOLDER_OF_MILLPOND"
        )


def _unseen(environ: Mapping[str, str]) -> Iterator[str]:
    for name in ("config", *ServeConfig.model_fields):
        if f"MILLPOND_{name.upper()}" in environ:
            flag = "api_key_file" if name == "api_key" else name
            yield f"MILLPOND_{name.upper()} is set here, but a service does not see it; give --{flag.replace('_', '-')}"


# --- the two kinds ----------------------------------------------------------------------------------------------


def _systemd(args: argparse.Namespace, plan: Plan) -> None:
    if args.run_as is not None and not args.system:
        raise Refused("--run-as: only a --system unit can run as somebody else")
    account = _account(args.run_as) if args.system else ""
    text = systemd_unit(plan, args.system, account)
    folder = SYSTEM_UNITS if args.system else _user_units(os.environ)
    path = _destination(args, folder / f"{args.name}.service")
    if path is None:
        print(text, end="")
        return
    _write(path, text, args.force)
    sudo, manager = ("sudo ", "") if args.system else ("", " --user")
    what = path.name if path.parent == folder else shlex.quote(str(path))
    print(f"Wrote {path}. To start it, now and at every boot:" if args.system else f"Wrote {path}. To start it:")
    print(f"  {sudo}systemctl{manager} daemon-reload")
    print(f"  {sudo}systemctl{manager} enable --now {what}")
    if not args.system:
        print("  loginctl enable-linger          # once: it starts at boot and survives your logout")
    print("To look at it, and to let it read API keys and certificate again:")
    print(f"  systemctl{manager} status {path.name}")
    print(f"  journalctl{manager} -u {path.name} -f")
    print(f"  {sudo}systemctl{manager} reload {path.name}")


def _launchd(args: argparse.Namespace, plan: Plan) -> None:
    label = f"local.{args.name}"
    text = launchd_plist(plan, label, _expanded("~") / "Library" / "Logs" / f"{label}.log")
    path = _destination(args, _expanded("~") / "Library" / "LaunchAgents" / f"{label}.plist")
    if path is None:
        print(text, end="")
        return
    _write(path, text, args.force)
    domain = f"gui/{os.getuid()}"
    print(f"Wrote {path}. To start it, now and at every login:")
    print(f"  launchctl bootstrap {domain} {shlex.quote(str(path))}")
    print("To look at it, to let it read API keys and certificate again, and to stop it:")
    print(f"  tail -f ~/Library/Logs/{label}.log")
    print(f"  launchctl kill SIGHUP {domain}/{label}")
    print(f"  launchctl bootout {domain}/{label}")


def _account(asked: str | None) -> str:
    try:
        account = asked or os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError) as error:
        raise Refused("--run-as: this account has no name; --run-as ACCOUNT names another") from error
    try:
        pwd.getpwnam(account)
    except KeyError as error:
        raise Refused(f"--run-as: there is no account {account!r} on this machine") from error
    if account == "root":
        print("millpond service: note: it will run as root; --run-as ACCOUNT names another account", file=sys.stderr)
    return account


def _user_units(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else _expanded("~/.config")) / "systemd" / "user"


def _destination(args: argparse.Namespace, installed: Path) -> Path | None:
    """Where to write; None: nowhere."""
    if args.install:
        return installed
    if args.output is None:
        return None
    path: Path = _absolute(str(args.output))
    if path.suffix != installed.suffix or not NAME.fullmatch(path.stem):
        allowed = f"must be a name of letters, digits, dots, dashes and underscores that ends in {installed.suffix}"
        raise Refused(f"--output: {allowed} (got {str(args.output)!r})")
    return path


def _write(path: Path, text: str, force: bool) -> None:
    """Put a whole file in place, or raise Refused and leave everything as it was."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{path.parent} cannot be made: {error.strerror}") from error
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".millpond-") as folder:
            whole = Path(folder) / path.name
            whole.write_text(text, encoding="utf-8")
            whole.chmod(0o644)
            if force:
                whole.replace(path)
            else:
                path.hardlink_to(whole)
    except FileExistsError as error:
        raise Refused(f"{path} exists; --force replaces it") from error
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error.strerror}") from error
