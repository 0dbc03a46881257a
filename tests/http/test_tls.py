"""HTTPS: the official client against a certificate of our own authority, bad pairs, and renewal while streams run."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from raw_client import connect, receive, send

from millpond.cli.certificate import BadCertificate, Certificate

if TYPE_CHECKING:
    from conftest import Server, StartServer

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")

CURVE = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
KEY = "alice-key-0123456789"


class Authority:
    """A certificate authority in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "root.pem"
        extension = ["-addext", "keyUsage=critical,keyCertSign"]
        self._openssl("req", "-x509", *CURVE, "-nodes", "-subj", "/CN=test root", "-days", "9", *extension, root="out")

    def issue(self, name: str) -> tuple[Path, Path]:
        """A certificate for this machine, and its key."""
        certificate, key, asked, extra = (self.folder / f"{name}.{kind}" for kind in ("pem", "key", "csr", "ext"))
        extra.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        self._openssl("req", *CURVE, "-nodes", "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(asked))
        signed = ["-CAcreateserial", "-days", "9", "-extfile", str(extra)]
        self._openssl("x509", "-req", "-in", str(asked), *signed, "-out", str(certificate), root="CA")
        return certificate, key

    def _openssl(self, *arguments: str, root: str = "") -> None:
        key = str(self.folder / "root.key")
        more = {"out": ["-out", str(self.root), "-keyout", key], "CA": ["-CA", str(self.root), "-CAkey", key], "": []}
        subprocess.run(["openssl", *arguments, *more[root]], check=True, capture_output=True)

    def trusting(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.root))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def secure(authority: Authority, start_server: StartServer) -> Iterator[Server]:
    """A server that speaks HTTPS and waits a second for a request."""
    certificate, key = authority.issue("secure")
    flags = ["tls_certificate", str(certificate), "tls_key", str(key), "body_timeout", "1"]
    with start_server("slow=0.02", *flags) as server:
        yield server
        assert server.stop() == 0
        assert not [line for line in server.lines if "Traceback" in line]


def client_of(server: Server, authority: Authority, key: str = "none") -> openai.OpenAI:
    http = openai.DefaultHttpxClient(verify=authority.trusting())
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=30, http_client=http)


