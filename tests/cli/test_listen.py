"""Addresses and names of ``millpond serve``: every family of a host, one port, one server (B8, A6)."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from millpond.cli.listen import bind, listen_on, url_of
from millpond.cli.serve import StartError
from millpond.config import ServeConfig
from millpond.http.names import ModelNames
from millpond.hub.progress import SilentProgress
from millpond.hub.source import resolve

V4 = (socket.AF_INET, ("127.0.0.1", 0))
V6 = (socket.AF_INET6, ("::1", 0, 0, 0))


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


@contextlib.contextmanager
def closing(listeners: list[socket.socket]) -> Iterator[list[socket.socket]]:
    try:
        yield listeners
    finally:
        for listener in listeners:
            listener.close()


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
@pytest.mark.parametrize("addresses", [[V4, V6], [V6, V4]])
def test_all_addresses_of_a_name_have_one_port(
    addresses: list[tuple[socket.AddressFamily, tuple[object, ...]]],
) -> None:
    with closing(listen_on(addresses)) as listeners:
        assert len(listeners) == 2
        [port] = {listener.getsockname()[1] for listener in listeners}
        for family, (host, *_) in addresses:
            with socket.socket(family) as client:
                client.connect((host, port))
        assert url_of(listeners, "localhost", "http") == f"http://localhost:{port}"


def test_addresses_that_the_machine_does_not_have_are_left_out() -> None:
    elsewhere = (socket.AF_INET, ("192.0.2.1", 0))
    with closing(listen_on([elsewhere, V4])) as listeners:
        assert [listener.getsockname()[0] for listener in listeners] == ["127.0.0.1"]
        assert url_of(listeners, "name", "https") == f"https://127.0.0.1:{listeners[0].getsockname()[1]}"
    with pytest.raises(OSError, match="assign") as caught:
        listen_on([elsewhere])
    assert caught.value.errno == errno.EADDRNOTAVAIL


def test_of_two_servers_on_one_port_the_second_hears_of_it_at_once() -> None:
    """Though neither has begun to serve."""
    with closing(bind(ServeConfig(port=0))) as [first]:
        port = first.getsockname()[1]
        with pytest.raises(StartError, match=rf"--port {port}: cannot listen there: .*another --port$"):
            bind(ServeConfig(port=port))


def test_a_linked_folder_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "data" / "v3"
    real.mkdir(parents=True)
    (real / "config.json").write_text("{}")
    (real / "model.safetensors").touch()
    link = tmp_path / "current"
    link.symlink_to(real)
    found = resolve(str(link), SilentProgress())
    assert (found.name, found.path) == ("current", real)
    names = ModelNames.of("", str(link), found.name, found.path)
    assert names == ModelNames("current", frozenset({"current", str(link), "v3"}))
    monkeypatch.chdir(real)
    assert [resolve(name, SilentProgress()).name for name in (".", "../v3")] == ["v3", "v3"]
    (real / "below").mkdir()
    monkeypatch.chdir(real / "below")
    assert resolve("..", SilentProgress()).name == "v3"
