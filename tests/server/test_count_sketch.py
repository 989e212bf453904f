"""A sketch preserves inner products, unbiased and with the expected error."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgpt.server.count_sketch import WIDTH, Sketch, cosine, mean_pairwise_cosine

GOLDEN_SIGNS = [1, -1, 1, 1, -1, -1, -1, -1, 1, -1, -1, 1, -1, 1, -1, 1, -1, 1, 1, -1]
ROWS, COLUMNS = 1500, 128  # rows and columns of an embedding
SIZE = ROWS * COLUMNS


def dense(generator) -> np.ndarray:
    return generator.standard_normal(SIZE)


def common_direction(generator) -> np.ndarray:
    """Every row moves along one direction, as a softmax moves the rows of absent tokens."""
    scales = 1 + 0.1 * generator.standard_normal((ROWS, 1))
    return (scales * generator.standard_normal(COLUMNS)).ravel()


def outlying_column(generator) -> np.ndarray:
    matrix = 0.01 * generator.standard_normal((ROWS, COLUMNS))
    matrix[:, 5] += generator.standard_normal(ROWS)
    return matrix.ravel()


def sparse_rows(generator) -> np.ndarray:
    matrix = np.zeros((ROWS, COLUMNS))
    matrix[generator.choice(ROWS, 20, replace=False)] = generator.standard_normal((20, COLUMNS))
    return matrix.ravel()


def one_matrix(generator) -> np.ndarray:
    """Nearly all of the update is in one small matrix."""
    vector = 1e-3 * generator.standard_normal(SIZE)
    vector[7000 : 7000 + 16384] = generator.standard_normal(16384)
    return vector


KINDS = [dense, common_direction, outlying_column, sparse_rows, one_matrix]


def pair(kind, number: int, wanted: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Two vectors of a kind with a cosine near `wanted`, and their exact cosine."""
    generator = np.random.default_rng(number)
    x, y = kind(generator), kind(generator)
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    y = wanted * x + np.sqrt(1 - wanted**2) * y
    x, y = x.astype(np.float32), y.astype(np.float32)
    return x, y, float(cosine(x.astype(np.float64), y.astype(np.float64)) or 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_unbiased_over_seeds(kind):
    x, y, _ = pair(kind, 1, 0.3)
    exact = float(x.astype(np.float64) @ y)
    sketches = [Sketch(SIZE, seed=seed) for seed in range(60)]
    found = np.array([sketch.of(x) @ sketch.of(y) for sketch in sketches])
    assert abs(found.mean() - exact) < 4 * found.std(ddof=1) / np.sqrt(found.size)
    squares = np.array([np.sum(sketch.of(x) ** 2) for sketch in sketches])
    assert squares.mean() == pytest.approx(1, abs=0.015)


@pytest.mark.parametrize("wanted", [-0.5, 0.0, 0.1, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cosine_is_off_by_about_one_over_the_root_of_the_width(kind, wanted):
    sketch = Sketch(SIZE)
    errors = []
    for number in range(12):
        x, y, exact = pair(kind, number, wanted)
        errors.append((cosine(sketch.of(x), sketch.of(y)) or 0.0) - exact)
    assert np.sqrt(np.mean(np.square(errors))) < 1.6 / np.sqrt(WIDTH)
    assert np.max(np.abs(errors)) < 4 / np.sqrt(WIDTH)


@given(
    st.integers(1, 700),
    st.integers(1, 90),
    st.integers(-9, 9),
    st.integers(-9, 9),
    st.integers(0, 2**32 - 1),
)
def test_a_sketch_is_linear(size, width, a, b, seed):
    """Whole numbers are not rounded, so the results are equal."""
    x, y = np.random.default_rng(seed).integers(-100, 101, (2, size)).astype(np.float32)
    sketch = Sketch(size, width, seed)
    np.testing.assert_array_equal(sketch.of(a * x + b * y), a * sketch.of(x) + b * sketch.of(y))


@settings(deadline=None)
@given(st.integers(1, 700), st.integers(1, 90), st.integers(0, 2**32 - 1))
def test_a_sketch_equals_its_formula(size, width, seed):
    """Against a loop over elements; with a small width there are several chunks."""
    sketch = Sketch(size, width)
    signs = np.array(
        [sketch.of(row)[i % width] for i, row in enumerate(np.eye(size, dtype=np.float32))]
    )
    assert set(signs) <= {-1.0, 1.0}
    x = np.random.default_rng(seed).integers(-100, 101, size).astype(np.float32)
    expected = np.zeros(width)
    np.add.at(expected, np.arange(size) % width, signs * x)
    np.testing.assert_array_equal(sketch.of(x), expected)


def test_signs_are_balanced_and_those_of_neighbours_independent():
    signs = np.empty(10_000)
    sketch = Sketch(signs.size, width=signs.size)
    signs[:] = sketch.of(np.ones(signs.size, np.float32))
    assert abs(signs.mean()) < 0.04
    assert all(abs(np.mean(signs[lag:] * signs[:-lag])) < 0.04 for lag in (1, 2, 8, 64, 4093))


DIGEST = """
import hashlib, numpy as np
from fedgpt.server.count_sketch import Sketch
vector = np.arange(50_000, dtype=np.float32) % 97
print(hashlib.sha256(Sketch(50_000).of(vector).tobytes()).hexdigest())
"""


def test_another_process_gets_the_same_bits():
    found = [
        subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True)
        for _ in "12"
    ]
    own = Sketch(50_000).of(np.arange(50_000, dtype=np.float32) % 97)
    assert {run.stdout.strip() for run in found} == {hashlib.sha256(own.tobytes()).hexdigest()}
    np.testing.assert_array_equal(Sketch(20, 20).of(np.ones(20, np.float32)), GOLDEN_SIGNS)


def test_the_input_is_not_changed_and_results_are_new_arrays():
    sketch = Sketch(5000, 64)
    x = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    before = x.copy()
    first = sketch.of(x)
    kept = first.copy()
    sketch.of(2 * x)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize(
    "vector", [np.zeros(4, np.float32), np.zeros((5, 1), np.float32), np.zeros(5)]
)
def test_another_shape_or_type_is_refused(vector):
    with pytest.raises(ValueError, match="expected 5 float32, got"):
        Sketch(5).of(vector)


@pytest.mark.parametrize("size, width", [(0, 5), (5, 0)])
def test_a_size_or_width_of_0_is_refused(size, width):
    with pytest.raises(ValueError, match="must be 1 or more"):
        Sketch(size, width)


@given(st.integers(2, 12), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_the_mean_cosine_is_that_over_all_pairs(k, size, seed):
    vectors = np.random.default_rng(seed).standard_normal((k, size)) * 10.0 ** np.arange(k)[:, None]
    expected = np.mean([cosine(x, y) for x, y in combinations(vectors, 2)])
    assert mean_pairwise_cosine(list(vectors)) == pytest.approx(expected, abs=1e-9)


def test_vectors_without_a_direction_are_left_out():
    x, y, nothing = np.array([1.0, 0.0]), np.array([3.0, 4.0]), np.zeros(2)
    assert cosine(x, nothing) is None
    assert mean_pairwise_cosine([x, nothing, y, nothing]) == pytest.approx(0.6)
    assert mean_pairwise_cosine([]) is None
    assert mean_pairwise_cosine([x]) is None
    assert mean_pairwise_cosine([x, nothing]) is None


def test_opposite_and_equal_vectors_stay_in_range():
    x = np.random.default_rng(0).standard_normal(1000)
    assert cosine(x, 3 * x) == pytest.approx(1) and mean_pairwise_cosine([x] * 9) == pytest.approx(
        1
    )
    assert mean_pairwise_cosine([x] * 9) <= 1 and mean_pairwise_cosine([x, -x]) >= -1
