"""Which BLAS is chosen, and that a wrong order of imports is an error instead of a slow server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fresh_python import run_python

from millpond.model import blas

pytestmark = pytest.mark.skipif(not blas.needed(), reason="only where MLX computes on a Linux CPU")


def test_one_line_says_what_is_used() -> None:
    line = blas.prepare()
    assert line
    assert "\n" not in line
    assert blas.prepare() == line, "a second call, after mlx is imported, only repeats the line"


def test_too_late_is_an_error() -> None:
    result = run_python("import mlx.core\nfrom millpond.model import blas\nblas.prepare()")
    assert result.returncode != 0
    assert "must be called before mlx is imported" in result.stderr


@pytest.mark.parametrize("error", ["ModuleNotFoundError('No module named mlx')", "ImportError('libmlx.so: not there')"])
def test_without_mlx_it_says_what_to_install(error: str, tmp_path: Path) -> None:
    """On Linux an extra of Millpond's brings it, so a bare install has none."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text(f"raise {error}")
    told = run_python("from millpond.model import blas\nblas.prepare()", PYTHONPATH=str(tmp_path)).stderr
    assert "mlx cannot be imported" in told
    assert "pip install 'millpond[cpu]', or with [cuda12] or [cuda13]" in told


def test_without_openblas_it_says_what_to_install() -> None:
    code = "from millpond.model import blas\nblas.find_openblas = lambda: None\nprint(blas.prepare())"
    assert "install millpond[cpu]" in run_python(code).stdout


def test_without_the_c_part_it_says_so() -> None:
    code = (
        "from pathlib import Path\nfrom millpond.model import blas\n"
        "blas.shim_path = lambda: Path('/nonexistent')\nprint(blas.prepare())"
    )
    shown = run_python(code).stdout
    assert "C compiler" in shown or "system" in shown


def test_the_choice_is_kept_between_starts(tmp_path: Path) -> None:
    if not blas.shim_path().is_file():
        pytest.skip("the C part is not built")
    code = "from millpond.model import blas\nblas.prepare()"
    assert run_python(code, MILLPOND_CACHE=str(tmp_path)).returncode == 0
    kept = (tmp_path / "rowblas.json").read_bytes()
    never = "from millpond.model import blas\ndel blas.measure_row_limit\nprint(blas.prepare())"
    again = run_python(never, MILLPOND_CACHE=str(tmp_path))
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "rowblas.json").read_bytes() == kept


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run_python(
        "from millpond.model import blas\nprint(blas.prepare())", MILLPOND_CACHE=str(tmp_path / "file" / "below")
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("given", "expected"), [("3", 3), ("1", 1)])
def test_openblas_num_threads_is_respected(given: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", given)
    assert blas.thread_count() == expected


def test_threads_are_at_most_the_cpus_we_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    assert 1 <= blas.thread_count() <= len(os.sched_getaffinity(0))
