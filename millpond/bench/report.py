"""Showing results in the terminal: a progress bar while it runs, a table and notes afterwards."""

from __future__ import annotations

from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from millpond.bench.runner import Run, RunProgress
from millpond.bench.stream import Reply
from millpond.bench.summary import Summary
from millpond.bench.workloads import Workload


class BarProgress(RunProgress):
    """One bar per workload. Use as a context manager; draws nothing when the console is not a terminal."""

    def __init__(self, console: Console) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        figures = TextColumn("{task.fields[tokens]} tokens, {task.fields[failed]} failed")
        self._bars = Bars(*columns, figures, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
        self._task = TaskID(0)
        self._tokens = 0
        self._failed = 0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begin(self, workload: Workload, count: int) -> None:
        self._tokens = self._failed = 0
        self._task = self._bars.add_task(f"{workload.name:14}", total=count, tokens=0, failed=0)

    def tick(self, reply: Reply) -> None:
        self._tokens += reply.tokens
        self._failed += not reply.ok
        self._bars.update(self._task, advance=1, tokens=self._tokens, failed=self._failed)

    def end(self) -> None:
        self._bars.stop_task(self._task)


def _number(value: float | None, factor: float = 1.0, digits: int = 1) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"


def _seconds(*values: float | None) -> str:
    return "/".join(_number(value, digits=2) for value in values)


def _milliseconds(*values: float | None) -> str:
    """Ten seconds and more in seconds, so that the column stays narrow."""
    texts = (
        _number(value, digits=1) + "s" if value is not None and value >= 10 else _number(value, 1000, 0)
        for value in values
    )
    return "/".join(texts)


HEADINGS = (
    "workload",
    "prompt\ntokens",
    "TTFT s\nmean/p95",
    "gap ms\nmean/p95/max",
    "output\ntok/s",
    "wall s",
    "failed",
)


def _row(summary: Summary) -> list[str]:
    return [
        summary.name,
        _number(summary.prompt_tokens, digits=0),
        _seconds(summary.ttft_mean, summary.ttft_p95),
        _milliseconds(summary.gap_mean, summary.gap_p95, summary.gap_max),
        _number(summary.tokens_per_second),
        _number(summary.wall),
        f"{summary.failures}/{summary.requests}",
    ]


def table_of(run: Run) -> Table:
    """One line per workload, narrow enough for a terminal of 80 columns."""
    title = f"{run.label or run.target.url} · {run.model}"
    table = Table(title=title, caption="gap: time between two arrivals of text", box=SIMPLE_HEAD, pad_edge=False)
    for heading in HEADINGS:
        left = heading == "workload"
        table.add_column(heading, justify="left" if left else "right", no_wrap=left, overflow="fold")
    for summary in run.summaries.values():
        table.add_row(*_row(summary), style="red" if summary.failures else None)
    return table


def print_report(console: Console, run: Run) -> None:
    """Print the table, then what only some workloads have, then every different error once."""
    console.print(table_of(run))
    for summary in run.summaries.values():
        notes = [f"{name}: {value:.3g}{'' if name.endswith(')') else ' s'}" for name, value in summary.notes.items()]
        if notes:
            console.print("\n  ".join([f"{summary.name}:", *notes]), highlight=False)
    chunks = [summary.name for summary in run.summaries.values() if summary.counted_by in ("chunks", "mixed")]
    if chunks:
        console.print(f"No usage from the server in {', '.join(chunks)}: one piece of text counts as one token.")
    for summary in run.summaries.values():
        for error in summary.errors:
            console.print(f"{summary.name}: {error}", style="red", markup=False, highlight=False)
