"""The exact variance of linear flux estimates f = a^T D on a difference image.

An aperture sum and a PSF flux differ in the pixel weights a only; what follows from the weights is here, once, for many
stars at a time, on the backend of the planes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from gpudia.backend import backend_of, to_device, to_host
from gpudia.errors import InputError
from gpudia.photometry.stamps import FloatArray, Stamps, StampsOn, inner, rows_of

__all__ = ["EpochNoise", "LinearVariance", "NoiseUnder", "finite", "linear_flux_variance", "transform_side"]

#: Polynomial terms at pixel positions: ``terms(x, y)`` has the terms on a last axis, after the shape of x and y.
Terms = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class EpochNoise:
    """All that makes the error of a flux on one difference image D = I - M; planes of one backend.

    Parameters
    ----------
    image_variance : (H, W)
        Variance of the image's own noise, ADU^2 (not that of the difference).
    kernel : (K, K) or (P, K, K), optional
        Matching kernel, M(x) = sum_u k[u] R(x - u): ``kernel[K//2, K//2]`` multiplies R(x). With `kernel_terms` one for
        each of the P polynomials.
    reference_variance : (H, W), optional
        Variance of the reference, ADU^2. Needs `kernel`.
    reference : (H, W), optional
        The reference frame R, ADU. Needed with `covariance`.
    covariance : (n, n), optional
        Covariance of the model's coefficients: for each kernel polynomial the pixels of `support`, row-major; then
        the background terms. Or what multiplies rows by one (`gpudia.model.EstimatedCovariance`).
    support : (K, K) bool, optional
        Pixels of the kernel that were free; all of them by default. Host array.
    kernel_terms, background_terms : callable, optional
        ``terms(x, y) -> (..., P)``: polynomials of the kernel and of the background at pixel positions of the frame,
        host side. Constant by default; without any background where `covariance` has no room for it.
    shared : float
        What the image adds to the reference, as a factor of its pixels: its weight in a stack over its scale. The
        noise of the two is then correlated. 0 for an image that is not in the reference.
    fitted : (H, W) bool, optional
        Pixels that took part in the fit of the model. With it the leverage of the star on its own model is put right
        (see `LinearVariance`); without it the star counts as one that was not in the fit.
    correction : callable, optional
        ``rows (D, n), more (E, n) -> (D, n), (E,)``: where `covariance` is an estimate, a better one C times some rows
        g, and h^T C h of more of them (see `gpudia.model.CovarianceCorrection`). Used for stars of high leverage.

    Raises
    ------
    InputError
        Shapes do not agree, or something that another part needs is missing.
    """

    image_variance: Any
    kernel: Any = None
    reference_variance: Any = None
    reference: Any = None
    covariance: Any = None
    support: Any = None
    kernel_terms: Terms | None = None
    background_terms: Terms | None = None
    shared: float = 0.0
    fitted: Any = None
    correction: Callable[[Any, Any], tuple[Any, Any]] | None = None
    #: Transforms of the kernel that were made already, by their side and dtype: most blocks of stars need the same.
    kernel_spectra: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shape = tuple(np.shape(self.image_variance))
        for name in ("reference_variance", "reference", "fitted"):
            plane = getattr(self, name)
            if plane is not None and tuple(np.shape(plane)) != shape:
                raise InputError(f"{name} must have the shape of image_variance {shape}, got {tuple(np.shape(plane))}")
        if self.kernel is not None:
            self._check_kernel()
        elif self.reference_variance is not None:
            raise InputError("kernel must be given with reference_variance, got None")
        if not 0 <= self.shared <= 1e6 or (self.shared and self.reference_variance is None):
            raise InputError(f"shared must be 0, or positive with reference_variance, got {self.shared}")
        if self.covariance is not None:
            self._check_covariance()

    def _check_kernel(self) -> None:
        shape = tuple(np.shape(self.kernel))
        if len(shape) not in (2, 3) or shape[-1] != shape[-2] or shape[-1] % 2 == 0:
            raise InputError(f"kernel must be (K, K) or (P, K, K) with K odd, got shape {shape}")
        if len(shape) == 3 and self.kernel_terms is None:
            raise InputError(f"kernel_terms must be given with a kernel of several terms, got None and shape {shape}")

    def _check_covariance(self) -> None:
        if self.reference is None or (self.kernel is None and self.support is None):
            raise InputError("reference and kernel (or support) must be given with covariance, got None")
        shape = tuple(np.shape(self.covariance))
        if len(shape) != 2 or shape[0] != shape[1]:
            raise InputError(f"covariance must be square (n, n), got shape {shape}")
        if self.support is not None and self.kernel is not None and self.support.shape != self.kernel.shape[-2:]:
            raise InputError(f"support must have the kernel's shape {tuple(self.kernel.shape[-2:])}, "
                             f"got {self.support.shape}")

    @property
    def kernel_size(self) -> int:
        """Side K of the kernel; 1 where none is given."""
        known = self.kernel if self.kernel is not None else self.support
        return 1 if known is None else int(known.shape[-1])


class LinearVariance(NamedTuple):
    r"""Parts of the variance of f = a^T D for S stars, each (S,).

    Attributes
    ----------
    noise
        Sum of :math:`a^2 \sigma_I^2 + (a \star k)^2 \sigma_R^2 - 2 q a (a \star k) \sigma_I^2` over the pixels, with
        the correlation a * k and q = `EpochNoise.shared`.
    fit
        g^T C g, what the noise of the model's coefficients adds; 0 without a covariance.
    rows
        (S, n): g = U^T a, the rows of the design matrix summed with the weights. For kernel polynomial p and
        offset u it is p_p sum_x a(x) R(x - u), for a background term p sum_x a(x), with the polynomials at the star.
        None without a covariance.
    coordinates, directions
        (S, N): what g^T C h is the inner product of, for g and h: g itself and C h, or those of
        `gpudia.model.SharedCovariance`. None without a covariance.
    """

    noise: Any
    fit: Any
    rows: Any
    coordinates: Any = None
    directions: Any = None

    def with_covariance(self, covariance: Any) -> LinearVariance:
        """Return it with g^T C g, where there are rows."""
        if self.rows is None:
            return self
        known = _known(covariance)
        coordinates = known.coordinates(self.rows) if self.coordinates is None else self.coordinates
        directions = known.times(coordinates)
        return self._replace(fit=inner(coordinates, directions), coordinates=coordinates, directions=directions)


class _Matrix(NamedTuple):
    """A covariance as it is: coordinates of a row are the row."""

    matrix: Any

    def coordinates(self, rows: Any) -> Any:
        return rows

    def times(self, rows: Any) -> Any:
        # what rounds here is small against the noise itself; with thousands of coefficients it is most of the work
        return rows @ self.matrix.astype(rows.dtype, copy=False)


def _known(covariance: Any) -> Any:
    return covariance if hasattr(covariance, "coordinates") else _Matrix(covariance)


class WeightsSeen(NamedTuple):
    """What follows from the weights of some stars alone: their transform, rows g and the coordinates of these."""

    spectra: Any
    rows: Any
    coordinates: Any


class NoiseUnder:
    """What the reference is under some stars: made once, for the noise of all epochs.

    Parameters
    ----------
    stamps : StampsOn
        Where the weights lie.
    noise : EpochNoise
        Of any of the epochs: its reference, reference variance, support and polynomials, which all have in common.
    side : int
        Side of the transforms, at least ``stamps.size + K - 1``.
    dtype : dtype
        Of the work, float32 or float64.
    """

    def __init__(self, stamps: StampsOn, noise: EpochNoise, side: int, dtype: Any) -> None:
        self.stamps, self.backend, self.side, self.dtype = stamps, stamps.backend, side, dtype
        self.half = noise.kernel_size // 2
        self._to_centre = self._phase(self.half)
        wide = StampsOn(stamps.stamps, stamps.shape, stamps.backend)
        self.kernel_terms = self._terms(noise.kernel_terms)
        self._variance = self._spectra = None
        if noise.reference_variance is not None:
            plane = finite(wide.gather(noise.reference_variance, self.half).astype(dtype))
            # as wide as the transforms: what is summed with it is then one piece of memory
            self._variance = self.backend.xp.zeros((*plane.shape[:2], side), dtype=dtype)
            self._variance[:, :, :plane.shape[2]] = plane
        if noise.covariance is not None:
            reference = finite(wide.gather(noise.reference, self.half).astype(dtype))
            self._spectra = self.backend.rfft2(reference, (side, side))
            free = np.ones((noise.kernel_size,) * 2, bool) if noise.support is None else np.asarray(noise.support, bool)
            # the transform back has lags[v] = sum_x a(x) R(x + v - h), so that the kernel's offset is u = h - v
            rows, columns = (2 * self.half - place for place in np.nonzero(free))
            self._free = to_device(rows * side + columns, self.backend)
            self._prepare_background(noise)

    def _prepare_background(self, noise: EpochNoise) -> None:
        n_kernel, n = int(self._free.shape[0]) * int(self.kernel_terms.shape[1]), int(noise.covariance.shape[0])
        self._background = self._terms(noise.background_terms)
        if noise.background_terms is None and n != n_kernel + 1:
            self._background = self._background[:, :0]
        expected = n_kernel + int(self._background.shape[1])
        if n != expected:
            raise InputError(f"covariance must have {expected} coefficients (kernel terms times support, background), "
                             f"got {n}")

    def _phase(self, shift: float) -> Any:
        """Transform of a shift by that many pixels along both axes, (side, side // 2 + 1)."""
        rows, columns = np.fft.fftfreq(self.side)[:, None], np.fft.rfftfreq(self.side)
        phase = np.exp(-2j * np.pi * shift * (rows + columns))
        return to_device(phase.astype(np.complex64 if self.dtype == np.float32 else complex), self.backend)

    def _terms(self, terms: Terms | None) -> Any:
        """Polynomials at the stars, (S, P) float64; 0 for a star at no finite place."""
        where = self.stamps.stamps.positions
        if terms is None:
            return to_device(np.ones((len(where), 1)), self.backend)
        inside = np.where(np.isfinite(where).all(axis=1, keepdims=True), where, 0.0)
        return to_device(np.asarray(terms(inside[:, 0], inside[:, 1]), float), self.backend)

    def kernel_spectra(self, noise: EpochNoise) -> tuple[Any, Any]:
        """Transform of the kernel at each star, centred, (S or 1, side, side // 2 + 1), and its sum (S or 1,)."""
        kernel, known = noise.kernel, noise.kernel_spectra
        key = self.side, self.dtype
        if key not in known:
            centred = self.backend.xp.conj(self._to_centre)
            known[key] = self.backend.rfft2(kernel.astype(self.dtype), (self.side, self.side)) * centred
        spectra = known[key]
        if len(kernel.shape) == 2:
            return spectra[None], kernel.sum()[None]
        terms = self.kernel_terms
        total = terms[:, 0, None, None].astype(self.dtype) * spectra[0]
        for p in range(1, int(kernel.shape[0])):
            total += terms[:, p, None, None].astype(self.dtype) * spectra[p]
        return total, (terms * kernel.sum(axis=(1, 2))).sum(axis=1)

    def only(self, numbers: NDArray[np.int64] | slice) -> NoiseUnder:
        """Return the same for some of the stars."""
        other, which = copy.copy(self), rows_of(numbers, self.backend)
        other.stamps, other.kernel_terms = self.stamps.only(numbers), self.kernel_terms[which]
        if self._variance is not None:
            other._variance = self._variance[which]
        if self._spectra is not None:
            other._spectra, other._background = self._spectra[which], self._background[which]
        return other

    def see(self, weights: Any, noise: EpochNoise, often: bool = False) -> WeightsSeen:
        """What the variance of a^T D needs of weights a (S, m, m) alone; coordinates, too, if it is needed often."""
        if self._variance is None and noise.covariance is None:
            return WeightsSeen(None, None, None)
        spectra = self.backend.rfft2(weights, (self.side, self.side))
        if noise.covariance is None:
            return WeightsSeen(spectra, None, None)
        rows = self._design_rows(spectra, weights.sum(axis=(1, 2)))
        return WeightsSeen(spectra, rows, _known(noise.covariance).coordinates(rows) if often else None)

    def variance(self, weights: Any, own: Any, noise: EpochNoise, kernel_spectra: Any,
                 seen: WeightsSeen) -> LinearVariance:
        """Parts of the variance of a^T D for weights a (S, m, m), with the image's own variance `own` on the stamps.

        What the coefficients' noise adds is left to `LinearVariance.with_covariance`.
        """
        total = inner(weights * weights, own)
        if self._variance is not None:
            total = total + self._reference_term(weights, seen.spectra, own, noise.shared, kernel_spectra)
        return LinearVariance(total, self.backend.xp.zeros_like(total), seen.rows, seen.coordinates)

    def _reference_term(self, weights: Any, spectra: Any, own: Any, shared: float, kernel_spectra: Any) -> Any:
        """Sum of (a correlated with k)^2 times the reference's variance, less what it shares with the image, (S,)."""
        m, h = self.stamps.stamps.size, self.half
        product = spectra * (self.backend.xp.conj(kernel_spectra) * self._to_centre)
        response = self.backend.irfft2(product, (self.side, self.side), m + 2 * h)
        term = inner(response * response, self._variance)
        if shared:
            term = term - 2 * shared * (weights * response[:, h:h + m, h:h + m] * own).sum(axis=(1, 2))
        return term

    def _design_rows(self, spectra: Any, total: Any) -> Any:
        """Rows g = U^T a, one for each star, (S, n)."""
        xp, terms = self.backend.xp, self.kernel_terms.astype(self.dtype)
        lags = self.backend.irfft2(self._spectra * xp.conj(spectra), (self.side, self.side), 2 * self.half + 1)
        lags = xp.take(lags.reshape(len(lags), (2 * self.half + 1) * self.side), self._free, axis=1)
        rows = xp.empty((len(lags), lags.shape[1] * terms.shape[1] + self._background.shape[1]), dtype=self.dtype)
        for p in range(int(terms.shape[1])):
            rows[:, p * lags.shape[1]:(p + 1) * lags.shape[1]] = terms[:, p, None] * lags
        rows[:, lags.shape[1] * terms.shape[1]:] = self._background.astype(self.dtype) * total[:, None]
        return rows


def linear_flux_variance(weights: FloatArray, stamps: Stamps, noise: EpochNoise) -> FloatArray:
    r"""Return the exact variance of the fluxes f = a^T D, pixel correlations through the kernel included.

    .. math:: Var(f) = \sum a^2 \sigma_I^2 + \sum (a \star k)^2 \sigma_R^2
                       - 2 q \sum a (a \star k) \sigma_I^2 + g^T C g, \qquad g = U^T a

    (see `LinearVariance`). Terms for which `noise` has nothing are left out. Not an approximation, but for polynomials,
    which count as constant over one star's footprint. It is that of a star whose pixels did not enter the fit; for the
    others see `gpudia.photometry.forced_photometry`.

    Parameters
    ----------
    weights : (S, m, m)
        a, for each star; 0 on ignored pixels. On the host, as the planes of `noise`.
    stamps : Stamps
        Where the stars' stamps lie, of side m.
    noise : EpochNoise
        Variances, kernel and covariance of the epoch.

    Returns
    -------
    (S,) float64
        Variance, ADU^2 of the difference image.

    Raises
    ------
    InputError
        The number of stars or of coefficients does not agree.
    """
    if weights.shape != (len(stamps), stamps.size, stamps.size):
        raise InputError(f"weights must have shape {(len(stamps), stamps.size, stamps.size)}, got {weights.shape}")
    backend = backend_of(weights)
    shape = tuple(int(n) for n in noise.image_variance.shape)
    side = transform_side(stamps.size, noise.kernel_size)
    placed = StampsOn(stamps, (shape[0], shape[1]), backend)
    under = NoiseUnder(placed, noise, side, np.dtype(float))
    spectra = None if noise.kernel is None else under.kernel_spectra(noise)[0]
    own = finite(placed.gather(noise.image_variance).astype(float))
    seen = under.see(weights, noise)
    parts = under.variance(weights, own, noise, spectra, seen).with_covariance(noise.covariance)
    return to_host(parts.noise + parts.fit)


def transform_side(size: int, kernel_size: int, psf_size: int = 0) -> int:
    """Side of the transforms for stamps of side `size`: their response to the kernel fits, and so does the PSF.

    What of a PSF convolved with the kernel lies further out may come back at the other edge, but not into the stamp.
    """
    spread = -(-(psf_size + kernel_size + size) // 2) if psf_size else 0
    return int(fft.next_fast_len(max(size + kernel_size - 1, spread, psf_size + 4 if psf_size else 0), real=True))


def finite(stamps: Any) -> Any:
    """Replace what is not finite by 0: such a pixel is masked and its weight 0, but 0 * nan would spoil the star."""
    xp = backend_of(stamps).xp
    return xp.where(xp.isfinite(stamps), stamps, 0.0)
