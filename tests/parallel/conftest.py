"""What tests of ranks share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from channel_middle import SIDES, Middle, Side, middle


@pytest.fixture
def tapped() -> Iterator[Middle]:
    """The handshake is done; frames pass through our hands."""
    with middle() as between:
        between.handshake()
        yield between


@pytest.fixture(params=SIDES)
def side(request: pytest.FixtureRequest) -> Side:
    return "leader" if request.param == "leader" else "follower"
