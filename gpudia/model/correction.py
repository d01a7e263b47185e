"""What an estimated covariance lacks for some combinations of the coefficients, without forming any matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gpudia.backend import scalar, to_device, to_host
from gpudia.model.polynomials import evaluate_terms
from gpudia.model.selection import power_under_kernel
from gpudia.model.stack import DifferenceStack

if TYPE_CHECKING:
    from gpudia.model.plan import ReferencePlan

__all__ = ["CovarianceCorrection"]

#: Pixels with the most starlight, whose weights are looked at one by one. On a crowded field of 300 px with a kernel of
#: 29, g^T N^-1 g of bright stars is off by (rms, over eight images) 0.4 to 2.0 % with 1000 of them, 0.3 to 1.3 % with
#: 2048, 0.3 to 1.3 % with 4096; that of the shared covariance by 2 to 17 %.
_PIXELS = 2048
#: Starlight of a pixel: the power of the reference up to so far from it, as images have wider PSFs.
_NEAR = 2
#: Share of its mean that is added to the diagonal of X^T N X: sums are in single precision, and directions of stars
#: nearly parallel.
_RIDGE = 1e-5


class CovarianceCorrection:
    r"""What N^-1 = (U^T W U)^-1 of single images is for rows g of bright stars, where only a shared estimate is kept.

    That is the inverse M of the normal matrix of typical weights :math:`\bar w`, scaled. An image with another ratio of
    starlight to sky has other weights where the stars are, and its :math:`g^T N^{-1} g` may differ by a third. In the
    span of the directions X = [M g_1 .. M g_D], in which the N^-1 g all but lie (Rayleigh-Ritz),

    .. math:: N^{-1} g \approx X (X^T N X)^{-1} X^T g, \qquad
              X^T N X = s \, X^T M^{-1} X + (U X)^T (w - s \bar w) \, U X

    where s is the ratio of the weights w to the typical ones, by their power under the kernel. The second term is
    summed over the pixels with the most starlight, s is that of all others. So nothing is transformed, and it takes one
    product of matrices for all stars of an image: a twentieth of the time of their models on the whole frame.

    What of N^-1 g lies outside of the span is missing, and where the kernel varies M is itself approximate. So
    :math:`g^T N^{-1} g` comes out too small for an image in which the brightest stars are masked, of which M is mostly
    made: on simulated fields of 100 px without one to six of them by up to 9 % with a constant kernel, by up to 45 %
    with degree 1 (the shared estimate is off by factors of 0.1 to 4). With degree 2 it was up to 22 % without any mask.

    Parameters
    ----------
    plan : ReferencePlan
        Made once for all images; on the plan's backend.
    """

    def __init__(self, plan: ReferencePlan) -> None:
        self._plan, self._design = plan, plan.design
        design, xp, tiling = plan.design, plan.backend.xp, plan.design.tiling
        typical = xp.where(plan.fit_pixels, plan.reference.weights, 0.0)
        count = min(_PIXELS, int(scalar((typical > 0).sum())))
        offset = np.abs(np.arange(plan.kernel_size) - plan.kernel_size // 2)
        near = np.maximum.outer(offset, offset) <= _NEAR
        light = xp.where(typical > 0, tiling.join(power_under_kernel(design.reference, tiling, near), 0.0), -1.0)
        self._bright = xp.argsort(-light.reshape(-1))[:count]
        self._typical = typical.reshape(-1)[self._bright]
        power = tiling.join(power_under_kernel(design.reference, tiling, design.support), 0.0)
        self._all, self._power = (power * typical).sum(), power.reshape(-1)[self._bright]
        power.reshape(-1)[self._bright] = 0.0
        total = (power * typical).sum()
        self._rest, self._total = power, xp.where(total > 0, total, 1.0)  # 0 where all pixels are bright
        places = to_host(self._bright)
        self._windows = self._under_kernel(places)
        y, x = np.divmod(places, tiling.shape[1])
        terms = evaluate_terms(max(design.spatial_degree, design.background_degree), x, y, tiling.shape)
        self._terms = to_device(terms.T, plan.backend, np.float32)

    def _under_kernel(self, pixels: np.ndarray) -> Any:
        """The reference under the kernel's free pixels, R(x - u) for each pixel x, (m, P) float32."""
        i, j = np.nonzero(self._design.support)
        half, width = self._design.tiling.kernel_size // 2, self._design.tiling.shape[1]
        places = pixels - ((i - half) * width + j - half)[:, None]
        flat = self._design.reference.reshape(-1).astype(np.float32)
        return flat[to_device(places, self._design.backend)]

    def __call__(self, stack: DifferenceStack, image: int, rows: Any, more: Any) -> tuple[Any, Any]:
        """What an image's N^-1 makes of some rows of the design matrix, summed with a star's weights.

        Parameters
        ----------
        stack : DifferenceStack
            Of the plan.
        image : int
            Number in it.
        rows : array (D, n), float64
            g, in the order and units of the covariance. Their directions are corrected.
        more : array (E, n), float64
            Other rows h; N^-1 is that of `rows` as far as they lie in the same span.

        Returns
        -------
        found : array (D, n)
            N^-1 g with N of the fit's last pass; C g where that cannot be said.
        sizes : array (E,)
            h^T N^-1 h.
        """
        xp, given = self._design.xp, self._plan.given
        weights = self._plan.weights_of(stack, image)
        x = given.shared.solved(rows)
        q = (rows * x).sum(axis=1)
        size = xp.sqrt(xp.where(q > 0, q, 1.0))
        x = x / size[:, None]  # the diagonal of X^T N X is then about as large for all
        light = self._model(given.in_fit_units(x).astype(xp.float32))
        bright = weights.reshape(-1)[self._bright]
        rest = (self._rest * weights).sum()
        scale = rest / self._total
        excess = (bright - scale * self._typical).astype(xp.float32)
        seen = x @ rows.T  # X^T g, a column a star
        inner = seen / size  # X^T M^-1 X
        exact = scale / self._plan.information * inner + (light * excess) @ light.T
        # what is outside of the span has the shared covariance, scaled by the information as ever
        usual = (rest + (self._power * bright).sum()) / (self._all * self._plan.information)
        ridge = _RIDGE * xp.eye(len(rows))
        inverses, ok = self._plan.backend.inverse_spd(xp.stack([
            matrix + ridge * xp.diagonal(matrix).mean() for matrix in (exact, usual * inner)]))
        if not scalar(ok.all()):
            covariance = given.estimate(stack.covariance_terms[image]).matrix()
            return rows @ covariance, (more @ covariance * more).sum(axis=1)
        others = x @ more.T
        change = (((inverses[0] - inverses[1]) @ others) * others).sum(axis=0)
        return (inverses[0] @ seen).T @ x, given.shared.sizes(more) / usual + change

    def _model(self, a: Any) -> Any:
        """U a at the bright pixels: coefficients (D, n) to (D, P)."""
        design, terms = self._design, self._terms
        P, m = design.n_spatial, design.n_kernel
        model = a[:, P * m:] @ terms[:design.n_background]
        for p in range(P):
            model = model + (a[:, p * m:(p + 1) * m] @ self._windows) * terms[p]
        return model
