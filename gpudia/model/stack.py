"""The result of a subtraction: a stack of differences with everything that belongs to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from gpudia.backend import namespace_of, to_host
from gpudia.errors import FrameError, InputError
from gpudia.flags import FRAME_FLAGS, PIXEL_FLAGS
from gpudia.model.polynomials import evaluate_terms

__all__ = ["DifferenceStack"]


@dataclass(frozen=True)
class DifferenceStack:
    """Differences of B images against one reference; arrays of the backend that the images were on.

    Attributes
    ----------
    difference, model, variance : (B, H, W)
        I - M and M, ADU of the image, and the variance of the difference (image noise plus the reference's noise
        through the kernel squared), ADU^2. NaN where the model is not defined: a border of K//2, and pixels that are
        not finite in the image. float32 for float32 images, else float64.
    flags : (B, H, W), uint8
        Bits of `gpudia.flags.PIXEL_FLAGS`. Pixels with any masked reference pixel under the kernel take no part in the
        fit; they have the bit ``reference`` where masked pixels carry more than 5 % of the kernel.
    kernel : (B, K, K), float64
        Kernel at the centre of the frame; ``kernel[K//2, K//2]`` multiplies the reference pixel itself.
    coefficients : (B, P_k, K, K)
        Kernel of each spatial polynomial term (1; x, y; x^2, xy, y^2; ... of coordinates scaled to -1 .. 1).
    kernel_error : (B, K, K)
        One sigma of `kernel`, from the diagonal of the covariance. That counts the reference's noise as independent
        from one model pixel to the next, as do `background_error` and `covariance`; `scale_error` does not.
    background, background_error : (B, P_b)
        Coefficients of the background polynomial, in the same order of terms, and one sigma.
    scale, scale_error : (B,)
        Photometric scale (target flux over reference flux) at the centre of the frame: the sum of the kernel, with
        one sigma from the noise of the image (see `with_noise_ratio`) and of the reference.
    scale_error_reference : (B,)
        The reference's part of `scale_error`: nearly the same relative error in all images, like an error of the flux
        on the reference. Light curves relative to each other do not feel it.
    chi2 : (B,)
        chi^2 per degree of freedom over the pixels used in the fit.
    n_pixels, n_clipped : (B,)
        Number of pixels used, and rejected by clipping.
    status : (B,), int32
        Bits of `gpudia.flags.FRAME_FLAGS`; 0 is good. `failed` says which images have no result.
    iterations : (B,)
        Conjugate-gradient iterations, all passes together.
    solver_error : (B,)
        Estimate of what the last pass of the iteration left undone: sqrt of chi^2 of the model's error over the pixels
        of the fit (noise itself gives the model sqrt(n), with n coefficients); 0 where solved directly.
    noise_gain : (B,)
        sqrt(sum k^2) / scale; above 1 the kernel deconvolves and amplifies the reference's noise.
    covariance : (B, n, n) or None
        Covariance of the coefficients (kernel terms over the support, then background). Kept on request.
    covariance_terms : (B, 2)
        s and t of an estimated covariance s C + t v v^T (see `gpudia.model.given`); NaN where it is exact.
    image_variance : (B, H, W) or None
        Variance of the image's own noise. Kept on request.
    support : (K, K) bool, host
        Pixels of the kernel that were free.
    covariance_kind : {"exact", "shared"}
        "shared" is the shared reference's matrix, scaled to each image's exact sum over the kernel: an estimate.
    """

    difference: Any
    model: Any
    variance: Any
    flags: Any
    kernel: Any
    coefficients: Any
    kernel_error: Any
    background: Any
    background_error: Any
    scale: Any
    scale_error: Any
    scale_error_reference: Any
    chi2: Any
    n_pixels: Any
    n_clipped: Any
    status: Any
    iterations: Any
    solver_error: Any
    noise_gain: Any
    covariance: Any
    covariance_terms: Any
    image_variance: Any
    support: np.ndarray
    covariance_kind: str

    def __len__(self) -> int:
        return len(self.status)

    @property
    def mask(self) -> Any:
        """Pixels to ignore, bool (B, H, W). Clipped pixels are not among them: they were measured."""
        return (self.flags & (255 - PIXEL_FLAGS.clipped)) != 0

    @property
    def clipped(self) -> Any:
        """Pixels left out of the fit as outliers, bool (B, H, W)."""
        return (self.flags & PIXEL_FLAGS.clipped) != 0

    @property
    def failed(self) -> Any:
        """Images without a result, bool (B,): their planes and numbers are NaN."""
        return (self.status & (FRAME_FLAGS.no_pixels | FRAME_FLAGS.not_finite)) != 0

    @property
    def scale_error_image(self) -> Any:
        """The image's own part of `scale_error`, (B,): what differs from epoch to epoch."""
        squared = self.scale_error**2 - self.scale_error_reference**2
        return namespace_of(squared).sqrt(namespace_of(squared).maximum(squared, 0.0))

    def with_noise_ratio(self, ratio: Any) -> DifferenceStack:
        """Return it with the scale errors of images whose pixels' noise is correlated.

        Parameters
        ----------
        ratio : (B, H, W)
            Variance of sums over many pixels, over that of single ones (resampling correlates pixels). A scale is such
            a sum: the image's part of its variance is multiplied by the mean over the good pixels.
        """
        xp, good = namespace_of(ratio), self.flags == 0
        mean = xp.where(good, ratio, 0.0).sum(axis=(1, 2)) / xp.maximum(good.sum(axis=(1, 2)), 1)
        own = self.scale_error_image**2 * mean
        return replace(self, scale_error=xp.sqrt(own + self.scale_error_reference**2))

    def map(self, function: Callable[[Any], Any]) -> DifferenceStack:
        """Apply a function to every array that lives on the backend."""
        names = [f.name for f in fields(self) if f.name not in ("support", "covariance_kind")]
        arrays: dict[str, Any] = {name: getattr(self, name) for name in names}
        changes: dict[str, Any] = {name: None if a is None else function(a) for name, a in arrays.items()}
        return replace(self, **changes)

    def to_host(self) -> DifferenceStack:
        """Copy all arrays to the host."""
        return self.map(to_host)

    def terms_at(self, x: Any, y: Any) -> np.ndarray:
        """Values of the kernel's polynomial terms at pixel positions, host, (S, P_k) or (P_k,)."""
        shape = tuple(self.difference.shape[-2:])
        degree = round((np.sqrt(8 * self.coefficients.shape[1] + 1) - 3) / 2)
        return evaluate_terms(degree, x, y, (shape[0], shape[1]))

    def require_solution(self, image: int) -> None:
        """Raise `FrameError` for an image without a solution, or with no significant light of the reference in it."""
        names = ", ".join(FRAME_FLAGS.decode(int(to_host(self.status[image]))))
        if bool(to_host(self.failed[image])):
            unknowns = int(self.support.sum()) * self.coefficients.shape[1] + self.background.shape[1]
            raise FrameError(f"no solution ({names}): {int(to_host(self.n_pixels[image]))} good pixels for "
                             f"{unknowns} unknowns")
        scale, error = float(to_host(self.scale[image])), float(to_host(self.scale_error[image]))
        if not scale > 3 * error:
            raise FrameError(f"photometric scale must be above 3 sigma, got {scale:.3g} +- {error:.2g} ({names})")

    def kernel_at(self, image: int, x: Any, y: Any) -> np.ndarray:
        """Kernel of one image at a position (x, y), host array (K, K), or at several, (S, K, K)."""
        return np.tensordot(self.terms_at(x, y), self._coefficients(image), axes=1)

    def scale_at(self, image: int, x: Any, y: Any) -> np.ndarray:
        """Photometric scale of one image at one position (a number) or at several (S,), host."""
        return self.terms_at(x, y) @ self._coefficients(image).sum(axis=(-2, -1))

    def _coefficients(self, image: int) -> np.ndarray:
        if not -len(self) <= image < len(self):
            raise InputError(f"image must be an index below {len(self)}, got {image}")
        return to_host(self.coefficients[image])
