"""millpond service: what systemd and launchd would read in the files, and what is refused."""

from __future__ import annotations

import os
import plistlib
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, byte_level_backend

from millpond.cli.units import Plan, Unwritable, launchd_plist, systemd_unit

NASTY = """-a b%n "q" 's' \\ $HOME ${HOME} $$ é😀 ; & <x> %% --x=1 #\tend\\"""
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
PROGRAM = (sys.executable, "-P", "-m", "millpond.cli.main", "serve")
SECONDS = 60


def service(
    *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MILLPOND_", "XDG_", "HF_"))}
    command = [sys.executable, "-m", "millpond.cli.main", "service", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=False, env={**clean, **(env or {})}, cwd=cwd
    )


def plan(*arguments: str, environment: Mapping[str, str] | None = None, port: int = 8000) -> Plan:
    return Plan(
        name="millpond",
        model="demo",
        command=(*PROGRAM, *arguments),
        environment=environment or {},
        stop_seconds=30,
        open_files=2048,
        port=port,
        read=(Path("/opt/model"),),
        written=(Path("/srv/cache"),),
    )


# --- a reader with systemd's rules ------------------------------------------------------------------------------

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'", "s": " "}


def words(text: str) -> Iterator[str]:
    """Words of a line: quotes around them, C escapes inside and outside of quotes, specifiers resolved."""
    position, word, quote = 0, None, ""
    while position < len(text):
        character = text[position]
        position += 1
        if character == "\\":
            follower = text[position]
            if follower == "x":
                word = (word or "") + chr(int(text[position + 1 : position + 3], 16))
                position += 3
            else:
                word = (word or "") + ESCAPES[follower]
                position += 1
        elif quote and character == quote:
            quote = ""
        elif not quote and character in "\"'" and word is None:
            quote, word = character, ""
        elif not quote and character in " \t":
            if word is not None:
                yield resolved(word)
            word = None
        else:
            assert quote or character not in "\"'", "a quote inside of a word"
            assert quote or word is not None or character not in ";#", "a separator, not a word"
            word = (word or "") + character
    assert not quote
    if word is not None:
        yield resolved(word)


def resolved(word: str) -> str:
    """Specifiers: %% is a percent sign, every other one would be replaced by something that nobody asked for."""
    assert not re.search(r"%", word.replace("%%", "")), word
    return word.replace("%%", "%")


def expanded(word: str) -> str:
    """Variables of a command line; none may be left."""
    assert not word.replace("$$", "").startswith("$")
    assert "${" not in word.replace("$$", "")
    return word.replace("$$", "$")


def read(unit: str) -> dict[str, dict[str, list[str]]]:
    """Sections, keys and values. A line that ends in a backslash would go on in the next one."""
    sections: dict[str, dict[str, list[str]]] = {}
    for line in unit.split("\n"):
        assert not line.endswith("\\"), line
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), {})
        elif line and line[0] not in "#;":
            key, _, value = line.partition("=")
            section.setdefault(key, []).append(value)
    return sections


def argv(unit: str) -> list[str]:
    (line,) = read(unit)["Service"]["ExecStart"]
    program, *rest = words(line)
    return [program, *map(expanded, rest)]


def environment(unit: str) -> dict[str, str]:
    found = [word for line in read(unit)["Service"].get("Environment", []) for word in words(line)]
    return {name: value for name, _, value in (word.partition("=") for word in found)}


# --- arguments survive ------------------------------------------------------------------------------------------


@given(st.lists(TEXTS), TEXTS)
def test_any_argument_and_variable_survives_the_unit(arguments: list[str], value: str) -> None:
    unit = systemd_unit(plan(*arguments, environment={"MILLPOND_CACHE": value}), system=False)
    assert argv(unit) == [*PROGRAM, *arguments]
    assert environment(unit) == {"MILLPOND_CACHE": value}


@given(st.lists(TEXTS))
def test_any_argument_survives_the_property_list_or_is_refused(arguments: list[str]) -> None:
    try:
        text = launchd_plist(plan(*arguments), "local.millpond", Path("/l"))
    except Unwritable:
        assert any(re.search(r"[\x00-\x08\x0b-\x1f]", argument) for argument in arguments)
        return
    assert plistlib.loads(text.encode())["ProgramArguments"] == [*PROGRAM, *arguments]


@pytest.mark.parametrize("kind", ["systemd", "launchd"])
def test_nasty_arguments_survive_the_command(kind: str, tmp_path: Path) -> None:
    keys = tmp_path / NASTY.replace("/", "_")
    flags = [f"--model-name={NASTY}", "--api-key-file", str(keys), "--port", "0"]
    result = service(kind, "demo", *flags, env={"MILLPOND_CACHE": str(keys)})
    if kind == "launchd":
        found = plistlib.loads(result.stdout.encode())
        command, carried = found["ProgramArguments"], found["EnvironmentVariables"]
    else:
        command, carried = argv(result.stdout), environment(result.stdout)
    expected = ["demo", "--port=0", f"--model-name={NASTY}", f"--api-key-file={keys}"]
    assert command == [*PROGRAM, *expected]
    assert carried == {"MILLPOND_CACHE": str(keys)}


