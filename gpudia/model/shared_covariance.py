"""Estimated covariances of all images of a plan, times rows of the design matrix, without forming any of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from gpudia.backend import backend_of, scalar

__all__ = ["EstimatedCovariance", "SharedCovariance"]

#: Parts of the columns of L: of each, what lies above the diagonal is left out of the products.
_PARTS = 4
#: Share of the diagonal that is added to C before it is factorised.
_RIDGE = 1e-12


class SharedCovariance:
    r"""The matrix C = L L^T, of which the covariance of an image is an estimate :math:`s \, C + t \, v v^T`.

    Coordinates :math:`c(g) = [L^T g, v^T g]` belong to a row g alone; for an image, :math:`g^T (s C + t \, v v^T) h` is
    the inner product of c(g) and [s .. s, t] c(h). L is triangular, so that this is half of the work of C h; and in
    single precision it is more exact, since no sum of large terms is to come out as small as :math:`g^T C g`.

    Parameters
    ----------
    matrix : array (n, n), float64
        C, symmetric and positive definite; otherwise products take twice as long.
    vector : array (n,), float64
        v.
    """

    def __init__(self, matrix: Any, vector: Any) -> None:
        self.matrix, self.vector = matrix, vector
        self._backend = backend_of(matrix)
        self._xp = self._backend.xp
        self._cast: dict[Any, tuple[Any, Any]] = {}

    @cached_property
    def factor(self) -> Any:
        """L, lower triangular, (n, n) float64; None where C is not definite."""
        xp = self._xp
        size = xp.sqrt(xp.maximum(xp.diagonal(self.matrix), 0.0))
        size = xp.where(size > 0, size, 1.0)
        alike = self.matrix / (size[:, None] * size) + _RIDGE * xp.eye(len(size))
        factor = size[:, None] * self._backend.cholesky(alike)
        return factor if scalar(xp.isfinite(factor).all()) else None

    def _in(self, dtype: Any) -> tuple[Any, Any]:
        """L (C itself where there is none) and v in a dtype."""
        if dtype not in self._cast:
            matrix = self.matrix if self.factor is None else self.factor
            self._cast[dtype] = matrix.astype(dtype), self.vector.astype(dtype)
        return self._cast[dtype]

    def coordinates(self, rows: Any) -> Any:
        """Coordinates of rows (S, n), (S, n + 1) in their dtype: the same for all images."""
        (factor, vector), n = self._in(rows.dtype), len(self.vector)
        found = self._xp.empty((len(rows), n + 1), dtype=rows.dtype)
        found[:, n] = rows @ vector
        if self.factor is None:
            found[:, :n] = rows
            return found
        edges = [n * part // _PARTS for part in range(_PARTS + 1)]
        for first, last in pairwise(edges):
            found[:, first:last] = rows[:, first:] @ factor[first:, first:last]
        return found

    def solved(self, rows: Any) -> Any:
        """C g of rows (S, n), computed in single precision from the coordinates, (S, n) in the dtype of the rows."""
        single = rows.astype(np.float32)
        found = self.coordinates(single)[:, :-1] @ self._in(single.dtype)[0].T
        return found.astype(rows.dtype)

    def sizes(self, rows: Any) -> Any:
        """g^T C g of rows (S, n), computed in single precision, (S,) in the dtype of the rows."""
        found = self.coordinates(rows.astype(np.float32))[:, :-1]
        other = found if self.factor is not None else found @ self._in(found.dtype)[0]
        return self._xp.einsum("ij,ij->i", found, other).astype(rows.dtype)

    def times(self, coordinates: Any, s: Any, t: Any) -> Any:
        """What the inner product with coordinates (S, n + 1) makes g^T (s C + t v v^T) h of, (S, n + 1)."""
        xp, n = self._xp, len(self.vector)
        if self.factor is None:
            matrix = self._in(coordinates.dtype)[0]
            return xp.concatenate([s * (coordinates[:, :n] @ matrix), t * coordinates[:, n:]], axis=1)
        found = coordinates * s.astype(coordinates.dtype)
        found[:, n] = coordinates[:, n] * t.astype(coordinates.dtype)
        return found


@dataclass(frozen=True)
class EstimatedCovariance:
    """Covariance s C + t v v^T of one image; `s` and `t` are arrays ()."""

    shared: SharedCovariance
    s: Any
    t: Any

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return (len(self.shared.vector),) * 2

    def coordinates(self, rows: Any) -> Any:
        """See `SharedCovariance.coordinates`."""
        return self.shared.coordinates(rows)

    def times(self, coordinates: Any) -> Any:
        """See `SharedCovariance.times`."""
        return self.shared.times(coordinates, self.s, self.t)

    def matrix(self) -> Any:
        """The covariance itself, (n, n) float64."""
        return self.s * self.shared.matrix + self.t * (self.shared.vector[:, None] * self.shared.vector)
