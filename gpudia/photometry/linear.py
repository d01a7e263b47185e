"""Linear flux estimates f = a^T D on a difference image, with their exact variance.

An aperture sum and a PSF flux differ in the pixel weights a only; what follows from the weights is here, once.
Work is done on stamps of many stars at the same time, in blocks that bound the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from gpudia.errors import InputError
from gpudia.flags import SOURCE_FLAGS
from gpudia.photometry.stamps import FloatArray, Footprint, ForcedFluxes, Stamps

__all__ = ["EpochNoise", "linear_flux_variance", "measure_in_blocks", "measure_linear"]

#: Polynomial terms at pixel positions: ``terms(x, y)`` has the terms on a last axis, after the shape of x and y.
Terms = Callable[[Any, Any], Any]

#: Numbers in one temporary of a block of stars (8 MB); a block holds about ten of them.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class EpochNoise:
    """All that makes the error of a flux on one difference image D = I - M.

    Parameters
    ----------
    image_variance : (H, W)
        Variance of the image's own noise, ADU^2 (not that of the difference).
    kernel : (K, K) or (S, K, K), optional
        Matching kernel, for all stars or at each of them: M(x) = sum_u k[u] R(x - u), ``kernel[K//2, K//2]``
        multiplies R(x).
    reference_variance : (H, W), optional
        Variance of the reference, ADU^2. Needs `kernel`.
    reference : (H, W), optional
        The reference frame R, ADU. Needed with `covariance`.
    covariance : (n, n), optional
        Covariance of the model's coefficients: for each kernel polynomial the pixels of `support`, row-major; then
        the background terms.
    support : (K, K) bool, optional
        Pixels of the kernel that were free; all of them by default.
    shared : float
        What the image adds to the reference, as a factor of its pixels: its weight in a stack over its scale. The
        noise of the two is then correlated. 0 for an image that is not in the reference.
    kernel_terms, background_terms : callable, optional
        ``terms(x, y) -> (..., P)``: polynomials of the kernel and of the background at pixel positions of the
        frame. Constant by default; without any background where `covariance` has no room for it.

    Raises
    ------
    InputError
        Shapes do not agree, or something that another part needs is missing.
    """

    image_variance: NDArray[Any]
    kernel: NDArray[Any] | None = None
    reference_variance: NDArray[Any] | None = None
    reference: NDArray[Any] | None = None
    covariance: NDArray[Any] | None = None
    support: NDArray[np.bool_] | None = None
    kernel_terms: Terms | None = None
    background_terms: Terms | None = None
    shared: float = 0.0

    def __post_init__(self) -> None:
        shape = np.shape(self.image_variance)
        for name in ("reference_variance", "reference"):
            plane = getattr(self, name)
            if plane is not None and np.shape(plane) != shape:
                raise InputError(f"{name} must have the shape of image_variance {shape}, got {np.shape(plane)}")
        if self.kernel is not None:
            object.__setattr__(self, "kernel", np.asarray(self.kernel, float))
            self._check_kernel()
        elif self.reference_variance is not None:
            raise InputError("kernel must be given with reference_variance, got None")
        if not 0 <= self.shared <= 1e6 or (self.shared and self.reference_variance is None):
            raise InputError(f"shared must be 0, or positive with reference_variance, got {self.shared}")
        if self.covariance is not None:
            self._check_covariance()

    def _check_kernel(self) -> None:
        shape = np.shape(self.kernel)
        if len(shape) not in (2, 3) or shape[-1] != shape[-2] or shape[-1] % 2 == 0:
            raise InputError(f"kernel must be (K, K) or (S, K, K) with K odd, got shape {shape}")

    def _check_covariance(self) -> None:
        if self.reference is None or (self.kernel is None and self.support is None):
            raise InputError("reference and kernel (or support) must be given with covariance, got None")
        if np.ndim(self.covariance) != 2 or len(set(np.shape(self.covariance))) != 1:
            raise InputError(f"covariance must be square (n, n), got shape {np.shape(self.covariance)}")
        if self.support is not None and self.kernel is not None and self.support.shape != self.kernel.shape[-2:]:
            raise InputError(f"support must have the kernel's shape {self.kernel.shape[-2:]}, "
                             f"got {self.support.shape}")

    def of(self, stars: slice) -> EpochNoise:
        """Return the same for some of the stars."""
        if self.kernel is None or self.kernel.ndim == 2:
            return self
        return replace(self, kernel=self.kernel[stars])

    def free_pixels(self) -> NDArray[np.bool_]:
        """Pixels of the kernel that were free, (K, K)."""
        if self.support is not None:
            return np.asarray(self.support, bool)
        return np.ones(np.shape(self.kernel)[-2:], bool)


def measure_in_blocks(n: int, size: int, noise: EpochNoise,
                      measure: Callable[[slice, EpochNoise], ForcedFluxes]) -> ForcedFluxes:
    """Call ``measure(stars, their noise)`` for blocks of `n` stars with stamps of side `size`, and join the parts."""
    if noise.kernel is not None and noise.kernel.ndim == 3 and len(noise.kernel) != n:
        raise InputError(f"kernel must be one for all stars or one for each of {n}, got {len(noise.kernel)}")
    side = size if noise.kernel is None else size + noise.kernel.shape[-1]
    step = max(1, _BLOCK // max(side**2, 0 if noise.covariance is None else len(noise.covariance)))
    blocks = [slice(start, min(start + step, n)) for start in range(0, n, step)]
    parts = [measure(block, noise.of(block)) for block in blocks]
    if not parts:
        return ForcedFluxes(np.empty(0), np.empty(0), np.empty(0, np.int32), np.empty(0, np.int32))
    return ForcedFluxes(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def measure_linear(difference: NDArray[Any], weights: FloatArray, stamps: Stamps, noise: EpochNoise,
                   under: Footprint, max_masked_fraction: float) -> ForcedFluxes:
    """Flux f = sum a D and its error for weights a (S, m, m) that are 0 on every ignored pixel.

    NaN where an edge cuts the star or more than `max_masked_fraction` of it is masked.
    """
    values = np.where(weights != 0, stamps.gather(difference), 0.0)
    flux = np.einsum("sij,sij->s", weights, values)
    error = np.sqrt(linear_flux_variance(weights, stamps, noise))
    usable = (under.fraction <= max_masked_fraction) & (under.flags & SOURCE_FLAGS.outside == 0)
    return ForcedFluxes(np.where(usable, flux, np.nan), np.where(usable, error, np.nan), under.flags, under.n_masked)


def linear_flux_variance(weights: FloatArray, stamps: Stamps, noise: EpochNoise) -> FloatArray:
    r"""Return the exact variance of the fluxes f = a^T D, pixel correlations through the kernel included.

    .. math:: Var(f) = \sum a^2 \sigma_I^2 + \sum (a \star k)^2 \sigma_R^2
                       - 2 q \sum a (a \star k) \sigma_I^2 + g^T C g, \qquad g = U^T a

    with the correlation a * k, q = `EpochNoise.shared`, and g the row of the design matrix summed with the weights: for
    kernel term p and offset u, g = sum_x a(x) p_p(x) R(x - u), for a background term, g = sum_x a(x) p(x). Terms for
    which `noise` has nothing are left out. Not an approximation, but for a kernel that varies over the frame: it is
    taken constant over one star's footprint in the second and third term.

    The last term is that of a star whose pixels did not enter the fit (clipped, or a variable injected later). A
    star that did enter scatters less, by up to 2 g^T C g, because the kernel follows its noise.

    Parameters
    ----------
    weights : (S, m, m)
        a, for each star; 0 on ignored pixels.
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
    variance = np.einsum("sij,sij,sij->s", weights, weights, _finite(stamps.gather(noise.image_variance)))
    if noise.reference_variance is not None:
        variance += _reference_term(weights, stamps, noise)
    if noise.covariance is not None:
        variance += _fit_term(weights, stamps, noise)
    return variance


def _finite(stamps: NDArray[Any]) -> NDArray[Any]:
    # Where a variance is not finite the pixel is masked and its weight 0; 0 * nan would spoil the star.
    return np.nan_to_num(stamps, copy=False, nan=0.0, posinf=0.0, neginf=0.0)


def _reference_term(a: FloatArray, where: Stamps, noise: EpochNoise) -> FloatArray:
    """Sum of (a correlated with k)^2 times the reference's variance, less what it shares with the image, (S,)."""
    kernel, variance = np.asarray(noise.kernel, float), np.asarray(noise.reference_variance)
    k, m = kernel.shape[-1], a.shape[-1]
    side = fft.next_fast_len(m + k - 1, real=True)
    flipped = kernel[..., ::-1, ::-1]
    # Correlation with k is convolution with the flipped k; in full mode it fills the stamp grown by K//2.
    product = fft.rfft2(a, (side, side)) * fft.rfft2(flipped, (side, side))
    response = fft.irfft2(product, (side, side))[:, : m + k - 1, : m + k - 1]
    term = np.einsum("sij,sij,sij->s", response, response, _finite(where.gather(variance, k // 2)))
    if noise.shared:
        inner = response[:, k // 2 : k // 2 + m, k // 2 : k // 2 + m]
        own = _finite(where.gather(noise.image_variance))
        term -= 2 * noise.shared * np.einsum("sij,sij,sij->s", a, inner, own)
    return term


def _fit_term(a: FloatArray, where: Stamps, noise: EpochNoise) -> FloatArray:
    """The term g^T C g, (S,)."""
    g = _design_rows(a, where, noise)
    covariance = np.asarray(noise.covariance, float)
    if g.shape[1] != len(covariance):
        raise InputError(f"covariance must have {g.shape[1]} coefficients (kernel terms times support, background), "
                         f"got {len(covariance)}")
    return np.einsum("sn,sn->s", g @ covariance, g)


def _design_rows(a: FloatArray, where: Stamps, noise: EpochNoise) -> FloatArray:
    """Rows g = U^T a, one for each star, (S, n)."""
    free = noise.free_pixels()
    half, m = free.shape[0] // 2, a.shape[-1]
    side = fft.next_fast_len(m + 2 * half, real=True)
    x, y = where.coordinates()
    x, y = np.broadcast_arrays(x[:, None, :], y[:, :, None])
    weighted = a[:, None] if noise.kernel_terms is None else a[:, None] * _terms_first(noise.kernel_terms, x, y)
    reference = fft.rfft2(_finite(where.gather(np.asarray(noise.reference, float), half)), (side, side))
    columns = []
    for p in range(weighted.shape[1]):
        lags = fft.irfft2(reference * np.conj(fft.rfft2(weighted[:, p], (side, side))), (side, side))
        # lags[v] = sum_x a(x) R(x + v - half), so that the kernel's offset is u = half - v: read it backwards.
        columns.append(lags[:, 2 * half :: -1, 2 * half :: -1][:, free])
    kernel_part = np.concatenate(columns, axis=1)
    return np.concatenate([kernel_part, _background_rows(a, x, y, noise, kernel_part.shape[1])], axis=1)


def _background_rows(a: FloatArray, x: Any, y: Any, noise: EpochNoise, n_kernel: int) -> FloatArray:
    if noise.background_terms is not None:
        return np.einsum("sij,spij->sp", a, _terms_first(noise.background_terms, x, y))
    if noise.covariance is not None and len(noise.covariance) > n_kernel:
        return a.sum(axis=(1, 2))[:, None]
    return np.empty((len(a), 0))


def _terms_first(terms: Terms, x: Any, y: Any) -> FloatArray:
    """Polynomials at the pixels of the stamps, (S, P, m, m)."""
    return np.moveaxis(np.asarray(terms(x, y), float), -1, 1)


