"""What the detector does to the light: noise, defects, cosmic rays, saturation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpudia.flags import PIXEL_FLAGS
from gpudia.simulate.conditions import Conditions
from gpudia.simulate.settings import SimulationSettings

__all__ = ["expected_variance", "expose"]

_MEAN_TRACK = 5.0  # px, mean length of a cosmic ray's track
_CHARGE = (500.0, 8000.0)  # ADU per pixel of a track, log-uniform


def expected_variance(model: NDArray[np.float64], gain: float, read_noise: float) -> NDArray[np.float64]:
    """Variance (ADU^2) of pixels whose expected value is `model` (ADU): ``model/gain + (read_noise/gain)^2``."""
    return np.maximum(model, 0) / gain + (read_noise / gain) ** 2


def expose(
    settings: SimulationSettings, conditions: Conditions, model: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.uint8], NDArray[np.int32]]:
    """Read a noisy frame out of a noise-free model.

    Parameters
    ----------
    settings : SimulationSettings
        Defects, cosmic rays, saturation.
    conditions : Conditions
        Gain and read noise of this epoch.
    model : ndarray, shape (H, W)
        Expected value of every pixel, ADU.

    Returns
    -------
    data : ndarray, shape (H, W), float64
        ADU.
    mask : ndarray, shape (H, W), uint8
        Bits of `gpudia.flags.PIXEL_FLAGS`.
    hits : ndarray, shape (H, W), int32
        Number of the (last) cosmic ray, from 1, that hit a pixel, masked or not; 0 where none did.
    """
    rng = settings.rng("noise", conditions.index)
    read_noise = rng.normal(0, conditions.read_noise, model.shape)
    data = (rng.poisson(model * conditions.gain) + read_noise) / conditions.gain
    mask = np.zeros(model.shape, np.uint8)
    hits = _add_cosmic_rays(settings, conditions.index, data, mask)
    _add_defects(settings, data, mask)
    saturated = data >= settings.saturation
    data[saturated] = settings.saturation
    mask[saturated] |= PIXEL_FLAGS.saturated
    return data, mask, hits


def _add_cosmic_rays(
    settings: SimulationSettings, epoch: int, data: NDArray[np.float64], mask: NDArray[np.uint8]
) -> NDArray[np.int32]:
    rng = settings.rng("cosmic rays", epoch)
    height, width = data.shape
    n = rng.poisson(settings.cosmic_rays * data.size / 1e5)
    unmasked = rng.permutation(n)[: round(n * settings.cosmic_rays_unmasked)] + 1
    hits = np.zeros(data.shape, np.int32)
    for ray in range(n):
        x0, y0, angle = rng.uniform(0, (width, height, 2 * np.pi))
        along = np.arange(0, 1 + rng.exponential(_MEAN_TRACK), 0.5)
        ix, iy = np.floor(x0 + along * np.cos(angle)).astype(int), np.floor(y0 + along * np.sin(angle)).astype(int)
        inside = (ix >= 0) & (ix < width) & (iy >= 0) & (iy < height)
        rows, columns = np.unique(np.stack([iy[inside], ix[inside]]), axis=1)
        charge = np.exp(rng.uniform(*np.log(_CHARGE)))
        data[rows, columns] += charge * rng.uniform(0.5, 1.5, rows.size)
        hits[rows, columns] = ray + 1
    mask[(hits > 0) & ~np.isin(hits, unmasked)] |= PIXEL_FLAGS.cosmic_ray
    return hits


def _add_defects(settings: SimulationSettings, data: NDArray[np.float64], mask: NDArray[np.uint8]) -> None:
    """Hot and dead pixels and columns of half the response, the same in every frame."""
    rng = settings.rng("defects")
    single = rng.uniform(size=data.shape) < settings.bad_pixels
    hot = rng.exponential(3000.0, data.shape) * (rng.uniform(size=data.shape) < 0.5)
    n_columns = round(settings.bad_columns * data.shape[1])
    columns = rng.permutation(data.shape[1])[:n_columns]
    data[:, columns] *= 0.5
    data[single] = hot[single]
    mask[single] |= PIXEL_FLAGS.bad
    mask[:, columns] |= PIXEL_FLAGS.bad
