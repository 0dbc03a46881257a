"""The hostfile: which machines share a model. Its format is that of mlx.launch and mlx.distributed_config.

Either a list of hosts, or an object with ``hosts`` and, if one likes, ``backend`` and ``envs``. A host is
``{"ssh": NAME, "ips": [ADDRESS, ...], "rdma": [DEVICE or null, ...]}``. Other fields are passed over, as by mlx.launch.
Pure, but for reading the file; mlx is never imported, because the front end reads hostfiles.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from millpond.config import MOST_RANKS, ConfigError

BACKENDS = ("ring", "jaccl", "jaccl-ring", "nccl", "mpi")
MOST_BYTES = 1024 * 1024
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
NAME = re.compile(r"[A-Za-z0-9_.@%:\[][^\s\0]*")
"""What may be given to ssh as a host: nothing that it would take for an option."""
ADDRESS = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
"""An IPv4 address or a name: the backends cut addresses off at the first colon."""


class Host(msgspec.Struct, frozen=True):
    """One rank's machine."""

    ssh: str
    ips: tuple[str, ...] = ()
    rdma: tuple[str | tuple[str, ...] | None, ...] = ()
    """The devices that lead to each rank; None where there are none, and for the rank itself."""


class Hostfile(msgspec.Struct, frozen=True):
    """A hostfile as it was understood; rank n runs on ``hosts[n]``."""

    hosts: tuple[Host, ...]
    backend: str = ""
    """Empty: it does not say."""
    envs: dict[str, str] = {}
    """Environment variables for every rank."""


def read_hosts(path: Path) -> Hostfile:
    """The hostfile at ``path``. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"hostfile: {path}: cannot be read: {error.strerror}") from error
    if len(content) > MOST_BYTES:
        raise ConfigError(f"hostfile: {path}: has more than {MOST_BYTES} bytes; is it another file?")
    return parse_hosts(content, f"hostfile: {path}")


def parse_hosts(content: bytes, where: str) -> Hostfile:
    """``where`` begins every complaint. Raises ConfigError."""
    try:
        data = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: is not JSON: {error}") from error
    backend: object = ""
    envs: object = []
    hosts = data
    if isinstance(data, dict):
        if "hosts" not in data:
            raise ConfigError(f"{where}: hosts: is missing; allowed is a list of hosts, or an object with it")
        backend, envs, hosts = data.get("backend", ""), data.get("envs", []), data["hosts"]
    if not isinstance(hosts, list):
        raise ConfigError(f"{where}: hosts: must be a list with one entry per rank (got {_shown(hosts)})")
    if not 1 <= len(hosts) <= MOST_RANKS:
        raise ConfigError(f"{where}: hosts: must have 1 to {MOST_RANKS} entries (got {len(hosts)})")
    # mlx.distributed_config writes an empty backend, or null, where it was asked for none.
    if backend not in ("", None, *BACKENDS):
        raise ConfigError(f"{where}: backend: must be {', '.join(BACKENDS)} (got {_shown(backend)})")
    return Hostfile(
        hosts=tuple(_host(host, f"{where}: hosts[{rank}]") for rank, host in enumerate(hosts)),
        backend=str(backend or ""),
        envs=_envs(envs, f"{where}: envs"),
    )


def _host(given: object, where: str) -> Host:
    if not isinstance(given, dict):
        raise ConfigError(f'{where}: must be an object such as {{"ssh": "mac1", "ips": []}} (got {_shown(given)})')
    ssh = given.get("ssh")
    if not isinstance(ssh, str) or not NAME.fullmatch(ssh):
        raise ConfigError(f"{where}.ssh: must be the name of a machine, as ssh is told it (got {_shown(ssh)})")
    ips = _list(given.get("ips"), f"{where}.ips")
    for place, address in enumerate(ips):
        if not isinstance(address, str) or not ADDRESS.fullmatch(address):
            raise ConfigError(f"{where}.ips[{place}]: must be an IPv4 address (got {_shown(address)})")
    rdma = tuple(
        _device(entry, f"{where}.rdma[{place}]")
        for place, entry in enumerate(_list(given.get("rdma"), f"{where}.rdma"))
    )
    return Host(ssh, tuple(str(address) for address in ips), rdma)


def _device(given: object, where: str) -> str | tuple[str, ...] | None:
    devices = given if isinstance(given, list) else [given]
    if given is None:
        return None
    if not devices or not all(isinstance(device, str) and device for device in devices):
        raise ConfigError(f"{where}: must be the name of a device, a list of such names, or null (got {_shown(given)})")
    names = tuple(str(device) for device in devices)
    return names if isinstance(given, list) else names[0]


def _envs(given: object, where: str) -> dict[str, str]:
    envs: dict[str, str] = {}
    for place, entry in enumerate(_list(given, where)):
        name, equals, value = entry.partition("=") if isinstance(entry, str) else ("", "", "")
        if not equals or not VARIABLE.fullmatch(name) or "\0" in value:
            raise ConfigError(f"{where}[{place}]: must be like NAME=VALUE (got {_shown(entry)})")
        envs[name] = value
    return envs


def _list(given: object, where: str) -> Sequence[object]:
    if given is None:
        return ()
    if not isinstance(given, list):
        raise ConfigError(f"{where}: must be a list (got {_shown(given)})")
    return given


def _shown(value: object) -> str:
    """As it is in the file, in short."""
    text = msgspec.json.encode(value).decode()
    return "nothing" if value is None else text if len(text) <= 80 else f"{text[:80]}…"


def check(hosts: Hostfile, backend: str, where: str) -> None:
    """Can the hosts talk to each other over ``backend``? Raises ConfigError."""
    if backend == "ring":
        _check_ring(hosts, where)
    elif backend in ("jaccl", "jaccl-ring"):
        _check_rdma(hosts, backend, where)
    if backend != "mpi" and not hosts.hosts[0].ips:
        raise ConfigError(f"{where}: hosts[0].ips: rank 0 needs an address that all others can reach")


def _check_ring(hosts: Hostfile, where: str) -> None:
    counts = [len(host.ips) for host in hosts.hosts]
    for rank, count in enumerate(counts):
        if not count:
            raise ConfigError(f"{where}: hosts[{rank}].ips: the ring backend needs at least one address of each host")
        if count != counts[0]:
            raise ConfigError(
                f"{where}: hosts[{rank}].ips: the ring backend needs as many addresses of each host, and hosts[0] "
                f"has {counts[0]} (got {count})"
            )


def _check_rdma(hosts: Hostfile, backend: str, where: str) -> None:
    world = len(hosts.hosts)
    for rank, host in enumerate(hosts.hosts):
        if len(host.rdma) != world:
            raise ConfigError(
                f"{where}: hosts[{rank}].rdma: the {backend} backend needs an entry per rank, {world} (got "
                f"{len(host.rdma)}); mlx.distributed_config writes them"
            )
        if host.rdma[rank] is not None:
            raise ConfigError(f"{where}: hosts[{rank}].rdma[{rank}]: must be null: no device leads to the rank itself")
        # A ring needs the two neighbours only.
        others = {(rank - 1) % world, (rank + 1) % world} if backend == "jaccl-ring" else set(range(world))
        for other in sorted(others - {rank}):
            if host.rdma[other] is None:
                raise ConfigError(f"{where}: hosts[{rank}].rdma[{other}]: no device leads to rank {other}")
