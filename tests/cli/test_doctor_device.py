"""millpond doctor --device: the self-test with a tiny model, and what its rows say of what was measured."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
from doctor_report import SECONDS, doctor, environment

from millpond.cli.doctor import results
from millpond.cli.doctor.device import of_the_test, table
from millpond.cli.doctor.results import HIT, PARITY, RESTART, START, ResultRow
from millpond.cli.doctor.selftest import SelfTest, rows_of_the_table
from millpond.cli.doctor.timing import Arrivals, DecodeRate, DecodeWindow, TimedAnswer, rate_of, rate_of_all
from millpond.client import EngineError
from millpond.client.start import start_message
from millpond.config import read_config
from millpond.types import ErrorKind, PrefixReport

SCRIPTED = (sys.executable, str(Path(__file__).parent.parent / "client" / "scripted_engine.py"))
COMMAND = (sys.executable, "-m", "millpond.cli.main", "doctor", "--device")
SECRET = "sk-nobody-may-see-this"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("wide_llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """Where the command makes temporary folders."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


def around(temporary: Path) -> dict[str, str]:
    """The command's environment, in which its user has a cache folder of their own."""
    user = {"MILLPOND_CACHE_DIR": str(temporary.parent / "user"), "MILLPOND_CACHE_SSD": "1GB"}
    return environment(TMPDIR=str(temporary), MILLPOND_API_KEY=SECRET, **user)


# --- the command ------------------------------------------------------------------------------------------------


