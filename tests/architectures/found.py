"""What is found out about an architecture, and where it is kept."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import msgspec

FILE = Path(__file__).parent / "found.json"
SAME = "same"
TIE = "tie"
NEXT_TURN = "next turn"


class Answers(msgspec.Struct, frozen=True):
    """Answers of some requests beside those of mlx-lm, one sequence at a time."""

    word: str
    """SAME; TIE where two tokens were as likely; or what is wrong."""
    apart: float = 0.0
    """Largest difference of a token's log probability."""

    @property
    def right(self) -> bool:
        return self.word in (SAME, TIE)


class Report(msgspec.Struct, omit_defaults=True):
    """An architecture on one kind of device."""

    name: str
    gpu: bool
    """As on a GPU: MLX's own attention and rotary embeddings; otherwise as on a CPU."""
    stage: str = "build"
    """What was begun last; "done" at the end."""
    alien: str = ""
    """Why mlx-lm itself cannot run it here; empty when it can."""
    refused: str = ""
    """Why Millpond does not load it; empty when it does."""
    kinds: list[str] = []
    """Of its leaves."""
    solo: str = ""
    """Why it is not batched; empty when it is."""
    forward_only: str = ""
    """Why draft tokens cannot be taken back; empty when they can."""
    uncached: str = ""
    native: bool = False
    pipelined: bool = False
    answers: dict[str, Answers] = {}
    """By what was asked: alone, batched, late, hit, next turn, guessed."""
    accepted: int = 0
    rejected: int = 0
    """Draft tokens."""
    unpacked: str = ""
    """Why its keys and values cannot be kept in 8 bits, or what is wrong then; empty when they can."""
    rereads: str = ""
    """Why an answer that is read again gives other numbers, in mlx-lm itself; empty where it does not."""
    undivided: str = ""
    """Why ranks cannot share it; empty when two can."""

    @property
    def loads(self) -> bool:
        return not self.alien and not self.refused

    @property
    def wrong(self) -> list[str]:
        """What was asked and answered otherwise, but for what mlx-lm does not answer the same way itself."""
        return [
            f"{asked}: {answers.word}"
            for asked, answers in self.answers.items()
            if not answers.right and not (asked == NEXT_TURN and self.rereads)
        ]

    @property
    def in_slots(self) -> bool:
        return self.loads and not self.solo and self.stage == "done" and not self.wrong


class Found(msgspec.Struct):
    """All of them."""

    mlx_lm: str = ""
    mlx: str = ""
    reports: list[Report] = []

    def put(self, report: Report) -> None:
        """Instead of what was found before."""
        self.mlx_lm, self.mlx = version("mlx-lm"), version("mlx")
        self.reports = [one for one in self.reports if (one.name, one.gpu) != (report.name, report.gpu)]
        self.reports.append(report)
        self.reports.sort(key=lambda one: (one.name.lower(), not one.gpu))

    def by_name(self) -> dict[str, list[Report]]:
        """As on a GPU, as on a CPU."""
        found: dict[str, list[Report]] = {}
        for report in self.reports:
            found.setdefault(report.name, []).append(report)
        return found


DECODER = msgspec.json.Decoder(Found)
REPORT_DECODER = msgspec.json.Decoder(Report)


def read() -> Found:
    return DECODER.decode(FILE.read_bytes()) if FILE.exists() else Found()


def write(found: Found) -> None:
    versions = msgspec.json.encode({"mlx_lm": found.mlx_lm, "mlx": found.mlx})
    lines = b",\n".join(map(msgspec.json.encode, found.reports))  # one each, so that a change shows where it is
    FILE.write_bytes(b'%b,"reports":[\n%b\n]}\n' % (versions[:-1], lines))
