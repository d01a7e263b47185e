"""The reference made fit for transforms: holes filled, noise known, a weight map that is typical of the images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpudia.backend import backend_of, namespace_of, scalar
from gpudia.model.planes import SAMPLE, median_of

__all__ = ["PreparedReference", "informative_pixels", "prepare_reference"]

#: Error of a reference pixel over the usual one, above which it counts as masked.
_USELESS = 1e3
#: Significance of the reference's light from which on a pixel's surroundings tell something of the kernel.
_SIGNIFICANT = 10.0


@dataclass(frozen=True)
class PreparedReference:
    """Reference planes (H, W): filled `data` and `variance` (None: noise unknown), `good`, and typical `weights`."""

    data: Any
    variance: Any
    good: Any
    weights: Any


def _gaussian_transform(shape: tuple[int, int], sigma: float, xp: Any) -> Any:
    rows = xp.exp(-2 * (np.pi * sigma * xp.fft.fftfreq(shape[0])) ** 2)
    columns = xp.exp(-2 * (np.pi * sigma * xp.fft.rfftfreq(shape[1])) ** 2)
    return rows[:, None] * columns


def _blurred(plane: Any, sigma: float) -> Any:
    backend, shape = backend_of(plane), tuple(plane.shape)
    return backend.irfft2(backend.rfft2(plane, shape) * _gaussian_transform(shape, sigma, backend.xp), shape)


def fill_holes(plane: Any, good: Any) -> Any:
    """Give the pixels that are not good the weighted mean of the good ones around them.

    A masked pixel never enters a fit, but it does enter the transforms: it must be finite and smooth. The scale of the
    (Gaussian) mean grows until good pixels are found; the median of the plane stands where there are none.
    """
    xp = namespace_of(plane)
    middle = median_of(plane[None], good[None], SAMPLE)[0]
    middle = xp.where(xp.isfinite(middle), middle, 0.0)
    filled = xp.where(good, plane, middle)
    known = good
    for sigma in (2.0, 8.0, 32.0):
        if scalar(known.all()):
            break
        weight = _blurred(good.astype(plane.dtype), sigma)
        total = _blurred(xp.where(good, plane - middle, 0.0), sigma)
        near = ~known & (weight > 0.02)
        filled = xp.where(near, middle + total / xp.where(near, weight, 1.0), filled)
        known = known | near
    return filled


def _typical_weights(variance: Any, good: Any) -> Any:
    """Weights 1 / variance with the variance blurred: most images have a wider PSF than the reference.

    By a Gaussian of 2 px: with it the solver needs ten per cent fewer iterations than with one of 1 px.
    """
    xp = namespace_of(good)
    if variance is None:
        return good.astype(xp.float64)
    level = xp.where(good, variance, 0.0).sum() / xp.maximum(good.sum(), 1)
    blurred = xp.maximum(_blurred(xp.where(good, variance, level), 2.0), 1e-3 * level)
    return xp.where(good, 1.0 / xp.where(blurred > 0, blurred, 1.0), 0.0)


def prepare_reference(data: Any, error: Any, mask: Any, unit: float) -> PreparedReference:
    """Check and fill the reference (H, W) times `unit`; see `PreparedReference`."""
    xp = namespace_of(data)
    data = data.astype(xp.float64) * unit
    good = xp.isfinite(data)
    if mask is not None:
        good &= mask == 0
    variance = None
    if error is not None:
        # an error a thousand times the usual says "do not use"; in single precision it would drown all others
        usual = median_of(error.astype(xp.float64)[None], (good & (error > 0))[None], SAMPLE)[0]
        good &= xp.isfinite(error) & (error > 0) & ~(error > _USELESS * usual)
        variance = xp.maximum(fill_holes((unit * xp.where(good, error, 0.0).astype(xp.float64)) ** 2, good), 0.0)
    data = xp.where(good, data, 0.0)
    filled = fill_holes(data, good)
    if variance is not None:
        # what stands in a hole is a guess, as uncertain as its surroundings are uneven
        uneven = fill_holes(data**2, good) - filled**2
        variance = xp.where(good, variance, xp.maximum(variance, uneven))
    return PreparedReference(filled, variance, good, _typical_weights(variance, good))


def informative_pixels(reference: PreparedReference, kernel_size: int) -> Any:
    """Pixels with significant light of the reference, bool (H, W): what they reach through the kernel informs the fit.

    Everywhere else the reference shows the kernel nothing but its own noise, and noise in the columns of a
    least-squares problem pulls the coefficients towards zero (errors in variables):
    E[U^T W U] = A + diag(sum w sigma_R^2), where the sum over empty sky is by far the largest part. In a sparse field
    with a single frame as reference that biased the photometric scale by 20 to 50 %; without the empty sky by no more
    than its error.

    The light is that of a difference of Gaussians of 1.7 px and K/2 px, against the noise of the former.
    """
    narrow = 1.7
    light = _blurred(reference.data, narrow) - _blurred(reference.data, kernel_size / 2)
    noise = _blurred(reference.variance, narrow) / (4 * math.pi * narrow**2)
    return light > _SIGNIFICANT * namespace_of(noise).sqrt(namespace_of(noise).maximum(noise, 0.0))
