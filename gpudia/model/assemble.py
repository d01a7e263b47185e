"""Fits of groups put together into one `DifferenceStack`."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpudia.flags import FRAME_FLAGS, PIXEL_FLAGS
from gpudia.model.design import Design
from gpudia.model.fit import Fit
from gpudia.model.given import GivenUnits
from gpudia.model.stack import DifferenceStack

__all__ = ["StackBuilder"]

_FAILED = FRAME_FLAGS.no_pixels | FRAME_FLAGS.not_finite


class StackBuilder:
    """Room for the results of a batch, filled group by group (from several threads: groups do not overlap).

    Parameters
    ----------
    design : Design
    images : array (B, H, W)
        As given by the caller: their dtype decides that of the planes.
    keep : tuple of str
        "covariance", "image_variance".
    """

    def __init__(self, design: Design, images: Any, keep: tuple[str, ...]) -> None:
        xp, B, n = design.xp, len(images), design.n_parameters
        self.design, self.xp = design, xp
        self.dtype = images.dtype if images.dtype == xp.float32 else xp.float64
        shape = tuple(images.shape)
        (height, width), m = design.tiling.shape, design.tiling.margin
        self._inside = xp.zeros((height, width), dtype=bool)
        self._inside[m:height - m, m:width - m] = True
        self.difference, self.model, self.variance = (xp.empty(shape, dtype=self.dtype) for _ in range(3))
        self.image_variance = xp.empty(shape, dtype=self.dtype) if "image_variance" in keep else None
        self.flags = xp.zeros(shape, dtype=xp.uint8)
        self.coefficients = xp.empty((B, n))
        self.variances = xp.empty((B, n))
        self.covariance: Any = xp.empty((B, n, n)) if "covariance" in keep else None
        self.covariance_terms = xp.full((B, 2), np.nan)
        self.scale_image_variance, self.scale_reference_variance = xp.empty(B), xp.empty(B)
        self.chi2, self.left = xp.empty(B), xp.empty(B)
        self.n_pixels, self.n_clipped = xp.zeros(B, dtype=xp.int64), xp.zeros(B, dtype=xp.int64)
        self.status, self.iterations = xp.zeros(B, dtype=xp.int32), xp.zeros(B, dtype=xp.int32)

    def put(self, group: slice, images: Any, finite: Any, good: Any, fit: Fit) -> None:
        """Store the fit of one group; an image without a solution gets NaN everywhere."""
        xp, tiling = self.xp, self.design.tiling
        solved = xp.isfinite(fit.coefficients).all(axis=1) & xp.isfinite(fit.chi2)
        status = fit.status | xp.where(finite.any(axis=(1, 2)), 0, FRAME_FLAGS.not_finite).astype(xp.int32)
        status = status | xp.where(solved, 0, FRAME_FLAGS.not_finite).astype(xp.int32)
        alive = (status & _FAILED) == 0
        defined = self._inside & finite & alive[:, None, None]
        model = xp.where(defined, tiling.join(fit.model, np.nan), np.nan)
        self.model[group] = model
        self.difference[group] = xp.where(finite, images, 0.0) - model
        self.variance[group] = xp.where(defined, tiling.join(fit.variance, np.nan), np.nan)
        if self.image_variance is not None:
            self.image_variance[group] = xp.where(defined, tiling.join(fit.image_variance, np.nan), np.nan)
        self.flags[group] = self._pixel_flags(finite, good, fit, alive)
        dead = ~alive
        self.coefficients[group] = xp.where(dead[:, None], np.nan, fit.coefficients)
        self.variances[group] = xp.where(dead[:, None], np.nan, fit.variances)
        self.scale_image_variance[group] = xp.where(dead, np.nan, fit.scale_image_variance)
        self.scale_reference_variance[group] = xp.where(dead, np.nan, fit.scale_reference_variance)
        self.chi2[group] = xp.where(dead, np.nan, fit.chi2)
        self.left[group] = xp.where(dead, np.nan, fit.left)
        self.n_pixels[group], self.n_clipped[group] = fit.n_pixels, fit.clipped.sum(axis=(1, 2, 3))
        self.status[group], self.iterations[group] = status, fit.iterations

    def put_covariance(self, group: slice, fit: Fit, given: GivenUnits) -> None:
        """Store what is kept of the covariances of one group, after `put`."""
        dead = ~self.xp.isfinite(self.coefficients[group][:, 0])
        if fit.covariance is None:
            self.covariance_terms[group] = self.xp.where(dead[:, None], np.nan, given.shared_terms(fit))
        if self.covariance is not None:
            self.covariance[group] = self.xp.where(dead[:, None, None], np.nan, given.covariance(fit))

    def _pixel_flags(self, finite: Any, good: Any, fit: Fit, alive: Any) -> Any:
        xp, tiling = self.xp, self.design.tiling
        flags = xp.where(finite & alive[:, None, None], 0, PIXEL_FLAGS.no_data)
        flags = flags | xp.where(finite & ~good, PIXEL_FLAGS.bad, 0)
        flags = flags | xp.where(tiling.join(fit.spoilt, False), PIXEL_FLAGS.reference, 0)
        flags = flags | xp.where(self._inside, 0, PIXEL_FLAGS.border)
        return (flags | xp.where(tiling.join(fit.clipped, False), PIXEL_FLAGS.clipped, 0)).astype(xp.uint8)

    def stack(self, covariance_kind: str) -> DifferenceStack:
        """Return everything as a `DifferenceStack`."""
        xp, design = self.xp, self.design
        kernels, background = design.unpack(self.coefficients)
        errors, background_error = design.unpack(xp.sqrt(xp.maximum(self.variances, 0.0)))
        kernel = kernels[:, 0]
        scale = kernel.sum(axis=(1, 2))
        norm = xp.sqrt((kernel**2).sum(axis=(1, 2)))
        gain = norm / xp.where(scale != 0, xp.abs(scale), np.nan)
        status = self.status | xp.where(gain > 1, FRAME_FLAGS.deconvolving, 0).astype(xp.int32)
        scale_error = xp.sqrt(self.scale_image_variance + self.scale_reference_variance)
        doubtful = (scale <= 0) | (scale_error > 0.1 * xp.abs(scale))
        status = status | xp.where(doubtful, FRAME_FLAGS.bad_scale, 0).astype(xp.int32)
        return DifferenceStack(
            difference=self.difference, model=self.model, variance=self.variance, flags=self.flags, kernel=kernel,
            coefficients=kernels, kernel_error=errors[:, 0], background=background,
            background_error=background_error,
            scale=scale, scale_error=scale_error, scale_error_reference=xp.sqrt(self.scale_reference_variance),
            chi2=self.chi2, n_pixels=self.n_pixels, n_clipped=self.n_clipped, status=status, iterations=self.iterations,
            solver_error=xp.sqrt(xp.maximum(self.left, 0.0)), noise_gain=gain, covariance=self.covariance,
            covariance_terms=self.covariance_terms,
            image_variance=self.image_variance, support=design.support, covariance_kind=covariance_kind)
