"""Estimated covariances, times rows, without the matrices."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from gpudia.backend import to_device, to_host
from gpudia.model.shared_covariance import EstimatedCovariance, SharedCovariance

N = 37


def covariance_of(backend, matrix, s=1.7, t=0.4):
    vector = np.random.default_rng(2).normal(size=N)
    shared = SharedCovariance(to_device(matrix, backend), to_device(vector, backend))
    s, t = (to_device(np.array(x), backend) for x in (s, t))
    return EstimatedCovariance(shared, s, t), 1.7 * matrix + 0.4 * np.outer(vector, vector)


def definite(condition):
    """A symmetric matrix with eigenvalues from 1 to 1 / condition."""
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(N, N)))[0]
    return (turn * np.geomspace(1, 1 / condition, N)) @ turn.T


#: Rounding of products of this length, and what a condition makes of it: L is the root of C.
@pytest.mark.parametrize(("matrix", "dtype", "rtol"), [
    (definite(1e4), np.float64, 1e-11), (definite(1e4), np.float32, 1e-3),
    (definite(1e4) - 0.1 * np.eye(N), np.float64, 1e-11), (definite(1e2) - 0.1 * np.eye(N), np.float32, 1e-4)])
def test_inner_products_are_those_of_the_matrix(backend, matrix, dtype, rtol):
    """An indefinite one, which is no covariance, too."""
    covariance, dense = covariance_of(backend, matrix)
    assert (covariance.shared.factor is None) == (np.linalg.eigvalsh(matrix)[0] < 0)
    g, h = np.random.default_rng(3).normal(size=(2, 11, N))
    first, second = (covariance.coordinates(to_device(rows.astype(dtype), backend)) for rows in (g, h))
    assert first.dtype == dtype
    found = to_host((first * covariance.times(second)).sum(axis=1))
    scale = np.einsum("ij,jk,ik->i", np.abs(g), np.abs(dense), np.abs(h))
    assert np.abs(found - np.einsum("ij,jk,ik->i", g, dense, h)).max() < rtol * scale.max()
    assert_allclose(to_host(covariance.matrix()), dense, rtol=1e-12, atol=1e-14)
    assert covariance.shape == (N, N)


def test_small_combinations_keep_their_digits(backend):
    """g^T C g of the least eigenvector, a millionth of the largest: C g itself would lose it in single precision."""
    matrix = definite(1e6)
    covariance, _ = covariance_of(backend, matrix, t=0.0)
    row = np.linalg.eigh(matrix)[1][:, :1].T
    c = covariance.coordinates(to_device(row.astype(np.float32), backend))
    found = float(to_host((c * covariance.times(c)).sum()))
    assert found == pytest.approx(1.7e-6, rel=0.02)  # rounding of the row itself: 6e-8 of the largest, amplified 1e3


def test_solved_rows_are_the_product(backend):
    covariance, _ = covariance_of(backend, definite(1e3))
    rows = np.random.default_rng(4).normal(size=(5, N))
    found = covariance.shared.solved(to_device(rows, backend))
    assert found.dtype == np.float64
    expected = rows @ definite(1e3)
    assert_allclose(to_host(found), expected, atol=1e-5 * np.abs(expected).max())
