"""Settings from flags, environment and file: which one wins, what is refused and how, what is written about them."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from millpond.config import ConfigError, ServeConfig, read_config, reference
from millpond.types import KvPacking, SpecMode, SpecSettings, Speculation

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("flag", "environment", "file")
DEFAULTS = read_config({}, {})
SECRET = "secret-key-0123456789"


def given(source: str, name: str, text: str, folder: Path) -> tuple[ServeConfig, str]:
    """The config with one setting from that source, and how the source is called in a refusal."""
    if source == "flag":
        return read_config({name: text}, {}), f"--{name.replace('_', '-')}"
    if source == "environment":
        return read_config({}, {f"MILLPOND_{name.upper()}": text}), f"MILLPOND_{name.upper()}"
    file = folder / "millpond.toml"
    file.write_text(f"{name} = '{text}'\n")
    return read_config({}, {}, str(file)), f"{file}: {name}"


def called(source: str, name: str, folder: Path) -> str:
    names = {"flag": f"--{name.replace('_', '-')}", "environment": f"MILLPOND_{name.upper()}"}
    return names.get(source, f"{folder / 'millpond.toml'}: {name}")


GOOD = {
    "host": ("::1", "::1"),
    "port": ("0", 0),
    "model_name": ("my model", "my model"),
    "sampling_defaults": ("api", "api"),
    "reasoning_field": ("both", "both"),
    "tool_format": ("hermes", "hermes"),
    "context_length": ("4096", 4096),
    "max_batch": ("256", 256),
    "max_itl_ms": ("12.5", 12.5),
    "prefill_chunk": ("128", 128),
    "kv_memory_mb": ("77", 77),
    "wired_memory_mb": ("1024", 1024),
    "deterministic": ("on", "on"),
    "kv_bits": ("8", 8),
    "kv_group_size": ("32", 32),
    "kv_quant_start": ("128", 128),
    "kv_quant_mode": ("rotated", None),
    "cache_ram": ("1GB", 10**9),
    "share_prefixes": ("on", "on"),
    "cache_selfcheck": ("3", 3),
    "cache_dir": ("/somewhere", Path("/somewhere")),
    "cache_ssd": ("1MiB", 2**20),
    "ssd_policy": ("all", "all"),
    "ssd_durability": ("durable", "durable"),
    "ssd_ttl": ("2w", 1_209_600),
    "responses_size": ("1MB", 10**6),
    "responses_ttl": ("1d", 86_400),
    "ssd_daily_writes": ("5kb", 5000),
    "ssd_min_free": ("0", 0),
    "spec": ("off", "off"),
    "spec_tokens": ("31", 31),
    "spec_adaptive": ("off", "off"),
    "spec_shared": ("on", "on"),
    "draft_model": ("org/small", "org/small"),
    "tp": ("2", 2),
    "hostfile": ("/hosts.json", Path("/hosts.json")),
    "tp_backend": ("jaccl-ring", "jaccl-ring"),
    "tp_host": ("10.0.0.1", "10.0.0.1"),
    "tp_port": ("40000", 40000),
    "tp_secret_file": ("/secret", Path("/secret")),
    "tp_silence": ("1m", 60),
    "tp_python": ("/opt/millpond/bin/python", "/opt/millpond/bin/python"),
    "tp_ssh": ('ssh -F "a file"', 'ssh -F "a file"'),
    "max_waiting": ("1", 1),
    "max_per_client": ("9", 9),
    "queue_timeout": ("1m", 60),
    "first_token_timeout": ("2h", 7200),
    "token_timeout": ("0.5", 0.5),
    "request_timeout": ("1d", 86_400),
    "body_timeout": ("5s", 5),
    "write_timeout": ("0", 0),
    "stream_buffer": ("1", 1),
    "keepalive": ("1.5m", 90),
    "stall_timeout": ("0", 0),
    "max_restarts": ("0", 0),
    "max_body": ("16MB", 16 * 10**6),
    "max_values": ("5000", 5000),
    "max_connections": ("1", 1),
    "api_key": (f"{SECRET}, other-{SECRET}", (SECRET, f"other-{SECRET}")),
    "api_key_file": ("/keys", Path("/keys")),
    "allowed_hosts": ("*.example.org,[::1],a:80", ("*.example.org", "[::1]", "a:80")),
    "cors_origins": ("https://A.example:1,app://x", ("https://a.example:1", "app://x")),
    "tls_certificate": ("/pem", None),
    "tls_key": ("/pem", None),
    "drain_seconds": ("0", 0),
    "log_format": ("json", "json"),
    "log_level": ("debug", "debug"),
}
"""A value of each setting, as text and as it is understood; None: only together with another setting."""


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ServeConfig.model_fields)
def test_every_setting_is_read_from_every_source(source: str, name: str, tmp_path: Path) -> None:
    """(J1)"""
    text, value = GOOD[name]
    if value is None:
        with pytest.raises(ConfigError, match=ALONE.get(name, "must be given if and only if tls_certificate is")):
            given(source, name, text, tmp_path)
        return
    config, _ = given(source, name, text, tmp_path)
    assert getattr(config, name) == value
    assert getattr(config, name) != ServeConfig.model_fields[name].default
    assert config.model_fields_set == {name}


ALONE = {"kv_quant_mode": "rotated needs kv_bits: 4"}
BAD = [
    ("port", "65536", "0 to 65535"),
    ("port", "-1", "0 to 65535"),
    ("port", "http", "0 to 65535"),
    ("port", "8000.5", "0 to 65535"),
    ("port", "", "0 to 65535"),
    ("max_batch", "0", "1 to 256"),
    ("max_batch", "257", "1 to 256"),
    ("max_itl_ms", "9.9", "10 to 60000"),
    ("max_itl_ms", "nan", "10 to 60000"),
    ("max_itl_ms", "400ms", "10 to 60000"),
    ("prefill_chunk", "100", "0 or a multiple of 64"),
    ("prefill_chunk", "65600", "0 to 65536"),
    ("kv_bits", "5", "must be 0, 4 or 8"),
    ("reasoning_field", "thinking", "'reasoning_content', 'reasoning' or 'both'"),
    ("tool_format", "xml", "must be auto or one of harmony, "),
    ("kv_bits", "int8", "integer"),
    ("kv_group_size", "16", "must be 32, 64 or 128"),
    ("kv_quant_start", "100", "0 or a multiple of 64"),
    ("kv_quant_mode", "rotated", "rotated needs kv_bits: 4"),
    ("kv_quant_mode", "int4", "'affine' or 'rotated'"),
    ("context_length", "-1", "from 0"),
    ("context_length", "4k", "from 0"),
    ("max_waiting", "0", "from 1"),
    ("max_waiting", "9" * 30, "less than or equal to 1000000000"),
    ("max_per_client", "-1", "from 0"),
    ("queue_timeout", "-1", "a number of seconds from 0"),
    ("first_token_timeout", "soon", "one of s, m, h, d, w behind it"),
    ("token_timeout", "inf", "a number of seconds from 0"),
    ("request_timeout", "1y", "a number of seconds from 0"),
    ("body_timeout", "", "a number of seconds from 0"),
    ("write_timeout", "nan", "a number of seconds from 0"),
    ("keepalive", "1 minute", "a number of seconds from 0"),
    ("stall_timeout", "1e400", "a number of seconds from 0"),
    ("stream_buffer", "0", "from 1"),
    ("max_restarts", "-1", "from 0"),
    ("max_body", "0", "from 1024"),
    ("max_body", "8 apples", "such as 8GB"),
    ("max_connections", "0", "from 1"),
    ("api_key_file", "", "a path"),
    ("tls_certificate", " ", "a path"),
    ("cache_dir", "~no-such-user/x", "no such user"),
    ("allowed_hosts", "a,,b", "separated by commas, none of them empty"),
    ("allowed_hosts", "", "none of them empty"),
    ("allowed_hosts", "http://localhost", "no URLs"),
    ("allowed_hosts", "a.*.b", "no URLs"),
    ("allowed_hosts", "*example.org", "no URLs"),
    ("cors_origins", "https://example.org/", "without anything behind the host"),
    ("cors_origins", "example.org", "such as https://example.org"),
    ("cors_origins", "https://*.example.org", "such as https://example.org"),
    ("cors_origins", "null", "such as https://example.org"),
    ("drain_seconds", "3601", "0 to 3600"),
    ("drain_seconds", "soon", "0 to 3600"),
    ("log_format", "xml", "'text' or 'json'"),
    ("log_level", "loud", "'debug', 'info', 'warning' or 'error'"),
    ("log_level", "INFO", "'debug', 'info', 'warning' or 'error'"),
    ("sampling_defaults", "vllm", "'model' or 'api'"),
    ("ssd_policy", "some", "'all', 'second-use', 'evicted' or 'off'"),
    ("spec", "eagle", "'auto', 'off', 'ngram', 'draft' or 'mtp'"),
    ("spec", "", "'auto', 'off', 'ngram', 'draft' or 'mtp'"),
    ("spec_tokens", "-1", "0 to 31"),
    ("spec_tokens", "32", "0 to 31"),
    ("spec_tokens", "2.5", "0 to 31"),
    ("spec_adaptive", "true", "'on' or 'off'"),
    ("spec_shared", "1", "'on' or 'off'"),
    ("share_prefixes", "yes", "'off' or 'on'"),
    ("draft_model", " ", "must be a model"),
    ("tp", "65", "0 to 64"),
    ("tp", "two", "0 to 64"),
    ("hostfile", "", "a path"),
    ("tp_backend", "gloo", "'ring', 'jaccl', 'jaccl-ring', 'nccl' or 'mpi'"),
    ("tp_port", "65535", "0 to 64511"),
    ("tp_secret_file", " ", "a path"),
    ("tp_silence", "0", "1 to 3600"),
    ("tp_silence", "2h", "1 to 3600"),
    ("tp_ssh", 'ssh "x', "must be a command"),
    ("tp_ssh", " ", "must be a command"),
]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("name", "text", "allowed"), BAD)
def test_bad_values_are_refused_by_source_value_and_range(
    source: str, name: str, text: str, allowed: str, tmp_path: Path
) -> None:
    """(J2)"""
    with pytest.raises(ConfigError) as refused:
        given(source, name, text, tmp_path)
    message = str(refused.value)
    assert message.startswith(f"{called(source, name, tmp_path)}: ")
    assert allowed in message
    assert f"(got {text!r})" in message


@pytest.mark.parametrize("source", SOURCES)
def test_a_draft_model_is_needed_to_guess_with_one(source: str, tmp_path: Path) -> None:
    """And may be given without, for the requests that ask for it. A file's switch is a word."""
    with pytest.raises(ConfigError, match="draft_model: must name a model when spec is draft"):
        given(source, "spec", "draft", tmp_path)
    for empty in ({"spec": "draft", "draft_model": ""}, {"spec": "draft", "draft_model": " "}):
        with pytest.raises(ConfigError, match=r"^--draft-model: must"):
            read_config(empty, {})
    for spec in ("auto", "off", "ngram", "draft", "mtp"):
        assert read_config({"spec": spec, "draft_model": "org/small"}, {}).draft_model == "org/small"
    file = tmp_path / "switch.toml"
    file.write_text("spec_adaptive = false\n")
    with pytest.raises(ConfigError, match="spec_adaptive: no setting is true or false"):
        read_config({}, {}, str(file))


