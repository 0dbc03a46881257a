"""Measure Millpond beside other servers on this machine: the same workloads, round by round, one server at a time.

Every round starts each server afresh, runs the workloads and stops it; the order turns by one from round to round, so
that a machine that gets slower hits nobody alone. The result is the median over the rounds and its ratio to one of the
servers. How to call it: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from servers import Running, Server, ServerError, running

from millpond.bench.report import BarProgress, print_report
from millpond.bench.runner import Run, Target, fresh_salt, run_workloads
from millpond.bench.stream import Json
from millpond.bench.summary import Summary, machine
from millpond.bench.workloads import BY_NAME, Sizes

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
Figures = dict[str, float]


@dataclass
class Measured:
    """What was seen of one server: one Run and one line of process figures per good round, and what failed."""

    runs: list[Run] = field(default_factory=list)
    process: list[Figures] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


# --- which servers ----------------------------------------------------------------------------------------------


def fast_blas() -> dict[str, str]:
    """Environment that makes an MLX program on Linux use the OpenBLAS wheel of this environment.

    MILLPOND_BENCH_PRELOAD, when set, is used as it is; empty switches preloading off.
    """
    if sys.platform != "linux":
        return {}
    if "MILLPOND_BENCH_PRELOAD" in os.environ:
        preload = os.environ["MILLPOND_BENCH_PRELOAD"]
        return {"LD_PRELOAD": preload} if preload else {}
    question = "import scipy_openblas32 as o; print(o.get_lib_dir())"
    folder = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=True).stdout.strip()
    library = RESULTS / "libopenblas_names.so"
    compiler = shutil.which("cc") or "cc"
    names = [f"-L{folder}", "-lscipy_openblas", f"-Wl,-rpath,{folder}"]
    flags = ["-O2", "-shared", "-fPIC", "-o", str(library), str(HERE / "openblas_names.c")]
    subprocess.run([compiler, *flags, *names], check=True)
    return {"LD_PRELOAD": str(library)}


def servers_from(args: argparse.Namespace) -> list[Server]:
    """The servers that were asked for, in the order of the flags."""
    float_model = str(args.float_model or args.model)
    found: list[Server] = []
    if not args.no_millpond:
        command = f"{args.millpond} serve {args.model} --port {{port}} --log-level warning {args.millpond_args}"
        found.append(Server("millpond", command, ""))
    if args.mlx_lm:
        command = f"{args.mlx_lm} -m mlx_lm server --model {float_model} --port {{port}} --log-level WARNING"
        found.append(Server("mlx-lm", f"{command} {args.mlx_lm_args}", float_model, fast_blas()))
    if args.rapid_mlx:
        command = f"{args.rapid_mlx} serve {float_model} --port {{port}} --log-level WARNING"
        found.append(Server("rapid-mlx", command, "", {**fast_blas(), "HF_HUB_OFFLINE": "1"}))
    if args.vllm_mlx:
        command = f"{args.vllm_mlx} serve {float_model} --port {{port}} --continuous-batching"
        found.append(Server("vllm-mlx", command, "", {**fast_blas(), "HF_HUB_OFFLINE": "1"}))
    if args.llama_cpp:
        found.append(Server("llama.cpp", args.llama_cpp, ""))
    for peer in args.peer:
        name, _, command = peer.partition("=")
        if not command:
            raise SystemExit(f"--peer {peer!r}: NAME=COMMAND wanted")
        found.append(Server(name, command, ""))
    return found


# --- measuring --------------------------------------------------------------------------------------------------


def measure(server: Server, args: argparse.Namespace, round_: int, console: Console) -> tuple[Run, Figures]:
    """One round of one server. Raises ServerError when it does not start."""
    sizes = Sizes(f"{args.salt}/{round_}", args.tokens, args.prompt_scale, args.repeats)
    workloads = [BY_NAME[name] for name in args.workload.split(",")]
    log = RESULTS / f"{server.name}.log"
    with running(server, log) as process, BarProgress(console) as bars:
        loaded = process.memory_mb()
        target = Target(process.url, server.model, args.timeout)
        work = run_workloads(target, workloads, sizes, label=f"{server.name}, round {round_ + 1}", progress=bars)
        run = asyncio.run(work)
        figures = _process_figures(process, loaded)
    print_report(console, run)
    return run, figures


def _process_figures(process: Running, loaded: float) -> Figures:
    return {
        "start to first token, s": process.start_seconds,
        "memory after start, MB": loaded,
        "memory at the end, MB": process.memory_mb(),
    }


def measure_all(servers: list[Server], args: argparse.Namespace, console: Console) -> dict[str, Measured]:
    """All rounds. A server that fails to start in a round is noted and left out of that round."""
    measured = {server.name: Measured() for server in servers}
    for round_ in range(args.rounds):
        turn = round_ % len(servers)
        for server in servers[turn:] + servers[:turn]:
            console.rule(f"round {round_ + 1} of {args.rounds}: {server.name}")
            try:
                run, figures = measure(server, args, round_, console)
            except ServerError as error:
                console.print(str(error), style="red", markup=False)
                measured[server.name].errors.append(str(error))
                continue
            measured[server.name].runs.append(run)
            measured[server.name].process.append(figures)
    return measured


# --- comparing --------------------------------------------------------------------------------------------------

FIGURES: tuple[tuple[str, Callable[[Summary], float | None]], ...] = (
    ("output tok/s", lambda summary: summary.tokens_per_second),
    ("tok/s of one stream after its first token", lambda summary: summary.stream_tokens_per_second),
    ("TTFT mean, s", lambda summary: summary.ttft_mean),
    ("TTFT p95, s", lambda summary: summary.ttft_p95),
    ("gap mean, s", lambda summary: summary.gap_mean),
    ("gap p95, s", lambda summary: summary.gap_p95),
    ("gap max, s", lambda summary: summary.gap_max),
    ("wall, s", lambda summary: summary.wall),
    ("output tokens", lambda summary: float(summary.tokens)),
    ("prompt tokens", lambda summary: summary.prompt_tokens),
    ("failures", lambda summary: float(summary.failures)),
)


def medians(measured: Measured) -> dict[tuple[str, str], float]:
    """(workload or "process", figure) → median over the rounds."""
    values: dict[tuple[str, str], list[float]] = {}
    for line in measured.process:
        for name, value in line.items():
            values.setdefault(("process", name), []).append(value)
    for run in measured.runs:
        for workload, summary in run.summaries.items():
            for name, read in FIGURES:
                if (figure := read(summary)) is not None:
                    values.setdefault((workload, name), []).append(figure)
            for name, note in summary.notes.items():
                values.setdefault((workload, name), []).append(note)
    return {key: statistics.median(seen) for key, seen in values.items()}


def table_of(results: dict[str, dict[tuple[str, str], float]], baseline: str) -> Table:
    """One line per figure; in brackets the ratio to the baseline."""
    table = Table(title=f"medians, in brackets the ratio to {baseline}")
    table.add_column("workload")
    table.add_column("figure")
    for name in results:
        table.add_column(name, justify="right")
    keys = list(dict.fromkeys(key for figures in results.values() for key in figures))
    for key in keys:
        cells = [_cell(figures.get(key), results[baseline].get(key)) for figures in results.values()]
        table.add_row(*key, *cells, end_section=key[1] == "failures")
    return table


def _cell(value: float | None, base: float | None) -> str:
    if value is None:
        return "-"
    ratio = f" ({value / base:.2f})" if base else ""
    return f"{value:.4g}{ratio}"


def as_json(args: argparse.Namespace, measured: dict[str, Measured]) -> dict[str, Json]:
    """Everything: settings, machine, medians and every raw run."""
    servers: dict[str, Json] = {}
    for name, seen in measured.items():
        middle: dict[str, Json] = {f"{workload}: {figure}": v for (workload, figure), v in medians(seen).items()}
        runs: list[Json] = [run.as_json() for run in seen.runs]
        process: list[Json] = [dict(line) for line in seen.process]
        errors: list[Json] = list(seen.errors)
        servers[name] = {"medians": middle, "process": process, "errors": errors, "runs": runs}
    settings: dict[str, Json] = {key: str(value) for key, value in vars(args).items()}
    return {"settings": settings, "machine": dict(machine()), "servers": servers}


# --- the command ------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    millpond = f"{sys.executable} -m millpond.cli.main"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what millpond serves: a hub name, an MLX folder, a GGUF file or demo")
    parser.add_argument("--float-model", default="", help="MLX folder with float32 weights for the MLX peers")
    parser.add_argument("--millpond", default=millpond, help="command that runs millpond; default: %(default)s")
    parser.add_argument("--millpond-args", default="", help="more arguments of millpond serve")
    parser.add_argument("--no-millpond", action="store_true", help="measure only the others")
    parser.add_argument("--mlx-lm", default="", metavar="PYTHON", help="interpreter that has mlx-lm")
    parser.add_argument("--mlx-lm-args", default="", help="more arguments of mlx_lm.server")
    parser.add_argument("--rapid-mlx", default="", metavar="PROGRAM", help="the rapid-mlx program")
    parser.add_argument("--vllm-mlx", default="", metavar="PROGRAM", help="the vllm-mlx program")
    parser.add_argument(
        "--llama-cpp", default="", metavar="COMMAND", help="command of a llama.cpp server, {port} in it"
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND", help="any other, {port} in it")
    parser.add_argument("--baseline", default="mlx-lm", help="server of the ratios; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--workload", default=",".join(BY_NAME), metavar="NAME[,NAME…]", help="default: all")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="requests of single; default: %(default)s")
    parser.add_argument("--prompt-scale", type=float, default=1.0, help="factor on prompt lengths")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds per request; default: %(default)s")
    parser.add_argument("--salt", default=fresh_salt(), help="varies the prompts; default: a new one")
    args = parser.parse_args(argv)
    unknown = [name for name in args.workload.split(",") if name not in BY_NAME]
    if unknown:
        parser.error(f"--workload: no {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    RESULTS.mkdir(exist_ok=True)
    servers = servers_from(args)
    console = Console()
    measured = measure_all(servers, args, console)
    results = {name: medians(seen) for name, seen in measured.items() if seen.runs}
    file = RESULTS / f"compare-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    file.write_text(json.dumps(as_json(args, measured), ensure_ascii=False), encoding="utf-8")
    if results:
        wide = Console(width=max(console.width, 60 + 22 * len(results)))
        wide.print(table_of(results, args.baseline if args.baseline in results else next(iter(results))))
    console.print(f"written: {file}", highlight=False)
    return 0 if all(not seen.errors for seen in measured.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