def test_a_draft_model_in_this_folder_is_found_from_any_other(tmp_path: Path) -> None:
    (tmp_path / "small.gguf").touch()
    drafts = {"small.gguf": str(tmp_path / "small.gguf"), "org/small": "org/small", "demo": "demo"}
    for named, expected in drafts.items():
        result = service("systemd", "demo", "--spec", "draft", "--draft-model", named, cwd=tmp_path)
        assert argv(result.stdout) == [*PROGRAM, "demo", "--spec=draft", f"--draft-model={expected}"], result.stderr
    assert "does not exist" in service("systemd", "demo", "--draft-model", "nothing.gguf", cwd=tmp_path).stderr


@pytest.mark.parametrize("character", list("\"'\\$\n"))
def test_a_program_that_systemd_cannot_start_is_refused(character: str) -> None:
    strange = plan()
    object.__setattr__(strange, "command", (f"/opt/{character}/python", "-m"))
    with pytest.raises(Unwritable, match="systemd cannot start"):
        systemd_unit(strange, system=False)


def test_what_is_not_utf8_is_refused() -> None:
    for kind in ("systemd", "launchd"):
        result = service(kind, "demo", "--model-name", os.fsdecode(b"\xff"))
        assert result.returncode == 1
        assert "--model-name: must be UTF-8" in result.stderr
        assert "Traceback" not in result.stderr


