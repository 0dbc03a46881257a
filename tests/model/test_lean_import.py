"""(J1) A start imports what it needs, and mlx-lm stays whole for whoever imports it afterwards."""

from __future__ import annotations

import subprocess

import pytest

from millpond.child import python

LARGE = ("transformers", "huggingface_hub", "torch", "httpx", "rich", "pygments")
"""Each is a tenth of a second, or whole seconds, of every start and of every return of an engine."""


@pytest.mark.parametrize(
    "started", ["millpond.engine.process, millpond.engine.boot", "millpond.cli.main, millpond.cli.serve"]
)
def test_a_start_imports_nothing_large(started: str) -> None:
    assert ran(f"import sys, {started}; print([name for name in {LARGE} if name in sys.modules])") == "[]"


@pytest.mark.parametrize(
    "first",
    [
        "import millpond.model.upstream",
        "import mlx_lm, millpond.model.upstream",
        "import millpond.model.upstream, mlx_lm.models.qwen3",
    ],
)
def test_mlx_lm_is_whole_afterwards(first: str) -> None:
    """Its names, its submodules, and what its loader takes of the tokenizers."""
    program = f"""
{first}
from mlx_lm import __version__, load, stream_generate
import pathlib, sys, mlx_lm, mlx_lm.tokenizer_utils, mlx_lm.utils, transformers
assert mlx_lm.utils.load is load and mlx_lm.models.cache.KVCache is millpond.model.upstream.KVCache
assert sys.modules["mlx_lm.generate"].TokenizerWrapper is mlx_lm.tokenizer_utils.TokenizerWrapper
try:
    mlx_lm.utils.load_tokenizer(pathlib.Path("/"))
except (OSError, ValueError):
    print(mlx_lm.__version__ == __version__, hasattr(mlx_lm, "no_such_name"))
"""
    assert ran(program) == "True False"


def ran(program: str) -> str:
    """What a new process says that runs the program."""
    done = subprocess.run(python("-c", program), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
