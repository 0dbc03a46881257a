from __future__ import annotations

import re
from pathlib import Path

import pytest
from architectures import folders, found, page
from architectures.__main__ import tried

ROOT = Path(__file__).parent.parent
LEAST = 118
"""Modules of mlx-lm that run in the batch, on a GPU and on a CPU."""


def test_every_module_of_mlx_lm_has_been_tried() -> None:
    assert folders.unknown() == [], "make coverage ARGS=--new tries them; add them to tests/architectures/models.toml"
    tried_names = {(report.name, report.gpu) for report in found.read().reports}
    assert tried_names == {(name, gpu) for name in folders.names() for gpu in (True, False)}


def test_the_page_is_what_would_be_written() -> None:
    assert page.PAGE.read_text() == page.written(found.read())


def test_no_answer_was_wrong() -> None:
    assert [(report.name, report.wrong) for report in found.read().reports if report.wrong] == []


def test_nearly_all_run_in_the_batch() -> None:
    assert page.counts(found.read())["batched"] >= LEAST


def test_the_readme_has_the_counts() -> None:
    counts = page.counts(found.read())
    said = f"{counts['batched']} of mlx-lm {found.read().mlx_lm}'s {counts['modules']} architectures"
    assert said in re.sub(r"\s+", " ", (ROOT / "README.md").read_text())


@pytest.mark.parametrize("device", ["gpu", "cpu"])
@pytest.mark.parametrize(
    "name", ["llama@sliding", "gemma4", "qwen3_5", "deepseek_v32", "recurrent_gemma", "nemotron-nas"]
)
@pytest.mark.often("llama@sliding-cpu")
def test_what_was_found_is_still_so(name: str, device: str) -> None:
    known = next(one for one in found.read().reports if (one.name, one.gpu) == (name, device == "gpu"))
    again = tried(name, device)
    assert not again.wrong
    assert (again.solo, again.forward_only, again.uncached, again.unpacked) == (
        known.solo,
        known.forward_only,
        known.uncached,
        known.unpacked,
    )


def test_a_module_that_nobody_has_described_is_tried_with_what_others_have() -> None:
    config = folders.guessed("llama")
    assert {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"} <= set(config)
    assert "model_type" not in config
