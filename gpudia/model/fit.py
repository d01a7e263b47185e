"""Kernel and background of a group of images: the passes of weights and clipping around the linear solve.

The solve works on residuals: r = U^T W (d - U a) in double precision, corrections A e = r by conjugate gradients,
a += e. The model U a and the residual are wanted anyway, so this costs nothing more, and the products inside the
conjugate gradients may be in single precision (`Fitter.inner`): their rounding is corrected from outside (iterative
refinement).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from gpudia.backend import scalar
from gpudia.flags import FRAME_FLAGS
from gpudia.model.convolver import TileConvolver
from gpudia.model.design import Design
from gpudia.model.iterative import Iterations, SharedPreconditioner, conjugate_gradients
from gpudia.model.noise import ImageNoise
from gpudia.model.normal import normal_equations, solve_equations
from gpudia.model.planes import SAMPLE, grow, middle_deviation
from gpudia.model.reference_noise import ReferenceNoise
from gpudia.model.settings import FitSettings

__all__ = ["Fit", "Fitter"]

#: Passes before the last only make weights: an error of the model of 1e-5 of the signal-to-noise ratio is enough.
_LOOSE = 1e-5
#: ... or of a few hundredths of the error that noise brings; a last pass that is not to be exact, of a thousandth.
_LOOSE_NOISE, _LAST_NOISE = 0.03, 1e-3
#: Accuracy of the scale's variance.
_FOR_ERROR = 3e-2
#: Gain in accuracy that one correction in single precision is asked for, and the one that it is certain to have.
_SINGLE_GAIN, _SINGLE_CERTAIN = 1e-6, 1e-3
#: Corrections in single precision before double precision takes over.
_ROUNDS = 5
_SAME_CHI2 = 1e-3
#: Sum of the kernel's squares over that without correction, above which the correction has gone astray (2.9 was seen).
_UNSOUND = 4.0
#: chi^2 per pixel below which an image may hold noise of the reference: of a mean of N frames, 1 - 2 / (N + 1).
_OWN_NOISE = 0.9
#: Sigma from which on the pull of a pixel no longer grows, before the last pass.
_HUBER = 3.0
#: Share of a star's light that the model may miss without being called an outlier, one sigma.
_MODEL_ERROR = 0.03
#: Share of the kernel on masked reference pixels, which hold a guess, from which on a difference is not to be used.
_SPOILT = 0.05


@dataclass
class Fit:
    """Result of a group: tiles (B, T, h, w) and numbers (B, ...)."""

    coefficients: Any
    covariance: Any  # (B, n, n), or None where it is shared
    variances: Any  # its diagonals, set when the covariance is final
    scale_variance: Any  # sum of the covariance over the central kernel
    scale_image_variance: Any  # variance of the scale from the image's noise
    scale_reference_variance: Any  # ... and from the reference's, pixels correlated by the kernel
    covariance_ratio: Any  # scale of the shared covariance
    model: Any
    image_variance: Any
    variance: Any
    clipped: Any
    spoilt: Any  # a masked reference pixel has a share of the kernel there
    chi2: Any
    n_pixels: Any
    iterations: Any
    left: Any  # chi^2 of the error that the solver left in the model
    status: Any


class Fitter:
    """Fits groups of images against one prepared reference.

    Parameters
    ----------
    design : Design
    preconditioner : SharedPreconditioner
    noise : ReferenceNoise or None
        In double precision; None when the reference's variance is not known.
    bad_convolver : TileConvolver or None
        Holds 1 at masked pixels of the reference, 0 elsewhere; None where there are none.
    informative : bool array (T, h, w) or None
        Pixels that enter the fit; None: all.
    settings : FitSettings

    Attributes
    ----------
    inner : Design
        The design whose products the conjugate gradients use, in single precision where `settings.mixed`.
    """

    def __init__(self, design: Design, preconditioner: SharedPreconditioner,
                 noise: ReferenceNoise | None, bad_convolver: TileConvolver | None, informative: Any,
                 settings: FitSettings) -> None:
        self.design = design
        self.preconditioner = preconditioner
        self.inner = design.single() if settings.mixed else design
        self.noise = noise.single(self.inner) if settings.mixed and noise is not None else noise
        self.bad_convolver = bad_convolver
        self.informative = informative
        self.settings = settings
        self.xp = design.xp

    def _reference_variance(self, a: Any) -> Any:
        return 0.0 if self.noise is None else self.noise.variance_of_model(a)

    def _missing(self, state: _State, weights: Any) -> Any:
        """What the right side of the equations lacks, (B, n); see `ReferenceNoise.missing`.

        Nothing in the first pass; for an image with less noise than stated, as one that went into the reference has it:
        they share their noise; and where the correction has made the kernel four times rougher than it was without:
        then the reference's noise is not what is stated.
        """
        if self.noise is None or not self.settings.correct_bias or not scalar((state.chi2 < math.inf).any()):
            return self.xp.zeros_like(state.a)
        shared = self.preconditioner
        variances = state.ratio[:, None] * self.xp.diagonal(shared.matrix)

        def damped(vector: Any) -> Any:
            return shared.damped(vector) * state.ratio[:, None]

        kernel = state.a[:, :self.design.n_kernel]
        power = (kernel * kernel).sum(axis=1)
        if state.power is None:
            state.power = self.xp.where(state.chi2 > _OWN_NOISE, power, 0.0)
        sound = power < _UNSOUND * state.power
        lacking = self.noise.missing(state.a, variances, weights, damped, shared.noise_share)
        return self.xp.where(sound[:, None], lacking, 0.0)

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
        state = self.approach(data, good, noise)
        return self._finish(state, data, good, self._chosen(good), noise, None)

    def _chosen(self, good: Any) -> Any:
        return good if self.informative is None else good & self.informative

    def approach(self, data: Any, good: Any, noise: ImageNoise) -> _State:
        """Run all passes but the last: they make its weights and its start."""
        xp, chosen = self.xp, self._chosen(good)
        trust: Any = 1.0
        state = self._start(data, noise)
        state.clipped = xp.zeros_like(good)
        settled = xp.zeros(len(data), dtype=bool)
        for _ in range(self.settings.passes - 1):
            weights = xp.where(chosen, trust / state.variance, 0.0)
            state.variance = trust = None  # planes of a pass make room for those of the next
            self._solve(state, weights, data, False, settled, _LOOSE_NOISE)
            state.variance = noise.of_model(data - state.residual) + self._reference_variance(state.a)
            found, trust = self._outliers(state, data, good, chosen)
            chi2 = self._mean(state.residual.astype(state.variance.dtype) ** 2 / state.variance, chosen & ~found)
            settled = (state.clipped == found).all(axis=(1, 2, 3)) & (xp.abs(chi2 - state.chi2) <= _SAME_CHI2 * chi2)
            state.clipped, state.chi2 = found, chi2
            if scalar(settled.all()):
                break
        return state

    def complete(self, part: _State, data: Any, good: Any, noise: ImageNoise) -> Fit:
        """Run the last pass on all tiles after `approach` on some.

        What those have found is off by its own noise: this solve stops at a thousandth of that.
        """
        state = replace(part, residual=data - self.design.model(part.a), status=self.xp.zeros_like(part.status))
        state.variance = noise.of_model(data - state.residual) + self._reference_variance(state.a)
        state.clipped, _ = self._outliers(state, data, good, good)
        slack = None if self.settings.exact_covariance else _LAST_NOISE
        return self._finish(state, data, good, good, noise, slack)

    def _finish(self, state: _State, data: Any, good: Any, chosen: Any, noise: ImageNoise,
                slack: float | None) -> Fit:
        """Solve under the last weights."""
        used = chosen & ~state.clipped
        weights = self.xp.where(used, 1.0 / state.variance, 0.0)
        state.variance = None
        self._solve(state, weights, data, True, self.xp.zeros(len(data), dtype=bool), slack)
        image_variance = noise.of_model(data - state.residual)
        state.variance = image_variance + self._reference_variance(state.a)
        return self._result(state, data, good, used, weights, image_variance)

    def _start(self, data: Any, noise: ImageNoise) -> _State:
        """Begin with an image that is nothing but its sky."""
        sky = noise.sky
        a = self.xp.zeros((len(data), self.design.n_parameters))
        a[:, self.design.n_spatial * self.design.n_kernel] = sky
        zero = self.xp.zeros(len(data), dtype=self.xp.int32)
        unknown = self.xp.full(len(data), self.xp.inf)
        return _State(a, data - sky[:, None, None, None], sky, zero, zero, noise.first(), None, unknown,
                      self.xp.full(len(data), 0.5))

    def _result(self, state: _State, data: Any, good: Any, used: Any, weights: Any, image_variance: Any) -> Fit:
        xp, variance = self.xp, state.variance
        n_pixels = used.sum(axis=(1, 2, 3))
        dof = xp.maximum(n_pixels - self.design.n_parameters, 1)
        chi2 = xp.where(used, state.residual**2 / variance, 0.0).sum(axis=(1, 2, 3)) / dof
        covariance, x = self._covariance(state, weights)
        scale_variances = self._scale_variances(x, weights, image_variance, state.a)
        return Fit(state.a, covariance, None, x[:, :self.design.n_kernel].sum(axis=1), *scale_variances,
                   state.ratio, data - state.residual, image_variance, variance, state.clipped,
                   self._spoilt(state.a, good), chi2, n_pixels, state.iterations, state.left,
                   state.status | self._too_few(n_pixels))

    def _spoilt(self, a: Any, good: Any) -> Any:
        """Pixels whose model stands on masked reference pixels by more than 5 % of the kernel, bool (B, T, h, w)."""
        xp = self.xp
        if self.bad_convolver is None:
            return xp.zeros_like(good)
        kernel = self.design.unpack(a)[0][:, :1]
        h, w = self.design.tiling.tile
        share = self.bad_convolver.convolve(self.bad_convolver.transform(xp.abs(kernel)))[..., :h, :w]
        return share > _SPOILT * xp.abs(kernel.sum(axis=(2, 3)))[..., None, None]

    def _covariance(self, state: _State, weights: Any) -> tuple[Any, Any]:
        """Covariance (None where it is shared) and its exact sums over the central kernel, C 1, (B, n)."""
        xp, m, rows = self.xp, self.design.n_kernel, state.exact_rows
        if self.settings.exact_covariance:
            return state.covariance, state.covariance[:, :, :m].sum(axis=2)
        ones = xp.zeros((len(weights), self.design.n_parameters))
        ones[:, :m] = 1.0
        zero = xp.zeros(len(weights))
        smoothness = self.preconditioner.smoothness(state.ratio)
        # A x = 1
        x = self._correction(weights, ones, zero, self.inner, smoothness, state.expected, _FOR_ERROR).solution
        if rows is not None:
            x[rows] = state.covariance[:, :, :m].sum(axis=2)
        return None, x

    def _scale_variances(self, x: Any, weights: Any, image_variance: Any, a: Any) -> tuple[Any, Any]:
        """Variance of the scale from the image's noise and from the reference's, with x = C 1, (B,) each.

        The scale is the sum over pixels v d with v = W U x.
        """
        planes = weights * self.inner.model(x)
        own = (planes**2 * image_variance).sum(axis=(1, 2, 3))
        return own, self.xp.zeros_like(own) if self.noise is None else self.noise.variance_of_sums(a, planes)

    def _outliers(self, state: _State, data: Any, good: Any, chosen: Any) -> tuple[Any, Any]:
        """Pixels beyond the clip with the good ones beside them, and each pixel's weight for a pass before the last.

        Before the last pass a deviant pixel is not dropped but its pull is bounded (Huber's weights, 3 sigma): a first
        model that is off at the bright stars would otherwise drop just these, and never find back to them. For the same
        reason 3 % of a star's light counts as an error of the model here. Where the errors given are too small for the
        whole image, the clip is in units of the true scatter: else a wrong gain would leave nothing to fit.
        """
        xp, tiling, variance = self.xp, self.design.tiling, state.variance
        model, residual = (data - state.residual).astype(variance.dtype), state.residual.astype(variance.dtype)
        light = model - self.inner.background(state.a)
        pull = xp.abs(residual) / xp.sqrt(variance + (_MODEL_ERROR * light) ** 2)
        spread = middle_deviation(pull, chosen, SAMPLE)
        deviation = pull / xp.where(spread > 1, spread, 1.0).astype(pull.dtype)[:, None, None, None]
        found = good & (deviation > self.settings.clip)
        limit = math.inf if math.isinf(self.settings.clip) else _HUBER
        trust = xp.minimum(1.0, limit / xp.maximum(deviation, 1e-30))
        grown = grow(found) if tiling.numbers is not None else tiling.split(grow(tiling.join(found, False)))
        return grown & good, trust

    def _mean(self, values: Any, where: Any) -> Any:
        xp = self.xp
        return xp.where(where, values, 0.0).sum(axis=(1, 2, 3)) / xp.maximum(where.sum(axis=(1, 2, 3)), 1)

    def _too_few(self, n_pixels: Any) -> Any:
        xp = self.xp
        return xp.where(n_pixels <= self.design.n_parameters, FRAME_FLAGS.no_pixels, 0).astype(xp.int32)

    def _limit(self, weights: Any, data: Any, sky: Any, slack: float | None) -> Any:
        """chi^2 of the model's error at which a solution is good enough, (B,).

        Without slack rtol^2 times the signal's, sum w (d - sky)^2. Noise itself gives the model an error of n, the
        number of coefficients: else it is a share of that.
        """
        axes, settings = (1, 2, 3), self.settings
        light = (data - sky[:, None, None, None]).astype(weights.dtype)
        data = data.astype(weights.dtype)
        signal = (weights * light * light).sum(axis=axes) + 1e-8 * (weights * data * data).sum(axis=axes)
        if slack is None:
            return settings.rtol**2 * signal
        return self.xp.minimum(_LOOSE**2 * signal + slack * self.design.n_parameters, 1e-4 * signal)

    def _correction(self, weights: Any, r: Any, limit: Any, inner: Design, smoothness: Any, expected: Any,
                    share: float = 0.0, most: int | None = None) -> Iterations:
        """Solve A e = r by conjugate gradients, the weights scaled to 1 at most."""
        xp = self.xp
        size = weights.max(axis=(1, 2, 3))
        size = xp.where(size > 0, size, 1.0)
        planes = inner.padded(weights / size[:, None, None, None])
        found = conjugate_gradients(inner, self.preconditioner, planes, r.astype(xp.float64) / size[:, None],
                                    limit / size, share, most or self.settings.max_iterations, smoothness / size,
                                    expected)
        found.energy, found.left = found.energy * size, found.left * size
        return found

    def _solve(self, state: _State, weights: Any, data: Any, last: bool, settled: Any, slack: float | None) -> None:
        """Bring a state to the solution of A a = U^T W d and what is `_missing` there, up to a `_limit` with slack.

        Images that have settled wait for the others without a change, so that none depends on its neighbours.
        """
        settings, xp = self.settings, self.xp
        state.ratio = self.preconditioner.ratio(weights)
        suited, missing = self.preconditioner.suits(weights, state.ratio), self._missing(state, weights)
        converged = xp.zeros(len(data), dtype=bool)
        if math.isfinite(self.preconditioner.condition) and not (last and settings.exact_covariance):
            wanted = suited if last else suited & ~settled
            converged = self._iterate(state, weights, data, missing, wanted, slack)
            failed = suited & ~converged
            state.status = state.status | xp.where(failed, FRAME_FLAGS.no_convergence, 0).astype(xp.int32)
        exactly = ~(converged & suited)
        if not last:
            exactly = exactly & ~settled
        elif settings.exact_covariance:
            exactly = xp.ones_like(exactly)
        if scalar(exactly.any()):
            self._solve_directly(state, weights, data, missing, xp.flatnonzero(exactly), last)

    def _solve_directly(self, state: _State, weights: Any, data: Any, missing: Any, rows: Any, last: bool) -> None:
        """Replace some rows of a state by the exact solution."""
        matrix, vector = normal_equations(self.design, weights[rows], data[rows])
        matrix = self.design.rules.add_to(matrix, self.preconditioner.smoothness(state.ratio)[rows])
        exact, covariance, ok = solve_equations(self.design, matrix, vector + missing[rows])
        state.a = state.a.copy()
        state.a[rows] = exact
        state.residual[rows] = data[rows] - self.design.model(exact)
        state.status = state.status.copy()
        state.left = self.xp.zeros(len(data)) if state.left is None else state.left.copy()
        state.left[rows] = 0.0
        state.status[rows] |= self.xp.where(ok, 0, FRAME_FLAGS.singular).astype(self.xp.int32)
        if last:
            state.covariance, state.exact_rows = covariance, rows

    def _iterate(self, state: _State, weights: Any, data: Any, missing: Any, wanted: Any, slack: float | None) -> Any:
        """Correct the state until its error is small; return which images are there, (B,)."""
        design, xp, rules = self.design, self.xp, self.design.rules
        smoothness = self.preconditioner.smoothness(state.ratio)
        limit = xp.where(wanted, self._limit(weights, data, state.sky, slack), xp.inf)
        converged, state.left, tight, spent = ~wanted, xp.zeros(len(data)), slack is None, 0
        for number in range(_ROUNDS + 1):
            inner = self.inner if number < _ROUNDS else design
            r = (design if tight else inner).adjoint(weights * state.residual) + missing
            r = rules.project(r - rules.penalty(state.a, smoothness))
            if number:  # what the corrections in single precision have left, in double
                left = self._energy(r, state.ratio)
                state.left = xp.where(converged, state.left, left)
                converged = converged | (left <= limit)
                if scalar(converged.all()):
                    break
            reach = limit
            if inner is not design:  # single precision does not gain more at once
                reach = xp.maximum(limit, _SINGLE_GAIN**2 * self._energy(r, state.ratio))
            reach = xp.where(converged, xp.inf, reach)
            found = self._correction(weights, r, reach, inner, smoothness, state.expected,
                                     most=self.settings.max_iterations - spent)
            state.expected = found.ratio
            spent += int(scalar(found.iterations.max()))
            state.left = xp.where(converged, state.left, found.left)
            state.a = rules.project(state.a + found.solution)
            state.residual = data - design.model(state.a)
            state.iterations = state.iterations + found.iterations
            if not tight or inner is design or spent >= self.settings.max_iterations:
                return converged | found.converged & (found.left <= limit)
            # ... nor does it gain less than three digits: then nothing need be measured
            converged = converged | (found.converged & (found.energy * _SINGLE_CERTAIN**2 <= limit))
            if scalar(converged.all()):
                break
        return converged

    def _energy(self, r: Any, ratio: Any) -> Any:
        """Estimate of the energy e^T A e of the error that a residual r stands for, (B,)."""
        return (r * self.preconditioner(r)).sum(axis=1) * ratio


@dataclass
class _State:
    """Where a group of images stands: coefficients (B, n), residual (B, T, h, w), and what led there."""

    a: Any
    residual: Any
    sky: Any
    iterations: Any
    status: Any
    variance: Any  # of the data under the model, (B, T, h, w)
    clipped: Any  # outliers, bool (B, T, h, w)
    chi2: Any  # per pixel, infinite before the first pass
    expected: Any  # see `conjugate_gradients`
    power: Any = None  # sum of the kernel's squares after the first pass; 0 where there is to be no correction
    ratio: Any = None  # `SharedPreconditioner.ratio` of the weights of the last solve
    left: Any = None  # chi^2 of the error that the solver left
    covariance: Any = None  # of the rows solved directly in the last pass
    exact_rows: Any = None
