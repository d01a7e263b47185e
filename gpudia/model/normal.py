"""Explicit normal matrices, accumulated in blocks of pixels: U is never stored whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpudia.backend import scalar, to_device
from gpudia.model.design import Design
from gpudia.model.polynomials import count_terms, exponents, scaled

__all__ = ["invert", "normal_equations", "normal_moments", "share_for_preconditioner",
           "solve_equations"]

_EPS = float(np.finfo(float).eps)

#: Pixels in one block of columns: the block and its weighted copy stay in the cache of a CPU core.
_BLOCK_PIXELS = 512
#: Cells along one side of a frame in which a polynomial counts as constant in the preconditioner. With 8 degree 2 took
#: a quarter more iterations, degree 3 half more.
_CELLS = 16
#: Bytes of the matrices of cells that are summed at the same time; no result depends on the number of cores.
_AT_ONCE_BYTES = 1 << 26
#: Frames of more pixels give the preconditioner a share of them.
_ENOUGH_PIXELS = 1 << 17

_Block = tuple[int, slice, slice]


def _blocks(design: Design, tile: int, rows: slice, columns: slice) -> Iterator[_Block]:
    """Cut a part of one tile into blocks of pixels: (tile, rows, columns)."""
    # A GPU wants blocks large enough to fill it; what fits is what `at_once` says of one pixel.
    pixels = max(_BLOCK_PIXELS, min(64 * _BLOCK_PIXELS, design.backend.at_once(32 * design.n_parameters)))
    width = min(columns.stop - columns.start, max(64, math.isqrt(pixels)))
    height = max(1, pixels // width)
    for y in range(rows.start, rows.stop, height):
        for x in range(columns.start, columns.stop, width):
            yield tile, slice(y, min(y + height, rows.stop)), slice(x, min(x + width, columns.stop))


def _fill_block(design: Design, part: Any, place: _Block, block: Any) -> None:
    """Write U^T of a block of pixels of one tile into `block` (n, pixels)."""
    _, rows, columns = place
    height, width = rows.stop - rows.start, columns.stop - columns.start
    K, n = design.tiling.kernel_size, design.n_kernel
    count = max(design.n_spatial, design.n_background)
    terms = design.terms_at(place, count).reshape(count, -1)
    # Kernel pixel u multiplies R(x - u): the shifted reference starts at K - 1 - u in the padded part. All of them are
    # one view of overlapping windows, [u] by its reversed axes.
    under = part[rows.start:rows.stop + K - 1, columns.start:columns.stop + K - 1]
    sy, sx = under.strides
    windows = design.xp.lib.stride_tricks.as_strided(under, shape=(K, K, height, width),
                                                     strides=(sy, sx, sy, sx))[::-1, ::-1]
    for row, run, place_in_block in design.runs:
        block[place_in_block].reshape(-1, height, width)[...] = windows[row, run]
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
    n, batch = design.n_parameters, len(weights)
    total = xp.zeros((batch, n + 1, n + 1))
    root = xp.sqrt(weights)
    parts = design.tiling.split_with_margin(design.reference)
    h, w = design.tiling.tile
    for place in (b for t in range(design.tiling.count) for b in _blocks(design, t, slice(0, h), slice(0, w))):
        pixels = root[(0, *place)].size
        block = xp.empty((n + 1, pixels))
        _fill_block(design, parts[place[0]], place, block)
        for i in range(batch):
            block[n] = data[(i, *place)].reshape(-1)
            weight = root[(i, *place)].reshape(-1)
            if i + 1 < batch:
                weighted = block * weight
            else:  # the block is not needed again
                weighted = block
                weighted *= weight
            total[i] += weighted @ weighted.T
    return total[:, :n, :n], total[:, :n, n]


def _cells(design: Design, degree: int) -> Iterator[_Block]:
    """Cut the tiles into cells, about 16 x 16 of them over the frame; for a constant polynomial 4 x 4."""
    (h, w), (rows, columns), cells = design.tiling.tile, design.tiling.grid, _CELLS if degree else 4
    height, width = -(-h // -(-cells // rows)), -(-w // -(-cells // columns))
    for tile in range(design.tiling.count):
        for y in range(0, h, height):
            for x in range(0, w, width):
                yield tile, slice(y, min(y + height, h)), slice(x, min(x + width, w))


def _monomials(design: Design, cell: _Block, degree: int) -> list[float]:
    """Values of x^i y^j up to a degree at the middle of a cell."""
    (tile, rows, columns), m = cell, design.tiling.margin
    origin = list(design.tiling.origins())[tile]
    y = scaled(origin[0] + m + (rows.start + rows.stop - 1) / 2, design.tiling.shape[0])
    x = scaled(origin[1] + m + (columns.start + columns.stop - 1) / 2, design.tiling.shape[1])
    return [x**i * y**j for i, j in exponents(degree)]


def share_for_preconditioner(pixels: int) -> float:
    """Share of a frame's pixels that makes a good preconditioner: all of 360 px, half of 512 px, a quarter of 2048 px.

    Measured: with that the solver needs a tenth more iterations than with all; with half of it two to six times as many
    at 512 px, a quarter more at 2048 px.
    """
    return 1.0 if pixels <= _ENOUGH_PIXELS else 0.5 * (2 * _ENOUGH_PIXELS / pixels) ** 0.25


def _chosen_blocks(design: Design, cells: list[_Block], information: np.ndarray,
                   share: float) -> list[list[tuple[_Block, float]]]:
    """Blocks of each cell to be summed, each with its factor.

    Three quarters of the share are the blocks that hold the most information, one quarter an even choice of the others,
    which stands for all of them: an even choice of all makes a far worse preconditioner.
    """
    blocks = [list(_blocks(design, *cell)) for cell in cells]
    if share >= 1.0:
        return [[(block, 1.0) for block in cell] for cell in blocks]
    best = 0.75 * share
    every = round((1 - best) / (share - best))
    known = [[information[block].sum() for block in cell] for cell in blocks]
    limit = np.quantile(np.concatenate(known), 1 - best)
    chosen = []
    for cell, values in zip(blocks, known, strict=True):
        rest = [block for block, value in zip(cell, values, strict=True) if value <= limit]
        chosen.append([(block, 1.0) for block, value in zip(cell, values, strict=True) if value > limit]
                      + [(block, len(rest) / len(rest[::every])) for block in rest[::every]])
    return chosen


def _in_groups(blocks: list[tuple[_Block, float]]) -> Iterator[list[tuple[_Block, float]]]:
    """Blocks of about 1000 pixels together: one product with these takes less than two with the halves."""
    step = max(1, 1024 // _BLOCK_PIXELS)
    for start in range(0, len(blocks), step):
        yield blocks[start:start + step]


def normal_moments(design: Design, weights: Any, information: np.ndarray, degree: int,
                   share: float) -> Any:
    """Sums over cells of their U^T W U times each term of a polynomial of twice the degree.

    Parameters
    ----------
    design : Design
        With a constant kernel. Products, and sums over some cells, are done in its precision, on all cores; the sum of
        these in float64.
    weights : array (T, h, w)
    information : array (T, h, w), host
        What each pixel adds to the trace of the matrix.
    degree : int
    share : float
        Share of the pixels to be summed; below 1 the result is an estimate.

    Returns
    -------
    moments : (count_terms(2 degree), n, n), float64
        The first is U^T W U itself.
    """
    xp, n = design.xp, design.n_parameters
    root = xp.sqrt(weights).astype(design.dtype)
    parts = design.tiling.split_with_margin(design.reference.astype(design.dtype))

    def sum_into(job: tuple[list[tuple[_Block, float]], Any]) -> None:
        chosen, total = job
        total[...] = 0.0
        for group in _in_groups(chosen):
            pixels = sum(root[place].size for place, _ in group)
            block, first = xp.empty((n, pixels), dtype=design.dtype), 0
            for place, factor in group:
                weight = root[place].reshape(-1) * math.sqrt(factor)
                part = block[:, first:first + weight.size]
                _fill_block(design, parts[place[0]], place, part)
                part *= weight
                first += weight.size
            total += block @ block.T

    moments = xp.zeros((count_terms(2 * degree), n * n))
    cells = list(_cells(design, degree))
    chosen = _chosen_blocks(design, cells, information, share)
    step = max(16, _AT_ONCE_BYTES // (n * n * root.dtype.itemsize))
    matrices = xp.empty((min(step, len(cells)), n, n), dtype=design.dtype)
    for start in range(0, len(cells), step):
        group = slice(start, start + step)
        values = np.array([_monomials(design, cell, 2 * degree) for cell in cells[group]])
        design.backend.run_all(sum_into, [(blocks, matrices[i]) for i, blocks in enumerate(chosen[group])])
        moments += to_device(values.T, design.backend, design.dtype) @ matrices[:len(values)].reshape(len(values), -1)
    return moments.reshape(-1, n, n)


def solve_equations(design: Design, matrix: Any, vector: Any) -> tuple[Any, Any, Any]:
    """Solve A a = b for each image within the design's rules by Cholesky, or from the well-determined part of A.

    Parameters
    ----------
    design : Design
        Its rules and backend are used.
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
    inverse, ok, _ = invert(design, design.rules.regular(matrix))
    covariance = design.rules.project_both(inverse)
    solution = _apply(covariance, vector)
    solution = solution + _apply(covariance, vector - _apply(matrix, solution))
    return solution, covariance, ok


