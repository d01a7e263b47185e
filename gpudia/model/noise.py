"""The noise of an image as a function of the model: weights that do not know the noise they weigh.

Weights from noisy data favour the pixels that fluctuated down and bias the photometric scale low by about 2 %. The
variance is therefore always taken from the model:

* with an error plane:  error^2 + s (M - d), where s is the slope of error^2 against d from pixel to pixel: 1/gain for
  planes that were computed from the noisy image (their own noise then cancels), 0 for planes that were not;
* with gain and read noise only:  read_noise^2/gain^2 + max(M, sky)/gain;
* with neither: one variance per image, from the scatter of the residuals.

On the first pass a smoothed image stands for M.
"""

from __future__ import annotations

import copy
from typing import Any

from gpudia.backend import namespace_of
from gpudia.model.planes import SAMPLE, median_of, middle_deviation, robust_sigma, smooth
from gpudia.model.tiles import Tiling

__all__ = ["ImageNoise"]

#: The model may not lower an error plane's variance below this share of it.
_FLOOR = 0.1


def _pairs_slope(variance: Any, data: Any, near_sky: Any) -> Any:
    """Slope of variance against data over differences of horizontal neighbours, (B,); 0 where they do not follow.

    Neighbours differ by noise; the structure of the sky cancels. A variance that was computed from the noisy data
    follows every fluctuation (correlation near 1), one that was not follows stars at most.
    """
    xp = namespace_of(data)
    both = near_sky[..., 1:] & near_sky[..., :-1]
    dx = xp.where(both, data[..., 1:] - data[..., :-1], 0.0)
    dv = xp.where(both, variance[..., 1:] - variance[..., :-1], 0.0)
    xx, xv, vv = ((a * b).sum(axis=(-2, -1)) for a, b in ((dx, dx), (dx, dv), (dv, dv)))
    follows = (xv > 0) & (xv * xv > 0.5 * xx * vv)
    return xp.where(follows, xv / xp.where(follows, xx, 1.0), 0.0)


class ImageNoise:
    """Variance of a group of images, on tiles.

    Parameters
    ----------
    data : array (B, H, W), float64
        Finite everywhere (zero at bad pixels).
    good : bool array (B, H, W)
        Finite, unmasked pixels.
    error : array (B, H, W) or None
        One sigma, finite and positive at good pixels.
    gain, read_noise : float or None
        e-/ADU and e-; used without an error plane.
    tiling : Tiling
    dtype : dtype
        Of the planes of variance.
    """

    def __init__(self, data: Any, good: Any, error: Any, gain: float | None, read_noise: float, tiling: Tiling,
                 dtype: Any) -> None:
        self.xp = xp = namespace_of(data)
        data = data.astype(dtype)
        self.error_plane = error is not None
        self.gain = gain
        self._good = tiling.split(good)
        self._data = tiling.split(data)
        sky = median_of(data, good, SAMPLE)
        #: Median of the good pixels, (B,); 0 where there are none.
        self.sky = xp.where(xp.isfinite(sky), sky, 0.0)
        self._first = None
        if self.error_plane:
            variance = error.astype(dtype) ** 2
            off = xp.abs(data - sky.astype(dtype)[:, None, None])
            near_sky = good & (off < 3 * middle_deviation(off, good, SAMPLE).astype(dtype)[:, None, None])
            self._slope = _pairs_slope(variance, data, near_sky).astype(dtype)[:, None, None, None]
            self._variance = tiling.split(xp.where(good, variance, 1.0))
            self._first = tiling.split(smooth(data, good))
        elif gain is not None:
            self._read_variance = (read_noise / gain) ** 2
            self._first = tiling.split(smooth(data, good))

    def on(self, tiling: Tiling) -> ImageNoise:
        """Return the noise on the tiles that another tiling of the same frame has in use."""
        other = copy.copy(self)
        for name in ("_good", "_data", "_variance", "_first"):
            value = getattr(self, name, None)
            setattr(other, name, None if value is None else tiling.chosen(value))
        return other

    def first(self) -> Any:
        """Variance for the first pass, (B, T, h, w)."""
        smoothed, self._first = self._first, None  # wanted once
        return self.xp.ones_like(self._data) if smoothed is None else self.of_model(smoothed)

    def of_model(self, model: Any) -> Any:
        """Variance of the image's own noise given the noise-free model, both (B, T, h, w), ADU^2."""
        xp, model = self.xp, model.astype(self._data.dtype)
        if self.error_plane:
            changed = self._variance + self._slope * (model - self._data)
            return xp.where(self._good, xp.maximum(changed, _FLOOR * self._variance), 1.0)
        if self.gain is not None:
            floor = (xp.maximum(self.sky, 0.0) / self.gain).astype(model.dtype)[:, None, None, None]
            variance = self._read_variance + xp.maximum(model / self.gain, floor)
            return xp.where(variance > 0, variance, 1.0)
        sigma = robust_sigma(self._data - model, self._good)
        usable = xp.isfinite(sigma) & (sigma > 0)
        return xp.where(usable, sigma**2, 1.0).astype(model.dtype)[:, None, None, None] + xp.zeros_like(model)