def test_what_the_engine_is_told_about_guessing() -> None:
    usual = DEFAULTS.spec_settings("")
    assert usual == SpecSettings(default=Speculation(mode=SpecMode.AUTO, tokens=0, adaptive=True))
    told = {"spec": "draft", "spec_tokens": "7", "spec_adaptive": "off", "spec_shared": "on", "draft_model": "demo"}
    config = read_config(told, {})
    assert config.speculation == Speculation(mode=SpecMode.DRAFT, tokens=7, adaptive=False)
    assert config.spec_settings("/draft") == SpecSettings(default=config.speculation, draft_path="/draft", shared=True)


def test_what_the_engine_is_told_about_packing() -> None:
    assert DEFAULTS.packing == KvPacking()
    told = {"kv_bits": "4", "kv_group_size": "32", "kv_quant_mode": "rotated"}
    assert read_config(told, {}).packing == KvPacking(bits=4, group_size=32, start=64, rotated=True)
    later = read_config({**told, "kv_quant_start": "128"}, {}).packing
    assert later == KvPacking(bits=4, group_size=32, start=128, rotated=True)


@pytest.mark.parametrize("source", SOURCES)
def test_a_key_is_never_shown(source: str, tmp_path: Path) -> None:
    """Not in a refusal, and not where a config is printed."""
    with pytest.raises(ConfigError) as refused:
        given(source, "api_key", f"{SECRET},,", tmp_path)
    message = str(refused.value)
    assert message.startswith(f"{called(source, 'api_key', tmp_path)}: must be words")
    assert SECRET not in message
    config, _ = given(source, "api_key", SECRET, tmp_path)
    assert SECRET not in repr(config) + str(config)


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    """(J1, J2) Whole: an empty value is a value, too, and a bad one that loses is no matter."""
    file = tmp_path / "millpond.toml"
    file.write_text("max-batch = 3\nport = 3\ndrain_seconds = 3.5\nmodel_name = 'file'\n")
    environ = {"MILLPOND_CONFIG": str(file), "MILLPOND_MAX_BATCH": "2", "MILLPOND_PORT": "2", "MILLPOND_MODEL_NAME": ""}
    config = read_config({"max_batch": "1", "port": None}, environ)
    assert (config.max_batch, config.port, config.drain_seconds, config.model_name) == (1, 2, 3.5, "")
    assert config.max_waiting == DEFAULTS.max_waiting
    assert read_config({"port": "1"}, {"MILLPOND_PORT": "nonsense"}).port == 1
    other = tmp_path / "other.toml"
    other.write_text("port = 9\n")
    assert read_config({}, {"MILLPOND_CONFIG": str(file)}, str(other)).port == 9, "--config beats MILLPOND_CONFIG"
    assert read_config({}, {"MILLPOND_CONFIG": ""}).port == DEFAULTS.port


