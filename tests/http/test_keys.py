"""API keys, as a hostile client would try them, on real sockets: what opens, what is never told, when they change."""

from __future__ import annotations

import hmac
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import openai
import pytest
from plain_http import bearer, get, one_answer, port_of
from raw_client import connect

from millpond.http.app import ROUTES
from millpond.http.keys import BadKeys, Keys

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Launch, Server, StartServer

ALICE, BOB, NAMELESS, BY_FLAG = (f"{name}-key-0123456789" for name in ("alice", "bob", "nameless", "flag"))
FILE = f"# who may come in\n\nalice   {ALICE}\n\tbob\t{BOB}  \n{NAMELESS}\n"
ASK = {"model": "test-model", "prompt": "ab", "max_tokens": 4}


# --- keys ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys from a flag and from a file."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(FILE)
    flags = ["api_key", f"{BY_FLAG}, another-{BY_FLAG}", "api_key_file", str(file)]
    with start_server("plain", *flags) as server:
        yield server
        assert server.stop() == 0
        assert not [line for line in server.lines if "key-0123456789" in line or "Traceback" in line]


@pytest.mark.parametrize("key", [ALICE, BOB, NAMELESS, BY_FLAG, f"another-{BY_FLAG}"])
def test_each_key_opens(guarded: Server, key: str) -> None:
    """(B8) From flag and file, as Bearer in any case and with any blanks, and as x-api-key."""
    for header in (f"Bearer {key}", f"bearer {key}", f"BEARER  {key} ", f"Bearer\t{key}"):
        assert get(guarded, "/v1/models", b"Authorization: " + header.encode()).status == 200, header
    assert get(guarded, "/v1/models", b"X-API-Key: " + key.encode()).status == 200
    # Some programs always send an authorization of their own.
    for other in (b"Authorization: Basic YTpi", b"Authorization: Bearer", b"Authorization: Bearer "):
        assert get(guarded, "/v1/models", other, b"x-api-key: " + key.encode()).status == 200, other


ODD_HEADERS = [
    b"",
    b"authorization:",
    b"authorization: Bearer",
    b"authorization: Bearer  ",
    b"authorization: " + ALICE.encode(),
    b"authorization: Basic " + ALICE.encode(),
    b"authorization: Bearer " + ALICE.encode()[:-1],
    b"authorization: Bearer " + ALICE.encode() + b"x",
    b"authorization: Bearer " + ALICE.upper().encode(),
    b"authorization: Bearer " + ALICE.encode() + b" " + BOB.encode(),
    b"authorization: Bearer " + ALICE.encode() + b"," + BOB.encode(),
    b'authorization: Bearer "' + ALICE.encode() + b'"',
    b"authorization: Bearer alice",
    b"authorization: Bearer #",
    b"authorization: Bearer \xff\xfe\x80\xe9",
    "authorization: Bearer schlüssel-Ω-鍵".encode(),
    b"\x61uthorization: \xa0Bearer\xa0" + ALICE.encode(),
    b"authorization: Bearer " + b"x" * 12_000,
    b"authorization: " + b", " * 5_000,
    b"authorization: Bearer wrong\r\nauthorization: Bearer " + ALICE.encode(),
    b"x-api-key:",
    b"x-api-key: \xff" + ALICE.encode(),
    b"x-api-key: " + b"y" * 12_000,
    b"cookie: authorization=Bearer " + ALICE.encode(),
]


@pytest.mark.parametrize("header", ODD_HEADERS, ids=range(len(ODD_HEADERS)))
def test_nothing_else_opens_and_nothing_raises(guarded: Server, header: bytes) -> None:
    """(B4, B8)"""
    refused = get(guarded, "/v1/models", *([header] if header else []))
    assert (refused.status, refused.error_code()) == (401, "invalid_api_key")
    assert refused.headers["www-authenticate"] == "Bearer"
    assert "key-0123456789" not in refused.body.decode()


@pytest.mark.parametrize("header", [b"authorization: Bearer \x00", b"authorization : Bearer x", b"bad"])
def test_what_is_no_header_is_a_400(guarded: Server, header: bytes) -> None:
    refused = get(guarded, "/v1/models", header)
    assert (refused.status, refused.error_code()) == (400, "bad_http")


def test_a_huge_header_hurts_nobody(guarded: Server) -> None:
    refused = get(guarded, "/v1/models", b"authorization: Bearer " + b"x" * 2_000_000)
    assert refused.status in (400, 401)
    assert get(guarded, "/livez").status == 200


PROBES = {"/livez", "/readyz", "/health"}
"""What may be open: said here anew, so that a path that is opened by mistake is noticed."""


