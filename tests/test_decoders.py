"""A decoder is made once, before threads: msgspec's description of a type is half-made while it is first asked for."""

from __future__ import annotations

import ast
from pathlib import Path

from fresh_python import run_python

import millpond

PACKAGE = Path(millpond.__file__).parent
ONE_THREAD = {PACKAGE / "model" / "remember.py"}
"""Is given the type, and runs on the engine's thread alone."""


def test_no_type_is_described_at_its_first_message() -> None:
    late = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sorted(set(PACKAGE.rglob("*.py")) - ONE_THREAD)
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (
            node.func.attr == "Decoder" or (node.func.attr == "decode" and any(k.arg == "type" for k in node.keywords))
        )
    ]
    assert late == []


FIRST_RECORDS = """
import sys, threading, xxhash
from millpond.prefix.disk import block_file
sys.setswitchinterval(1e-6)
header = b"\\x92\\xa1n\\x98" + b"\\xa1k" * 8
prefix = block_file._PREFIX.pack(block_file._MAGIC, block_file.VERSION, len(header), 0, xxhash.xxh3_64_digest(header))
file = prefix + header
together = threading.Barrier(16)

def read():
    together.wait()
    try:
        block_file.decode_head(file, block_file.layout(file).file_bytes)
    except block_file.DamagedRecord:
        pass

threads = [threading.Thread(target=read) for _ in range(16)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


def test_many_threads_may_read_the_first_record() -> None:
    """(F) One in five such processes died when the type was described then."""
    for _ in range(8):
        done = run_python(FIRST_RECORDS)
        assert (done.returncode, done.stderr) == (0, "")