def invert(design: Design, matrix: Any) -> tuple[Any, Any, Any]:
    """Invert symmetric matrices (B, n, n); see `solve_equations`.

    Returns
    -------
    inverse : (B, n, n)
    ok : (B,) bool, False where Cholesky failed
    condition : (B,)
        Largest element of the inverse of the matrix with unit diagonal: a cheap lower bound of its condition number.
    """
    xp = design.xp
    diagonal = xp.diagonal(matrix, axis1=-2, axis2=-1)
    scale = 1.0 / xp.sqrt(xp.where(diagonal > 0, diagonal, 1.0))
    scaled = matrix * scale[:, :, None]
    scaled *= scale[:, None, :]
    inverse, ok = design.backend.inverse_spd(scaled)
    # A Cholesky factor of a singular matrix can exist by rounding: its inverse then has huge entries.
    limit = 1.0 / (matrix.shape[-1] * _EPS)
    condition = xp.maximum(inverse.max(axis=(-2, -1)), -inverse.min(axis=(-2, -1)))
    ok = ok & (condition < limit)
    for i in range(len(matrix)):
        if not scalar(ok[i]):
            inverse[i] = _pseudo_inverse(design, scaled[i])
    inverse *= scale[:, :, None]
    inverse *= scale[:, None, :]
    return inverse, ok, xp.where(ok, condition, np.inf)


def _apply(matrix: Any, vector: Any) -> Any:
    return (matrix @ vector[..., None])[..., 0]


def _pseudo_inverse(design: Design, matrix: Any) -> Any:
    xp = design.xp
    finite = xp.where(xp.isfinite(matrix), matrix, 0.0)
    values, vectors = design.backend.eigh(finite)
    limit = len(finite) * _EPS * xp.abs(values).max()
    inverse = xp.where(values > limit, 1.0 / xp.where(values > limit, values, 1.0), 0.0)
    return (vectors * inverse) @ vectors.T
