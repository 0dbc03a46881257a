"""The millpond command: help, versions, bad flags, doctor."""

from __future__ import annotations

import subprocess
import sys

import pytest

from millpond import __version__
from millpond.cli.serve import bind
from millpond.config import ServeConfig


def millpond(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "millpond.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_version() -> None:
    assert millpond("--version").stdout.strip() == f"millpond {__version__}"


def test_no_command_and_an_unknown_one_list_what_there_is() -> None:
    for arguments in ((), ("dance",)):
        result = millpond(*arguments)
        assert result.returncode == 2
        assert "COMMAND" in result.stderr


@pytest.mark.parametrize(
    ("flag", "value"), [("--max-batch", "0"), ("--port", "99999"), ("--drain-seconds", "soon"), ("--log-level", "loud")]
)
def test_a_bad_flag_is_refused_with_its_name_and_value(flag: str, value: str) -> None:
    result = millpond("serve", "demo", flag, value)
    assert result.returncode == 1
    assert flag in result.stderr
    assert value in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_model_is_refused_with_what_is_allowed() -> None:
    result = millpond("serve", "no-such-model", "--port", "0")
    assert result.returncode == 1
    assert "no-such-model" in result.stderr
    assert "demo" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_address_that_cannot_be_had() -> None:
    result = millpond("serve", "demo", "--host", "192.0.2.1", "--port", "0")
    assert result.returncode == 1
    assert "192.0.2.1" in result.stderr
    assert "cannot listen" in result.stderr


def test_doctor_names_what_it_looked_at() -> None:
    result = millpond("doctor")
    for subject in ("millpond", "mlx", "device", "compiler", "memory", "cache"):
        assert f"  {subject}" in result.stdout, result.stdout + result.stderr


def test_the_front_end_does_not_import_mlx() -> None:
    """Also not through some library: mlx in the front end would mean two owners of the GPU."""
    program = (
        "import sys, millpond.cli.serve, millpond.http.app, millpond.hub.source, uvicorn, transformers\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('mlx', 'mlx_lm', 'torch')])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("host", "warned"), [("127.0.0.1", False), ("localhost", False), ("::1", False), ("0.0.0.0", True), ("::", True)]
)
def test_listening_beyond_this_machine_is_warned_about(
    caplog: pytest.LogCaptureFixture, host: str, warned: bool
) -> None:
    for listener in bind(ServeConfig(host=host, port=0)):
        listener.close()
    assert any("beyond this machine" in record.message for record in caplog.records) == warned


def test_the_default_address_is_this_machine_only() -> None:
    assert ServeConfig().host == "127.0.0.1"
