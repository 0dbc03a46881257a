"""Which ranks a group has, where each runs, and what each must be told, as mlx.launch would tell it.

A layout is decided once, at the start of ``millpond serve``; every group that is started from it gets ports and a
secret of its own. Sockets are bound and secrets made in followers.py; here only files that settings name are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import msgspec

from millpond.config import ConfigError, ServeConfig
from millpond.launch.hosts import Host, Hostfile, check, read_hosts
from millpond.launch.launched import LaunchedRank, find_launch
from millpond.types import GroupSettings

CONTROL_PORT = 32322
"""Where rank 0 takes control connections unless told otherwise; mlx.launch begins one above it."""
LOOPBACK = "127.0.0.1"
LEAST_SECRET = 16


class GroupLayout(msgspec.Struct, frozen=True, kw_only=True):
    """The ranks of a group. ``hosts[n].ssh`` is empty where rank n runs on this machine."""

    hosts: tuple[Host, ...]
    backend: str
    """As in a hostfile: jaccl and jaccl-ring are told apart."""
    host: str
    """Where the others find rank 0."""
    port: int
    """0: any that is free."""
    envs: dict[str, str] = {}
    devices: tuple[str, ...] = ()
    """With nccl: which GPU each rank sees."""
    launch: LaunchedRank | None = None
    """This process's own place where somebody else starts the ranks; then ``hosts`` says nothing of them."""
    secret: str = ""
    """Hex; empty, as always where we start the ranks: each group gets one of its own."""
    flags: dict[str, str] = {}
    """What this process was given for the engine, where somebody else starts the ranks."""
    silence_seconds: float = 5.0

    @property
    def world(self) -> int:
        return len(self.hosts)

    @property
    def followers_here(self) -> tuple[int, ...]:
        """Ranks but the first that are ours to start on this machine."""
        return () if self.launch else tuple(n for n in range(1, self.world) if not self.hosts[n].ssh)

    @property
    def followers_elsewhere(self) -> tuple[int, ...]:
        """Ranks that are ours to start over ssh."""
        return () if self.launch else tuple(n for n in range(1, self.world) if self.hosts[n].ssh)

    @property
    def restarts(self) -> bool:
        """Whether another group can follow one that is lost; mpirun ends all with the first that is lost."""
        return self.backend != "mpi"

    @property
    def addresses(self) -> tuple[str, ...]:
        """What the backend listens on: a port is needed for each."""
        if self.launch or self.backend == "mpi":
            return ()
        if self.backend == "ring":
            return tuple(address for host in self.hosts for address in host.ips)
        return self.hosts[0].ips[:1]

    @property
    def fixed_ports(self) -> tuple[int, ...] | None:
        """One per address; None: any that are free."""
        return tuple(self.port + 1 + n for n in range(len(self.addresses))) if self.port else None

    def settings(self, port: int, ports: Sequence[int], secret: str, models: Mapping[int, str]) -> list[GroupSettings]:
        """Of every rank of one group. ``port``: rank 0's; ``ports``: one per address; ``models``: the name by rank."""
        return [
            GroupSettings(
                rank=rank,
                world=self.world,
                backend="jaccl" if self.backend == "jaccl-ring" else self.backend,
                host=self.host,
                port=port,
                secret=secret,
                model=models[rank],
                environment=self._environment(rank, ports),
                files=self._files(ports),
                flags=self.flags,
                silence_seconds=self.silence_seconds,
            )
            for rank in range(self.world)
        ]

    def _environment(self, rank: int, ports: Sequence[int]) -> dict[str, str]:
        if self.launch:  # it is set already
            return {}
        own = {**self.envs, "MLX_RANK": str(rank)}
        if self.backend == "nccl":
            own |= {"NCCL_HOST_IP": self.addresses[0], "NCCL_PORT": str(ports[0]), "MLX_WORLD_SIZE": str(self.world)}
            own["CUDA_VISIBLE_DEVICES"] = self.devices[rank]
        elif self.backend in ("jaccl", "jaccl-ring"):
            own["MLX_JACCL_COORDINATOR"] = f"{self.addresses[0]}:{ports[0]}"
            own |= {"MLX_JACCL_RING": "1"} if self.backend == "jaccl-ring" else {}
        return own

    def _files(self, ports: Sequence[int]) -> dict[str, str]:
        if self.launch:
            return {}
        if self.backend == "ring":
            left = iter(ports)
            nodes = [[f"{address}:{next(left)}" for address in host.ips] for host in self.hosts]
            return {"MLX_HOSTFILE": msgspec.json.encode(nodes).decode()}
        if self.backend in ("jaccl", "jaccl-ring"):
            return {"MLX_IBV_DEVICES": msgspec.json.encode([host.rdma for host in self.hosts]).decode()}
        return {}


