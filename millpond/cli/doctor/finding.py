"""What the doctor says: one line about one thing and, unless all is well, what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """``state`` is ok, warn or fail. warn: it works, but slower or with less than it could. fail: ``millpond serve``
    would not start, or something that the settings ask for would not work. ``remedy`` is empty only for ok."""

    state: str
    subject: str
    text: str
    remedy: str = ""

    @property
    def lines(self) -> str:
        """For people, with what to do below."""
        line = f"{self.state:4}  {self.subject:9} {self.text}"
        return f"{line}\n                -> {self.remedy}" if self.remedy else line


def ok(subject: str, text: str) -> Finding:
    return Finding("ok", subject, text)


def warn(subject: str, text: str, remedy: str) -> Finding:
    return Finding("warn", subject, text, remedy)


def fail(subject: str, text: str, remedy: str) -> Finding:
    return Finding("fail", subject, text, remedy)


def shown(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
