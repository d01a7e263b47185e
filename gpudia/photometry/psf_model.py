"""The PSF of a frame as a model: a mean stamp, how it changes over the field, and a profile for few or faint stars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from gpudia.photometry.inputs import as_positions
from gpudia.photometry.stamps import FloatArray

__all__ = ["Psf", "constant_under_change", "cut_circle", "field_terms", "fit_moffat", "moffat_psf", "radius2"]

#: How far a real PSF is from a Moffat profile: in terms of the pixel, and of the peak.
_MISFIT, _MISFIT_FLOOR = 0.05, 0.0003
#: Exponents of Moffat profiles, and how they scatter.
_BETA, _BETA_SPREAD = 3.2, 0.6


@dataclass(frozen=True)
class Psf:
    """A point spread function on pixels, the same all over a region or changing linearly over it.

    Attributes
    ----------
    terms : (T, m, m) float64
        Odd-sized, centred on the central pixel. Term 0 is the PSF at the region's centre, of sum 1. Where it varies,
        T = 3: terms 1 and 2 are its change from the centre to the right edge (x = W-1) and to the upper one (y = H-1),
        each of sum 0.
    method : {"stack", "moffat", "assumed"}
        Stack of stars; Moffat profile fitted to a stack of too few or too faint ones; Moffat profile of the stated
        FWHM, as no star was fit for use.
    n_stars : int
        Stars in the stack.
    shape : (H, W)
        Of the region, pixels.
    """

    terms: FloatArray
    method: str
    n_stars: int
    shape: tuple[int, int]

    @property
    def stamp(self) -> FloatArray:
        """The PSF at the region's centre, (m, m), of sum 1."""
        return self.terms[0]

    @property
    def varies(self) -> bool:
        """Whether it changes over the region."""
        return len(self.terms) > 1

    def at(self, positions: Any) -> FloatArray:
        """PSFs at positions (x, y) of the region, each centred on its central pixel and of sum 1.

        Parameters
        ----------
        positions : (S, 2)
            0-based pixels. Beyond an edge the PSF is that of the edge; where one is not finite, that of the centre.

        Returns
        -------
        (S, m, m) float64
            A view of one stamp where the PSF does not vary: not writable.
        """
        where = as_positions(positions)
        if not self.varies:
            return np.broadcast_to(self.stamp, (len(where), *self.stamp.shape))
        return np.tensordot(field_terms(where, self.shape), self.terms, axes=1)


def field_terms(positions: FloatArray, shape: tuple[int, int]) -> FloatArray:
    """The terms 1, u, v of a linear change over a region (H, W), (S, 3): u and v from -1 to 1 between the edges."""
    half = (np.array(shape[::-1], float) - 1) / 2
    uv = np.clip(np.nan_to_num((positions - half) / np.maximum(half, 1.0), posinf=0.0, neginf=0.0), -1.0, 1.0)
    uv[~np.isfinite(positions).all(axis=1)] = 0.0
    return np.column_stack([np.ones(len(uv)), uv])


def moffat_psf(fwhm: float, size: int, beta: float = 3.0, ellipticity: tuple[float, float] = (0.0, 0.0)) -> FloatArray:
    """Moffat profile (1 + r^2/alpha^2)^-beta, averaged over pixels, on a stamp (size, size) of sum 1.

    `ellipticity` (e1, e2) stretches it along and across the axes and the diagonals:
    r^2 = (1 - e1) x^2 + (1 + e1) y^2 - 2 e2 x y.
    """
    fine = 5
    grid = (np.arange(size * fine) - (size * fine - 1) / 2) / fine
    x, y = grid[None, :], grid[:, None]
    alpha = fwhm / (2 * np.sqrt(2 ** (1 / beta) - 1))
    r2 = (1 - ellipticity[0]) * x**2 + (1 + ellipticity[0]) * y**2 - 2 * ellipticity[1] * x * y
    profile = (1 + np.maximum(r2, 0) / alpha**2) ** -beta
    stamp = profile.reshape(size, fine, size, fine).mean(axis=(1, 3))
    return stamp / stamp.sum()


def radius2(size: int) -> FloatArray:
    """Squared distance of the pixels of a stamp from its centre."""
    grid = np.arange(size) - size // 2
    return (grid[:, None] ** 2 + grid**2).astype(float)


def cut_circle(stamp: FloatArray) -> FloatArray:
    """0 outside of the inscribed circle; of sum 1."""
    size = stamp.shape[-1]
    inside = np.where(radius2(size) <= (size / 2) ** 2, stamp, 0.0)
    return inside / inside.sum()


def fit_moffat(stamp: FloatArray, fwhm: float, noise: FloatArray) -> tuple[FloatArray, float]:
    """Moffat profile that fits a noisy stamp best, and the constant that lies under it.

    A constant under all PSF stars cannot be told from their backgrounds: this profile says what of it is wing.
    `noise` is 1 sigma of the pixels. Where they say little of the wings, beta is near 3.2, its usual value.
    """
    size = stamp.shape[0]
    inside, weight = _profile_weights(stamp, noise)

    def residual(p: FloatArray) -> FloatArray:
        profile = p[4] * moffat_psf(p[0], size, p[1], (p[2], p[3])) + p[5]
        return np.append((weight * (profile - stamp))[inside], (p[1] - _BETA) / _BETA_SPREAD)

    fit = least_squares(residual, [fwhm, _BETA, 0.0, 0.0, 1.0, 0.0], x_scale=[fwhm, 1.0, 0.1, 0.1, 1.0, 1e-3],
                        bounds=([0.5 * fwhm, 1.5, -0.6, -0.6, 0.1, -1.0], [2 * fwhm, 8.0, 0.6, 0.6, 3.0, 1.0]))
    return moffat_psf(fit.x[0], size, fit.x[1], (fit.x[2], fit.x[3])), float(fit.x[5])


def constant_under_change(change: FloatArray, profile: FloatArray, noise: FloatArray) -> float:
    """The constant that lies under a change of a PSF: what a change of width, ellipticity, place and flux leaves."""
    grid = np.arange(len(profile)) - len(profile) // 2
    x, y = grid, grid[:, None]
    along_y, along_x = np.gradient(profile)
    modes = [x * along_x + y * along_y, x * along_x - y * along_y, x * along_y + y * along_x, along_x, along_y, profile,
             np.ones_like(profile)]
    inside, weight = _profile_weights(profile, noise)
    design = np.stack([(weight * mode)[inside] for mode in modes], axis=1)
    scale = np.linalg.norm(design, axis=0)
    return float(np.linalg.lstsq(design / scale, (weight * change)[inside], rcond=None)[0][-1] / scale[-1])


def _profile_weights(stamp: FloatArray, noise: FloatArray) -> tuple[NDArray[np.bool_], FloatArray]:
    """Which pixels count in the fit of a profile, and 1 / sigma of all, with what no profile fits."""
    sigma = np.hypot(noise, _MISFIT * np.maximum(stamp, 0.0) + _MISFIT_FLOOR * stamp.max())
    return radius2(len(stamp)) <= (len(stamp) / 2) ** 2, 1 / sigma