def shown_by(server: Server, authority: Authority) -> str:
    """Whose certificate a new connection sees."""
    address = ("127.0.0.1", int(urlsplit(server.url).port or 0))
    with (
        socket.create_connection(address, 20) as plain,
        authority.trusting().wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        subject = (connection.getpeercert() or {})["subject"]
        return str(subject[0][0][1])


def test_the_official_client_over_https(secure: Server, authority: Authority) -> None:
    """(J1) Whole and streamed."""
    assert secure.url.startswith("https://127.0.0.1:")
    with client_of(secure, authority) as client:
        asked = {"model": "test-model", "prompt": "ab", "max_tokens": 4}
        assert client.completions.create(**asked).choices[0].text == "abab"  # type: ignore[call-overload]
        chunks = client.completions.create(**asked, stream=True)  # type: ignore[call-overload]
        assert "".join(chunk.choices[0].text for chunk in chunks) == "abab"


def test_who_does_not_trust_the_authority_does_not_connect(secure: Server) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{secure.url}/livez")


def test_plain_http_and_nonsense_on_the_secure_port_hurt_nobody(secure: Server, authority: Authority) -> None:
    port = int(urlsplit(secure.url).port or 0)
    for sent in (b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n", b"\x00" * 1000, b"\x16\x03\x01", b""):
        with connect(port) as connection:
            send(connection, [sent])
            connection.shutdown(socket.SHUT_WR)
            assert b"HTTP" not in receive(connection)
    with httpx.Client(verify=authority.trusting()) as client:
        assert client.get(f"{secure.url}/livez").status_code == 200


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_old_protocols_are_refused(secure: Server, authority: Authority) -> None:
    context = authority.trusting()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    port = int(urlsplit(secure.url).port or 0)
    with connect(port) as plain, context.wrap_socket(plain, server_hostname="localhost") as connection:
        assert connection.version() in ("TLSv1.2", "TLSv1.3")
    with contextlib.suppress(ssl.SSLError):  # newer libraries cannot even ask
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with connect(port) as plain, pytest.raises((ssl.SSLError, OSError)):
        context.wrap_socket(plain, server_hostname="localhost").close()


def test_half_a_request_is_cut_over_https_too(secure: Server, authority: Authority) -> None:
    with connect(int(urlsplit(secure.url).port or 0)) as plain:
        connection = authority.trusting().wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=True)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost:")
        assert receive(connection) == b""
        connection.close()


# --- refused at start ---------------------------------------------------------------------------------------------


def test_a_bad_pair_is_refused_with_what_is_wrong(authority: Authority, tmp_path: Path) -> None:
    """(J2) In words, naming setting and file; nobody is asked for a password."""
    certificate, key = authority.issue("first")
    _, other = authority.issue("second")
    nonsense, locked = tmp_path / "nonsense.pem", tmp_path / "locked.key"
    nonsense.write_text("-----BEGIN CERTIFICATE-----\nnonsense\n")
    command = ["openssl", "ec", "-in", str(key), "-aes128", "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    missing = tmp_path / "missing.pem"
    for pair, setting, why in (
        ((certificate, other), "tls_certificate, tls_key", "the key is not that of the certificate"),
        ((certificate, missing), f"tls_key: {missing}", "No such file"),
        ((missing, key), f"tls_certificate: {missing}", "No such file"),
        ((tmp_path, key), f"tls_certificate: {tmp_path}", "Is a directory"),
        ((nonsense, key), "tls_certificate, tls_key", "must be PEM files"),
        ((certificate, nonsense), "tls_certificate, tls_key", "must be PEM files"),
        ((key, certificate), "tls_certificate, tls_key", "must be PEM files"),
        ((certificate, locked), f"tls_key: {locked}", "has a password"),
    ):
        with pytest.raises(BadCertificate) as refused:
            Certificate(*pair)
        assert str(refused.value).startswith(setting)
        assert why in str(refused.value)


def test_a_mismatched_pair_stops_the_command_before_the_model_is_looked_for(authority: Authority) -> None:
    """(J2)"""
    (certificate, _), (_, key) = authority.issue("mine"), authority.issue("yours")
    command = [sys.executable, "-m", "millpond.cli.main", "serve", "no-such-model", "--port", "0"]
    flags = ["--tls-certificate", str(certificate), "--tls-key", str(key)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "the key is not that of the certificate" in done.stderr
    assert "no-such-model" not in done.stderr
    assert "Traceback" not in done.stderr


# --- SIGHUP -------------------------------------------------------------------------------------------------------


def test_sighup_renews_the_certificate(start_server: StartServer, authority: Authority, tmp_path: Path) -> None:
    """New connections see the new one, running streams go on; half a pair changes nothing, the keys included."""
    certificate, key, keys = tmp_path / "live.pem", tmp_path / "live.key", tmp_path / "keys"

    def install(pair: tuple[Path, Path]) -> None:
        for source, live in zip(pair, (certificate, key), strict=True):
            shutil.copy(source, live)

    old, new, newer = (authority.issue(name) for name in ("old", "new", "newer"))
    install(old)
    keys.write_text(f"alice {KEY}\n")
    flags = ["tls_certificate", str(certificate), "tls_key", str(key), "api_key_file", str(keys)]
    with start_server("slow=0.02", *flags) as server, client_of(server, authority, KEY) as client:
        stream = client.completions.create(model="test-model", prompt="ab", max_tokens=400, stream=True)
        pieces = [next(stream).choices[0].text]
        assert shown_by(server, authority) == "old"
        install(new)
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_line("read again keys=1 certificate=True")
        assert shown_by(server, authority) == "new"
        shutil.copy(newer[0], certificate)
        keys.write_text(f"alice {KEY}\nbob bob-key-0123456789\n")
        server.process.send_signal(signal.SIGHUP)
        assert " error " in server.wait_for_line("the key is not that of the certificate")
        assert shown_by(server, authority) == "new"
        with client_of(server, authority, "bob-key-0123456789") as bob, pytest.raises(openai.AuthenticationError):
            bob.models.list()
        install(newer)
        keys.write_text("short\n")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_line("line 1")
        assert shown_by(server, authority) == "new"
        keys.write_text(f"alice {KEY}\nbob bob-key-0123456789\n")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_line("read again keys=2 certificate=True")
        assert shown_by(server, authority) == "newer"
        pieces += [chunk.choices[0].text for chunk in stream]
        assert "".join(pieces) == "ab" * 200
        assert server.stop() == 0
