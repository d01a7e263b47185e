"""What is asked of a kernel beside fitting the data: a smooth shape, a photometric scale of a lower degree."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpudia.backend import to_device

__all__ = ["KernelRules"]


def _roughness(support: np.ndarray) -> np.ndarray:
    """H = D^T D, D the second differences along rows and columns that lie within the support, (m, m).

    Kernels that are constant over the grid, or a plane, cost nothing: H 1 = 0. So the sum over all pixels of the
    equations, which is what determines the photometric scale, is the same as without H.
    """
    numbers = np.full(support.shape, -1)
    numbers[support] = np.arange(support.sum())
    rows = []
    for grid in (numbers, numbers.T):
        for triple in np.lib.stride_tricks.sliding_window_view(grid, 3, axis=1).reshape(-1, 3):
            if (triple >= 0).all():
                row = np.zeros(int(support.sum()))
                row[triple] = 1.0, -2.0, 1.0
                rows.append(row)
    differences = np.array(rows) if rows else np.zeros((0, int(support.sum())))
    H: np.ndarray = differences.T @ differences
    return H


class KernelRules:
    """Regularisation and constraint, for vectors of coefficients (B, n) and matrices (B, n, n).

    Parameters
    ----------
    design : Design
    smoothness : float
        lambda of (U^T W U + lambda H) a = U^T W d in units of tr(U^T W U) / tr(H), both of the constant term's kernel
        pixels, H the squared second differences of each term's kernel. 0: none.
    n_scale : int
        Terms of the polynomial of the photometric scale; the kernels of the terms beyond have the sum zero.
    """

    def __init__(self, design: Any, smoothness: float, n_scale: int) -> None:
        self.xp = design.xp
        self._m, self._terms, self._n_scale = design.n_kernel, design.n_spatial, n_scale
        self._first = design.n_kernel * design.n_spatial
        self.smoothness = 0.0
        if smoothness:
            H = _roughness(design.support)
            if H.any():
                self._H = to_device(H, design.backend)
                #: lambda for one unit of tr(U^T W U).
                self.smoothness = smoothness / float(np.trace(H))

    @property
    def constrains(self) -> bool:
        """Whether any term's kernel must have the sum zero."""
        return self._n_scale < self._terms

    def penalty(self, a: Any, amount: Any) -> Any:
        """Return lambda H a for coefficients (B, n) and lambda (B,); 0 without regularisation."""
        if not self.smoothness:
            return 0.0
        rough = a[:, :self._first].reshape(len(a), self._terms, self._m) @ self._H
        out = self.xp.zeros_like(a)
        out[:, :self._first] = amount[:, None] * rough.reshape(len(a), -1)
        return out

    def add_to(self, matrix: Any, amount: Any) -> Any:
        """Return U^T W U + lambda H for matrices (B, n, n) and lambda (B,); adds in place."""
        if self.smoothness:
            for start in range(0, self._first, self._m):
                block = slice(start, start + self._m)
                matrix[:, block, block] += amount[:, None, None] * self._H
        return matrix

    def project(self, a: Any) -> Any:
        """Take the sum off the kernels that must have none, along the last axis (..., n)."""
        if not self.constrains:
            return a
        a, start = a.copy(), self._n_scale * self._m
        kernels = a[..., start:self._first].reshape(*a.shape[:-1], -1, self._m)
        a[..., start:self._first] = (kernels - kernels.mean(axis=-1)[..., None]).reshape(*a.shape[:-1], -1)
        return a

    def project_both(self, matrix: Any) -> Any:
        """Z A Z of matrices (B, n, n) with the projection Z."""
        if not self.constrains:
            return matrix
        swap = self.xp.swapaxes
        return swap(self.project(swap(self.project(matrix), -1, -2)), -1, -2)

    def regular(self, matrix: Any) -> Any:
        """Z A Z + c (I - Z), which can be inverted: its inverse, projected on both sides, is that within the rules."""
        if not self.constrains:
            return matrix
        xp, n = self.xp, matrix.shape[-1]
        identity = xp.eye(n)
        size = xp.diagonal(matrix, axis1=-2, axis2=-1).sum(axis=-1) / n
        return self.project_both(matrix) + size[:, None, None] * (identity - self.project(identity))
