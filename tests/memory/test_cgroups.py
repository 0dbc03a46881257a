"""(A6) Limits of memory and CPUs, as control groups of every layout set them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from millpond.child import python
from millpond.memory.cgroups import ControlGroups

GIB = 2**30
UNLIMITED = "9223372036854771712"


def groups(tmp_path: Path, cgroup: str, mounts: Mapping[str, str], files: Mapping[str, str]) -> ControlGroups:
    """``mounts``: mount point below the test's /sys -> ``root type options``; ``files`` below /sys, too."""
    proc, system = tmp_path / "proc", tmp_path / "sys fs"
    proc.mkdir()
    (proc / "cgroup").write_text(cgroup)
    lines = ["22 1 0:21 / /proc rw,nosuid shared:5 - proc proc rw"]
    for point, described in mounts.items():
        root, kind, options = described.split()
        place = str(system / point).replace(" ", "\\040")
        lines.append(f"30 23 0:26 {root} {place} rw,nosuid shared:9 master:1 - {kind} {kind} {options}")
    (proc / "mountinfo").write_text("\n".join(lines) + "\n")
    for name, content in files.items():
        file = system / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    return ControlGroups.own(proc)


V2 = {"cgroup": "/ cgroup2 rw,nsdelegate"}
V1 = {
    "cgroup/memory": "/ cgroup rw,memory",
    "cgroup/cpu,cpuacct": "/ cgroup rw,cpu,cpuacct",
    "cgroup/systemd": "/ cgroup rw,xattr,name=systemd",
}
V1_GROUPS = "9:memory:/system.slice/millpond.service\n4:cpu,cpuacct:/system.slice\n1:name=systemd:/x\n0::/x\n"


@pytest.mark.parametrize(
    ("files", "memory", "cpus"),
    [
        ({}, None, None),
        ({"a/b/memory.max": "max", "a/b/cpu.max": "max 100000"}, None, None),
        ({"a/b/memory.max": f"{3 * GIB}", "a/b/cpu.max": "150000 100000"}, 3 * GIB, 1.5),
        ({"a/b/memory.high": f"{2 * GIB}", "a/b/memory.max": f"{3 * GIB}"}, 2 * GIB, None),
        ({"a/b/memory.max": f"{3 * GIB}", "a/memory.max": f"{GIB}", "a/cpu.max": "50000 100000"}, GIB, 0.5),
        ({"memory.max": f"{GIB}", "a/memory.max": "max", "other/memory.max": "1", "a/b/c/memory.max": "1"}, GIB, None),
        ({"a/b/memory.max": "nonsense", "a/b/cpu.max": "1"}, None, None),
    ],
)
def test_version_2(tmp_path: Path, files: Mapping[str, str], memory: int | None, cpus: float | None) -> None:
    """The group's own limit and those of all above it; neither siblings' nor children's."""
    found = groups(tmp_path, "0::/a/b\n", V2, {f"cgroup/{name}": content for name, content in files.items()})
    assert (found.memory_limit(), found.cpu_limit()) == (memory, cpus)


def test_version_1(tmp_path: Path) -> None:
    files = {
        "cgroup/memory/memory.limit_in_bytes": UNLIMITED,
        "cgroup/memory/system.slice/memory.limit_in_bytes": f"{4 * GIB}",
        "cgroup/memory/system.slice/millpond.service/memory.limit_in_bytes": f"{2 * GIB}",
        "cgroup/cpu,cpuacct/system.slice/cpu.cfs_quota_us": "300000",
        "cgroup/cpu,cpuacct/system.slice/cpu.cfs_period_us": "100000",
        "cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        "cgroup/systemd/x/memory.limit_in_bytes": "1",
    }
    found = groups(tmp_path, V1_GROUPS, V1, {**files, "cgroup/systemd/x/memory.limit_in_bytes": f"{3 * GIB}"})
    assert (found.memory_limit(), found.cpu_limit()) == (2 * GIB, 3.0)


def test_both_versions_side_by_side(tmp_path: Path) -> None:
    """Memory by version 1, CPUs by version 2."""
    mounts = {**V1, "cgroup/unified": "/ cgroup2 rw"}
    files = {
        "cgroup/memory/system.slice/millpond.service/memory.limit_in_bytes": f"{2 * GIB}",
        "cgroup/unified/x/cpu.max": "200000 100000",
    }
    found = groups(tmp_path, V1_GROUPS, mounts, files)
    assert (found.memory_limit(), found.cpu_limit()) == (2 * GIB, 2.0)


@pytest.mark.parametrize(
    ("path", "root"),
    [("/", "/"), ("/docker/1f", "/docker/1f"), ("/", "/docker/1f"), ("/../../x", "/"), ("/elsewhere", "/docker/1f")],
)
def test_in_a_container_the_mounted_root_counts(tmp_path: Path, path: str, root: str) -> None:
    """With a namespace of its own or without, and when the path makes no sense inside."""
    mounts = {"cgroup/memory": f"{root} cgroup rw,memory"}
    found = groups(tmp_path, f"3:memory:{path}\n", mounts, {"cgroup/memory/memory.limit_in_bytes": f"{GIB}"})
    assert found.memory_limit() == GIB


def test_a_group_within_a_containers(tmp_path: Path) -> None:
    files = {"cgroup/memory.max": f"{2 * GIB}", "cgroup/inner/memory.max": f"{GIB}"}
    found = groups(tmp_path, "0::/docker/1f/inner\n", {"cgroup": "/docker/1f cgroup2 rw"}, files)
    assert found.memory_limit() == GIB


def test_what_is_left(tmp_path: Path) -> None:
    """The least of all levels; cached files count as free."""
    files = {
        "cgroup/a/memory.max": "1000",
        "cgroup/a/memory.current": "700",
        "cgroup/a/memory.stat": "anon 400\ninactive_file 250",
        "cgroup/memory.max": "2000",
        "cgroup/memory.current": "1900",
    }
    assert groups(tmp_path, "0::/a\n", V2, files).memory_left() == 100


def test_a_system_without_groups(tmp_path: Path) -> None:
    found = ControlGroups.own(tmp_path)
    assert (found.memory_limit(), found.memory_left(), found.cpu_limit()) == (None, None, None)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root makes control groups, on Linux")
def test_a_real_group() -> None:
    version_2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    group = Path("/sys/fs/cgroup" if version_2 else "/sys/fs/cgroup/memory") / f"millpond-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.max" if version_2 else "memory.limit_in_bytes")).write_text("1500000000")
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error.strerror}")
    try:
        program = (
            f"import os, pathlib; pathlib.Path({str(group / 'cgroup.procs')!r}).write_text(str(os.getpid()))\n"
            "from millpond.memory.machine import total_memory; print(total_memory())"
        )
        done = subprocess.run(python("-c", program), capture_output=True, text=True, check=True)
        assert 1_400_000_000 < int(done.stdout) <= 1_500_000_000
    finally:
        group.rmdir()
