"""A client that sends a server's worst bodies back to back until it is killed: ``hammer.py PORT NUMBER``."""

from __future__ import annotations

import http.client
import itertools
import sys

from worst_bodies import CHAT, PLAIN, worst

CHOSEN = (
    *("messages[0]", "messages[1]", "messages[10]", "messages[13]", "stop[2]", "no_such_field[1]", "no_such_field[2]"),
    *("prompt[0]", "prompt[3]", "prompt[4]", "prompt[7]", "prediction[1]", "logit_bias[0]"),
)


def main() -> None:
    port, number = int(sys.argv[1]), int(sys.argv[2])
    bodies = [(path, body) for path in (CHAT, PLAIN) for name, body in worst(path) if name in CHOSEN]
    print("begun", flush=True)
    begin = number * len(bodies) // 2
    for path, body in itertools.cycle(bodies[begin:] + bodies[:begin]):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("POST", path, body, {"content-type": "application/json"})
        connection.getresponse().read()
        connection.close()


if __name__ == "__main__":
    main()
