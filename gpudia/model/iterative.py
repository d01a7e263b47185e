"""Preconditioned conjugate gradients on many images at once.

Only weights and data differ from image to image; the reference is shared. The products with U and U^T are FFTs with
the reference (`Design.normal`), and the preconditioner is the normal matrix of the shared reference under one weight
map, inverted once (`SharedPreconditioner`).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

from gpudia.backend import namespace_of, scalar, to_host
from gpudia.model.design import Design
from gpudia.model.normal import invert, normal_moments, share_for_preconditioner
from gpudia.model.polynomials import exponents
from gpudia.model.selection import power_under_kernel

__all__ = ["Iterations", "SharedPreconditioner", "conjugate_gradients"]

#: Condition up to which products in single precision make a preconditioner and converge.
_SINGLE_CONDITION = 1e5
#: Steps of the power iteration; largest eigenvalue of A^-1 noise that is taken for a fluctuation.
_POWERS, _ROOM = 20, 1.5
#: Ratio of an image's and the shared weights on bright against all pixels, up to which they count as alike.
_CONTRAST = 100.0


class SharedPreconditioner:
    """Approximate inverse of every image's normal matrix, from the reference alone.

    Parameters
    ----------
    design : Design
        The model.
    base : Design
        The same reference and support with a constant kernel, and (for a varying kernel) a constant background.
    weights : array (T, h, w)
        A weight map typical of the images, 0 where a pixel is not in the fit.
    noise : ReferenceNoise or None
        That of the reference, where its bias is to be put right.

    Attributes
    ----------
    weights : array (T, h, w)
        As given.
    constant : array (n_0, n_0)
        Inverse normal matrix of the constant kernel.
    matrix : array (n, n)
        The approximate inverse normal matrix of the design.
    noise_share : float
        Share of `noise` that the reference can hold.
    condition : float
        Lower bound of the condition number of that of the constant kernel (scaled to a unit diagonal); infinite where
        the reference does not determine a kernel.

    Notes
    -----
    For a kernel that varies the frame is taken as cells in each of which the polynomials are constant. A cell's sum of
    products serves all blocks then: A[p, q] = sum_cells p_p p_q A_cell, at the cost of the constant kernel's sum.
    """

    def __init__(self, design: Design, base: Design, weights: Any, noise: Any) -> None:
        self.design = design
        self.weights = weights
        self._power = power_under_kernel(base.reference, base.tiling, base.support)
        information = weights * self._power
        self._information, total = information.sum(), weights.sum()
        self._mean = self._information / design.xp.where(total > 0, total, design.xp.nan)
        share = share_for_preconditioner(math.prod(weights.shape))
        moments, constant, self.condition = _moments(base, weights, information, design.spatial_degree, share,
                                                     self.smoothness(design.xp.ones(1)))
        self.constant = constant
        normal = moments[0] if design is base else self._varying(moments, weights)
        self.matrix = constant if design is base else self._inverse(normal)
        kind = design.xp.float32 if self.suits_single else design.xp.float64
        self._factor = self.matrix.astype(kind)
        self.noise_share, self._damped = 1.0, None
        if noise is not None:
            sums = noise.sums(weights[None])
            self.noise_share = self._consistent_share(noise, sums)
            self._damped = self._inverse(noise.added(self.noise_share * sums, normal))

    @property
    def suits_single(self) -> bool:
        """Whether the equations are well enough conditioned for products in single precision."""
        return self.condition < _SINGLE_CONDITION

    def smoothness(self, ratio: Any) -> Any:
        """Lambda of images with these ratios, (B,)."""
        return self.design.rules.smoothness * self._information / ratio

    def ratio(self, weights: Any) -> Any:
        """Scale of an image's covariance over the shared one: the ratio of the traces of the normal matrices, (B,).

        The trace is sum_x w(x) sum_u R(x - u)^2, a weighted sum over one plane.
        """
        xp = self.design.xp
        information = (weights * self._power).sum(axis=(1, 2, 3))
        return self._information / xp.where(information > 0, information, xp.nan)

    def suits(self, weights: Any, ratio: Any) -> Any:
        """Whether an image's weights are near enough to the typical ones for the iteration to be trusted, (B,) bool.

        `ratio` is that of the weights.

        One pixel a billion times brighter than the others, say, that has all the weight in one map and none in the
        other, would leave the iteration stuck without notice.
        """
        xp = self.design.xp
        total = weights.sum(axis=(1, 2, 3))
        mean = self._information / ratio / xp.where(total > 0, total, xp.nan)
        contrast = mean / xp.where(self._mean > 0, self._mean, xp.nan)
        return (contrast < _CONTRAST) & (contrast > 1 / _CONTRAST)

    def on(self, base: Design, weights: Any) -> SharedPreconditioner:
        """Return the same inverse for weights on other tiles of the reference: `base` and `weights` on these."""
        other = copy.copy(self)
        other._power = power_under_kernel(base.reference, base.tiling, base.support)
        other._mean = (weights * other._power).sum() / weights.sum()
        return other

    def __call__(self, residual: Any) -> Any:
        """Apply to residuals (B, n)."""
        return self._product(residual, self._factor)

    def damped(self, vector: Any) -> Any:
        """Apply the approximate inverse of the normal matrix with the reference's noise added to vectors (B, n)."""
        return self._product(vector, self._damped)

    def _product(self, vector: Any, factor: Any) -> Any:
        # One product per row: the result of an image does not depend on how many stand beside it.
        rows = vector.astype(factor.dtype)[:, None, :]
        return (rows @ factor)[:, 0].astype(vector.dtype)

    def _consistent_share(self, noise: Any, sums: Any) -> float:
        """Share of the stated noise that there is room for in the normal matrix A.

        A holds the noise itself and is nowhere less than it, but for fluctuations: the largest eigenvalue of A^-1 noise
        is near 1. It is larger where errors are overstated, or the reference was smoothed. (Power iteration.)
        """
        xp = self.design.xp
        vector, largest = xp.sqrt(xp.maximum(xp.diagonal(self.matrix), 0.0))[None], xp.zeros(())
        for _ in range(_POWERS):
            norm = xp.sqrt((vector * vector).sum())
            vector = self(noise.applied(sums, vector / xp.where(norm > 0, norm, 1.0)))
            largest = xp.sqrt((vector * vector).sum())
        found = float(scalar(largest))
        return min(1.0, _ROOM / found) if found > 0 else 1.0

    def _inverse(self, normal: Any) -> Any:
        """Inverse of a normal matrix (n, n) within the design's rules."""
        rules = self.design.rules
        matrix = rules.add_to(normal[None].copy(), self.smoothness(self.design.xp.ones(1)))
        return rules.project_both(invert(self.design, rules.regular(matrix))[0])[0]

    def _varying(self, moments: Any, weights: Any) -> Any:
        """Normal matrix of a varying kernel from the moments (count_terms(2 degree), m + 1, m + 1)."""
        design, xp = self.design, self.design.xp
        P, Q, m, n = design.n_spatial, design.n_background, design.n_kernel, design.n_parameters
        powers = exponents(2 * design.spatial_degree)
        # One block of m + 1 rows for each polynomial: the kernel's and the background's. Where the background has fewer
        # terms those rows fall away; where it has more, the others stand alone.
        index = [(slice(p * m, (p + 1) * m), P * m + p) for p in range(P)]
        matrix = xp.zeros((n, n))
        for p, (rows, row) in enumerate(index):
            for q, (columns, column) in enumerate(index):
                (ip, jp), (iq, jq) = powers[p], powers[q]
                block = moments[powers.index((ip + iq, jp + jq))]
                matrix[rows, columns] = block[:m, :m]
                if q < Q:
                    matrix[rows, column] = block[:m, m]
                if p < Q:
                    matrix[row, columns] = block[m, :m]
                if p < Q and q < Q:
                    matrix[row, column] = block[m, m]
        if Q > P:
            matrix[P * m + P:, P * m + P:] = self._background_gram(weights)[P:, P:]
        return matrix

    def _background_gram(self, weights: Any) -> Any:
        design = self.design
        (h, w), Q = design.tiling.tile, design.n_background
        gram: Any = 0.0
        for tiles in design.chunks(1):
            flat = design.terms_at((tiles, slice(0, h), slice(0, w)), Q).reshape(Q, -1)
            gram = gram + (flat * weights[tiles].reshape(-1)) @ flat.T
        return gram


