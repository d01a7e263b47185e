"""Which pixels, and which tiles, enter the fit."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpudia.backend import backend_of, to_device, to_host
from gpudia.model.convolver import TileConvolver
from gpudia.model.reference import PreparedReference, informative_pixels
from gpudia.model.tiles import Tiling

__all__ = ["PixelSelection", "power_under_kernel"]

#: Share of the information on the kernel that the most informative tiles are to hold: at 2048 px a quarter of them hold
#: half of it. With 0.3 the last pass, over all tiles, has as much more to do as the first ones have less.
_SHARE = 0.5
#: Regions along one side of the frame each of which has a tile in the fit: a varying kernel needs stars everywhere.
_REGIONS = 4


def _sum_under_kernel(plane: Any, tiling: Tiling, support: np.ndarray) -> Any:
    """Sum of a plane (H, W) over the kernel's pixels, sum_u plane(x - u), on tiles (T, h, w)."""
    convolver = TileConvolver(plane, tiling)
    kernel = to_device(support.astype(float), backend_of(plane))[None, None]
    h, w = tiling.tile
    return convolver.convolve(convolver.transform(kernel))[0, :, :h, :w]


def power_under_kernel(reference: Any, tiling: Tiling, support: np.ndarray) -> Any:
    """Sum of the squared reference under the kernel's pixels, sum_u R(x - u)^2, (T, h, w).

    Times a weight it is what a pixel adds to the trace of the normal matrix: its information on the kernel.
    """
    return backend_of(reference).xp.maximum(_sum_under_kernel(reference**2, tiling, support), 0.0)


class PixelSelection:
    """Pixels of one reference that may enter a fit.

    Parameters
    ----------
    reference : PreparedReference
    fit_mask : array (H, W) or None
        Non-zero: not in the fit.
    tiling : Tiling
    support : bool array (K, K), host
    """

    def __init__(self, reference: PreparedReference, fit_mask: Any, tiling: Tiling, support: np.ndarray) -> None:
        self.reference, self.tiling, self.support = reference, tiling, support
        xp = backend_of(reference.data).xp
        inside = tiling.split(xp.ones(tiling.shape, dtype=bool))
        if fit_mask is not None:
            inside = inside & ~tiling.split(fit_mask != 0)
        #: Pixels with nothing but good reference pixels under the kernel, bool (T, h, w).
        self.usable = inside & ~self._reached_from(~reference.good)

    def _reached_from(self, pixels: Any) -> Any:
        """Pixels that have one of `pixels` (H, W) under the kernel's support, bool (T, h, w)."""
        xp = backend_of(pixels).xp
        return _sum_under_kernel(pixels.astype(xp.float64), self.tiling, self.support) > 0.5

    def informative(self) -> Any:
        """Usable pixels that significant light of the reference can reach through the kernel, bool (T, h, w)."""
        return self.usable & self._reached_from(informative_pixels(self.reference, self.tiling.kernel_size))

    def weights(self, pixels: Any) -> Any:
        """Weights that are typical of an image on some pixels (T, h, w), 0 on the others."""
        return backend_of(pixels).xp.where(pixels, self.tiling.split(self.reference.weights), 0.0)

    def best_tiles(self, reference: Any, pixels: Any) -> tuple[tuple[int, ...], float]:
        """Return the tiles that carry half of the information on the kernel, and the share that they do carry.

        The best tile of each of 4 x 4 regions is among them.
        """
        information = self.weights(pixels) * power_under_kernel(reference, self.tiling, self.support)
        known = to_host(information.sum(axis=(1, 2)))
        rows, columns = self.tiling.grid
        regions = [(row * _REGIONS // rows, column * _REGIONS // columns) for row, column in self.tiling.places()]
        order = np.argsort(-known, kind="stable")
        wanted = 1 + int(np.searchsorted(np.cumsum(known[order]), _SHARE * known.sum()))
        chosen = set(order[:wanted].tolist())
        for region in set(regions):
            chosen.add(next(int(tile) for tile in order if regions[tile] == region))
        numbers = tuple(sorted(chosen))
        total = known.sum()
        return numbers, float(known[list(numbers)].sum() / total) if total > 0 else 1.0
