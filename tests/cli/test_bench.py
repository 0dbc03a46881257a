from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from millpond.bench.workloads import ALL
from millpond.cli import bench

if TYPE_CHECKING:
    from tests.cli.conftest import ScriptedServer


def call(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    args = parser.parse_args(["bench", *arguments])
    return bench.run(args)


def small(url: str, model: str, workload: str, *more: str) -> int:
    common = ("--tokens", "3", "--prompt-scale", "0.02", "--repeats", "2", "--timeout", "20", "--salt", "s")
    return call("--url", url, "--model", model, "--workload", workload, *common, *more)


def test_every_workload_runs_and_its_figures_are_written(
    scripted_server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.json"
    names = ",".join(workload.name for workload in ALL)
    assert small(scripted_server.url, "", names, "--json", str(out), "--label", "mine") == 0
    written = json.loads(out.read_text())
    assert written["model"] == "good"
    assert written["label"] == "mine"
    assert written["machine"]["cores"] >= 1
    assert list(written["workloads"]) == [workload.name for workload in ALL]
    for name, workload in written["workloads"].items():
        summary = workload["summary"]
        assert (summary["failures"], summary["counted_by"]) == (0, "usage"), name
        assert summary["requests"] == len(workload["requests"])
        assert summary["ttft_mean"] <= summary["ttft_p95"] or summary["requests"] == 1
        assert summary["tokens"] == sum(request["completion_tokens"] for request in workload["requests"])
        assert summary["cached_tokens"] == 2
    table = capsys.readouterr().out
    assert "concurrent-16" in table
    assert "0/32" in table


def test_requests_are_what_their_workload_says(scripted_server: ScriptedServer) -> None:
    assert small(scripted_server.url, "good", "single,seeded-8,shared-prefix,multi-turn") == 0
    bodies = scripted_server.bodies[1:]  # the first one is the warm-up
    single, seeded, shared, turns = bodies[:2], bodies[2:10], bodies[10:22], bodies[22:]
    assert all(body["ignore_eos"] and body["stream_options"] == {"include_usage": True} for body in bodies)
    assert [body["temperature"] for body in single] == [0.0, 0.0]
    assert all("seed" not in body for body in single)
    assert {body["seed"] for body in seeded} == set(range(1000, 1008))
    assert {body["temperature"] for body in seeded} == {0.7}
    assert len({body["messages"][0]["content"] for body in shared}) == 1
    assert len({body["messages"][1]["content"] for body in shared}) == 12
    assert [len(body["messages"]) for body in turns] == [1, 3, 5, 7, 9, 11]
    assert turns[1]["messages"][0] == turns[0]["messages"][0]
    assert turns[1]["messages"][1]["content"].startswith("w")
    texts = [body["messages"][-1]["content"] for body in bodies]
    assert len(set(texts)) == len(texts)


def test_same_salt_same_requests(scripted_server: ScriptedServer) -> None:
    for _ in range(2):
        assert small(scripted_server.url, "good", "single") == 0
    half = len(scripted_server.bodies) // 2
    assert scripted_server.bodies[:half] == scripted_server.bodies[half:]


def test_other_salt_shares_no_prompt(scripted_server: ScriptedServer) -> None:
    for salt in ("one", "two"):
        arguments = ("--tokens", "2", "--prompt-scale", "0.1", "--workload", "single", "--salt", salt)
        assert call("--url", scripted_server.url, *arguments) == 0
    firsts = [" ".join(body["messages"][0]["content"].split()[:4]) for body in scripted_server.bodies]
    assert len(set(firsts)) == len(firsts)


def test_tokens_are_counted_by_chunks_without_usage(
    scripted_server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.json"
    assert small(scripted_server.url, "no-usage", "single", "--json", str(out)) == 0
    summary = json.loads(out.read_text())["workloads"]["single"]["summary"]
    assert (summary["counted_by"], summary["tokens"]) == ("chunks", 6)
    assert "one piece of text counts as one token" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("fails", "HTTP 500"),
        ("error-event", "the engine died"),
        ("cut", "without a finish reason"),
        ("garbage", "undecodable event"),
        ("silent", "no text"),
    ],
)
def test_a_failing_server_is_counted_and_shown(
    scripted_server: ScriptedServer, capsys: pytest.CaptureFixture[str], model: str, error: str
) -> None:
    assert small(scripted_server.url, model, "single,long-prompt") == 1
    shown = capsys.readouterr().out
    assert "2/2" in shown
    assert "5/5" in shown
    assert error in shown


def test_a_hanging_server_is_a_failure(scripted_server: ScriptedServer, capsys: pytest.CaptureFixture[str]) -> None:
    code = small(scripted_server.url, "hangs", "concurrent-8", "--timeout", "0.3")
    assert code == 1
    shown = capsys.readouterr().out
    assert "8/8" in shown
    assert "no end within 0.3 s" in shown


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert small("http://127.0.0.1:1", "good", "single") == 1
    assert "no server answers at http://127.0.0.1:1" in capsys.readouterr().err


def test_json_on_standard_output_is_all_there_is(
    scripted_server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert small(scripted_server.url, "good", "single", "--json", "-") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["workloads"]["single"]["summary"]["requests"] == 2
    assert "single" in captured.err


@pytest.mark.parametrize(
    ("flag", "value", "word"),
    [
        ("--workload", "nonsense", "nonsense"),
        ("--tokens", "0", "'0'"),
        ("--timeout", "nan", "'nan'"),
        ("--url", "localhost", "'localhost'"),
    ],
)
def test_bad_flags_are_refused_with_their_value(
    capsys: pytest.CaptureFixture[str], flag: str, value: str, word: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        call(flag, value)
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert flag in message
    assert word in message
