"""Recipes in docs/how-to can be followed: what they change is there as they show it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEP = re.compile(r"^\d+\. .*?(?=^\d+\. |\Z)", re.MULTILINE | re.DOTALL)
DIFF = re.compile(r"^   ```diff\n(.*?)^   ```", re.MULTILINE | re.DOTALL)


def hunks(step: str) -> list[list[str]]:
    """The lines of each, with their first column: kept, taken away or added."""
    parts = [part for diff in DIFF.findall(step) for part in diff.split("   @@\n")]
    return [[line[3:] for line in part.splitlines()] for part in parts]


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("docs/how-to/*.md")), ids=lambda path: path.stem)
def test_what_a_recipe_changes_is_there(recipe: Path) -> None:
    for step in STEP.findall(recipe.read_text()):
        for lines in hunks(step):
            file = ROOT / re.findall(r"`([^`\n]+/[^`\n]+|pyproject\.toml)`", step)[0]
            before = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
            assert file.read_text().count(before) == 1, f"{recipe.name}: {file.name} has changed; it has not\n{before}"
