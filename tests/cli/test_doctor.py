"""millpond doctor as a process: settings, address, keys, certificates and disks."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from doctor_report import SECONDS, doctor, environment
from tiny_tokenizers import CHATML, byte_level_backend, write_folder

from millpond.cli.doctor import address, disk, settings, tls
from millpond.config import read_config

SCRIPTED_SERVER = Path(__file__).parent.parent / "http" / "scripted_server.py"
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


# --- all is well ------------------------------------------------------------------------------------------------


def test_a_sound_machine(tmp_path: Path) -> None:
    report = doctor("--cache-dir", str(tmp_path), "--cache-ssd", "1MB", "--ssd-min-free", "0")
    assert not report.failed
    expected = ("millpond", "system", "mlx", "mlx-lm", "packages", "device", "C part", "compiler", "memory", "settings")
    assert {*expected, "cache", "hub", "SSD tier", "files", "port"} <= report.state.keys()
    assert report.state["packages"] == report.state["settings"] == report.state["port"] == "ok"
    assert str(tmp_path) in report.text["SSD tier"]
    assert "cache_dir, cache_ssd, port, ssd_min_free" in report.text["settings"]


def test_for_people_every_line_has_a_state_and_what_to_do_stands_below() -> None:
    command = [sys.executable, "-m", "millpond.cli.main", "doctor", "--max-batch", "0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    lines = result.stdout.splitlines()
    assert result.returncode == 1
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        state = line.split()[0]
        assert state in ("ok", "warn", "fail", "->")
        assert following.strip().startswith("->") == (state in ("warn", "fail")), line
    assert any(line.startswith("fail  settings") and "--max-batch" in line for line in lines)


# --- settings ---------------------------------------------------------------------------------------------------


def test_bad_settings_wherever_they_come_from(tmp_path: Path) -> None:
    file = tmp_path / "millpond.toml"
    file.write_text("max_batch = 0\n")
    report = doctor("--config", str(file))
    assert report.failed == {"settings"}
    assert f"{file}: max_batch" in report.text["settings"]
    assert "port" not in report.state
    for flags, environ, name in (
        ({"drain_seconds": "soon"}, {}, "--drain-seconds"),
        ({}, {"MILLPOND_MAX_WAITING": "none"}, "MILLPOND_MAX_WAITING"),
    ):
        config, (finding,) = settings.read(flags, None, environ)
        assert config is None
        assert finding.state == "fail"
        assert name in finding.text


def test_a_variable_that_is_no_setting() -> None:
    report = doctor(MILLPOND_MAX_BATHC="3")
    assert report.state["settings"] == "warn"
    assert "MILLPOND_MAX_BATHC" in report.text["settings"]
    assert "MILLPOND_MAX_BATCH?" in report.remedy["settings"]


def test_an_installation_without_mlx(tmp_path: Path) -> None:
    (tmp_path / "mlx.py").write_text("raise ModuleNotFoundError('No module named mlx')")
    report = doctor(PYTHONPATH=str(tmp_path))
    assert report.failed == {"device"}
    assert "mlx cannot be imported" in report.text["device"]
    assert report.remedy["device"].startswith("install Millpond ")


# --- the port ---------------------------------------------------------------------------------------------------


def test_a_port_taken_by_another_program() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        # It accepts nothing and answers nothing.
        report = doctor("--port", str(port))
    assert report.failed == {"port"}
    assert str(port) in report.text["port"]
    assert "--port" in report.remedy["port"]


@contextlib.contextmanager
def millpond_server(folder: Path, *flags: str) -> Iterator[str]:
    """A running Millpond with a scripted engine; the port it has."""
    model = write_folder(
        folder, byte_level_backend(), {"eos_token": "<|endoftext|>", "chat_template": CHATML}, {"model_type": "llama"}
    )
    command = [sys.executable, str(SCRIPTED_SERVER), "plain", str(model), *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if "listening url=" in line)
            yield line.split("url=")[1].split()[0].rsplit(":", 1)[1]
        finally:
            process.terminate()
            process.communicate()


def test_a_port_taken_by_a_running_millpond(tmp_path: Path) -> None:
    with millpond_server(tmp_path / "model") as port:
        report = doctor("--port", port)
    assert report.state["port"] == "warn"
    assert "running Millpond" in report.text["port"]
    assert report.code == 0


@needs_openssl
def test_a_port_taken_by_a_running_millpond_with_tls(tmp_path: Path) -> None:
    certificate, key = pair(tmp_path, "one")
    flags = ("tls_certificate", str(certificate), "tls_key", str(key))
    with millpond_server(tmp_path / "model", *flags) as port:
        report = doctor("--port", port, "--tls-certificate", str(certificate), "--tls-key", str(key))
    assert "running Millpond" in report.text["port"]
    assert report.state["TLS"] == "ok"


def test_an_address_that_is_not_ours() -> None:
    report = doctor("--host", "192.0.2.1")
    assert report.failed == {"port"}
    for host in ("192.0.2.1", "no-such-host.invalid"):
        finding = address.port(read_config({"host": host, "port": "0"}, {}))
        assert finding.state == "fail"
        assert host in finding.text


# --- who may come in --------------------------------------------------------------------------------------------


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    report = doctor("--api-key-file", str(file))
    assert report.failed == {"keys"}
    assert str(file) in report.text["keys"]

    def found(**flags: str) -> list[tuple[str, str]]:
        return [(item.state, f"{item.text} {item.remedy}") for item in address.access(read_config(flags, {}))]

    file.write_text("short\n")
    ((state, said),) = found(api_key_file=str(file))
    assert state == "fail"
    assert "line 1" in said
    file.write_text("long-enough\n")
    file.chmod(0o644)
    ((state, said),) = found(api_key_file=str(file), host="0.0.0.0")
    assert state == "warn"
    assert "chmod 600" in said
    file.chmod(0o600)
    ((state, _),) = found(api_key_file=str(file), host="0.0.0.0")
    assert state == "ok"
    ((state, said),) = found(host="0.0.0.0")
    assert state == "warn"
    assert "--api-key-file" in said
    assert found() == []


def openssl(*arguments: str, cwd: Path) -> None:
    subprocess.run(["openssl", *arguments], cwd=cwd, check=True, capture_output=True, timeout=SECONDS)


def pair(folder: Path, name: str, days: int = 90) -> tuple[Path, Path]:
    """A certificate that signs itself, and its key."""
    key, certificate = folder / f"{name}.key", folder / f"{name}.pem"
    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(key))
    openssl("req", "-x509", *new, "-out", str(certificate), "-days", str(days), "-subj", "/CN=localhost", cwd=folder)
    return certificate, key


def expired(folder: Path, key: Path) -> Path:
    """A certificate that was good in 2020."""
    (folder / "index.txt").touch()
    (folder / "serial").write_text("01\n")
    (folder / "ca.cnf").write_text(
        "[ca]\ndefault_ca=d\n[d]\ndatabase=index.txt\nserial=serial\nnew_certs_dir=.\ndefault_md=sha256\npolicy=p\n"
        "[p]\ncommonName=supplied\n"
    )
    openssl("req", "-new", "-key", str(key), "-out", "csr", "-subj", "/CN=localhost", cwd=folder)
    dates = ("-startdate", "20200101000000Z", "-enddate", "20200201000000Z")
    signing = ("-selfsign", "-keyfile", str(key), "-in", "csr", "-out", "old.pem", "-notext", "-batch")
    openssl("ca", "-config", "ca.cnf", *dates, *signing, cwd=folder)
    return folder / "old.pem"


@needs_openssl
def test_certificates(tmp_path: Path) -> None:
    certificate, key = pair(tmp_path, "good")
    soon, soon_key = pair(tmp_path, "soon", days=3)
    locked, garbage = tmp_path / "locked.key", tmp_path / "garbage.pem"
    openssl("pkey", "-in", str(key), "-aes256", "-passout", "pass:secret", "-out", str(locked), cwd=tmp_path)
    garbage.write_text("no certificate\n")
    for used, used_key, state, said in (
        (certificate, key, "ok", "until 20"),
        (certificate, soon_key, "fail", "is not the key of"),
        (tmp_path / "missing.pem", key, "fail", "missing.pem cannot be read"),
        (certificate, tmp_path / "missing.key", "fail", "missing.key cannot be read"),
        (certificate, locked, "fail", "passphrase"),
        (garbage, key, "fail", "garbage.pem"),
        (soon, soon_key, "warn", "expires on 20"),
        (expired(tmp_path, key), key, "fail", "expired"),
    ):
        config = read_config({"tls_certificate": str(used), "tls_key": str(used_key)}, {})
        (finding,) = tls.findings(config)
        assert (finding.state, said in finding.text) == (state, True), finding


@needs_openssl
def test_a_certificate_with_another_key(tmp_path: Path) -> None:
    certificate, _ = pair(tmp_path, "one")
    _, other = pair(tmp_path, "other")
    report = doctor("--tls-certificate", str(certificate), "--tls-key", str(other))
    assert report.failed == {"TLS"}
    assert "is not the key of" in report.text["TLS"]


# --- disks ------------------------------------------------------------------------------------------------------


def test_cache_folders_that_are_files(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    report = doctor("--cache-ssd", "1MB", MILLPOND_CACHE=str(file / "below"), HF_HUB_CACHE=str(file))
    assert report.failed == {"SSD tier"}  # which was asked for; the others only cost time
    assert report.state["cache"] == report.state["hub"] == "warn"
    assert "MILLPOND_CACHE" in report.remedy["cache"]
    assert "HF_HUB_CACHE" in report.remedy["hub"]
    assert "--cache-dir" in report.remedy["SSD tier"]


def test_folders_that_cannot_be_used_only_cost_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MILLPOND_CACHE", str(tmp_path / "file"))
    found = [*disk.caches(), disk.ssd(read_config({}, {}))]
    assert [finding.state for finding in found if str(tmp_path) in finding.text] == ["warn", "warn"]
    monkeypatch.setenv("MILLPOND_CACHE", "~nobody-of-this-name/cache")
    cache, *_, tier = [*disk.caches(), disk.ssd(read_config({}, {}))]
    assert (cache.state, tier.state) == ("warn", "warn")
    assert "MILLPOND_CACHE=FOLDER" in cache.remedy


def test_a_cache_that_others_may_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLPOND_CACHE", str(tmp_path))
    assert [finding.state for finding in disk.caches() if finding.subject == "cache"] == ["ok"]
    tmp_path.chmod(0o770)
    assert [finding.state for finding in disk.caches() if finding.subject == "cache"] == ["ok", "warn"]


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk that is mounted read-only."""
    folder = tmp_path / "read only"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("may not mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_disk(read_only: Path) -> None:
    report = doctor("--cache-dir", str(read_only / "a" / "b"), "--cache-ssd", "1MB", MILLPOND_CACHE=str(read_only))
    assert report.failed == {"SSD tier"}
    assert "ead-only" in report.text["cache"]


def test_an_ssd_tier_without_room(tmp_path: Path) -> None:
    folder = ("--cache-dir", str(tmp_path))
    report = doctor(*folder, "--cache-ssd", "1MB", "--ssd-min-free", "900PB")
    assert report.state["SSD tier"] == "warn"
    assert "--ssd-min-free" in report.remedy["SSD tier"]
    assert not report.failed
    finding = disk.ssd(read_config({"cache_dir": str(tmp_path), "cache_ssd": "900PB", "ssd_min_free": "0"}, {}))
    assert finding.state == "warn"
    assert "--cache-ssd" in finding.remedy


@pytest.mark.skipif(not Path("/dev/shm").is_dir() or disk.file_system(Path("/dev/shm")) != "tmpfs", reason="no tmpfs")
def test_an_ssd_tier_in_memory() -> None:
    report = doctor("--cache-dir", "/dev/shm/millpond-no-such-folder", "--cache-ssd", "1MB", "--ssd-min-free", "0")
    assert report.state["SSD tier"] == "warn"
    assert "tmpfs" in report.text["SSD tier"]
    assert not Path("/dev/shm/millpond-no-such-folder").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's list of mounts")
def test_what_kind_of_file_system_a_folder_is_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        "30 22 0:44 / /data rw - xfs /dev/vdb rw\n"
        "31 22 0:45 / /data rw shared:3 master:1 - nfs4 server:/export rw\n"
        "32 22 0:46 / /my\\040disk rw - cifs //server/share rw\n"
        "33 22 0:47 / /remote rw - fuse.sshfs host: rw\n"
    )
    monkeypatch.setattr(disk, "MOUNTS", mounts)
    kinds = {path: disk.file_system(Path(path)) for path in ("/x", "/data/x", "/database", "/my disk/x/y", "/remote")}
    assert list(kinds.values()) == ["ext4", "nfs4", "ext4", "cifs", "fuse.sshfs"]
    network = {path for path, kind in kinds.items() if disk.NETWORK.fullmatch(kind)}
    assert network == {"/data/x", "/my disk/x/y", "/remote"}
