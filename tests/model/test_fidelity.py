"""Greedy fidelity on real models: many prompts at once against mlx-lm's own generation of each alone (D4)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from engine_driver import Driver, assert_right, request
from tokenizers import Tokenizer

from millpond.model.opened import open_model
from millpond.types import UNPACKED, KvPacking, Request

ROOT = Path(__file__).parents[2]
TEXT = "\n\n".join((ROOT / name).read_text() for name in ("README.md", "docs/architecture.md", "CHANGELOG.md"))


def check(folder: Path, lengths: list[int], answer: int, packing: KvPacking = UNPACKED) -> None:
    """Prompts of these lengths join at different turns and leave at different lengths; each is then run alone."""
    opened = open_model(folder, packing=packing)
    encoding = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT * 3).ids
    prompts = {f"r{index}": encoding[index * 97 : index * 97 + length] for index, length in enumerate(lengths)}
    requests: list[Request] = [
        request(name, tokens, answer + 5 * (index % 3)) for index, (name, tokens) in enumerate(prompts.items())
    ]
    driven = Driver(opened.model, capabilities=opened.capabilities, max_batch=16)
    assert driven.capabilities.slots
    assert driven.capabilities.pipelined
    for one in requests[: len(requests) // 2]:
        driven.submit(one)
    driven.run(arrivals={3 + 4 * index: one for index, one in enumerate(requests[len(requests) // 2 :])})
    for one in requests:
        assert len(driven.outcomes[one.id].tokens) == one.params.max_tokens
        assert_right(opened.model, one.tokens, driven.outcomes[one.id].tokens)


@pytest.mark.models
def test_smollm2(smollm2_folder: Path) -> None:
    check(smollm2_folder, [5, 130, 17, 64, 65, 40], 6)


@pytest.mark.models
@pytest.mark.slow  # small models with windows are among the tests of the engine
def test_gemma3_past_its_window(gemma3_folder: Path) -> None:
    check(gemma3_folder, [5, 700, 505, 64], 12)


@pytest.mark.models
@pytest.mark.slow  # packed keys and values of SmolLM2 are also in the tests of ranks
@pytest.mark.parametrize("fixture", ["smollm2_folder", "gemma3_folder"])
def test_packed(fixture: str, request: pytest.FixtureRequest) -> None:
    """(I1) Against one sequence whose keys and values are packed at the same places."""
    lengths = [5, 530, 17, 64, 65, 40]
    check(request.getfixturevalue(fixture), lengths, 8, KvPacking(bits=8))


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.parametrize("fixture", ["smollm2_folder", "gemma3_folder"])
def test_sixteen_prompts(fixture: str, request: pytest.FixtureRequest) -> None:
    lengths = [5, 900, 6, 64, 65, 17, 300, 129, 512, 700, 33, 128, 250, 40, 511, 620]
    check(request.getfixturevalue(fixture), lengths, int(os.environ.get("MILLPOND_TEST_ANSWER", "16")))
