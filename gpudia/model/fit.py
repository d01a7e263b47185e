"""Kernel and background of a group of images: the passes of weights and clipping around the linear solve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gpudia.backend import scalar
from gpudia.flags import FRAME_FLAGS
from gpudia.model.convolver import TileConvolver
from gpudia.model.design import Design
from gpudia.model.iterative import SharedPreconditioner, conjugate_gradients
from gpudia.model.noise import ImageNoise
from gpudia.model.normal import normal_equations, solve_equations
from gpudia.model.planes import grow, robust_sigma

__all__ = ["Fit", "FitSettings", "Fitter"]

#: Passes before the last only make weights: an error of the model of 1e-5 of the signal-to-noise ratio is enough.
_LOOSE = 1e-5
_SAME_CHI2 = 1e-3
#: Sigma from which on the pull of a pixel no longer grows, before the last pass.
_HUBER = 3.0
#: Share of a star's light that the model may miss without being called an outlier, one sigma.
_MODEL_ERROR = 0.03
#: Share of the kernel on masked reference pixels, which hold a guess, from which on a difference is not to be used.
_SPOILT = 0.05


@dataclass(frozen=True)
class FitSettings:
    """Settings of the passes; see `ReferencePlan`."""

    passes: int
    clip: float
    solver: str
    covariance: str
    rtol: float
    max_iterations: int
    gain: float | None
    read_noise: float


@dataclass
class Fit:
    """Result of a group: tiles (B, T, h, w) and numbers (B, ...)."""

    coefficients: Any
    covariance: Any  # (B, n, n), or the shared (1, n, n)
    variances: Any  # its diagonals, set when the covariance is final
    scale_variance: Any
    total_weight: Any
    model: Any
    image_variance: Any
    variance: Any
    clipped: Any
    spoilt: Any  # a masked reference pixel has a share of the kernel there
    chi2: Any
    n_pixels: Any
    iterations: Any
    status: Any


class Fitter:
    """Fits groups of images against one prepared reference.

    Parameters
    ----------
    design : Design
    preconditioner : SharedPreconditioner
    variance_convolver : TileConvolver or None
        Holds the reference's variance; None when it is not known.
    bad_convolver : TileConvolver or None
        Holds 1 at masked pixels of the reference, 0 elsewhere; None where there are none.
    informative : bool array (T, h, w) or None
        Pixels that enter the fit; None: all.
    settings : FitSettings
    """

    def __init__(self, design: Design, preconditioner: SharedPreconditioner,
                 variance_convolver: TileConvolver | None, bad_convolver: TileConvolver | None, informative: Any,
                 settings: FitSettings) -> None:
        self.design = design
        self.preconditioner = preconditioner
        self.variance_convolver = variance_convolver
        self.bad_convolver = bad_convolver
        self.informative = informative
        self.settings = settings
        self.xp = design.xp

    def reference_noise(self, a: Any) -> Any:
        """Variance that the reference's noise brings to the model: k(x)^2 (x) variance_R, (B, T, h, w) or 0."""
        if self.variance_convolver is None:
            return 0.0
        design, convolver = self.design, self.variance_convolver
        kernels, _ = design.unpack(a)
        parts = []
        products = [(p, q, convolver.transform(kernels[:, p] * kernels[:, q] * (1.0 if p == q else 2.0)))
                    for p in range(design.n_spatial) for q in range(p, design.n_spatial)]
        for tiles in design.chunks(len(a)):
            terms = design.terms(tiles)
            parts.append(sum(terms[p] * terms[q] * convolver.convolve(s, tiles) for p, q, s in products))
        noise = parts[0] if len(parts) == 1 else self.xp.concatenate(parts, axis=1)
        return self.xp.maximum(noise, 0.0)  # FFTs leave -1e-16 of the brightest star on empty sky

    def fit(self, data: Any, good: Any, noise: ImageNoise) -> Fit:
        """Run the passes on one group.

        Parameters
        ----------
        data : array (B, T, h, w)
            Finite; zero where not good.
        good : bool array (B, T, h, w)
            Pixels that may enter the fit.
        noise : ImageNoise
        """
        xp, settings = self.xp, self.settings
        chosen = good if self.informative is None else good & self.informative
        clipped, trust = xp.zeros_like(good), xp.ones_like(data)
        variance, a, chi2 = noise.first(), None, None
        iterations = xp.zeros(len(data), dtype=xp.int32)
        final = settings.passes == 1
        for number in range(1, settings.passes + 1):
            weights = xp.where(chosen & ~clipped, 1.0, 0.0) if final else xp.where(chosen, trust, 0.0)
            weights = weights / variance
            variance = trust = None  # planes of a pass make room for those of the next
            solution = self._solve(weights, data, a, final)
            a, iterations = solution.a, iterations + solution.iterations
            model = self.design.model(a)
            image_variance = noise.of_model(model)
            variance = image_variance + self.reference_noise(a)
            residual = data - model
            if final:
                break
            found, trust = self._outliers(residual, variance, a, good, chosen)
            new_chi2 = self._mean(residual**2 / variance, chosen & ~found)
            residual = model = image_variance = None
            settled = chi2 is not None and self._settled(clipped, found, chi2, new_chi2)
            clipped, chi2 = found, new_chi2
            final = settled or number + 1 == settings.passes
        significance = residual**2 / variance
        used = chosen & ~clipped
        n_pixels = used.sum(axis=(1, 2, 3))
        dof = xp.maximum(n_pixels - self.design.n_parameters, 1)
        chi2 = xp.where(used, significance, 0.0).sum(axis=(1, 2, 3)) / dof
        status = solution.status | self._too_few(n_pixels)
        covariance, scale_variance = self._covariance(solution, weights)
        return Fit(a, covariance, None, scale_variance, weights.sum(axis=(1, 2, 3)), model, image_variance, variance,
                   clipped, self._spoilt(a, good), chi2, n_pixels, iterations, status)

    def _spoilt(self, a: Any, good: Any) -> Any:
        """Pixels whose model stands on masked reference pixels by more than 5 % of the kernel, bool (B, T, h, w)."""
        xp = self.xp
        if self.bad_convolver is None:
            return xp.zeros_like(good)
        kernel = self.design.unpack(a)[0][:, 0]
        share = self.bad_convolver.convolve(self.bad_convolver.transform(xp.abs(kernel)))
        return share > _SPOILT * xp.abs(kernel.sum(axis=(1, 2)))[:, None, None, None]

    def _covariance(self, solution: _Solution, weights: Any) -> tuple[Any, Any]:
        """Covariance and the exact variance of the scale, 1^T C 1 over the central kernel."""
        xp, m = self.xp, self.design.n_kernel
        if self.settings.covariance == "exact" or self.settings.solver == "direct":
            return solution.covariance, solution.covariance[:, :m, :m].sum(axis=(1, 2))
        ones = xp.zeros((len(weights), self.design.n_parameters))
        ones[:, :m] = 1.0
        # One more solve, A x = 1: half the digits are plenty for an error.
        x = conjugate_gradients(self.design, self.preconditioner, weights, ones, None, _LOOSE,
                                self.settings.max_iterations).solution
        return self.preconditioner.matrix()[None], (x * ones).sum(axis=1)

    def _outliers(self, residual: Any, variance: Any, a: Any, good: Any, chosen: Any) -> tuple[Any, Any]:
        """Pixels beyond the clip with the good ones beside them, and each pixel's weight for a pass before the last.

        Before the last pass a deviant pixel is not dropped but its pull is bounded (Huber's weights, 3 sigma): a first
        model that is off at the bright stars would otherwise drop just these, and never find back to them. For the same
        reason 3 % of a star's light counts as an error of the model here. Where the errors given are too small for the
        whole image, the clip is in units of the true scatter: else a wrong gain would leave nothing to fit.
        """
        xp, tiling = self.xp, self.design.tiling
        kernels, background = self.design.unpack(a)
        light = self.design.model(self.design.pack(kernels, background * 0.0))
        pull = residual / xp.sqrt(variance + (_MODEL_ERROR * light) ** 2)
        spread = robust_sigma(pull, chosen)
        deviation = xp.abs(pull) / xp.where(spread > 1, spread, 1.0)[:, None, None, None]
        found = good & (deviation > self.settings.clip)
        limit = math.inf if math.isinf(self.settings.clip) else _HUBER
        trust = xp.minimum(1.0, limit / xp.maximum(deviation, 1e-30))
        return tiling.split(grow(tiling.join(found, False))) & good, trust

    def _mean(self, values: Any, where: Any) -> Any:
        xp = self.xp
        return xp.where(where, values, 0.0).sum(axis=(1, 2, 3)) / xp.maximum(where.sum(axis=(1, 2, 3)), 1)

    def _settled(self, clipped: Any, found: Any, chi2: Any, new: Any) -> bool:
        change = (clipped != found).any() | (self.xp.abs(new - chi2) > _SAME_CHI2 * new).any()
        return not scalar(change)

    def _too_few(self, n_pixels: Any) -> Any:
        xp = self.xp
        return xp.where(n_pixels <= self.design.n_parameters, FRAME_FLAGS.no_pixels, 0).astype(xp.int32)

    def _solve(self, weights: Any, data: Any, start: Any, final: bool) -> _Solution:
        settings, xp = self.settings, self.xp
        iterate = not (final and settings.solver == "direct")
        iterations = xp.zeros(len(data), dtype=xp.int32)
        status = xp.zeros(len(data), dtype=xp.int32)
        a = None
        if iterate:
            result = conjugate_gradients(self.design, self.preconditioner, weights,
                                         self.design.adjoint(weights * data), start,
                                         settings.rtol if final else _LOOSE, settings.max_iterations)
            a, iterations = result.solution, result.iterations
            converged = scalar(result.converged.all())
            if converged and (not final or settings.covariance == "shared"):
                return _Solution(a, None, iterations, status)
            status = xp.where(result.converged, 0, FRAME_FLAGS.no_convergence).astype(xp.int32)
        matrix, vector = normal_equations(self.design, weights, data)
        exact, covariance, ok = solve_equations(self.design, matrix, vector)
        use_exact = ~result.converged[:, None] if iterate else xp.ones((len(data), 1), dtype=bool)
        a = exact if a is None else xp.where(use_exact, exact, a)
        status = status | xp.where(ok, 0, FRAME_FLAGS.singular).astype(xp.int32)
        return _Solution(a, covariance, iterations, status)


@dataclass
class _Solution:
    a: Any
    covariance: Any
    iterations: Any
    status: Any
