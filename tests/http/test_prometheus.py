"""A real Prometheus scrapes a real server, and answers every question that dashboards and alerts ask of it."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from metrics_page import DASHBOARDS, ROOT, RULES, expressions

if TYPE_CHECKING:
    from conftest import Server, StartServer

PROMETHEUS = shutil.which("prometheus")
PROMTOOL = shutil.which("promtool")
START_SECONDS = 60
SCRAPE_SECONDS = 120
SCRAPES = 6
"""So many scrapes with requests in between, one a second."""
LINT_ALLOWED = {
    "metric names should not contain ':'",
    'non-counter metrics should not have "_total" suffix',
    "metric names should not contain abbreviated units",
}
"""What promtool says of names that vLLM has chosen."""
VARIABLES = {
    "$model_name": "test-model",
    "$instance": ".*",
    "$__rate_interval": "10s",
    "$__range": "1m",
}

pytestmark = pytest.mark.skipif(
    PROMETHEUS is None or PROMTOOL is None,
    reason="needs Prometheus: apt-get install --no-install-recommends prometheus, or brew install prometheus",
)


class Prometheus:
    """A running Prometheus that scrapes one server every second and knows our rules."""

    def __init__(self, folder: Path, target: str, port: int) -> None:
        rules = [str(file) for file in RULES if "rules" not in file.stem and file.stem != "prometheus"]
        config = folder / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
            f"rule_files: {rules}\n"
            f"scrape_configs: [{{job_name: millpond, static_configs: [{{targets: ['{target}']}}]}}]\n"
        )
        self.url = f"http://127.0.0.1:{port}"
        assert PROMETHEUS is not None
        self.process = subprocess.Popen(
            [
                PROMETHEUS,
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._ready.wait(START_SECONDS), "".join(self.lines)
        assert self.process.poll() is None, "".join(self.lines)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if "ready to receive web requests" in line:
                self._ready.set()
        self._ready.set()

    def ask(self, expression: str) -> list[float]:
        """The values of all series that an expression has now. Fails when Prometheus does not understand it."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=30, verify=False)
        body = answer.json()
        assert body["status"] == "success", (expression, body)
        assert not body.get("warnings"), (expression, body)
        assert body["data"]["resultType"] == "vector", expression
        return [float(series["value"][1]) for series in body["data"]["result"]]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@contextlib.contextmanager
def prometheus(folder: Path, url: str) -> Iterator[Prometheus]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = Prometheus(folder, url.removeprefix("http://"), port)
    try:
        yield running
    finally:
        running.stop()


def some_of_everything(server: Server) -> None:
    """Answers that finish, stop, fail and are refused, and one client that leaves."""

    def post(body: dict[str, object]) -> None:
        with contextlib.suppress(httpx.ReadTimeout):
            patience = 0.3 if body["prompt"] == [903] else 20
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=patience, verify=False)

    prompts: list[object] = [[64, 65], [64, 65, 901], [64, 900], [903], "abc"]
    bodies: list[dict[str, object]] = [{"prompt": prompt, "max_tokens": 12} for prompt in prompts]
    bodies += [{"prompt": "a", "model": "none"}, {"prompt": "abc", "max_tokens": 9, "stop": "c", "stream": True}]
    with ThreadPoolExecutor(len(bodies)) as pool:
        list(pool.map(post, bodies))


def test_prometheus_answers_every_question(start_server: StartServer, tmp_path: Path) -> None:
    with start_server("queue=0,slow=0.01,figures") as server, prometheus(tmp_path, server.url) as asked:
        deadline = time.monotonic() + SCRAPE_SECONDS
        scrapes: list[float] = []
        while not scrapes or scrapes[0] < SCRAPES:
            some_of_everything(server)
            scrapes = asked.ask('count_over_time(up{job="millpond"}[5m])')
            assert time.monotonic() < deadline, asked.lines[-5:]
        assert asked.ask('min_over_time(up{job="millpond"}[5m])') == [1]

        [submitted] = asked.ask("millpond_requests_submitted_total")
        assert submitted > 10
        told = "millpond_requests_finished_total + millpond_requests_failed_total + millpond_requests_cancelled_total"
        assert asked.ask(f"millpond_requests_submitted_total - ({told} + millpond_requests_open)") == [0]

        for file in DASHBOARDS:
            answers = {each: asked.ask(filled(each)) for each in expressions(file)}
            empty = {each for each, values in answers.items() if not any(math.isfinite(value) for value in values)}
            assert len(answers) > 80
            assert not [each for each in empty if not each.endswith("> 0")], empty
        for file in RULES:
            for each in expressions(file):
                asked.ask(each)
        # The first is recorded by a rule, up to a scrape and an evaluation behind what it is recorded from.
        difference = "vllm:time_per_output_token_seconds_count - vllm:inter_token_latency_seconds_count"
        while asked.ask(difference) != [0]:
            assert time.monotonic() < deadline, asked.ask(difference)


def filled(expression: str) -> str:
    """With Grafana's variables filled in."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


def test_promtool_finds_nothing_wrong(start_server: StartServer) -> None:
    assert PROMTOOL is not None
    with start_server("figures") as server:
        some_of_everything(server)
        page = httpx.get(f"{server.url}/metrics").text
    checked = subprocess.run([PROMTOOL, "check", "metrics"], input=page, capture_output=True, text=True, timeout=60)
    assert checked.returncode in (0, 3), checked.stderr  # 3: it parses, and there is something to say
    for line in checked.stderr.splitlines():
        name, _, said = line.partition(" ")
        assert name.startswith("vllm:"), line
        assert said in LINT_ALLOWED, line


def test_promtool_accepts_the_files() -> None:
    assert PROMTOOL is not None
    config = ROOT / "deploy" / "prometheus" / "prometheus.yml"
    for command in (["config", str(config)], ["rules", *(str(file) for file in RULES if file != config)]):
        checked = subprocess.run([PROMTOOL, "check", *command], capture_output=True, text=True, timeout=60)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    assert re.search(r"^rule_files:\n  - millpond-alerts.yml$", config.read_text(), re.M)