def test_the_command_of_the_unit_serves_and_stops(tmp_path: Path) -> None:
    """As systemd would run it: its arguments, its variables, the root folder, SIGTERM."""
    folder = tiny_models.save("llama", tmp_path / 'mo"del %h $x')
    byte_level_backend().save(str(folder / "tokenizer.json"))
    settings = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": "%s"}'
    (folder / "tokenizer_config.json").write_text(settings % CHATML.replace("\\", "\\\\").replace('"', '\\"'))
    relative = os.path.relpath(folder)
    unit = service("systemd", relative, "--port", "0", "--cache-ssd", "0", "--drain-seconds", "1").stdout
    needed = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    process = subprocess.Popen(
        argv(unit), env={**needed, **environment(unit)}, cwd="/", stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "ready api=" in line:
                break
        else:
            raise AssertionError("".join(lines))
        process.send_signal(signal.SIGTERM)
        (seconds,) = read(unit)["Service"]["TimeoutStopSec"]
        process.communicate(timeout=int(seconds))
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0


# --- what the files say -----------------------------------------------------------------------------------------


def test_the_unit_restarts_what_fails_and_lets_a_stop_take_its_time() -> None:
    unit = read(service("systemd", "demo", "--drain-seconds", "40.5", "--max-connections", "5000").stdout)
    main = {key: values for key, values in unit["Service"].items() if key not in ("ExecStart", "Environment")}
    assert int(main["TimeoutStopSec"][0]) > 40.5 + 15
    assert int(main["LimitNOFILE"][0]) > 5000
    assert main["Restart"] == ["on-failure"]
    assert main["KillMode"] == ["mixed"]
    assert main["OOMPolicy"] == ["continue"]
    assert main["ExecReload"] == ["/bin/kill -HUP $MAINPID"]
    assert main["NoNewPrivileges"] == ["yes"]
    assert {"RestartSec", "StandardError"} <= main.keys()
    assert {"StartLimitIntervalSec", "StartLimitBurst"} <= unit["Unit"].keys()
    # The start limit must be reachable: so many starts, each after its pause, fit into the interval.
    limit = int(unit["Unit"]["StartLimitBurst"][0]) * int(main["RestartSec"][0])
    assert limit < int(unit["Unit"]["StartLimitIntervalSec"][0])
    assert unit["Install"] == {"WantedBy": ["default.target"]}


def test_a_system_unit_has_an_account_and_a_sandbox_that_leaves_it_what_it_needs() -> None:
    unit = read(systemd_unit(plan(port=443), system=True, user="millpond"))
    assert unit["Service"]["User"] == ["millpond"]
    assert unit["Service"]["PrivateTmp"] == ["yes"]
    assert unit["Service"]["ProtectSystem"] == ["full"]
    assert unit["Service"]["AmbientCapabilities"] == ["CAP_NET_BIND_SERVICE"]
    assert unit["Install"] == {"WantedBy": ["multi-user.target"]}
    inside = plan()
    object.__setattr__(inside, "read", (Path("/tmp/model"),))
    object.__setattr__(inside, "written", (Path("/usr/local/cache"),))
    unit = read(systemd_unit(inside, system=True, user="millpond"))
    assert not {"PrivateTmp", "ProtectSystem", "AmbientCapabilities"} & unit["Service"].keys()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("flags", [(), ("--system", "--run-as", "daemon", "--port", "443")])
def test_systemd_finds_nothing_wrong_with_it(flags: tuple[str, ...], tmp_path: Path) -> None:
    def verified(path: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, check=False)

    simple = tmp_path / "simple.service"
    simple.write_text("[Service]\nExecStart=/bin/true\n")
    if verified(simple).returncode != 0:
        pytest.skip("systemd-analyze does not work here")
    path = tmp_path / "millpond.service"
    assert service("systemd", "demo", f"--model-name={NASTY}", "--output", str(path), *flags).returncode == 0
    result = verified(path)
    assert result.returncode == 0
    assert "millpond.service" not in result.stdout + result.stderr


def test_the_property_list_keeps_the_server_alive() -> None:
    result = service("launchd", "demo", "--name", "two", "--drain-seconds", "40.5", env={"HOME": "/Users/x"})
    found = plistlib.loads(result.stdout.encode())
    assert found["Label"] == "local.two"
    assert found["KeepAlive"] == {"SuccessfulExit": False}
    assert found["RunAtLoad"] is True
    assert found["ThrottleInterval"] > 0
    assert found["ExitTimeOut"] > 40.5 + 15
    assert found["SoftResourceLimits"]["NumberOfFiles"] > 1024
    assert found["StandardErrorPath"] == found["StandardOutPath"] == "/Users/x/Library/Logs/local.two.log"


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.often("systemd")
@pytest.mark.parametrize(
    ("kind", "where", "start"),
    [
        ("systemd", ".config/systemd/user/millpond.service", "systemctl --user enable --now millpond.service"),
        ("launchd", "Library/LaunchAgents/local.millpond.plist", "launchctl bootstrap"),
    ],
)
def test_install_writes_once_and_says_how_to_start(kind: str, where: str, start: str, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    path = tmp_path / where
    first = service(kind, "demo", "--install", env=home)
    assert first.returncode == 0, first.stderr
    assert str(path) in first.stdout
    assert start in first.stdout
    assert path.read_text() == service(kind, "demo", env=home).stdout
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    again = service(kind, "demo", "--install", "--port", "9000", env=home)
    assert again.returncode == 1
    assert "--force" in again.stderr
    assert "9000" not in path.read_text()
    assert service(kind, "demo", "--install", "--port", "9000", "--force", env=home).returncode == 0
    assert "9000" in path.read_text()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_output_goes_where_it_is_told_or_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "my units" / "llm.service"
    result = service("systemd", "demo", "--output", str(path))
    assert f"enable --now '{path}'" in result.stdout
    assert argv(path.read_text()) == [*PROGRAM, "demo"]
    for name in ("unit.txt", "my llm.service"):
        assert "--output" in service("systemd", "demo", "--output", str(tmp_path / name)).stderr
    blocked = service("systemd", "demo", "--output", str(path / "below.service"))
    assert blocked.returncode == 1
    assert "cannot be made" in blocked.stderr
    assert "Traceback" not in blocked.stderr


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.often("systemd")
@pytest.mark.parametrize("kind", ["systemd", "launchd"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("demo", "--port", "99999"), "--port"),
        (("demo", "--drain-seconds", "soon"), "--drain-seconds"),
        (("demo", "--config", "/no/such/file.toml"), "/no/such/file.toml"),
        (("no-such-model",), "no-such-model"),
        (("./no-such.gguf",), "no-such.gguf"),
        (("demo", "--name", "../x"), "--name"),
        (("demo", "--api-key", "sk-secret-secret"), "--api-key-file"),
        (("demo", "--api-ke", "sk-secret-secret"), ""),
    ],
)
def test_what_cannot_be_served_is_refused(kind: str, arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    result = service(kind, *arguments, "--install", env={"HOME": str(tmp_path)})
    assert result.returncode != 0
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert "sk-secret" not in result.stdout + result.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_systems_accounts() -> None:
    assert "--run-as" in service("systemd", "demo", "--system", "--run-as", "no-such-account").stderr
    assert "--run-as" in service("systemd", "demo", "--run-as", "nobody").stderr
    unit = service("systemd", "demo", "--system", env={"SUDO_USER": "nobody"}).stdout
    assert read(unit)["Service"]["User"] == ["nobody"]


def test_settings_of_this_shell_are_neither_taken_nor_forgotten() -> None:
    result = service("systemd", "demo", env={"MILLPOND_PORT": "nonsense", "MILLPOND_API_KEY": "sk-secret-secret"})
    assert result.returncode == 0
    assert argv(result.stdout) == [*PROGRAM, "demo"]
    assert "MILLPOND_PORT" in result.stderr
    assert "--api-key-file" in result.stderr
    assert "sk-secret" not in result.stdout + result.stderr
