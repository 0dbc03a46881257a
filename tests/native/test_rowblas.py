"""The C part against numpy: every path, odd sizes, strides, threads, fork; and that MLX really binds to it."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from fresh_python import run_python
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.model import blas

pytestmark = pytest.mark.skipif(
    not blas.needed() or not blas.shim_path().is_file(), reason="only where the C part is built and MLX uses the CPU"
)

Floats = npt.NDArray[np.float32]
ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112


def shim() -> ctypes.CDLL:
    library = ctypes.CDLL(str(blas.shim_path()))
    library.millpond_rowblas_own_calls.restype = ctypes.c_uint64
    library.millpond_rowblas_passed_calls.restype = ctypes.c_uint64
    return library


def sgemm(
    a: Floats,
    b: Floats,
    transposed: bool,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Floats | None = None,
    turned_a: bool = False,
) -> Floats:
    """alpha * a @ b + beta * out through the exported symbol.

    ``transposed``: b is given as [n, k]; ``turned_a``: a is given as [k, m]. Last axes must be contiguous.
    """
    m, k = a.shape[::-1] if turned_a else a.shape
    n = b.shape[0] if transposed else b.shape[1]
    c = np.full((m, n), np.nan, np.float32) if out is None else out
    pointer = ctypes.POINTER(ctypes.c_float)
    shim().cblas_sgemm(
        *(ROW_MAJOR, TRANSPOSED if turned_a else PLAIN, TRANSPOSED if transposed else PLAIN, m, n, k),
        *(ctypes.c_float(alpha), a.ctypes.data_as(pointer), a.strides[0] // 4),
        *(b.ctypes.data_as(pointer), b.strides[0] // 4),
        *(ctypes.c_float(beta), c.ctypes.data_as(pointer), n),
    )
    return c


def numbers(seed: int, *shape: int, pad: int = 0) -> Floats:
    """Random values; ``pad`` more columns lie between the rows."""
    whole = np.random.default_rng(seed).standard_normal((*shape[:-1], shape[-1] + pad)).astype(np.float32)
    return whole[..., : shape[-1]]


def assert_product(c: Floats, a: Floats, b: Floats, transposed: bool) -> None:
    right = (b.T if transposed else b).astype(np.float64)
    exact = a.astype(np.float64) @ right
    scale = np.abs(a.astype(np.float64)) @ np.abs(right)
    assert np.all(np.abs(c - exact) <= 1e-5 * scale + 1e-12)


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 70),
    pad=st.integers(0, 5),
    transposed=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=200, deadline=None)
def test_any_size_and_stride(m: int, n: int, k: int, pad: int, transposed: bool, seed: int) -> None:
    a = numbers(seed, m, k, pad=pad)
    b = numbers(seed + 1, *((n, k) if transposed else (k, n)), pad=pad)
    assert_product(sgemm(a, b, transposed), a, b, transposed)


@pytest.mark.usefixtures("all_rows_own")
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 17, 32, 33])
@pytest.mark.parametrize(("n", "k"), [(1536, 576), (577, 1031), (49, 8192)])
def test_sizes_shared_between_threads(rows: int, n: int, k: int) -> None:
    a, b = numbers(1, rows, k), numbers(2, n, k)
    assert_product(sgemm(a, b, transposed=True), a, b, True)


@given(
    m=st.integers(1, 400),
    n=st.integers(1, 700),
    k=st.integers(1, 300),
    transposed=st.booleans(),
    turned_a=st.booleans(),
    beta=st.sampled_from([0.0, 2.0]),
)
@settings(max_examples=60, deadline=None)
def test_large_products_cut_into_pieces(m: int, n: int, k: int, transposed: bool, turned_a: bool, beta: float) -> None:
    a = numbers(1, *((k, m) if turned_a else (m, k)), pad=3)
    b = numbers(2, *((n, k) if transposed else (k, n)), pad=1)
    c = numbers(3, m, n)
    before = shim().millpond_rowblas_passed_calls() + shim().millpond_rowblas_own_calls()
    got = sgemm(a, b, transposed, alpha=0.5, beta=beta, out=c.copy(), turned_a=turned_a)
    assert shim().millpond_rowblas_passed_calls() + shim().millpond_rowblas_own_calls() == before + 1
    left, right = (a.T if turned_a else a), (b.T if transposed else b)
    assert np.allclose(got, 0.5 * (left.astype(np.float64) @ right) + beta * c, rtol=1e-3, atol=1e-3)


@pytest.fixture
def all_rows_own() -> Iterator[None]:
    """Every row count that can be done here is, whatever was measured."""
    rows = range(1, shim().millpond_rowblas_max_rows() + 1)
    before = [shim().millpond_rowblas_takes(count) for count in rows]
    for count in rows:
        shim().millpond_rowblas_take(count, 1)
    yield
    for count, taken in zip(rows, before, strict=True):
        shim().millpond_rowblas_take(count, taken)


@pytest.mark.usefixtures("all_rows_own")
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Bit for bit: the promise that lets a request's text not depend on who else is in its batch."""
    a, b = numbers(1, 32, 576), numbers(2, 1536, 576)
    together = sgemm(a, b, True)
    for rows in (1, 2, 3, 5, 7, 16):
        for first in (0, 11, 32 - rows):
            part = sgemm(np.ascontiguousarray(a[first : first + rows]), b, True)
            assert np.array_equal(part, together[first : first + rows])


