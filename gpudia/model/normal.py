"""Explicit normal matrices, accumulated in blocks of pixels: U is never stored whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gpudia.backend import scalar
from gpudia.model.design import Design

__all__ = ["normal_equations", "solve_equations"]

_EPS = float(np.finfo(float).eps)

#: Pixels in one block of columns: the block and its weighted copy stay in the cache of a CPU core.
_BLOCK_PIXELS = 512


def _row_blocks(design: Design) -> Iterator[tuple[int, int, int]]:
    h, w = design.tiling.tile
    # A GPU wants blocks large enough to fill it; what fits is what `at_once` says of one row of pixels.
    rows = max(1, _BLOCK_PIXELS // w, design.backend.at_once(32 * w * design.n_parameters))
    rows = min(rows, h, max(1, 64 * _BLOCK_PIXELS // w))
    for tile in range(design.tiling.count):
        for start in range(0, h, rows):
            yield tile, start, min(start + rows, h)


def _fill_block(design: Design, part: Any, tile: int, rows: slice, block: Any) -> None:
    """Write U^T of some pixel rows of one tile into `block` (n, pixels)."""
    height, width = rows.stop - rows.start, design.tiling.tile[1]
    K, n = design.tiling.kernel_size, design.n_kernel
    terms = design.terms(slice(tile, tile + 1))[:, 0, rows].reshape(-1, height * width)
    k = 0
    for uy, row in enumerate(design.support):
        # Kernel pixel (uy, ux) multiplies R(x - u): the shifted reference starts at K - 1 - u in the padded part. The
        # free pixels of one row of the kernel stand side by side: one copy through a view of overlapping windows.
        strip = part[rows.start + K - 1 - uy:rows.start + K - 1 - uy + height]
        sy, sx = strip.strides
        windows = design.xp.lib.stride_tricks.as_strided(strip, shape=(K, height, width), strides=(sx, sy, sx))
        free = np.flatnonzero(row)
        first, count = K - 1 - int(free[-1]), len(free)
        block[k:k + count].reshape(count, height, width)[...] = windows[first:first + count][::-1]
        k += count
    for p in range(1, design.n_spatial):
        block[p * n:(p + 1) * n] = block[:n] * terms[p]
    block[design.n_spatial * n:design.n_parameters] = terms[:design.n_background]


def normal_equations(design: Design, weights: Any, data: Any) -> tuple[Any, Any]:
    """Return U^T W U and U^T W d of each image.

    Parameters
    ----------
    design : Design
    weights, data : arrays (B, T, h, w)
        Inverse variances (0 where a pixel is not used) and finite data.

    Returns
    -------
    matrix : (B, n, n), float64
    vector : (B, n), float64

    Notes
    -----
    The data are one more column of U, so that one symmetric product per block gives both.
    """
    xp = design.xp
    n, batch, width = design.n_parameters, len(weights), design.tiling.tile[1]
    total = xp.zeros((batch, n + 1, n + 1))
    root = xp.sqrt(weights)
    parts = design.tiling.split_with_margin(design.reference)
    for tile, start, stop in _row_blocks(design):
        block = xp.empty((n + 1, (stop - start) * width))
        _fill_block(design, parts[tile], tile, slice(start, stop), block)
        for i in range(batch):
            block[n] = data[i, tile, start:stop].reshape(-1)
            weight = root[i, tile, start:stop].reshape(-1)
            if i + 1 < batch:
                weighted = block * weight
            else:  # the block is not needed again
                weighted = block
                weighted *= weight
            total[i] += weighted @ weighted.T
    return total[:, :n, :n], total[:, :n, n]


def solve_equations(design: Design, matrix: Any, vector: Any) -> tuple[Any, Any, Any]:
    """Solve A a = b for each image by Cholesky, or from the well-determined part where A is singular.

    Parameters
    ----------
    design : Design
        Only its backend is used.
    matrix, vector : arrays (B, n, n), (B, n)

    Returns
    -------
    solution : (B, n)
    covariance : (B, n, n), the inverse
    ok : (B,) bool, False where the matrix was not positive definite

    Notes
    -----
    The matrix is scaled to a unit diagonal first. Where Cholesky fails, eigenvalues below n eps times the largest are
    left out (the minimum-norm solution in the scaled coefficients). One step of iterative refinement follows.
    """
    xp = design.xp
    diagonal = xp.diagonal(matrix, axis1=-2, axis2=-1)
    scale = 1.0 / xp.sqrt(xp.where(diagonal > 0, diagonal, 1.0))
    scaled = matrix * scale[:, :, None]
    scaled *= scale[:, None, :]
    inverse, ok = design.backend.inverse_spd(scaled)
    # A Cholesky factor of a singular matrix can exist by rounding: its inverse then has huge entries.
    limit = 1.0 / (matrix.shape[-1] * _EPS)
    ok = ok & (inverse.max(axis=(-2, -1)) < limit) & (inverse.min(axis=(-2, -1)) > -limit)
    for i in range(len(matrix)):
        if not scalar(ok[i]):
            inverse[i] = _pseudo_inverse(design, scaled[i])
    covariance = inverse
    covariance *= scale[:, :, None]
    covariance *= scale[:, None, :]
    solution = _apply(covariance, vector)
    solution = solution + _apply(covariance, vector - _apply(matrix, solution))
    return solution, covariance, ok




def _apply(matrix: Any, vector: Any) -> Any:
    return (matrix @ vector[..., None])[..., 0]


def _pseudo_inverse(design: Design, matrix: Any) -> Any:
    xp = design.xp
    finite = xp.where(xp.isfinite(matrix), matrix, 0.0)
    values, vectors = design.backend.eigh(finite)
    limit = len(finite) * _EPS * xp.abs(values).max()
    inverse = xp.where(values > limit, 1.0 / xp.where(values > limit, values, 1.0), 0.0)
    return (vectors * inverse) @ vectors.T
