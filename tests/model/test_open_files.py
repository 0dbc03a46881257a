"""(A6) The limit of open files is the administrator's: importing mlx-lm neither lowers it nor needs a high one."""

from __future__ import annotations

import resource
import subprocess

import pytest

from millpond.child import python

PROGRAM = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
before = resource.setrlimit
import millpond.model.upstream
assert resource.setrlimit is before
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.often("before0")
@pytest.mark.parametrize(
    ("before", "after"), [((256, 1024), (1024, 1024)), ((256, 5000), (2048, 5000)), ((3000, 5000), (3000, 5000))]
)
def test_it_is_kept_and_used(before: tuple[int, int], after: tuple[int, int]) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < before[1]:
        pytest.skip("few open files are allowed here")
    done = subprocess.run(python("-c", PROGRAM, *map(str, before)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert tuple(map(int, done.stdout.split())) == after


def test_the_tests_own_processes_keep_it_too() -> None:
    """What a test imports from mlx-lm itself would take it from every server that a later test starts."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, 4096))
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] == before[1]
