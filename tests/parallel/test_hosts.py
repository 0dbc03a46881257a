"""Hostfiles, what mlx.launch and mpirun leave in the environment, and what each rank is told; nothing is started."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.cli.group import layout_of
from millpond.config import ConfigError, read_config
from millpond.launch.hosts import BACKENDS, Host, Hostfile, check, parse_hosts
from millpond.launch.launched import LaunchedRank, find_launch
from millpond.launch.layout import CONTROL_PORT, GroupLayout

if TYPE_CHECKING:
    from millpond.types import GroupSettings

SECRET = {"MILLPOND_TP_SECRET": "a secret of the group"}
MACS = [
    {"ssh": "mac1.local", "ips": ["10.0.0.1"], "rdma": [None, "rdma_en2", ["rdma_en3", "rdma_en4"]]},
    {"ssh": "mac2.local", "ips": ["10.0.0.2"], "rdma": ["rdma_en2", None, "rdma_en4"]},
    {"ssh": "me@mac3", "ips": ["10.0.0.3"], "rdma": ["rdma_en3", "rdma_en4", None]},
]


def parse(data: object) -> Hostfile:
    return parse_hosts(json.dumps(data).encode(), "hosts.json")


def laid_out(flags: dict[str, str], environ: dict[str, str] | None = None) -> GroupLayout | None:
    return layout_of(read_config(flags, {}), environ or {})


def asked_for(flags: dict[str, str], environ: dict[str, str] | None = None) -> GroupLayout:
    layout = laid_out(flags, environ)
    assert layout is not None
    return layout


def told(layout: GroupLayout, ports: tuple[int, ...] = (5001, 5002, 5003, 5004)) -> list[GroupSettings]:
    return layout.settings(4000, ports, "ab" * 32, dict.fromkeys(range(layout.world), "model"))


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    """The three Macs; what they talk over is left to the test."""
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps({"envs": ["MLX_METAL_FAST_SYNCH=1", "EMPTY="], "hosts": MACS}))
    return path


# --- the file ---------------------------------------------------------------------------------------------------


def test_a_hostfile_of_mlx_is_understood() -> None:
    """The example of its own documentation, both ways to write it."""
    found = parse({"backend": "jaccl", "envs": ["A=1=2"], "hosts": MACS})
    assert (found.backend, found.envs) == ("jaccl", {"A": "1=2"})
    assert found.hosts[0] == Host("mac1.local", ("10.0.0.1",), (None, "rdma_en2", ("rdma_en3", "rdma_en4")))
    assert parse(MACS).hosts == found.hosts
    assert parse([{"ssh": "a"}, {"ssh": "127.0.0.1", "more": {}}]).hosts == (Host("a"), Host("127.0.0.1"))


def test_a_hostfile_that_mlx_wrote_is_understood() -> None:
    common = pytest.importorskip("mlx._distributed_utils.common")
    hosts = [common.Host(n, mac["ssh"], mac["ips"], mac["rdma"]) for n, mac in enumerate(MACS)]
    written = common.Hostfile(hosts, "jaccl-ring", ["A=b"]).to_json()
    assert parse(written) == parse({"backend": "jaccl-ring", "envs": ["A=b"], "hosts": MACS})


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (3, "hosts: must be a list with one entry per rank (got 3)"),
        ({}, "hosts: is missing"),
        ([], "hosts: must have 1 to 64 entries (got 0)"),
        ([{"ssh": "a"}] * 65, "(got 65)"),
        ([{"ssh": "a"}, "b"], 'hosts[1]: must be an object such as {"ssh": "mac1", "ips": []} (got "b")'),
        ([{"ips": []}], "hosts[0].ssh: must be the name of a machine, as ssh is told it (got nothing)"),
        ([{"ssh": "-oProxyCommand=x"}], "hosts[0].ssh: must be the name"),
        ([{"ssh": "a b"}], "hosts[0].ssh: must be the name"),
        ([{"ssh": "a", "ips": "10.0.0.1"}], "hosts[0].ips: must be a list"),
        ([{"ssh": "a", "ips": ["10.0.0.1", "fe80::1"]}], "hosts[0].ips[1]: must be an IPv4 address"),
        ([{"ssh": "a", "rdma": [3]}], "hosts[0].rdma[0]: must be the name of a device"),
        ([{"ssh": "a", "rdma": [[]]}], "hosts[0].rdma[0]: must be the name of a device"),
        ({"hosts": [{"ssh": "a"}], "backend": "smoke"}, "backend: must be ring, jaccl, jaccl-ring, nccl, mpi"),
        ({"hosts": [{"ssh": "a"}], "envs": {"A": 1}}, "envs: must be a list"),
        ({"hosts": [{"ssh": "a"}], "envs": ["A-B=1"]}, "envs[0]: must be like NAME=VALUE"),
    ],
)
def test_the_entry_that_is_wrong_is_named(data: object, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(data)
    assert str(refused.value).startswith("hosts.json: ")
    assert says in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"NaN", b"not json"])
def test_what_is_not_json_is_refused(content: bytes) -> None:
    with pytest.raises(ConfigError, match=r"^x: is not JSON"):
        parse_hosts(content, "x")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "ssh": st.sampled_from(["a", "b.local", "-x", ""]) | anything,
        "ips": st.lists(st.sampled_from(["10.0.0.1", "::1", "mac"]) | anything, max_size=2) | anything,
        "rdma": st.lists(st.none() | st.just("en1") | anything, max_size=3) | anything,
    },
)
hostfiles = anything | st.fixed_dictionaries(
    {"hosts": st.lists(entries | anything, max_size=3)},
    optional={
        "backend": st.sampled_from(BACKENDS) | anything,
        "envs": st.lists(st.sampled_from(["A=1", "=", "A"]) | anything, max_size=2) | anything,
    },
)


@settings(max_examples=400, deadline=None)
@given(hostfiles | st.lists(entries, max_size=4), st.sampled_from(BACKENDS))
def test_any_json_is_hosts_or_a_config_error(data: object, backend: str) -> None:
    """And whatever was understood can be checked for any backend, and laid out."""
    try:
        found = parse(data)
        check(found, backend, "hosts.json")
    except ConfigError:
        return
    layout = GroupLayout(
        hosts=found.hosts, backend=backend, host="a", port=0, envs=found.envs, devices=("0",) * len(found.hosts)
    )
    ports = tuple(range(5000, 5000 + len(layout.addresses)))
    for rank, each in enumerate(told(layout, ports=ports)):
        assert msgspec.json.decode(msgspec.json.encode(each), type=type(each)) == each
        assert (each.rank, each.environment["MLX_RANK"]) == (rank, str(rank))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_hosts_or_a_config_error(content: bytes) -> None:
    with contextlib.suppress(ConfigError):
        parse_hosts(content, "x")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path, says in ((tmp_path / "none.json", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=f"^hostfile: {path}: cannot be read: {says}"):
            asked_for({"hostfile": str(path)})
    (tmp_path / "large.json").write_bytes(b" " * 1_048_577)
    with pytest.raises(ConfigError, match="is it another file"):
        asked_for({"hostfile": str(tmp_path / "large.json")})


# --- what ranks are told ------------------------------------------------------------------------------------------


def test_ring(hostfile: Path) -> None:
    """tp_backend, tp_port, tp_host, tp_silence: as mlx.launch --backend ring tells them."""
    layout = asked_for({"hostfile": str(hostfile), "tp_silence": "7s"})
    assert (layout.backend, layout.host, layout.port) == ("ring", "10.0.0.1", CONTROL_PORT)
    assert layout.fixed_ports == (CONTROL_PORT + 1, CONTROL_PORT + 2, CONTROL_PORT + 3)
    assert (layout.followers_here, layout.followers_elsewhere) == ((), (1, 2))
    first, second, third = told(layout)
    assert (first.rank, first.world, first.backend, first.host, first.port) == (0, 3, "ring", "10.0.0.1", 4000)
    assert second.environment == {"MLX_METAL_FAST_SYNCH": "1", "EMPTY": "", "MLX_RANK": "1"}
    assert third.files == {"MLX_HOSTFILE": '[["10.0.0.1:5001"],["10.0.0.2:5002"],["10.0.0.3:5003"]]'}
    assert third.silence_seconds == 7.0
    moved = asked_for({"hostfile": str(hostfile), "tp_port": "40000", "tp_host": "mac1.lan"})
    assert (moved.host, moved.port, moved.fixed_ports) == ("mac1.lan", 40000, (40001, 40002, 40003))


@pytest.mark.parametrize("backend", ["jaccl", "jaccl-ring"])
def test_jaccl(hostfile: Path, backend: str) -> None:
    layout = asked_for({"hostfile": str(hostfile), "tp_backend": backend})
    assert layout.fixed_ports == (CONTROL_PORT + 1,)
    second = told(layout)[1]
    assert second.backend == "jaccl"
    assert second.environment["MLX_JACCL_COORDINATOR"] == "10.0.0.1:5001"
    assert second.environment.get("MLX_JACCL_RING") == ("1" if backend == "jaccl-ring" else None)
    assert json.loads(second.files["MLX_IBV_DEVICES"]) == [mac["rdma"] for mac in MACS]


def test_nccl(tmp_path: Path) -> None:
    """A GPU for each rank, counted machine by machine; those that are visible, where somebody has said which."""
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([{"ssh": name, "ips": ["10.0.0.1"]} for name in ("a", "a", "b", "a")]))
    layout = asked_for({"hostfile": str(hosts), "tp_backend": "nccl"})
    assert [each.environment["CUDA_VISIBLE_DEVICES"] for each in told(layout)] == ["0", "1", "0", "2"]
    assert told(layout)[2].environment | {"CUDA_VISIBLE_DEVICES": ""} == {
        "MLX_RANK": "2",
        "NCCL_HOST_IP": "10.0.0.1",
        "NCCL_PORT": "5001",
        "MLX_WORLD_SIZE": "4",
        "CUDA_VISIBLE_DEVICES": "",
    }
    here = asked_for({"tp": "2", "tp_backend": "nccl"}, {"CUDA_VISIBLE_DEVICES": "3, GPU-x"})
    assert [each.environment["CUDA_VISIBLE_DEVICES"] for each in told(here)] == ["3", "GPU-x"]
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES: has 1 devices"):
        asked_for({"tp": "2", "tp_backend": "nccl"}, {"CUDA_VISIBLE_DEVICES": "3"})


def test_ranks_on_this_machine() -> None:
    """tp: all here, any free port."""
    layout = asked_for({"tp": "2"})
    assert (layout.world, layout.backend, layout.host, layout.port, layout.fixed_ports) == (
        2,
        "ring",
        "127.0.0.1",
        0,
        None,
    )
    assert layout.addresses == ("127.0.0.1", "127.0.0.1")
    assert (layout.followers_here, layout.followers_elsewhere) == ((1,), ())


@pytest.mark.parametrize("flags", [{}, {"tp": "1"}, {"tp": "0"}])
def test_no_group_unless_asked(flags: dict[str, str]) -> None:
    assert laid_out(flags) is None


def test_the_backend_of_the_hostfile_counts_unless_another_is_asked_for(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps({"backend": "jaccl", "hosts": MACS}))
    assert asked_for({"hostfile": str(hosts)}).backend == "jaccl"
    assert asked_for({"hostfile": str(hosts), "tp_backend": "ring"}).backend == "ring"


def hosts_with(rank: int, **changed: object) -> list[dict[str, object]]:
    return [{**mac, **changed} if number == rank else dict(mac) for number, mac in enumerate(MACS)]


@pytest.mark.parametrize(
    ("hosts", "flags", "says"),
    [
        (MACS, {"tp": "2"}, "tp: must be 3, as many as .* has hosts, or absent .got 2."),
        (MACS, {"tp": "1"}, "tp: must be 3"),
        (MACS[:1], {}, "hosts: one rank cannot share a model"),
        (hosts_with(1, ips=[]), {}, r"hosts\[1\]\.ips: the ring backend needs at least one address"),
        (hosts_with(1, ips=["10.0.0.2", "10.0.1.2"]), {}, r"hosts\[1\]\.ips: .* as many .* \(got 2\)"),
        (hosts_with(2, rdma=[None]), {"tp_backend": "jaccl"}, r"hosts\[2\]\.rdma: .* 3 \(got 1\)"),
        (hosts_with(1, rdma=["x"] * 3), {"tp_backend": "jaccl"}, r"hosts\[1\]\.rdma\[1\]: must be null"),
        (hosts_with(1, rdma=["x", None, None]), {"tp_backend": "jaccl"}, r"hosts\[1\]\.rdma\[2\]: no device"),
        (hosts_with(0, ips=[]), {"tp_backend": "jaccl"}, r"hosts\[0\]\.ips: rank 0 needs an address"),
        (hosts_with(0, ips=[]), {"tp_backend": "nccl"}, r"hosts\[0\]\.ips: rank 0 needs an address"),
        (MACS, {"tp_backend": "mpi"}, "with mpi, start millpond serve on every rank"),
    ],
)
def test_a_group_that_cannot_work_is_refused(
    tmp_path: Path, hosts: list[dict[str, object]], flags: dict[str, str], says: str
) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps(hosts))
    with pytest.raises(ConfigError, match=says):
        asked_for({"hostfile": str(path), **flags})


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"tp_backend": "ring"}, "tp_backend: ring needs two ranks or more"),
        ({"tp": "1", "tp_backend": "nccl"}, "tp_backend: nccl needs two ranks or more"),
        ({"tp": "2", "tp_backend": "jaccl"}, "tp_backend: jaccl needs a hostfile"),
        ({"tp": "2", "tp_backend": "mpi"}, "tp_backend: mpi needs mpirun"),
    ],
)
def test_a_mode_that_nothing_starts_is_refused(flags: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        laid_out(flags)


# --- started by somebody else -------------------------------------------------------------------------------------


@pytest.fixture
def by_mlx(tmp_path: Path) -> dict[str, str]:
    """What mlx.launch --backend ring sets for rank 1 of 2."""
    file = tmp_path / "ring.json"
    file.write_text('[["10.0.0.1:32323"], ["10.0.0.2:32324"]]\n')
    return {"MLX_RANK": "1", "MLX_HOSTFILE": str(file)}


def test_ranks_of_mlx_launch(by_mlx: dict[str, str], tmp_path: Path) -> None:
    assert find_launch(by_mlx) == LaunchedRank(1, 2, "ring", "10.0.0.1", "mlx.launch")
    devices = tmp_path / "devices.json"
    devices.write_text('[[null, "a"], ["a", null]]')
    jaccl = {"MLX_RANK": "0", "MLX_JACCL_COORDINATOR": "10.0.0.1:32323", "MLX_IBV_DEVICES": str(devices)}
    assert find_launch(jaccl) == LaunchedRank(0, 2, "jaccl", "10.0.0.1", "mlx.launch")
    assert find_launch({**jaccl, "MLX_JACCL_RING": "1"}) == LaunchedRank(0, 2, "jaccl-ring", "10.0.0.1", "mlx.launch")
    nccl = {"MLX_RANK": "2", "NCCL_HOST_IP": "10.0.0.9", "NCCL_PORT": "1", "MLX_WORLD_SIZE": "4"}
    assert find_launch(nccl) == LaunchedRank(2, 4, "nccl", "10.0.0.9", "mlx.launch")
    assert find_launch({}) is None


def test_ranks_of_mpirun() -> None:
    """mpi is left to mpirun, and an mpirun of a single process means nothing."""
    environ = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert find_launch(environ) == LaunchedRank(3, 4, "mpi", "127.0.0.1", "mpirun")
    assert find_launch({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}) is None
    layout = asked_for({"tp_backend": "mpi", "tp": "4"}, {**environ, **SECRET})
    assert (layout.backend, layout.restarts, layout.addresses) == ("mpi", False, ())
    apart = {**environ, **SECRET, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(ConfigError, match="tp_host: mpirun does not tell where rank 0 is"):
        asked_for({}, apart)
    assert asked_for({"tp_host": "node1"}, apart).host == "node1"


def test_a_launched_rank_knows_where_rank_0_is(by_mlx: dict[str, str]) -> None:
    layout = asked_for({"tp": "2"}, {**by_mlx, **SECRET})
    assert layout.launch is not None
    assert (layout.launch.rank, layout.world, layout.host, layout.port) == (1, 2, "10.0.0.1", CONTROL_PORT)
    assert (layout.followers_here, layout.followers_elsewhere, layout.addresses) == ((), (), ())
    assert (told(layout)[1].environment, told(layout)[1].files) == ({}, {})


def test_a_launched_rank_tells_what_it_was_given_for_the_engine(by_mlx: dict[str, str]) -> None:
    """Each has flags of its own then; ranks that we start have none. What concerns HTTP or folders may differ."""
    given = [
        told(asked_for(settings, {**by_mlx, **SECRET}))[1].flags
        for settings in ({}, {"port": "1", "cache_dir": "/elsewhere"}, {"kv_bits": "8"}, {"max_batch": "4"})
    ]
    assert given[0] == given[1]
    assert {name for name in given[0] if given[2][name] != given[0][name]} == {"kv_bits"}
    assert {name for name in given[0] if given[3][name] != given[0][name]} == {"max_batch"}
    assert told(asked_for({"tp": "2"}, {}))[1].flags == {}


def test_secrets_of_launched_ranks(by_mlx: dict[str, str], tmp_path: Path) -> None:
    """tp_secret_file or MILLPOND_TP_SECRET; none that is short, and none in a message."""
    file = tmp_path / "secret"
    file.write_text("a secret of the group\n")
    given_by_file = asked_for({"tp_secret_file": str(file)}, by_mlx).secret
    assert given_by_file == asked_for({}, {**by_mlx, **SECRET}).secret
    assert len(bytes.fromhex(given_by_file)) == 32
    assert given_by_file != asked_for({}, {**by_mlx, "MILLPOND_TP_SECRET": "another secret of it"}).secret
    with pytest.raises(ConfigError, match=r"tp_secret_file: ranks that mlx\.launch started need a secret"):
        asked_for({}, by_mlx)
    file.write_text("  too short  \n")
    with pytest.raises(ConfigError, match=r"must have 16 characters or more \(got 9\)") as refused:
        asked_for({"tp_secret_file": str(file)}, by_mlx)
    assert "too short" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"MILLPOND_TP_SECRET: must have 16 characters or more \(got 0\)"):
        asked_for({}, {**by_mlx, "MILLPOND_TP_SECRET": ""})
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        asked_for({"tp_secret_file": str(tmp_path / "none")}, by_mlx)


def test_ranks_that_we_start_get_secrets_of_their_own() -> None:
    assert asked_for({"tp": "2"}, SECRET).secret == ""


@pytest.mark.parametrize(
    ("flags", "environ", "says"),
    [
        ({"tp": "3"}, {}, "tp: must be 2, as many as mlx.launch started"),
        ({"tp_backend": "jaccl"}, {}, "tp_backend: must be ring, which mlx.launch chose"),
        ({"hostfile": "/hosts.json"}, {}, "hostfile: is given to mlx.launch"),
        ({}, {"MLX_RANK": "2"}, "mlx.launch started 2 ranks, and this is rank 2"),
        ({}, {"MLX_RANK": "-1"}, "MLX_RANK: must be a number from 0"),
        ({}, {"MLX_HOSTFILE": "/no/such/file"}, "MLX_HOSTFILE: '/no/such/file' cannot be read"),
        ({}, {"MLX_HOSTFILE": "/dev/null", "MLX_RANK": "0"}, "mlx.launch started 1 rank, which cannot share"),
        ({}, {"NCCL_HOST_IP": "a", "MLX_WORLD_SIZE": "x"}, "MLX_WORLD_SIZE: must be a number"),
    ],
)
def test_launches_that_make_no_sense(
    by_mlx: dict[str, str], flags: dict[str, str], environ: dict[str, str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        asked_for(flags, {**by_mlx, **SECRET, **environ})


def test_a_rank_without_its_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"MLX_RANK is set as if by mlx\.launch"):
        asked_for({}, {"MLX_RANK": "0"})
    broken = tmp_path / "broken.json"
    for content, says in (("{", "is not JSON"), ("{}", "must have a list with an entry per rank")):
        broken.write_text(content)
        with pytest.raises(ConfigError, match=says):
            asked_for({}, {"MLX_RANK": "0", "MLX_HOSTFILE": str(broken)})