def _moments(base: Design, weights: Any, information: Any, degree: int, share: float,
             smoothness: Any) -> tuple[Any, Any, float]:
    """Moments of the normal matrix, the inverse of the first, its condition; in single precision where that will do."""
    host = to_host(information)
    for design in (base.single(), base):
        moments = normal_moments(design, weights, host, degree, share)
        inverse, _, condition = invert(base, base.rules.add_to(moments[:1].copy(), smoothness))
        if scalar(condition[0]) < _SINGLE_CONDITION:
            break
    return moments, inverse[0], float(scalar(condition[0]))


@dataclass
class Iterations:
    """Result of `conjugate_gradients`.

    Attributes
    ----------
    solution : (B, n)
    iterations : (B,)
    energy : (B,)
        a^T A a of the solution a.
    left : (B,)
        Estimate of the energy of the error that is left.
    ratio : (B,)
        Largest ratio of the drops of the error's energy in two steps; what was expected where there was but one.
    converged : (B,) bool
    """

    solution: Any
    iterations: Any
    energy: Any
    left: Any
    ratio: Any
    converged: Any

    def store(self, rows: Any, solution: Any, iterations: Any, energy: Any, left: Any, ratio: Any) -> None:
        """Write the state of some rows."""
        self.solution[rows], self.iterations[rows] = solution, iterations
        self.energy[rows], self.left[rows], self.ratio[rows] = energy, left, ratio


