"""Reading what /metrics says, and which metrics PromQL expressions ask for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "deploy" / "grafana").glob("*.json"))
RULES = sorted((ROOT / "deploy" / "prometheus").glob("*.yml"))
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_WORDS = {"and", "or", "unless", "bool", "inf", "nan"}
_LABELS = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")


_SAMPLE = re.compile(r"([^\s{]+)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Page:
    """One scrape; values by name and labels."""

    def __init__(self, text: str) -> None:
        self.samples: Samples = {}
        self.rising: Samples = {}
        """Those that may never fall."""
        kind = ""
        for line in text.splitlines():
            if line.startswith("# TYPE"):
                kind = line.rpartition(" ")[2]
            elif not line.startswith("#"):
                found = _SAMPLE.fullmatch(line)
                assert found is not None, line
                key = found[1], frozenset(_LABEL.findall(found[2] or ""))
                self.samples[key] = float(found[3])
                if kind in ("counter", "histogram"):
                    self.rising[key] = self.samples[key]
        self.names = {name for name, _ in self.samples}

    def value(self, name: str, **labels: str) -> float:
        """The one sample of this name with these labels, and any others."""
        asked = set(labels.items())
        found = [value for (known, said), value in self.samples.items() if known == name and asked <= said]
        assert len(found) == 1, (name, labels, found)
        return found[0]


def scrape(url: str) -> Page:
    answer = httpx.get(f"{url}/metrics", timeout=20, verify=False)
    assert answer.status_code == 200, answer.text
    return Page(answer.text)


def expressions(file: Path) -> list[str]:
    """Every PromQL expression of a dashboard or a rule file."""
    if file.suffix == ".json":
        return list(_expressions(json.loads(file.read_text(encoding="utf-8"))))
    return [found.strip() for found in re.findall(r"^\s*(?:- )?expr:\s*(.+)$", file.read_text(encoding="utf-8"), re.M)]


def _expressions(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("expr"), str):
            yield node["expr"]
        for value in node.values():
            yield from _expressions(value)
    elif isinstance(node, list):
        for value in node:
            yield from _expressions(value)


def asked(expression: str) -> set[str]:
    """The metrics that an expression names."""
    bare = _LABELS.sub(" ", re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"", " ", expression))
    found = set()
    for match in _NAME.finditer(bare):
        is_function = bare[match.end() :].lstrip().startswith("(")
        is_number = match.start() > 0 and (bare[match.start() - 1].isdigit() or bare[match.start() - 1] == ".")
        if not is_function and not is_number and match.group().lower() not in _WORDS | _AGGREGATIONS:
            found.add(match.group())
    return found


_AGGREGATIONS = {"sum", "min", "max", "avg", "count", "topk", "quantile"}
"""May stand before their ``by (…)``, which is taken out."""
