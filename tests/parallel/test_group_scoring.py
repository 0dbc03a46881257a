"""Two ranks score prompts and make vectors of them as one does (M8, M9): all read the same chunks in the same order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from embedding_model import declare
from engine_driver import Outcome, request
from group_driver import Group
from msgspec.structs import replace
from tiny_models import prompt, save

from millpond.types import Request

CLOSE = 2e-4


def requests(tag: str) -> list[Request]:
    """All kinds, side by side, and prompts of more than one chunk."""
    made = []
    for number, length in enumerate((1, 63, 64, 300)):
        made.append(request(f"{tag}-answer{number}", prompt(length, 1), 6))
        made.append(request(f"{tag}-scored{number}", prompt(length, 2), 3, prompt_logprobs=2))
        tokens = prompt(length, 3)
        made.append(replace(request(f"{tag}-vector{number}", [*tokens, tokens[-1]], 1), pooled=True))
    return made


def found(folder: Path, world: int, home: Path) -> list[Outcome]:
    with Group(folder, world, home, prefill_chunk=128) as group:
        info = group.ready()
        assert info.embedding_size == 64
        first = list(group.answers(requests("first")).values())
        again = list(group.answers(requests("again")).values())  # behind what is cached by now
        assert group.stop() == [0] * world
    return [*first, *again]


def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    folder = declare(save("llama", tmp_path / "model"), "mean_tokens")
    alone, together = found(folder, 1, tmp_path / "one"), found(folder, 2, tmp_path / "two")
    vectors = 0
    for one, two in zip(alone, together, strict=True):
        assert one.tokens == two.tokens
        assert [scored.token for scored in one.prompt_logprobs] == [scored.token for scored in two.prompt_logprobs]
        for mine, other in zip(one.prompt_logprobs, two.prompt_logprobs, strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=CLOSE)
        assert (one.embedding is None) == (two.embedding is None)
        if one.embedding is not None and two.embedding is not None:
            vectors += 1
            ours, theirs = (np.frombuffer(each, "<f4") for each in (one.embedding, two.embedding))
            assert float(ours @ theirs) > 1 - 1e-5
    assert vectors == 8
    assert sum(bool(one.prompt_logprobs) for one in alone) == 6  # a prompt of one token has none
