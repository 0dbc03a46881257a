"""How long the SSD tier stays away from a disk that fails."""

from __future__ import annotations

import errno
import time

import pytest

from millpond.prefix.disk.backoff import BACKOFF_SECONDS, Backoff
from millpond.prefix.disk.stats import Tally


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), OSError(errno.ENOSPC, "No space left")])
def test_a_disk_that_goes_on_failing_is_tried_for_ever(error: OSError) -> None:
    """(F7) After ever longer pauses, up to the longest; once something was written the next failure is the first."""
    pause = Backoff(Tally())
    for _ in range(2):
        waits = []
        for _ in range(3 * len(BACKOFF_SECONDS)):
            begun = time.monotonic()
            assert pause.begin(error)
            assert pause.active
            assert pause.reason
            waits.append(pause.until - begun)
            pause.end()
            assert not pause.active
        assert waits == pytest.approx([*BACKOFF_SECONDS, *BACKOFF_SECONDS[-1:] * (2 * len(BACKOFF_SECONDS))], abs=0.5)
        pause.succeeded()
