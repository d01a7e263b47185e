"""Preconditioned conjugate gradients on many images at once.

Only weights and data differ from image to image; the reference is shared. The products with U and U^T are FFTs with
the reference (`Design.normal`), and the preconditioner is the normal matrix of the shared reference under one weight
map, inverted once (`SharedPreconditioner`). For kernels that vary over the frame it is the Kronecker product of the
polynomials' weighted Gram matrix and the constant-kernel matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpudia.backend import scalar, to_device, to_host
from gpudia.model.design import Design
from gpudia.model.normal import normal_equations, solve_equations

__all__ = ["Iterations", "SharedPreconditioner", "conjugate_gradients"]


class SharedPreconditioner:
    """Approximate inverse of every image's normal matrix, from the reference alone.

    Parameters
    ----------
    design : Design
        The model.
    base : Design
        The same reference and support with a constant kernel, and (for a varying kernel) a constant background.
    weights : array (1, T, h, w)
        A weight map typical of the images.
    """

    def __init__(self, design: Design, base: Design, weights: Any) -> None:
        self.design = design
        self.base = base
        matrix, vector = normal_equations(base, weights, weights * 0.0)
        _, covariance, _ = solve_equations(base, matrix, vector)
        #: Sum of the weights that the matrix was made with.
        self.total_weight = weights.sum()
        #: Inverse normal matrix of the constant kernel, (n_0, n_0).
        self.inverse = covariance[0]
        self._gram_inverse = None
        if design.n_spatial > 1:
            self._gram_inverse = self._spatial_gram(weights)

    def _spatial_gram(self, weights: Any) -> Any:
        design, xp = self.design, self.design.xp
        gram: Any = 0.0
        for tiles in design.chunks(1):
            terms = design.terms(tiles)
            flat = terms.reshape(len(terms), -1)
            gram = gram + (flat * weights[0, tiles].reshape(-1)) @ flat.T
        host = to_host(gram / xp.where(gram[0, 0] > 0, gram[0, 0], 1.0))
        P, Q = design.n_spatial, design.n_background
        # A weight map with few good pixels may not determine all terms: then fall back on their own scale.
        host = host + 1e-6 * np.diag(np.maximum(np.diag(host), 1e-6))
        self._extra = to_device(np.linalg.inv(host[:Q, :Q])[P:, P:], design.backend) if Q > P else None
        return to_device(np.linalg.inv(host[:P, :P]), design.backend)

    def __call__(self, residual: Any) -> Any:
        """Apply to residuals (B, n)."""
        if self._gram_inverse is None:
            return _rows_times(residual, self.inverse)
        design, xp = self.design, self.design.xp
        P, Q, m = design.n_spatial, design.n_background, design.n_kernel
        split = P * m
        shared = min(P, Q)
        blocks = xp.zeros((len(residual), P, m + 1), dtype=residual.dtype)
        blocks[:, :, :m] = residual[:, :split].reshape(-1, P, m)
        blocks[:, :shared, m] = residual[:, split:split + shared]
        blocks = self._gram_inverse @ (blocks @ self.inverse)
        parts = [blocks[:, :, :m].reshape(len(residual), -1), blocks[:, :shared, m]]
        if self._extra is not None:
            parts.append(_rows_times(residual[:, split + P:], self._extra) / self.total_weight)
        return xp.concatenate(parts, axis=1)

    def matrix(self) -> Any:
        """Return the approximate inverse as a matrix (n, n)."""
        if self._gram_inverse is None:
            return self.inverse
        return self(self.design.xp.eye(self.design.n_parameters))


def _rows_times(rows: Any, matrix: Any) -> Any:
    # One product per row: the result of an image does not depend on how many stand beside it.
    return (rows[:, None, :] @ matrix)[:, 0]


@dataclass
class Iterations:
    """Result of `conjugate_gradients`: solution (B, n), iterations (B,), relative residual (B,), converged (B,)."""

    solution: Any
    iterations: Any
    residual: Any
    converged: Any


def conjugate_gradients(design: Design, preconditioner: SharedPreconditioner, weights: Any, vector: Any,
                        start: Any | None, rtol: float, max_iterations: int) -> Iterations:
    """Solve U^T W U a = b for each image.

    Parameters
    ----------
    design : Design
    preconditioner : callable
        Residuals (B, n) to approximate solutions (B, n).
    weights : array (B, T, h, w)
    vector : array (B, n)
        Right-hand sides b = U^T W d.
    start : array (B, n) or None
        Where to start from; None starts from the preconditioner's own solution.
    rtol : float
        Stop an image when its preconditioned residual norm sqrt(r^T M r) is below `rtol` sqrt(b^T M b): the error of
        the solution in units of the data's signal-to-noise ratio.
    max_iterations : int

    Notes
    -----
    An image that has converged takes no more steps (its step length is zero) but is computed along with the others of
    its group; on a CPU a group is one image.
    """
    xp = design.xp
    a = preconditioner(vector) if start is None else start
    r = vector - design.normal(a, weights)
    z = preconditioner(r)
    p = z
    rz = (r * z).sum(axis=1)
    limit = rtol**2 * xp.abs((vector * preconditioner(vector)).sum(axis=1))
    count = xp.zeros(len(vector), dtype=xp.int32)
    for _ in range(max_iterations):
        active = rz > limit  # False for NaN, too
        if not scalar(active.any()):
            break
        q = design.normal(p, weights)
        pq = (p * q).sum(axis=1)
        step = xp.where(active & (pq > 0), rz / xp.where(pq > 0, pq, 1.0), 0.0)[:, None]
        a = a + step * p
        r = r - step * q
        z = preconditioner(r)
        new = (r * z).sum(axis=1)
        p = z + xp.where(active, new / xp.where(rz > 0, rz, 1.0), 0.0)[:, None] * p
        rz = xp.where(active, new, rz)
        count = count + active
    residual = xp.sqrt(xp.abs(rz) / xp.where(limit > 0, limit, 1.0)) * rtol
    return Iterations(a, count, residual, (rz <= limit) & xp.isfinite(a).all(axis=1))
