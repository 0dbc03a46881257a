"""Two network namespaces with a slow, lossy link between them, and a command that runs in the first. Linux, as root.

The link is two TAP devices and this process between them, which delays and drops Ethernet frames; no kernel module is
needed. The command finds a hostfile for two ranks in SOAK_HOSTFILE, and in SOAK_SSH a stand-in for ssh that runs what
it is given in the second namespace.

    python benchmarks/lossy_link.py --delay-ms 2 --loss 0.5 -- COMMAND ...
"""

from __future__ import annotations

import argparse
import fcntl
import heapq
import json
import os
import random
import selectors
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
ADDRESSES = ("10.77.0.1", "10.77.0.2")
FRAME = 65536


def ip(*words: str) -> None:
    """Run ip(8)."""
    subprocess.run(["ip", *words], check=True)


def tap(namespace: str, address: str) -> int:
    """A TAP device inside a namespace; the descriptor stays here."""
    name = f"kv{os.getpid() % 100000}{address[-1]}"
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
    ip("link", "set", name, "netns", namespace)
    ip("-n", namespace, "addr", "add", f"{address}/24", "dev", name)
    ip("-n", namespace, "link", "set", name, "up")
    ip("-n", namespace, "link", "set", "lo", "up")
    return descriptor


def relay(ends: tuple[int, int], delay: float, loss: float, process: subprocess.Popen[bytes]) -> dict[str, int]:
    """Pass frames on until the command has ended. Returns what was passed and dropped."""
    chance, counts = random.Random(1), {"passed": 0, "dropped": 0}
    waiting: list[tuple[float, int, int, bytes]] = []
    watched = selectors.DefaultSelector()
    for place, end in enumerate(ends):
        watched.register(end, selectors.EVENT_READ, ends[1 - place])
    while process.poll() is None:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.2
        for key, _ in watched.select(min(timeout, 0.2)):
            frame = os.read(key.fd, FRAME)
            if chance.random() < loss:
                counts["dropped"] += 1
                continue
            counts["passed"] += 1
            heapq.heappush(waiting, (time.monotonic() + delay, counts["passed"], key.data, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, end, frame = heapq.heappop(waiting)
            try:
                os.write(end, frame)
            except BlockingIOError:
                counts["dropped"] += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay-ms", type=float, default=2.0, help="each way")
    parser.add_argument("--loss", type=float, default=0.5, help="per cent of the frames, each way")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    names = [f"millpond-{os.getpid()}-{side}" for side in "ab"]
    with tempfile.TemporaryDirectory() as folder:
        hostfile, ssh = Path(folder) / "hosts.json", Path(folder) / "ssh"
        hosts = [{"ssh": name, "ips": [address]} for name, address in zip(("first", "second"), ADDRESSES, strict=True)]
        hostfile.write_text(json.dumps({"backend": "ring", "hosts": hosts}))
        # The last argument is the command line that ssh would hand to a shell.
        ssh.write_text(f'#!/bin/bash\nexec ip netns exec {names[1]} /bin/bash -c "${{@: -1}}"\n')
        ssh.chmod(0o700)
        made: list[str] = []
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ends = tap(names[0], ADDRESSES[0]), tap(names[1], ADDRESSES[1])
            environment = {**os.environ, "SOAK_HOSTFILE": str(hostfile), "SOAK_SSH": str(ssh)}
            process = subprocess.Popen(["ip", "netns", "exec", names[0], *command], env=environment)
            counts = relay(ends, args.delay_ms / 1000, args.loss / 100, process)
            print(f"frames: {counts['passed']} passed, {counts['dropped']} dropped")
            return process.returncode
        finally:
            for name in made:
                ip("netns", "del", name)


if __name__ == "__main__":
    sys.exit(main())