def test_a_file_may_hold_the_types_of_toml(tmp_path: Path) -> None:
    file = tmp_path / "millpond.toml"
    file.write_text(
        "# a comment\nport = 9000\nmax-itl-ms = 200\ncache_ram = '8GB'\nssd_ttl = 60\nmax_body = 4096\n"
        "allowed_hosts = ['a.example', '*.b.example']\napi_key = ['key,with-a-comma']\n"
    )
    config = read_config({}, {}, str(file))
    assert (config.port, config.max_itl_ms, config.cache_ram, config.ssd_ttl) == (9000, 200, 8 * 10**9, 60)
    assert (config.max_body, config.allowed_hosts) == (4096, ("a.example", "*.b.example"))
    assert config.api_key == ("key,with-a-comma",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("max_bach = 3", "max_bach: there is no such setting; is it max_batch?"),
        ("[serve]\nport = 1", "serve: there is no such setting"),
        ("colour = 'red'", "colour: there is no such setting"),
        ("port = 1\nport = 2", "is not TOML"),
        ("max-batch = 1\nmax_batch = 2", "max_batch: is there twice"),
        ("port = true", "port: no setting is true or false (got True)"),
        ("port = [1]", "port: Input should be a valid integer; allowed is 0 to 65535 (got [1])"),
        ("port = 2026-01-01", "port: Input should be a valid integer"),
        ("host = 5", "host: Input should be a valid string (got 5)"),
        ("cache_ssd = -1", "cache_ssd: "),
        ("cache_ssd = inf", "cache_ssd: "),
        ("cache_ssd = nan", "cache_ssd: "),
        ("drain_seconds = inf", "drain_seconds: "),
        ("drain_seconds = nan", "drain_seconds: "),
        ("allowed_hosts = ['']", "allowed_hosts: must be words"),
        ("allowed_hosts = [5]", "allowed_hosts: Input should be a valid string"),
        ("api_key_file = 5", "api_key_file: Input is not a valid path"),
        ("port", "is not TOML"),
        ("port = 1 \x00", "is not TOML"),
        (None, "cannot be read: No such file"),
        ("", ""),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: str | None, said: str) -> None:
    """(J2) With the file's name, whatever is wrong."""
    file = tmp_path / "millpond.toml"
    if content is not None:
        file.write_text(content)
    if not said:
        assert read_config({}, {}, str(file)) == DEFAULTS
        return
    with pytest.raises(ConfigError) as refused:
        read_config({}, {}, str(file))
    assert str(refused.value).startswith(f"{file}: ")
    assert said in str(refused.value)


