"""Places without a star: what the fluxes there scatter by is what the errors of all fluxes have to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from gpudia.backend import active_backend
from gpudia.model.planes import median_of
from gpudia.photometry import excess_scatter
from gpudia.photometry.stamps import Stamps

if TYPE_CHECKING:
    from gpudia.pipeline.looks import Look
    from gpudia.pipeline.measure import EpochFluxes

__all__ = ["blank_places", "sky_scatter", "with_sky_excess"]

Float = NDArray[np.float64]
#: Places at most; in how many epochs so many may be measured, and how many are in all of a long series; how many are
#: tried, and how many tell something.
_MOST, _EPOCHS, _LEAST, _TRIED, _FEWEST = 256, 16, 24, 2048, 16
#: Signal to noise of a bright star; FWHM to keep away from any star, a bright one, and one that may vary.
_BRIGHT, _REACHES = 100.0, (1.0, 2.0, 3.0)
#: What is looked for, as a share of the stated error.
_GRID = np.append(0.0, np.geomspace(0.03, 5.0, 52))


def blank_places(mask: NDArray[Any], positions: Float, flux: Float, error: Float, varying: NDArray[np.bool_],
                 fwhm: float, n_epochs: int) -> Float:
    """Choose places on a grid that are a FWHM away from stars and masked pixels, more from what is bright or varies.

    Parameters
    ----------
    mask : (H, W)
        Not 0 = ignore.
    positions : (S, 2)
        Stars (x, y), pixels.
    flux, error : (S,)
        Of the stars; one that is not known may be of a bright star.
    varying : (S,) bool
        Which may vary: their light is on the differences.
    fwhm : float
        The worst seeing, pixels.
    n_epochs : int
        In how many they will be measured: what takes no time in a short series does in a long one.

    Returns
    -------
    (N, 2)
        256 at most, 24 in long series, which tell an epoch's scatter to a sixth; none where there is no room for 16.
    """
    height, width = mask.shape
    step = max(2 * fwhm, np.sqrt(mask.size / _TRIED))
    x, y = np.meshgrid(np.arange(step / 2, width - 1, step), np.arange(step / 2, height - 1, step))
    places = np.column_stack([x.ravel(), y.ravel()])
    near = Stamps(places, 2 * int(np.ceil(fwhm)) + 1).gather(mask != 0, outside=True)
    blank = ~near.any(axis=(1, 2))
    known = np.isfinite(positions).all(axis=1)
    with np.errstate(invalid="ignore"):
        bright = known & ~(flux < _BRIGHT * error)
    for stars, reach in zip((known, bright, known & varying), _REACHES, strict=True):
        if stars.any():
            blank &= cKDTree(positions[stars]).query(places)[0] > reach * fwhm
    places = places[blank]
    if len(places) < _FEWEST:
        return np.empty((0, 2))
    most = max(_LEAST, min(_MOST, _MOST * _EPOCHS // max(n_epochs, 1)))
    return places[np.linspace(0, len(places) - 1, min(len(places), most)).round().astype(int)]


def sky_scatter(fluxes: Sequence[EpochFluxes], method: str) -> tuple[Float, Float]:
    r"""What the sky scatters by beyond the stated errors, of each epoch: a flat field, fringes, stars below the noise.

    Fluxes at blank places are noise, stated by :math:`\sigma`. What they scatter by beyond that (`excess_scatter`, a
    share s of their errors) is on each star, too, however bright: :math:`s \tilde\sigma`, with the median of their
    errors.

    Returns
    -------
    excess : (E,)
        By how much the errors at blank places are too small, :math:`\sqrt{1 + s^2}`; 1 where nothing tells.
    size : (E,)
        :math:`s \tilde\sigma`, ADU of the reference.
    """
    flux, error = (np.array([epoch.blank[method][k] for epoch in fluxes], float) for k in (0, 1))
    good = np.isfinite(flux) & (error > 0) & (flux != 0).any(axis=1, keepdims=True)  # not the reference itself
    good &= good.sum(axis=1, keepdims=True) >= _FEWEST
    share = excess_scatter(flux, error, error, good, _GRID) * good.any(axis=1)
    return np.hypot(1.0, share), share * np.nan_to_num(median_of(error, good))


def with_sky_excess(done: Sequence[Look], fluxes: Sequence[EpochFluxes], best: str) -> list[EpochFluxes]:
    """Add to the errors what the sky scatters by beyond them (`sky_scatter`); note that of `best` as ``sky_excess``."""
    methods = list(fluxes[0].fluxes) if fluxes else []
    found = dict(zip(methods, active_backend().run_all(partial(sky_scatter, fluxes), methods), strict=True))
    result = []
    for i, (look, epoch) in enumerate(zip(done, fluxes, strict=True)):
        look.numbers["sky_excess"] = float(found[best][0][i])
        widened = {}
        for method, one in epoch.fluxes.items():
            more = found[method][1][i]
            widened[method] = one._replace(flux_diff_err=np.hypot(one.flux_diff_err, more),
                                           flux_err=np.hypot(one.flux_err, more))
        result.append(replace(epoch, fluxes=widened))
    return result