def test_many_threads_at_once() -> None:
    a, b = numbers(1, 3, 576), numbers(2, 1536, 576)
    expected = sgemm(a, b, True)
    wrong: list[int] = []

    def work(number: int) -> None:
        wrong.extend(number for _ in range(100) if not np.array_equal(sgemm(a, b, True), expected))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_the_pool_works_after_it_slept() -> None:
    a, b = numbers(1, 1, 1024), numbers(2, 2048, 1024)
    expected = sgemm(a, b, True)
    pause = threading.Event()
    for _ in range(5):
        pause.wait(0.02)
        assert np.array_equal(sgemm(a, b, True), expected)


FORKED = """
import os, sys
import numpy as np
from millpond.model import blas
blas.prepare()
import mlx.core as mx
a, b = mx.random.normal((2, 1024)), mx.random.normal((2048, 1024))
import ctypes
shim = ctypes.CDLL(str(blas.shim_path()))
shim.millpond_rowblas_measure.restype = ctypes.c_long
assert shim.millpond_rowblas_measure(2, 2048, 1024, 1, 3) > 0
child = os.fork()
if child == 0:
    os._exit(0 if shim.millpond_rowblas_measure(2, 2048, 1024, 1, 3) > 0 else 1)
assert shim.millpond_rowblas_measure(2, 2048, 1024, 1, 3) > 0
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_has_a_pool_of_its_own() -> None:
    result = run_python(FORKED, OPENBLAS_NUM_THREADS="2")
    assert result.returncode == 0, result.stderr


def test_mlx_binds_to_it() -> None:
    import mlx.core as mx

    before = shim().millpond_rowblas_own_calls() + shim().millpond_rowblas_passed_calls()
    x, w = mx.random.normal((3, 64)), mx.random.normal((96, 64))
    product = np.array(x @ w.T)
    assert shim().millpond_rowblas_own_calls() + shim().millpond_rowblas_passed_calls() > before
    assert_product(product, np.array(x), np.array(w), True)


def test_doubles_and_complex_numbers_are_passed_on() -> None:
    import mlx.core as mx

    with mx.stream(mx.cpu):
        x, w = mx.random.normal((5, 7)).astype(mx.float64), mx.random.normal((7, 3)).astype(mx.float64)
        assert np.allclose(np.array(x @ w), np.array(x) @ np.array(w))
        z = x.astype(mx.complex64)
        assert np.allclose(np.array(z @ w.astype(mx.complex64)), np.array(z) @ np.array(w), atol=1e-5)