def test_a_file_that_is_no_text_or_no_file(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"model_name = '\xe9'")
    for path, said in ((tmp_path / "latin", "is not TOML"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=said):
            read_config({}, {}, str(path))


def millpond(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "millpond.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environ)


def test_the_command_refuses_at_once_and_in_one_line(tmp_path: Path) -> None:
    """(J2) From each source, before a model is looked for or an address is taken."""
    file = tmp_path / "millpond.toml"
    file.write_text("max_batch = 999\n")
    for arguments, environ, source in (
        (["--max-batch", "999"], {}, "--max-batch"),
        ([], {"MILLPOND_MAX_BATCH": "999"}, "MILLPOND_MAX_BATCH"),
        (["--config", str(file)], {}, f"{file}: max_batch"),
        ([], {"MILLPOND_CONFIG": str(file)}, f"{file}: max_batch"),
    ):
        done = millpond("serve", "no-such-model", *arguments, **environ)
        assert done.returncode == 1
        [line] = done.stderr.splitlines()
        assert line.startswith(f"millpond serve: {source}: ")
        assert "1 to 256" in line
        assert "999" in line


@pytest.mark.parametrize("host", ["..", "a" * 100, "no-such-host.invalid", "", "[::1]", "256.1.1.1"])
def test_a_host_that_is_none_is_refused(host: str) -> None:
    """(J2)"""
    done = millpond("serve", "no-such-model", f"--host={host}", "--port", "0")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(f"millpond serve: --host {host} --port 0: cannot listen there: ")


def test_help_names_every_setting_with_its_default() -> None:
    said = re.sub(r"\s+", " ", millpond("serve", "--help", COLUMNS="200").stdout)
    for name in ServeConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in said
    for default in ("Default: 8MiB.", "Default: 10m.", "Default: 30d.", "Default: 100GB.", "Default: 200."):
        assert default in said


def test_the_reference_is_up_to_date() -> None:
    """(J1) If this fails: make reference."""
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == reference()


def test_the_reference_has_every_setting_and_its_default_can_be_given() -> None:
    rows = [line.strip("| ").split(" | ") for line in reference().splitlines() if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == list(ServeConfig.model_fields)
    for name, default, *_ in rows:
        if default.strip():
            setting = name.strip("`")
            assert getattr(read_config({setting: default.strip("` ")}, {}), setting) == getattr(DEFAULTS, setting)


def test_the_example_of_the_documentation_works(tmp_path: Path) -> None:
    """Every TOML block in the pages about settings."""
    blocks = [
        block
        for page in ("configuration.md", "security.md")
        for block in re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    ]
    assert blocks
    for block in blocks:
        file = tmp_path / "example.toml"
        file.write_text(block)
        assert read_config({}, {}, str(file)).model_fields_set == set(tomllib.loads(block))
