"""nginx and HAProxy on loopback with the files that we ship; only addresses, ports and paths are other ones."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from waiting import free_port, until

ROOT = Path(__file__).parents[2]
SHIPPED = {
    "nginx": ROOT / "deploy" / "nginx" / "millpond.conf",
    "haproxy": ROOT / "deploy" / "haproxy" / "millpond.cfg",
}
# Debian keeps both where only root's PATH leads.
_WHERE = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
PROGRAMS = {name: shutil.which(name, path=_WHERE) for name in SHIPPED}
START_SECONDS = 30
_NGINX = """
daemon off;
error_log stderr;
pid {folder}/nginx.pid;
{user}
worker_processes 2;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/millpond.conf;
}}
"""


class Balancer:
    """A program that runs, or could run, in front of two replicas."""

    def __init__(self, name: str, folder: Path, replicas: Sequence[str]) -> None:
        """``replicas`` are addresses with ports."""
        self.name = name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        program = PROGRAMS[name]
        assert program is not None
        text = _of(SHIPPED[name].read_text(encoding="utf-8"), replicas)
        if name == "nginx":
            text = _with(
                text, {"listen 8080;": f"listen 127.0.0.1:{self.port};", "/var/log/nginx/millpond.log": f"{folder}/log"}
            )
            (folder / "millpond.conf").write_text(text)
            # Started by root, the workers would otherwise be nobody, who may not enter the tests' folders.
            user = "user root;" if os.geteuid() == 0 else ""
            (folder / "nginx.conf").write_text(_NGINX.format(folder=folder, user=user))
            self.command = [program, "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]
            self.check = [*self.command, "-t"]
        else:
            text = _with(text, {"bind :8080": f"bind 127.0.0.1:{self.port}"})
            (folder / "millpond.cfg").write_text(text)
            self.command = [program, "-db", "-f", str(folder / "millpond.cfg")]
            self.check = [*self.command, "-c"]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        # What it says goes to a file: nobody would empty a pipe.
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(self.command, stdout=said, stderr=said)
            try:
                until(lambda: process.poll() is not None or self._listens(), patience=START_SECONDS)
                said.seek(0)
                assert process.poll() is None, said.read()
                yield
            finally:
                process.terminate()
                process.wait(20)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


def _of(text: str, replicas: Sequence[str]) -> str:
    """The file for these replicas: those that it does not name get a line like the last one."""
    for number in range(3, len(replicas) + 1):
        [last] = [line for line in text.splitlines(keepends=True) if f"127.0.0.1:{7999 + number}" in line]
        changes = {f":{7999 + number}": f":{8000 + number}"}
        changes |= {f"{word}{number - 1}": f"{word}{number}" for word in ("replica-", "id ") if word in last}
        text = text.replace(last, last + _with(last, changes))
    return _with(text, {f"127.0.0.1:{8001 + number}": replica for number, replica in enumerate(replicas)})


def _with(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text