def group_layout(config: ServeConfig, environ: Mapping[str, str], names: frozenset[str]) -> GroupLayout | None:
    """The group that is asked for; None: none is, one engine runs the model alone.

    ``names`` are those by which ssh would reach this machine. Raises ConfigError.
    """
    launch = find_launch(environ)
    if launch is not None:
        return _launched(config, launch, _given_secret(config, environ))
    if config.hostfile is not None:
        return _listed(config, environ, names)
    if config.tp_backend == "mpi":
        raise ConfigError(
            "tp_backend: mpi needs mpirun (or mlx.launch --backend mpi) to start millpond serve on every rank"
        )
    if config.tp < 2:
        if config.tp_backend != "auto":
            raise ConfigError(
                f"tp_backend: {config.tp_backend} needs two ranks or more; give tp, a hostfile, or start "
                "millpond serve with mlx.launch"
            )
        return None
    if config.tp_backend.startswith("jaccl"):
        raise ConfigError(f"tp_backend: {config.tp_backend} needs a hostfile that names the RDMA devices")
    hosts = Hostfile(hosts=(Host("", (LOOPBACK,)),) * config.tp)
    return _ours(config, hosts, config.tp_backend if config.tp_backend != "auto" else "ring", environ)


def _launched(config: ServeConfig, launch: LaunchedRank, secret: str) -> GroupLayout:
    if config.hostfile is not None:
        raise ConfigError(f"hostfile: is given to {launch.by}, which started this rank, not to millpond serve")
    if config.tp not in (0, launch.world):
        raise ConfigError(f"tp: must be {launch.world}, as many as {launch.by} started, or absent (got {config.tp})")
    if config.tp_backend not in ("auto", launch.backend):
        raise ConfigError(
            f"tp_backend: must be {launch.backend}, which {launch.by} chose, or absent (got {config.tp_backend})"
        )
    if not secret:
        raise ConfigError(
            f"tp_secret_file: ranks that {launch.by} started need a secret of {LEAST_SECRET} characters or more, the "
            "same for all; give a file with it, or set MILLPOND_TP_SECRET"
        )
    host = config.tp_host or launch.host
    if not host:
        raise ConfigError(
            f"tp_host: {launch.by} does not tell where rank 0 is; give an address that all ranks can reach"
        )
    return GroupLayout(
        hosts=(Host(""),) * launch.world,
        backend=launch.backend,
        host=host,
        port=config.tp_port or CONTROL_PORT,
        launch=launch,
        secret=secret,
        flags=config.of_the_engine,
        silence_seconds=config.tp_silence,
    )


def _listed(config: ServeConfig, environ: Mapping[str, str], names: frozenset[str]) -> GroupLayout:
    assert config.hostfile is not None
    hosts = read_hosts(config.hostfile)
    where = f"hostfile: {config.hostfile}"
    world = len(hosts.hosts)
    if config.tp not in (0, world):
        raise ConfigError(f"tp: must be {world}, as many as {config.hostfile} has hosts, or absent (got {config.tp})")
    if world < 2:
        raise ConfigError(f"{where}: hosts: one rank cannot share a model; name two hosts or more, or give no hostfile")
    backend = config.tp_backend if config.tp_backend != "auto" else hosts.backend or "ring"
    if backend == "mpi":
        raise ConfigError(f"{where}: backend: with mpi, start millpond serve on every rank with mlx.launch or mpirun")
    check(hosts, backend, where)
    # Rank 0 is here, whatever it is called; and so is whoever has the same name.
    here = names | {hosts.hosts[0].ssh}
    placed = tuple(Host("" if host.ssh in here else host.ssh, host.ips, host.rdma) for host in hosts.hosts)
    return _ours(config, Hostfile(placed, backend, hosts.envs), backend, environ)


def _ours(config: ServeConfig, hosts: Hostfile, backend: str, environ: Mapping[str, str]) -> GroupLayout:
    """A group whose ranks we start."""
    elsewhere = any(host.ssh for host in hosts.hosts)
    return GroupLayout(
        hosts=hosts.hosts,
        backend=backend,
        host=config.tp_host or hosts.hosts[0].ips[0],
        port=config.tp_port or (CONTROL_PORT if elsewhere else 0),
        envs=hosts.envs,
        devices=_devices(hosts.hosts, environ) if backend == "nccl" else (),
        silence_seconds=config.tp_silence,
    )


def _devices(hosts: Sequence[Host], environ: Mapping[str, str]) -> tuple[str, ...]:
    """A GPU for each rank, counted on each machine by itself. Raises ConfigError."""
    visible = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    found = []
    for rank, host in enumerate(hosts):
        place = sum(other.ssh == host.ssh for other in hosts[:rank])
        if visible and not host.ssh and place >= len(visible):
            raise ConfigError(
                f"CUDA_VISIBLE_DEVICES: has {len(visible)} devices, too few for the ranks on this machine"
            )
        found.append(visible[place] if visible and not host.ssh else str(place))
    return tuple(found)


def _given_secret(config: ServeConfig, environ: Mapping[str, str]) -> str:
    """What the user gave as a secret, in hex; empty where nothing was given. Raises ConfigError, which shows none."""
    name, secret = "MILLPOND_TP_SECRET", environ.get("MILLPOND_TP_SECRET", "")
    if config.tp_secret_file is not None:
        name = f"tp_secret_file: {config.tp_secret_file}"
        try:
            secret = config.tp_secret_file.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{name}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name}: must be text") from error
    elif "MILLPOND_TP_SECRET" not in environ:
        return ""
    secret = secret.strip()
    if len(secret) < LEAST_SECRET:
        raise ConfigError(f"{name}: must have {LEAST_SECRET} characters or more (got {len(secret)})")
    return hashlib.sha256(secret.encode()).hexdigest()
