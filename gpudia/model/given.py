"""From the units of the fit to those of the data as they were given, coefficients with their covariance."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

from gpudia.model.design import Design
from gpudia.model.fit import Fit

__all__ = ["GivenUnits"]

#: Least unit (and one over the largest) whose square times the square of data is far from the ends of single precision.
_LEAST = 2.0**-40


class GivenUnits:
    """Results for reference and images as they came.

    Parameters
    ----------
    design : Design
    unit : float
        Factor by which reference and images were multiplied for the fit.
    sky : array () or None
        What was subtracted from the reference after that; None where it is not to be put into the background.
    shared : array (n, n)
        Approximate inverse of the shared normal matrix, in the units of the fit.
    """

    def __init__(self, design: Design, unit: float, sky: Any, shared: Any) -> None:
        self.design = design
        self.unit = unit
        self._sky = sky
        self._shared = shared
        #: Whether variances in the units of the data are numbers of single precision.
        self.fits_single = _LEAST < unit < 1 / _LEAST

    def fit(self, fit: Fit) -> Fit:
        """Return the fit with coefficients, their covariance (where it is exact) and variances, and planes as given."""
        xp, m, P, unit = self.design.xp, self.design.n_kernel, self.design.n_spatial, self.unit
        a, first = fit.coefficients.copy(), P * m
        if self._sky is not None:  # b_p -= sky * sum k_p
            a[:, first:first + P] -= self._sky * a[:, :first].reshape(-1, P, m).sum(axis=2)
        a[:, first:] /= unit
        covariance = None
        if fit.covariance is not None:
            covariance = self._transformed(fit.covariance)
            variances = xp.diagonal(covariance, axis1=-2, axis2=-1)
        else:
            ratio, missing, v = self._shared_terms(fit)
            variances = ratio[:, None] * xp.diagonal(self.shared) + missing[:, None] * v * v
        kind = fit.variance.dtype if self.fits_single else xp.float64
        own, variance = (plane.astype(kind) / unit**2 for plane in (fit.image_variance, fit.variance))
        return replace(fit, coefficients=a, covariance=covariance, variances=variances, model=fit.model / unit,
                       image_variance=own, variance=variance)

    def in_fit_units(self, coefficients: Any) -> Any:
        """Coefficients (B, n) as given to those of the fit: the inverse of what `fit` does to them."""
        m, P = self.design.n_kernel, self.design.n_spatial
        a, first = coefficients.copy(), P * m
        a[:, first:] *= self.unit
        if self._sky is not None:
            a[:, first:first + P] += self._sky * a[:, :first].reshape(-1, P, m).sum(axis=2)
        return a

    def covariance(self, fit: Fit) -> Any:
        """Covariance (B, n, n) of a fit as given: exact, or an estimate from the shared matrix."""
        if fit.covariance is not None:
            return fit.covariance
        ratio, missing, v = self._shared_terms(fit)
        return ratio[:, None, None] * self.shared + missing[:, None, None] * (v[:, None] * v)

    def _transformed(self, C: Any) -> Any:
        """Covariance (..., n, n) of the coefficients as given."""
        P, m, n = self.design.n_spatial, self.design.n_kernel, self.design.n_parameters
        first, lead = P * m, C.shape[:-2]
        C = C.copy()
        if self._sky is not None:
            C[..., first:first + P, :] -= self._sky * C[..., :first, :].reshape(*lead, P, m, n).sum(axis=-2)
            C[..., first:first + P] -= self._sky * C[..., :first].reshape(*lead, n, P, m).sum(axis=-1)
        C[..., first:, :] /= self.unit
        C[..., first:] /= self.unit
        return C

    @cached_property
    def shared(self) -> Any:
        """Approximate inverse of the shared normal matrix, for coefficients as given, (n, n)."""
        return self._transformed(self._shared)

    def _shared_terms(self, fit: Fit) -> tuple[Any, Any, Any]:
        """Estimate of each image's covariance, s C + t v v^T: s (B,), t (B,), v (n,).

        The shared one by the ratio of the traces s, made exact for the sum S over the central kernel:
        v = C 1 / (1^T C 1) and t = S - s 1^T C 1, a change of rank one that leaves it positive semi-definite.
        """
        xp, C, m = self.design.xp, self.shared, self.design.n_kernel
        ratio = fit.covariance_ratio
        row = C[:, :m].sum(axis=1)
        scale_variance = row[:m].sum()
        v = row / xp.where(scale_variance > 0, scale_variance, 1.0)
        return ratio, fit.scale_variance - ratio * scale_variance, v