def test_only_the_probes_are_open(guarded: Server) -> None:
    """(B8) Whatever routes there are or will be."""
    paths = {route.path.replace("{model:path}", "test-model") for route in ROUTES}
    assert paths >= PROBES
    for path in sorted(paths | {"/", "/v1/nothing", "//metrics", "/livez/", "/v1/../livez", "/LIVEZ", "/livez%2f"}):
        assert get(guarded, path).status == (200 if path in PROBES else 401), path


def test_the_official_client_with_and_without_a_valid_key(guarded: Server) -> None:
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=BOB, max_retries=0) as client:
        assert client.completions.create(**ASK).choices[0].text == "abab"  # type: ignore[call-overload]
        assert "".join(
            chunk.choices[0].text
            for chunk in client.completions.create(**ASK, stream=True)  # type: ignore[call-overload]
        )
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="bob-key-wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            client.models.list()
        assert refused.value.code == "invalid_api_key"


def test_the_log_names_the_owner_and_never_the_key(guarded: Server) -> None:
    for number, key in enumerate((ALICE, NAMELESS)):
        httpx.get(f"{guarded.url}/v1/models", headers={**bearer(key), "x-request-id": f"owner-{number}"})
    assert "owner=alice" in guarded.wait_for_line("id=owner-0")
    assert "owner=key-" in guarded.wait_for_line("id=owner-1")
    httpx.get(f"{guarded.url}/v1/models?api_key={ALICE}", headers={**bearer("wrong"), "x-request-id": "owner-2"})
    assert "refused=invalid_api_key" in guarded.wait_for_line("id=owner-2")
    assert not any("key-0123456789" in line for line in guarded.lines)


def test_every_known_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """(B8) Whichever key matches, and also when none does."""
    compared: list[tuple[bytes, bytes]] = []
    original = hmac.compare_digest

    def compare(known: bytes, shown: bytes) -> bool:
        compared.append((known, shown))
        return original(known, shown)

    monkeypatch.setattr("millpond.http.keys.hmac.compare_digest", compare)
    file = tmp_path / "keys"
    file.write_text(FILE)
    keys = Keys([BY_FLAG], file)
    for shown, owner in ((BY_FLAG, "key-"), (ALICE, "alice"), (NAMELESS, "key-"), ("none of them", "None")):
        compared.clear()
        assert str(keys.owner(shown.encode())).startswith(owner)
        assert len({known for known, _ in compared}) == len(compared) == 4
        assert len({len(part) for pair in compared for part in pair}) == 1, "digests, so that lengths tell nothing"


