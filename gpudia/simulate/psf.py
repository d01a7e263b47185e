"""Elliptical Moffat point spread functions, integrated over pixels.

A star of unit flux has the surface brightness [Moffat 1969, A&A 3, 455]

    I(d) = (beta - 1) / (pi a^2) * (1 + d^T Q d)^(-beta),     det Q = 1 / a^4,   a = FWHM / (2 sqrt(2^(1/beta) - 1))

with ``FWHM`` the geometric mean of the two axes and

    Q = [[1 - e1, -e2], [-e2, 1 + e1]] / (a^2 sqrt(1 - e1^2 - e2^2)),

so that ``|e| = (A^2 - B^2) / (A^2 + B^2)`` for semi-axes A and B. The integral over the infinite plane is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpudia.errors import InputError

__all__ = ["MISSING_FLUX", "MoffatField", "add_stars"]

#: Largest fraction of a star's flux in the wings that a stamp leaves out.
MISSING_FLUX = 1e-3

# Gauss-Legendre nodes per pixel and axis. Three nodes err by f^(6) / 2016000 per pixel and axis, below 1e-5 of the
# peak for FWHM >= 3 px; two nodes, f^(4) / 4320, are as good outside of _CORE * FWHM, where the profile is smooth.
_CORE_ORDER, _WING_ORDER, _CORE = 3, 2, 1.5
_NODES = {order: np.polynomial.legendre.leggauss(order) for order in (_CORE_ORDER, _WING_ORDER)}


@dataclass(frozen=True)
class MoffatField:
    """The PSF of one frame: an elliptical Moffat function that varies linearly over the frame.

    Attributes
    ----------
    beta : float
        Exponent of the Moffat function, above 1.
    centre : tuple of float
        The point (x, y), 0-based pixels, where the first column of `coefficients` holds.
    coefficients : ndarray, shape (3, 3)
        Rows: FWHM in pixels, e1, e2. Columns: value at `centre`, change per pixel along x, along y.
    """

    beta: float
    centre: tuple[float, float]
    coefficients: NDArray[np.float64]

    def shape_at(self, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
        """FWHM (px), e1 and e2 at positions (x, y); shape (3, ...)."""
        dx = np.asarray(x, dtype=float) - self.centre[0]
        dy = np.asarray(y, dtype=float) - self.centre[1]
        return np.tensordot(self.coefficients, np.stack([np.ones_like(dx), dx, dy]), axes=1)

    def scale_length(self, fwhm: ArrayLike) -> NDArray[np.float64]:
        """The radius `a` (px) of a Moffat function of this beta and a given FWHM (px)."""
        return np.asarray(fwhm) / (2 * np.sqrt(2 ** (1 / self.beta) - 1))

    def pixels(self, x: float, y: float, columns: tuple[int, int], rows: tuple[int, int]) -> NDArray[np.float64]:
        """Flux of a unit star at (x, y) in each pixel of a window.

        Parameters
        ----------
        x, y : float
            Position, 0-based pixel centres.
        columns, rows : tuple of int
            First pixel and the one after the last, along x and y.

        Returns
        -------
        ndarray, shape (rows[1] - rows[0], columns[1] - columns[0])
            Integrals over the pixels. The PSF is that of the position (x, y), the same over the whole window.
        """
        shape = self.shape_at(x, y)
        wing = self._integrals(shape, x, y, columns, rows, _WING_ORDER)
        reach = int(np.ceil(_CORE * shape[0]))
        inner_c = _overlap((round(x) - reach, round(x) + reach + 1), columns)
        inner_r = _overlap((round(y) - reach, round(y) + reach + 1), rows)
        if inner_c[0] < inner_c[1] and inner_r[0] < inner_r[1]:
            window = (slice(inner_r[0] - rows[0], inner_r[1] - rows[0]),
                      slice(inner_c[0] - columns[0], inner_c[1] - columns[0]))
            wing[window] = self._integrals(shape, x, y, inner_c, inner_r, _CORE_ORDER)
        return wing

    def stamp(self, x: float, y: float, size: int) -> NDArray[np.float64]:
        """PSF of a star at (x, y) on the `size` x `size` pixels around the pixel nearest to it.

        Raises
        ------
        InputError
            When `size` is not a positive odd number.
        """
        if size < 1 or size % 2 == 0:
            raise InputError(f"size must be a positive odd number, got {size}")
        ix, iy, half = round(float(x)), round(float(y)), size // 2
        return self.pixels(float(x), float(y), (ix - half, ix + half + 1), (iy - half, iy + half + 1))

    def _integrals(
        self,
        shape: NDArray[np.float64],
        x: float,
        y: float,
        columns: tuple[int, int],
        rows: tuple[int, int],
        order: int,
    ) -> NDArray[np.float64]:
        fwhm, e1, e2 = shape
        a2 = self.scale_length(fwhm) ** 2
        q = 1 / (a2 * np.sqrt(1 - e1**2 - e2**2))
        nodes, weights = _NODES[order]
        dx = np.add.outer(np.arange(*columns) - x, nodes / 2).ravel()
        dy = np.add.outer(np.arange(*rows) - y, nodes / 2).ravel()
        base = np.multiply.outer(dy, -2 * q * e2 * dx)
        base += (1 + q * (1 - e1) * dx**2) + (q * (1 + e1) * dy**2)[:, None]
        profile = (base**-self.beta).reshape(rows[1] - rows[0], order, -1)
        by_row = (weights / 2) @ profile
        return (self.beta - 1) / (np.pi * a2) * (by_row.reshape(by_row.shape[0], -1, order) @ (weights / 2))


def add_stars(
    image: NDArray[np.float64], x: ArrayLike, y: ArrayLike, flux: ArrayLike, psf: MoffatField, edge_level: float
) -> None:
    """Add stars to an image, in place.

    A stamp reaches to where the star's surface brightness has fallen to `edge_level`, and at least to where no
    more than `MISSING_FLUX` of the flux lies outside: bright stars get large stamps.

    Parameters
    ----------
    image : ndarray, shape (H, W), float64
        The image, changed in place.
    x, y : array_like, shape (N,)
        Positions, 0-based pixel centres; stars outside of the frame leave their wings in it.
    flux : array_like, shape (N,)
        Total fluxes, in units of `image` times pixels.
    psf : MoffatField
        The PSF, evaluated at each star's position.
    edge_level : float
        Surface brightness per pixel that may be neglected.
    """
    x, y, flux = (np.atleast_1d(np.asarray(v, dtype=float)) for v in (x, y, flux))
    height, width = image.shape
    radius = _stamp_radius(psf, x, y, flux, edge_level)
    for xi, yi, fi, ri in zip(x.tolist(), y.tolist(), flux.tolist(), radius.tolist(), strict=True):
        columns = _overlap((round(xi) - ri, round(xi) + ri + 1), (0, width))
        rows = _overlap((round(yi) - ri, round(yi) + ri + 1), (0, height))
        if columns[0] < columns[1] and rows[0] < rows[1]:
            image[slice(*rows), slice(*columns)] += fi * psf.pixels(xi, yi, columns, rows)


def _stamp_radius(
    psf: MoffatField, x: NDArray[np.float64], y: NDArray[np.float64], flux: NDArray[np.float64], edge_level: float
) -> NDArray[np.int64]:
    fwhm, e1, e2 = psf.shape_at(x, y)
    a = psf.scale_length(fwhm)
    peak = np.abs(flux) * (psf.beta - 1) / (np.pi * a**2)
    faint = MISSING_FLUX ** (-1 / (psf.beta - 1))
    reach = np.sqrt(np.maximum(faint, (peak / edge_level) ** (1 / psf.beta)) - 1)
    e = np.hypot(e1, e2)
    return np.ceil(a * reach * ((1 + e) / (1 - e)) ** 0.25).astype(np.int64)


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return max(a[0], b[0]), min(a[1], b[1])
