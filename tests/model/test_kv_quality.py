"""What packing costs in quality is measured, and what is published is what is measured (I2)."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
MODELS = ("SmolLM2 135M Instruct", "Gemma 3 270M")


def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kv_quality", ROOT / "benchmarks" / "kv_quality.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kv_quality"] = module
    spec.loader.exec_module(module)
    return module


def published() -> dict[str, dict[str, tuple[float, float]]]:
    """Mean divergence and perplexity by model and way of keeping keys and values."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    lines: dict[str, tuple[float, float]] = {}
    for line in (ROOT / "docs" / "kv-quality.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            lines = found.setdefault(line[3:], {})
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and re.match(r"\d", cells[1]):
            lines[cells[0]] = (float(cells[1].split()[0]), float(cells[4]))
    return found


@pytest.mark.parametrize("model", MODELS)
def test_every_way_of_packing_is_published(model: str) -> None:
    lines = published()[model]
    names = [way.name for way in bench().ways()[1:]]
    assert list(lines) == names
    exact = lines["full precision against itself"]
    assert exact[0] == 0.0
    int8, int4 = lines["int8, groups of 64"], lines["int4, groups of 64"]
    assert 0 < int8[0] < int4[0]
    assert abs(int8[1] / exact[1] - 1) < 0.02
    assert {f"{name}; within the prompt too" for name in ("int8, groups of 64", "int4, groups of 64")} <= set(lines)


@pytest.mark.slow
def test_what_is_published_is_what_is_measured(smollm2_folder: Path) -> None:
    """Two rows and 48 predictions each: near the figures of the whole text, and exactly none for full precision."""
    made = bench()
    chosen = made.ways()[:4]
    loaded = made.load(smollm2_folder, 0, lambda _: None)
    rows = made.rows_of("\n\n".join(made.topics.values()), made.Tokenizer.load(smollm2_folder), 2, 300 + 48 + 1)
    models = [made.kept_as(loaded, way.form) for way in chosen]
    tallies = made.measure(models, chosen, rows, 300)
    means = [float(sum(step.mean() for step in tally.divergence) / len(tally.divergence)) for tally in tallies]
    expected = published()[MODELS[0]]
    assert means[0] == means[1] == 0.0
    assert means[2] < 5 * expected["int8, groups of 64"][0]
    assert means[2] < means[3] < 5 * expected["int4, groups of 64"][0]