BAD_LINES = {
    "short": "too short",
    "three": f"alice {ALICE} # laptop",
    "comment": f"{ALICE} #comment-behind",
    "not-ascii": "alice schlüssel-0123456789",
    "reversed": f"sk-{'0123456789' * 4} alice-laptop",
    "control": f"alice {ALICE}\x07",
    "twice": f"carol {BOB}",
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named_without_its_key(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# comment\n\nbob {BOB}\n{line}\n", encoding="utf-8")
    with pytest.raises(BadKeys) as refused:
        Keys([], file)
    message = str(refused.value)
    assert message.startswith(f"api_key_file: {file}, line 4: ")
    assert not any(word in message for word in line.split() if len(word) > 7)


@pytest.mark.parametrize("content", [b"", b"# nobody\n\n", b"\xff\xfe\x00k", None])
def test_a_file_without_keys_opens_nothing(tmp_path: Path, content: bytes | None) -> None:
    """An empty key file must not mean: no keys, so everybody may come in."""
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    for given in ([], [BY_FLAG]) if content is None else ([],):
        with pytest.raises(BadKeys) as refused:
            Keys(given, file)
        assert str(refused.value).startswith(f"api_key_file: {file} ")


@pytest.mark.parametrize("key", ["short", "with a space", "schlüssel-0123", "tab\tin-the-key", "#commented-out"])
def test_a_bad_key_by_flag_is_refused_by_its_number(key: str) -> None:
    with pytest.raises(BadKeys) as refused:
        Keys([BY_FLAG, key], None)
    assert str(refused.value).startswith("api_key: key 2: ")
    assert key not in str(refused.value)


def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice {ALICE}\n", encoding="utf-8-sig")
    assert Keys([], file).owner(ALICE.encode()) == "alice"


# --- order: size, key, place --------------------------------------------------------------------------------------


def test_a_body_without_a_key_is_not_read(guarded: Server) -> None:
    """(B8) Declared or chunked, large or small, announced with Expect: the answer comes before a byte of it."""
    for headers in (
        b"content-length: 7000000",
        b"transfer-encoding: chunked",
        b"content-length: 70\r\nexpect: 100-continue",
        b"content-length: 7000000\r\nauthorization: Bearer wrong-key-0123",
    ):
        refused = one_answer(guarded, b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n" + headers + b"\r\n\r\n")
        assert (refused.status, refused.error_code()) == (401, "invalid_api_key"), headers


def test_an_absurd_length_is_refused_before_the_key(guarded: Server) -> None:
    """(B8) Size first: the number alone is enough, with a key or without."""
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {10**15}\r\n"
    for key in ("", f"authorization: Bearer {ALICE}\r\n"):
        refused = one_answer(guarded, f"{head}{key}\r\n".encode())
        assert (refused.status, refused.error_code()) == (413, "request_too_large")


def test_who_has_no_key_holds_no_place(guarded: Server) -> None:
    """(B8) Connections with unread bodies and refused requests leave places and counters alone."""
    before = guarded.health()["requests"]
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n"
    connections = [connect(port_of(guarded)) for _ in range(20)]
    try:
        for connection in connections:
            connection.sendall(head + b"{" * 1000)
        for connection in connections:
            assert connection.recv(12) == b"HTTP/1.1 401"
        assert guarded.health()["requests"] == before
        with httpx.Client(base_url=guarded.url, headers=bearer(ALICE)) as client:
            assert client.post("/v1/completions", json=ASK).status_code == 200
    finally:
        for connection in connections:
            connection.close()


# --- SIGHUP -------------------------------------------------------------------------------------------------------


def test_sighup_reads_keys_again_and_disturbs_nobody(start_server: StartServer, tmp_path: Path) -> None:
    """(B8) A revoked key is refused, a new one accepted, a running stream goes on; a broken file changes nothing."""
    file = tmp_path / "keys"
    file.write_text(FILE)

    def status(server: Server, key: str) -> int:
        return httpx.get(f"{server.url}/v1/models", headers=bearer(key)).status_code

    with start_server("slow=0.02", "api_key_file", str(file), "api_key", BY_FLAG) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=ALICE, max_retries=0) as client:
            stream = client.completions.create(model="test-model", prompt="ab", max_tokens=300, stream=True)
            pieces = [next(stream).choices[0].text]
            file.write_text(f"carol carol-key-0123456789\nbob {BOB}\n")
            server.process.send_signal(signal.SIGHUP)
            assert "read again" in server.wait_for_line("keys=3")
            assert status(server, ALICE) == 401
            assert [status(server, key) for key in (BOB, "carol-key-0123456789", BY_FLAG)] == [200] * 3
            for broken, why in (
                (f"bob {BOB}\nshort\n".encode(), "line 2"),
                (b"\xff\xff", "codec can't decode"),
                (None, "No such file"),
            ):
                file.unlink()
                if broken is not None:
                    file.write_bytes(broken)
                server.process.send_signal(signal.SIGHUP)
                line = server.wait_for_line(why)
                assert " error millpond.serve: nothing was read again " in line
                assert "key-0123456789" not in line
                assert [status(server, key) for key in (BOB, ALICE)] == [200, 401]
            pieces += [chunk.choices[0].text for chunk in stream]
            assert "".join(pieces) == "ab" * 150
        assert server.process.poll() is None
        assert server.stop() == 0


def test_sighup_without_anything_to_read_is_harmless(start_server: StartServer) -> None:
    """Also while the model loads."""
    with start_server("load=1", ready=False) as server:
        assert server.url
        for _ in range(3):
            server.process.send_signal(signal.SIGHUP)
        server.wait_for_line("read again")
        server.wait_for_line("ready api=")
        assert server.stop() == 0


def test_sighup_before_anything_listens_does_not_end_the_start() -> None:
    """While a model is downloaded, say; a service manager takes that death for an orderly one and leaves it."""
    program = (
        "import os, signal, sys\n"
        "import millpond.hub.source\n"
        "from millpond.cli.main import main\n"
        "from millpond.hub.errors import SourceError\n"
        "def resolve(*_):\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    raise SourceError('alive')\n"
        "millpond.hub.source.resolve = resolve\n"
        "sys.exit(main(['serve', 'demo', '--port', '0']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "millpond serve: alive")


# --- what others on the machine can see ---------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_key_is_on_a_command_line_unless_it_was_given_there(
    launch: Launch, byte_tokenizer: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(FILE)
    program = str(Path(__file__).with_name("scripted_server.py"))
    with launch([sys.executable, program, "plain", str(byte_tokenizer), "api_key_file", str(file)]) as server:
        for pid in (server.process.pid, server.engine_pid()):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            assert b"python" in line
            assert b"key-0123456789" not in line
            assert Path(f"/proc/{pid}/environ").stat().st_mode & 0o077 == 0, (
                "nor can others read what it was started with"
            )
