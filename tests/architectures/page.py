"""docs/models.md: what becomes of each architecture. Written by ``make coverage``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from mlx_lm.utils import MODEL_REMAPPING

from architectures.folders import module_of
from architectures.found import Found, Report

PAGE = Path(__file__).parent.parent.parent / "docs" / "models.md"
BEGIN = """\
# Which models run, and how

Millpond runs what mlx-lm {mlx_lm} has a class for. `make coverage` has built each of its {modules} architectures small,
with random weights, and served it as on a GPU (MLX's own attention and rotary embeddings) and as on a CPU. Its answers
were compared with mlx-lm's own, one sequence at a time, token by token and by log probabilities: alone, beside others,
joining late, behind a cached prefix, in a next turn, and with draft tokens of which some are wrong.

**{batched} run in the batch** (every variant that was tried, on both); not served: {refused}; in turns, one row at a
time: {solo}; not tried, because mlx-lm itself does not run them here: {untried}. What can be done with a model is found
out when it is started, not looked up here: `millpond doctor MODEL` says it of yours.

- **batch**: rows share a forward, join and leave between any two steps; otherwise each row has a forward of its own.
- **prefix cache**: beginnings of prompts are found in RAM and on the SSD.
- **draft tokens**: speculative decoding; a model that cannot go back cannot be guessed for.
- **8 bits**: `--kv-bits 8`.
- **divided**: mlx-lm knows how to share it between two ranks (`--tp 2`).

Numbers are those of the reasons below.
"""
COLUMNS: tuple[tuple[str, Callable[[Report], str]], ...] = (
    ("batch", lambda report: report.solo),
    ("prefix cache", lambda report: report.uncached or report.rereads),
    ("draft tokens", lambda report: report.forward_only),
    ("8 bits", lambda report: report.unpacked),
    ("divided", lambda report: report.undivided),
)


class Reasons:
    """Numbered in the order in which they come."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, why: str) -> int:
        """Of a sentence; the same for the same."""
        said = re.sub(r"^kv_bits: 8 cannot be used with this model: |\. Leave kv_bits out to serve it$", "", why)
        said = re.sub(r"model of type '[^']*'", "model of this type", " ".join(said.split()))
        said = re.sub(r" in '[^']*/model'", "", said)
        return self._numbers.setdefault(said.removeprefix("tp: "), len(self._numbers) + 1)

    def lines(self) -> list[str]:
        return [f"{number}. {why}" for why, number in self._numbers.items()]


def modules(found: Found) -> dict[str, list[Report]]:
    """What was found of each module, all variants together."""
    together: dict[str, list[Report]] = {}
    for report in found.reports:
        together.setdefault(module_of(report.name), []).append(report)
    return together


def counts(found: Found) -> dict[str, int]:
    """Modules, and how many of them are batched, solo, not served, and not tried. A module is what its worst variant
    is."""
    every = modules(found).values()
    batched = sum(all(report.in_slots for report in reports) for reports in every)
    untried = sum(any(report.alien for report in reports) for reports in every)
    refused = sum(any(report.refused for report in reports) for reports in every)
    solo = len(every) - batched - untried - refused
    return {"modules": len(every), "batched": batched, "solo": solo, "refused": refused, "untried": untried}


def written(found: Found) -> str:
    """The page."""
    reasons = Reasons()
    lines = [f"| model type | {' | '.join(name for name, _ in COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for name, reports in found.by_name().items():
        lines.append(f"| {_title(name)} | {' | '.join(_cells(reports, reasons))} |")
    others = ", ".join(f"{kind} ({module})" for kind, module in sorted(MODEL_REMAPPING.items()))
    return "\n".join(
        [
            BEGIN.format(mlx_lm=found.mlx_lm, **counts(found)),
            *lines,
            "",
            f"Model types that run as another one: {others}.",
            "",
            "## Reasons",
            "",
            *reasons.lines(),
            "",
        ]
    )


def _title(name: str) -> str:
    module, _, variant = name.partition("@")
    return f"{module} ({variant})" if variant else module


def _cells(reports: Sequence[Report], reasons: Reasons) -> list[str]:
    return [
        _both([_cell(report, why, reasons) for report in reports], [report.gpu for report in reports])
        for _, why in COLUMNS
    ]


def _cell(report: Report, why: Callable[[Report], str], reasons: Reasons) -> str:
    if report.alien:
        return f"not tried [{reasons.number(report.alien)}]"
    if report.refused:
        return f"not served [{reasons.number(report.refused)}]"
    if report.wrong:
        return f"WRONG [{reasons.number('; '.join(report.wrong))}]"
    if not (reason := why(report)):
        return "yes"
    return f"{'yes' if reason == report.rereads else 'no'} [{reasons.number(reason)}]"


def _both(cells: Sequence[str], gpus: Sequence[bool]) -> str:
    """A cell that is the same on both is said once."""
    if len(set(cells)) == 1:
        return cells[0]
    return ", ".join(f"{'GPU' if gpu else 'CPU'}: {cell}" for cell, gpu in zip(cells, gpus, strict=True))
