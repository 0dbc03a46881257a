from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.sample.noise import bits, uniform, uniforms, words

GOLDEN: dict[tuple[int, int], int] = {
    (0, 0): 0xA791BB87FE5F2889,
    (0, 1): 0x22280EF29CAA05DC,
    (1, 0): 0x15053453D55E6CDD,
    (1, 1): 0x9B48C74CBAA8F44B,
    (42, 7): 0x0CDEB9F436DEF04F,
    (18446744073709551615, 0): 0xAD1AD8D7301BD4C8,
    (9223372036854775808, 131072): 0x092EE365FA3037D5,
    (123456789, 2147483648): 0xEB8DC6CCEE71BE94,
}


@pytest.mark.parametrize(("address", "expected"), GOLDEN.items())
def test_golden_bits(address: tuple[int, int], expected: int) -> None:
    assert bits(*address) == expected


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_forms_agree(seed: int, position: int) -> None:
    raw = bits(seed, position)
    high, low = words([seed], [position])[0].tolist()
    assert (high << 31) + low == raw >> 2
    assert uniform(seed, position) == (raw >> 11) / 2**53
    assert 0.0 <= uniform(seed, position) < 1.0
    assert uniforms([seed], [position]).tolist() == [uniform(seed, position)]


def test_no_pairs() -> None:
    assert words([], []).shape == (0, 2)
    assert uniforms([], []).shape == (0,)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="shorter"):
        words([1, 2], [3])


def _draws(seeds: range, positions: range) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return np.array([[uniform(s, p) for p in positions] for s in seeds])


@pytest.mark.parametrize(("seeds", "positions"), [(range(1), range(20000)), (range(20000), range(1))])
def test_uniform_along_positions_and_seeds(seeds: range, positions: range) -> None:
    draws = _draws(seeds, positions).reshape(-1)
    counts, _ = np.histogram(draws, bins=100, range=(0, 1))
    chi_square = float(((counts - 200.0) ** 2 / 200.0).sum())
    assert chi_square < 99 + 4 * np.sqrt(2 * 99)
    assert abs(float(np.corrcoef(draws[:-1], draws[1:])[0, 1])) < 4 / np.sqrt(len(draws))


def test_neighbouring_seeds_are_independent() -> None:
    draws = _draws(range(40), range(500))
    correlation = np.array(np.corrcoef(draws)) - np.eye(40)
    assert float(np.abs(correlation).max()) < 5 / np.sqrt(500)


def test_shifted_streams_do_not_overlap() -> None:
    seen = {bits(seed, position) for seed in range(100) for position in range(500)}
    assert len(seen) == 100 * 500


def test_every_input_bit_reaches_half_of_the_output() -> None:
    cases = [(base * 104729, 1 << bit) for bit in range(64) for base in range(20)]
    flips = [(bits(base, 5) ^ bits(base ^ flip, 5)).bit_count() for base, flip in cases]
    flips += [(bits(3, base) ^ bits(3, base ^ flip)).bit_count() for base, flip in cases]
    assert 31.0 < float(np.mean(flips)) < 33.0
    assert min(flips) > 10
