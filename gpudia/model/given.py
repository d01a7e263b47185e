"""From the units of the fit to those of the data as they were given, coefficients with their covariance."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

from gpudia.model.design import Design
from gpudia.model.fit import Fit
from gpudia.model.shared_covariance import EstimatedCovariance, SharedCovariance

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
            terms = self.shared_terms(fit)
            s, t = terms[:, 0], terms[:, 1]
            variances = s[:, None] * xp.diagonal(self.shared.matrix) + t[:, None] * self.shared.vector**2
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
        terms = self.shared_terms(fit)
        return self.design.xp.stack([self.estimate(terms[i]).matrix() for i in range(len(terms))])

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
    def shared(self) -> SharedCovariance:
        """Approximate inverse C of the shared normal matrix, for coefficients as given, and v = C 1 / (1^T C 1).

        1 picks the central kernel's pixels.
        """
        xp, C, m = self.design.xp, self._transformed(self._shared), self.design.n_kernel
        row = C[:, :m].sum(axis=1)
        scale_variance = row[:m].sum()
        return SharedCovariance(C, row / xp.where(scale_variance > 0, scale_variance, 1.0))

    def shared_terms(self, fit: Fit) -> Any:
        """Return s and t of the estimate s C + t v v^T of each image's covariance, (B, 2).

        s is the ratio of the traces; t = S - s 1^T C 1 makes it exact for the sum S over the central kernel: a change
        of rank one that leaves it positive semi-definite.
        """
        s = fit.covariance_ratio
        return self.design.xp.stack([s, fit.scale_variance - s * self._scale_variance], axis=1)

    @cached_property
    def _scale_variance(self) -> Any:
        m = self.design.n_kernel
        return self.shared.matrix[:m, :m].sum()

    def estimate(self, terms: Any) -> EstimatedCovariance:
        """Return the estimated covariance of an image, from its `DifferenceStack.covariance_terms`."""
        return EstimatedCovariance(self.shared, terms[0], terms[1])
