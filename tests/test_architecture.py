"""The pictures in docs/architecture.md show the packages that exist, what they import, and modules that exist; and no
name stands for two things."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent
CODE = ROOT / "millpond"
HOUSE, WAY = re.findall(r"```mermaid\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.DOTALL)
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
MEND = "docs/architecture.md, first picture: "
Arrows = set[tuple[str, str]]


def drawn() -> Arrows:
    found: Arrows = set()
    for line in HOUSE.splitlines():
        ends = [part.replace(" ", "").split("&") for part in line.split("-->")]
        found |= {(a, b) for before, after in pairwise(ends) for a in before for b in after}
    return found


def imported(shown: set[str]) -> Arrows:
    """What the modules of the picture import of one another, anywhere in them."""
    found: Arrows = set()
    for file in CODE.rglob("*.py"):
        importer = file.relative_to(CODE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "millpond":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {(importer, name.split(".")[1]) for name in names}
    return {(a, b) for a, b in found if a != b and {a, b} <= shown}


def shown() -> set[str]:
    alone = set(re.findall(r"^ +(\w+)$", HOUSE, re.MULTILINE)) - {"end"}
    return alone.union(*drawn())


def test_every_package_is_in_the_picture_and_nothing_else() -> None:
    packages = {file.parent.name for file in CODE.glob("*/__init__.py")}
    assert not packages - shown(), f"{MEND}add them"
    assert not shown() - packages - {file.stem for file in CODE.glob("*.py")}, f"{MEND}take away what does not exist"


def test_arrows_are_imports_and_imports_are_arrows() -> None:
    arrows, real = drawn(), imported(shown())
    assert not arrows - real, f"{MEND}nothing imports that way; take these arrows away"
    reached = set(arrows)
    while more := {(a, d) for a, b in reached for c, d in arrows if b == c} - reached:
        reached |= more
    assert not real - reached, f"{MEND}these imports are shown by no way of arrows; add an arrow for each that is left"


def test_no_arrow_contradicts_a_contract() -> None:
    [layers] = [contract["layers"] for contract in CONTRACTS if contract["type"] == "layers"]
    height = {name: -number for number, layer in enumerate(layers) for name in layer.split(" | ")}
    up = {(a, b) for a, b in drawn() if height[a] <= height[b]}
    for contract in CONTRACTS:
        sources, targets = contract.get("source_modules", ()), contract.get("forbidden_modules", ())
        up |= {(a, b) for a, b in drawn() if f"millpond.{a}" in sources and f"millpond.{b}" in targets}
    assert not up, f"{MEND}pyproject.toml forbids these arrows"


def test_no_two_classes_have_one_name() -> None:
    files = {file: ast.parse(file.read_text()).body for file in CODE.rglob("*.py")}
    named = Counter(node.name for body in files.values() for node in body if isinstance(node, ast.ClassDef))
    assert [name for name, times in named.items() if times > 1] == []


def test_a_request_goes_through_modules_that_exist() -> None:
    named = re.findall(r'\["([\w/]+)', WAY)
    assert len(named) > 15
    assert not [name for name in named if not (CODE / f"{name}.py").is_file()], "docs/architecture.md, second picture"
