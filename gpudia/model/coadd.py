"""A deeper reference: the weighted mean of images that were subtracted against one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gpudia.backend import backend_of, scalar
from gpudia.errors import InputError
from gpudia.flags import PIXEL_FLAGS
from gpudia.model.planes import SAMPLE, grow, median_of
from gpudia.model.polynomials import exponents, scaled
from gpudia.model.stack import DifferenceStack

__all__ = ["Coadd", "Coadded"]

#: Share of a pixel's light that the model may miss without the pixel being called an outlier, one sigma.
_MODEL_ERROR = 0.05
#: Share of the weight that must have been measured, and not filled in, at a good pixel.
_MEASURED = 0.5


@dataclass(frozen=True)
class Coadded:
    """Planes (H, W), ADU of the first reference: mean, its variance, and which pixels are not to be used."""

    data: Any
    variance: Any
    mask: Any


class Coadd:
    """Sums over images on one grid, in any number of batches, each brought to the reference's scale and background.

    Parameters
    ----------
    reference : array (H, W)
        What the images are subtracted against; its backend is that of the sums.
    clip : float
        Pixels further than this many sigma from the model count as outliers.

    Notes
    -----
    An image is I = K (x) R + b, so (I - b) / s with s = sum K is the field under the image's own PSF with the
    reference's flux and sky. The mean of these with weights w_i, the same for all pixels of an image, is an image with
    one PSF, the mean of the images', and with noise that is independent from pixel to pixel; both hold for no image
    that was convolved to another's PSF. So the kernels serve to find scale, background and outliers, and to fill in.

    For one PSF everywhere a pixel must not lack one of the images: that would give a star's core, saturated in the
    sharp images, the profile of the others. Masked pixels and outliers are filled with the model (K (x) R) / s. They
    count as not measured in the variance; where less than half of the weight was measured the result is masked.
    Where an image has neither a value nor a model (the first reference is masked there) the mean is that of the
    others: good enough for a reference against which a second round has models everywhere. With `complete` such
    pixels are masked.

    Pixels at which most images are outliers accuse the reference, not the images: those are averaged as they are,
    and the image that is the reference is left out there.
    """

    def __init__(self, reference: Any, clip: float = 5.0) -> None:
        if getattr(reference, "ndim", 0) != 2:
            raise InputError(f"reference must be an array (H, W), got shape {getattr(reference, 'shape', None)}")
        self.xp = xp = backend_of(reference).xp
        self.clip = clip
        shape = tuple(reference.shape)
        self._clean, self._raw = _Sums(shape, xp), _Sums(shape, xp)
        self._outliers, self._count = xp.zeros(shape, dtype=xp.int32), 0

    def add(self, stack: DifferenceStack, images: Any, variances: Any, masks: Any, weights: Any,
            is_reference: Any) -> None:
        """Add images (B, H, W).

        Parameters
        ----------
        stack : DifferenceStack
            Their differences against the reference.
        images, variances : arrays (B, H, W)
            ADU and ADU^2, as they were subtracted.
        masks : bool array (B, H, W)
            True = ignore.
        weights : array (B,)
            Of an image brought to the reference's scale.
        is_reference : bool array (B,)
            Which of them is the reference itself.
        """
        xp = self.xp
        scale, background = _planes(stack.coefficients.sum(axis=(2, 3)), stack), _planes(stack.background, stack)
        value, variance = (images - background) / scale, variances / scale**2
        defined = xp.isfinite(stack.model) & (stack.flags & PIXEL_FLAGS.reference == 0)
        model = xp.where(defined, (stack.model - background) / scale, 0.0)
        good = ~masks & xp.isfinite(value) & xp.isfinite(variance) & (variance > 0)
        outlier = self._outlying(stack, model, scale, good & defined)
        each = weights[:, None, None]
        own = is_reference[:, None, None]
        self._outliers += (outlier & ~own).sum(axis=0).astype(xp.int32)
        self._count += len(images) - int(scalar((is_reference | ~(weights > 0)).sum()))
        self._clean.add(value, variance, model, good & ~outlier, defined, each)
        self._raw.add(value, variance, model, good & ~own, defined & ~own, each)

    def result(self, complete: bool) -> Coadded:
        """Return the mean of what was added, with or without the pixels that lack an image."""
        xp = self.xp
        accused = grow(2 * self._outliers > self._count) if self._count > 1 else self._outliers < 0
        clean, raw = self._clean.mean(complete), self._raw.mean(complete)
        data, variance, mask = (xp.where(accused, b, a) for a, b in zip(clean, raw, strict=True))
        return Coadded(data, variance, mask)

    def _outlying(self, stack: DifferenceStack, model: Any, scale: Any, known: Any) -> Any:
        """Pixels off the model by more than noise and 5 % of the light there, grown by one pixel, (B, H, W)."""
        xp = self.xp
        light = (model - median_of(model, known, SAMPLE)[:, None, None]) * scale
        sigma = xp.sqrt(xp.where(known, stack.variance, 1.0) + (_MODEL_ERROR * light) ** 2)
        return grow(known & (xp.abs(xp.where(known, stack.difference, 0.0)) > self.clip * sigma)) & known


class _Sums:
    """Weighted sums of values over images, (H, W) each."""

    def __init__(self, shape: tuple[int, ...], xp: Any) -> None:
        self.xp = xp
        self.value, self.weight, self.measured, self.noise, self.asked = (xp.zeros(shape) for _ in range(5))

    def add(self, value: Any, variance: Any, model: Any, good: Any, defined: Any, weights: Any) -> None:
        xp = self.xp
        self.value += (weights * xp.where(good, value, xp.where(defined, model, 0.0))).sum(axis=0)
        self.weight += (weights * (good | defined)).sum(axis=0)
        self.measured += (weights * good).sum(axis=0)
        self.noise += (weights**2 * xp.where(good, variance, 0.0)).sum(axis=0)
        self.asked += weights.sum(axis=0)

    def mean(self, complete: bool) -> tuple[Any, Any, Any]:
        """Mean, variance of what was measured, and mask."""
        xp = self.xp
        enough = self.measured > _MEASURED * self.asked
        if complete:
            enough = enough & (self.weight > (1 - 1e-9) * self.asked)
        some = self.weight > 0
        measured = xp.where(self.measured > 0, self.measured, 1.0)
        data = xp.where(some, self.value / xp.where(some, self.weight, 1.0), xp.nan)
        return data, xp.where(self.measured > 0, self.noise / measured**2, xp.nan), ~enough


def _planes(coefficients: Any, stack: DifferenceStack) -> Any:
    """Polynomials with coefficients (B, P) at every pixel, (B, H, W) or, where they are constant, (B, 1, 1)."""
    xp = backend_of(coefficients).xp
    count, (height, width) = coefficients.shape[1], stack.difference.shape[-2:]
    if count == 1:
        return coefficients[:, :, None]
    degree = next(d for d in range(count) if (d + 1) * (d + 2) // 2 == count)
    y, x = scaled(xp.arange(height), height)[:, None], scaled(xp.arange(width), width)[None]
    return sum(coefficients[:, k, None, None] * (x**i * y**j) for k, (i, j) in enumerate(exponents(degree)))
