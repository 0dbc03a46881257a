"""What mlx.launch and mpirun tell a process that they start: which rank it is, of how many, and where rank 0 is.

mlx.launch sets MLX_RANK and the variables of its backend; mpirun of Open MPI sets OMPI_COMM_WORLD_RANK and
OMPI_COMM_WORLD_SIZE. Pure, but for reading the files that the variables name; mlx is never imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from millpond.config import ConfigError


class LaunchedRank(msgspec.Struct, frozen=True):
    """This process's place in a group that somebody else starts."""

    rank: int
    world: int
    backend: str
    """As in a hostfile."""
    host: str
    """Where rank 0 is; empty when nothing tells."""
    by: str
    """Who started it, for people."""


def find_launch(environ: Mapping[str, str]) -> LaunchedRank | None:
    """None: nobody has started this process as a rank. Raises ConfigError for a place that makes no sense."""
    if "MLX_RANK" in environ:
        return _placed(_by_mlx(environ))
    if environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1":  # many a batch system starts everything under mpirun
        return _placed(_by_mpi(environ))
    return None


def _placed(launch: LaunchedRank) -> LaunchedRank:
    if launch.world < 2:
        raise ConfigError(
            f"{launch.by} started {launch.world} rank, which cannot share a model; give it more hosts, or start "
            "millpond serve without it"
        )
    if launch.rank >= launch.world:
        raise ConfigError(
            f"{launch.by} started {launch.world} ranks, and this is rank {launch.rank} (they count from 0)"
        )
    return launch


def _by_mlx(environ: Mapping[str, str]) -> LaunchedRank:
    rank = _number(environ, "MLX_RANK")
    if "MLX_JACCL_COORDINATOR" in environ:
        backend = "jaccl-ring" if environ.get("MLX_JACCL_RING", "0") not in ("", "0") else "jaccl"
        host = environ["MLX_JACCL_COORDINATOR"].rpartition(":")[0]
        return LaunchedRank(rank, len(_listed(environ, "MLX_IBV_DEVICES")), backend, host, "mlx.launch")
    if "NCCL_HOST_IP" in environ:
        world = _number(environ, "MLX_WORLD_SIZE")
        return LaunchedRank(rank, world, "nccl", environ["NCCL_HOST_IP"], "mlx.launch")
    if "MLX_HOSTFILE" in environ:
        nodes = _listed(environ, "MLX_HOSTFILE")
        first = nodes[0][0] if nodes and isinstance(nodes[0], list) and nodes[0] else ""
        return LaunchedRank(rank, max(1, len(nodes)), "ring", str(first).rpartition(":")[0], "mlx.launch")
    raise ConfigError(
        "MLX_RANK is set as if by mlx.launch, but MLX_HOSTFILE, MLX_JACCL_COORDINATOR and NCCL_HOST_IP are not; unset "
        "it to serve without other ranks"
    )


def _by_mpi(environ: Mapping[str, str]) -> LaunchedRank:
    rank, world = _number(environ, "OMPI_COMM_WORLD_RANK"), _number(environ, "OMPI_COMM_WORLD_SIZE")
    here = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(world)
    return LaunchedRank(rank, world, "mpi", "127.0.0.1" if here else "", "mpirun")


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    if not value.isascii() or not value.isdecimal() or len(value) > 6:
        raise ConfigError(f"{name}: must be a number from 0 (got {value!r})")
    return int(value)


def _listed(environ: Mapping[str, str], name: str) -> list[object]:
    """The list in the file that a variable names; empty for an empty file, which mlx.launch makes for a single host."""
    path = environ.get(name, "")
    try:
        content = Path(path).read_bytes().strip()
        found = msgspec.json.decode(content) if content else []
    except OSError as error:
        raise ConfigError(f"{name}: {path!r} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{name}: {path!r} is not JSON: {error}") from error
    if not isinstance(found, list):
        raise ConfigError(f"{name}: {path!r} must have a list with an entry per rank")
    return found
