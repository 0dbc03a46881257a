"""(A6) What Millpond starts imports what is installed, wherever it was started."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import CONFIGS, save
from tiny_tokenizers import CHATML, byte_level_backend, write_folder

import millpond
from millpond.child import inherited, python
from millpond.client.engine import ENGINE_COMMAND
from millpond.launch.followers import RANK_COMMAND

PACKAGE = Path(millpond.__file__).parent
HOSTILE = (
    "millpond",
    "mlx",
    "mlx_lm",
    "numpy.py",
    "types.py",
    "tokenizers.py",
    "json.py",
    "pip",
    "uvicorn",
    "signal.py",
)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder where much is found that looks like modules, and ends whoever imports it."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in HOSTILE:
        file = folder / name if name.endswith(".py") else folder / name / "__init__.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"import os\nos.write(2, b'imported from here: {name}')\nos._exit(99)\n")
    return folder


def run(command: tuple[str, ...], cwd: Path, *, said: str = "", more: bool = True) -> subprocess.CompletedProcess[str]:
    """``more``: its standard input stays open."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as keyboard:
        keyboard.write(said)
        keyboard.flush() if more else keyboard.close()
        with os.fdopen(reading) as stdin:
            return subprocess.run(
                command,
                cwd=cwd,
                env=inherited({}),
                stdin=stdin,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )


@pytest.mark.parametrize(
    "command",
    [ENGINE_COMMAND, RANK_COMMAND, python("-m", "millpond.cli.held"), python("-m", "pip")],
    ids=lambda c: c[-1],
)
def test_no_child_imports_from_the_folder_it_starts_in(
    command: tuple[str, ...], hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not through empty entries of PYTHONPATH either, which mean that folder; its other entries stay."""
    (hostile.parent / "elsewhere").mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("", str(hostile.parent / "elsewhere"), "")))
    done = run((*command, "--help"), hostile)
    assert (done.returncode, done.stderr) == (0, "")
    assert inherited({})["PYTHONPATH"] == str(hostile.parent / "elsewhere")
    # The folder is what it claims to be.
    assert run((sys.executable, "-c", "import numpy"), hostile).returncode == 99


def test_python_is_started_in_one_way_only() -> None:
    """Whoever starts it without ``millpond.child.python`` forgets what that is for."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.List | ast.Tuple) and node.elts and file.name != "child.py":
                assert ast.unparse(node.elts[0]) != "sys.executable", f"{file}:{node.lineno}"
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "multiprocessing.Process"), file


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    backend = byte_level_backend()
    config = {**CONFIGS["llama"], "vocab_size": backend.get_vocab_size(with_added_tokens=True)}
    monkeypatch.setitem(CONFIGS, "llama", config)
    settings = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    return write_folder(save("llama", tmp_path / "model"), backend, settings, config)


def test_a_chat_with_its_own_server_in_a_hostile_folder(hostile: Path, model: Path) -> None:
    """The server, and its engine."""
    command = python("-m", "millpond.cli.main", "chat", str(model), "--max-tokens", "2")
    done = run(command, hostile, said="hello", more=False)
    assert done.returncode == 0, done.stderr
    assert "imported from here" not in done.stderr


@pytest.mark.slow
def test_ranks_in_a_hostile_folder(hostile: Path, model: Path) -> None:
    command = python("-m", "millpond.cli.main", "serve", str(model), "--tp", "2", "--port", "0")
    with subprocess.Popen(command, cwd=hostile, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            said = "".join(iter(lambda: until_ready(server), ""))
        finally:
            server.terminate()
    assert "imported from here" not in said
    assert server.returncode == 0


def until_ready(server: subprocess.Popen[str]) -> str:
    """Lines, then nothing once it is ready."""
    assert server.stderr is not None
    line = server.stderr.readline()
    assert line, "it has ended"
    return "" if "ready api=" in line else line