def conjugate_gradients(design: Design, preconditioner: SharedPreconditioner, weights: Any, vector: Any, limit: Any,
                        share: float, max_iterations: int, smoothness: Any, expected: Any) -> Iterations:
    """Solve A a = b, A = U^T W U + lambda H, for each image from a = 0, within what the preconditioner spans.

    Parameters
    ----------
    design : Design
        In double or single precision: the products are done in it, all else in double.
    preconditioner : callable
        Residuals (B, n) to approximate solutions (B, n).
    weights : array (B, T, hf, wf)
        `padded`.
    vector : array (B, n)
        Right-hand sides b.
    limit : array (B,)
        Stop an image when the energy of the error, e^T A e, is no more than this. With inverse variances as weights
        that is chi^2 of the model's error, whatever the preconditioner.
    share : float
        Stop it, too, when the error's energy is no more than this share of the solution's.
    max_iterations : int
    smoothness : array (B,)
        lambda.
    expected : array (B,)
        Ratio of the drops of the error's energy in two steps that is expected before there were two: the largest in an
        earlier solve for the same image, 0.5 where there is none.

    Notes
    -----
    A step of length s takes s r^T z off the error's energy (Hestenes & Stiefel 1952, J. Res. NBS 49, 409). Where the
    last two took d and q d, those to come will take about d q + d q^2 + ... = d q / (1 - q): what is left. An image
    that has converged takes no more steps. When half of a group have, the others go on alone.
    """
    xp = design.xp
    vector = design.rules.project(vector)
    a, r, z = xp.zeros_like(vector), vector, preconditioner(vector)
    p, rz = z, (vector * z).sum(axis=1)
    count, energy = xp.zeros(len(vector), dtype=xp.int32), xp.zeros(len(vector))
    drop = left = xp.where(rz > 0, xp.inf, rz)
    ratio = xp.zeros(len(vector))
    out = Iterations(a.copy(), count.copy(), energy.copy(), left.copy(), ratio.copy(), None)
    rows, limits, guess = slice(None), limit, expected
    for number in range(max_iterations):
        active = left > xp.maximum(limit, share * energy)  # False for NaN, too
        n_active = int(scalar(active.sum()))
        if n_active == 0:
            break
        if number and 2 * n_active <= len(r):
            out.store(rows, a, count, energy, left, ratio)
            live = xp.flatnonzero(active)
            rows = live if isinstance(rows, slice) else rows[live]
            a, r, p, rz, count, energy, drop, left, ratio, weights, limit, active, smoothness, guess = (
                v[live] for v in (a, r, p, rz, count, energy, drop, left, ratio, weights, limit, active, smoothness,
                                  guess))
        q = design.normal(p, weights).astype(r.dtype) + design.rules.penalty(p, smoothness)
        q = design.rules.project(q)
        pq = (p * q).sum(axis=1)
        step = xp.where(active & (pq > 0), rz / xp.where(pq > 0, pq, 1.0), 0.0)
        before, drop = drop, xp.where(active, step * rz, drop)
        last = _ratio(before, drop, guess)
        left = xp.where(active, drop * last / (1.0 - last), left)
        ratio = xp.where(active & xp.isfinite(before), xp.maximum(ratio, last), ratio)
        energy = energy + step * rz
        a = a + step[:, None] * p
        r = r - step[:, None] * q
        z = preconditioner(r)
        new = (r * z).sum(axis=1)
        p = z + xp.where(active, new / xp.where(rz > 0, rz, 1.0), 0.0)[:, None] * p
        rz = xp.where(active, new, rz)
        count = count + active
    out.store(rows, a, count, energy, left, ratio)
    out.ratio = xp.where(out.ratio > 0, out.ratio, expected)
    out.converged = (out.left <= xp.maximum(limits, share * out.energy)) & xp.isfinite(out.solution).all(axis=1)
    return out


def _ratio(before: Any, drop: Any, guess: Any) -> Any:
    """Ratio of two drops, 0.95 at most; the guess where there was but one."""
    xp = namespace_of(drop)
    known = xp.isfinite(before) & (before > 0)
    return xp.minimum(xp.where(known, drop / xp.where(known, before, 1.0), guess), 0.95)