def test_a_table_to_be_pasted(tiny: Path, temporary: Path) -> None:
    """Every row, the settings that were given, nothing of the user's, and nothing left behind."""
    result = subprocess.run(
        [*COMMAND, str(tiny), "--kv-bits", "8"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=around(temporary),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    cells = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    found = dict(cells[1:])
    assert tuple(found) == rows_of_the_table()
    for said in ("mlx-lm ", "Python ", "- device: ", "- model: tiny\n", "- settings: kv_bits=8\n"):
        assert said in result.stdout
    assert "int8 in groups of 64, lane slots" in found[START]
    assert "probe at start: held" in found[PARITY]
    assert "2 of 2" in found[HIT]
    for rows in (1, 8, 32):
        assert "tok/s" in found[results.decode_name(rows)]
    # The context holds 512 tokens, of which the answer has some.
    assert "of 504 tokens" in found["prefill, 1k tokens"]
    assert "not run" in found["prefill, 8k tokens"]
    assert "503 of them from disk" in found[RESTART]
    for hidden in (SECRET, str(tiny.parent), str(temporary.parent)):
        assert hidden not in result.stdout
    assert "restart-warm" in result.stderr
    assert not list(temporary.iterdir())
    assert not (temporary.parent / "user").exists()


@pytest.mark.slow
def test_the_same_as_json(tiny: Path, temporary: Path) -> None:
    command = [*COMMAND, "--json", str(tiny)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=False, env=around(temporary)
    )
    printed = json.loads(result.stdout)
    assert (result.returncode, result.stderr) == (0, "")
    assert printed["ok"]
    assert printed["findings"] == []
    assert printed["device"]["about"]["settings"] == "all are the defaults"
    rows = {row["test"]: row for row in printed["device"]["rows"]}
    assert tuple(rows) == rows_of_the_table()
    assert rows[PARITY]["figures"] == {"answers": 8, "same": 8, "answer_tokens": 24}
    assert rows[RESTART]["figures"]["disk_tokens"] == 503
    assert rows["decode, 32 rows"]["figures"].keys() == {"tokens_per_second", "step_ms"}
    assert (rows["prefill, 8k tokens"]["state"], rows["prefill, 8k tokens"]["figures"]) == ("skipped", {})


@pytest.mark.often("15")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(number: signal.Signals, tiny: Path, temporary: Path) -> None:
    """Not even while blocks are being written."""
    with subprocess.Popen([*COMMAND, str(tiny)], stderr=subprocess.PIPE, text=True, env=around(temporary)) as process:
        assert process.stderr is not None
        assert next(line for line in process.stderr if line.startswith("decode"))
        assert list(temporary.iterdir())
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert not list(temporary.iterdir())


def test_what_cannot_be_measured() -> None:
    assert "no-such-model" in doctor("--device", "no-such-model").text["model"]
    report = doctor("--device", "--tp", "2")
    assert report.failed == {"settings"}
    assert "--tp" in report.remedy["settings"]
    assert doctor("--device", "--max-batch", "0").failed == {"settings"}


# --- with a scripted engine -------------------------------------------------------------------------------------


def measured(script: str, tmp_path: Path, budget: float = 120.0) -> dict[str, ResultRow]:
    """The rows of the self-test, by name."""
    config = of_the_test(read_config({}, {}), tmp_path / "ssd")
    start = start_message(config, script, "", "scripted")
    said: list[str] = []
    rows = asyncio.run(SelfTest(config, start, said.append, budget, SCRIPTED).run())
    assert [row.test for row in rows] == list(rows_of_the_table())
    return {row.test: row for row in rows}


DECODES = ("decode, 1 row", "decode, 8 rows", "decode, 32 rows")


def test_what_is_beyond_the_budget_is_not_run(tmp_path: Path) -> None:
    """A row of decoding is timed for three seconds."""
    for budget, beyond in ((0.0, (PARITY, *DECODES)), (2.0, DECODES)):
        rows = measured("plain", tmp_path, budget)
        assert rows[START].state == "ok"
        assert not [row for row in rows.values() if row.state == "failed"]
        for test in beyond:
            assert rows[test].text.startswith("not run: about "), rows[test]
            assert not rows[test].figures


def test_an_engine_that_does_not_start(tmp_path: Path) -> None:
    rows = measured("fatal", tmp_path)
    assert rows.pop(START).state == "failed"
    assert {row.state for row in rows.values()} == {"skipped"}


def test_an_engine_that_dies(tmp_path: Path) -> None:
    """In the middle of parity: the rows that follow say that there is none, or what was measured with the next."""
    rows = measured("crash_after=40", tmp_path)
    assert rows[START].state == "ok"
    assert rows[PARITY].state == "failed"
    assert "died" in rows[PARITY].text


# --- what is said of what was measured --------------------------------------------------------------------------

MISS = TimedAnswer(100, (1, 2, 3), 0.5, 0.7, PrefixReport())
AGAIN = replace(MISS, prefix=PrefixReport(memory=99, end="prompt"))


def test_a_hit_that_is_no_miss_is_a_failure() -> None:
    other = replace(AGAIN, tokens=(1, 2, 4))
    assert results.hit([MISS, MISS], [AGAIN, AGAIN]).state == "ok"
    row = results.hit([MISS, MISS], [AGAIN, other])
    assert (row.state, row.figures["same"]) == ("failed", 1)
    # What was computed anew is no hit, whatever it says.
    assert results.hit([MISS], [replace(other, prefix=PrefixReport(end="evicted"))]).text == (
        "not run: nothing was restored (evicted)"
    )


def test_an_answer_that_differs_after_a_restart_is_a_failure() -> None:
    warm = replace(MISS, first_seconds=0.125, prefix=PrefixReport(disk=64))
    row = results.restarted(MISS, warm, "ext4")
    assert row.state == "ok"
    assert row.text == "TTFT 125 ms of 100 tokens, 64 of them from disk (ext4): 4 times as fast as cold"
    assert results.restarted(MISS, replace(warm, tokens=(1,)), "").state == "ok", "the rest was read in other chunks"
    all_of_it = replace(warm, tokens=(1,), prefix=PrefixReport(disk=99))
    assert results.restarted(MISS, all_of_it, "").state == "failed"
    assert results.restarted(MISS, replace(MISS, prefix=PrefixReport(end="slower")), "").text.endswith(": slower")


def test_rows_are_timed_while_all_of_them_run() -> None:
    """The first decodes alone until the second has its first token, at 5; nothing counts before."""

    async def rate(*told: tuple[int, float] | Exception | None) -> DecodeRate | None:
        came: Arrivals = asyncio.Queue()
        for item in told:
            came.put_nowait(item)
        return await rate_of_all(2, DecodeWindow(seconds=0.0, least_steps=3, most_steps=9), came)

    alone = [(0, when / 10) for when in range(4)]
    both = [(row, when) for when in (5.0, 7.0, 9.0) for row in (1, 0)]
    assert asyncio.run(rate(*alone, *both)) == DecodeRate(2, 1.0)
    assert asyncio.run(rate(*alone, *both[:4], None)) == DecodeRate(2, 1.0)
    assert asyncio.run(rate(*alone, None)) is None
    with pytest.raises(EngineError, match="out of memory"):
        asyncio.run(rate(*alone, EngineError(ErrorKind.ENGINE, "out of memory")))


def test_rows_are_timed_by_their_own_tokens() -> None:
    """Two tokens a second and four, each from its first to its last; one token says nothing."""
    rate = rate_of([[1.0, 1.5, 2.0], [1.25, 1.5], [1.1]])
    assert rate == DecodeRate(3, 6.0)
    assert rate.step_seconds == 0.5
    assert results.decoded(3, rate).text == "6 tok/s, 500 ms per step"
    assert rate_of([[1.0]]) is None
    assert results.decoded(32, None).state == "skipped"
    window = DecodeWindow(seconds=3.0, least_steps=8, most_steps=128)
    assert [window.over(*seen) for seen in ((7, 9.0), (8, 2.9), (8, 3.0), (128, 0.1))] == [False, False, True, True]


def test_a_cell_is_one_line() -> None:
    about = dict.fromkeys(("millpond", "mlx", "mlx-lm", "python", "system", "device", "model", "settings"), "x")
    printed = table(about, [results.failed(PARITY, "a|b\nc")])
    assert "| parity | **failed**: a\\|b c |" in printed.splitlines()
