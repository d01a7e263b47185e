"""The conditions of every epoch: time, seeing, transparency, sky, pointing, depth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpudia.simulate.psf import MoffatField
from gpudia.simulate.settings import SimulationSettings
from gpudia.simulate.sky import frame_centre

__all__ = ["Conditions", "draw_conditions"]

# A depth of math.inf: its noise is far below the rounding to float32, yet every formula stays finite.
_NOISE_FREE_DEPTH = 1e12


@dataclass(frozen=True)
class Conditions:
    """One epoch as the sky and the telescope make it.

    Attributes
    ----------
    index : int
        Number of the epoch.
    mjd : float
        Mid-exposure, days (UTC).
    psf : MoffatField
        The PSF over the frame.
    transparency : float
        Flux in the frame over flux at transparency 1.
    sky : ndarray, shape (3,)
        Sky at the frame centre (ADU) and its change per pixel along x and y.
    transform : ndarray, shape (2, 3)
        Takes a pixel (x, y) of the reference to one of this frame.
    gain, read_noise : float
        Electrons per ADU, electrons; those of the mean of all exposures where the reference is deeper.
    """

    index: int
    mjd: float
    psf: MoffatField
    transparency: float
    sky: NDArray[np.float64]
    transform: NDArray[np.float64]
    gain: float
    read_noise: float


def draw_conditions(settings: SimulationSettings) -> list[Conditions]:
    """Draw the conditions of all epochs; the epoch of the best seeing is the reference."""
    fwhm = _spread(settings.rng("seeing"), settings.fwhm_range, settings.n_epochs)
    transparency = _spread(settings.rng("transparency"), settings.transparency_range, settings.n_epochs)
    sky = np.exp(_spread(settings.rng("sky"), np.log(settings.sky_range), settings.n_epochs))
    reference = int(np.argmin(fwhm))
    jitter = settings.rng("times").uniform(-0.3, 0.3, settings.n_epochs)
    mjd = settings.mjd_start + settings.cadence * (np.arange(settings.n_epochs) + jitter)
    return [
        Conditions(i, float(mjd[i]), _draw_psf(settings, i, fwhm[i]), float(transparency[i]),
                   _draw_sky(settings, i, sky[i]), _draw_transform(settings, i, reference),
                   *_noise_of(settings, i == reference))
        for i in range(settings.n_epochs)
    ]  # fmt: skip


def _spread(rng: np.random.Generator, limits: NDArray[np.float64] | tuple[float, float], n: int) -> NDArray[np.float64]:
    """One uniform number from each n-th part of a range, in random order: few epochs still span it."""
    low, high = limits
    return low + (high - low) * (rng.permutation(n) + rng.uniform(size=n)) / n


def _draw_psf(settings: SimulationSettings, epoch: int, fwhm: float) -> MoffatField:
    rng = settings.rng("psf", epoch)
    size, direction = settings.ellipticity * np.sqrt(rng.uniform()), rng.uniform(0, 2 * np.pi)
    at_centre = np.array([fwhm, size * np.cos(direction), size * np.sin(direction)])
    angles = rng.uniform(0, 2 * np.pi, 3)
    change = settings.psf_variation / 512 * np.array([fwhm, 0.5, 0.5])
    gradients = change[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return MoffatField(settings.beta, frame_centre(settings), np.column_stack([at_centre, gradients]))


def _draw_sky(settings: SimulationSettings, epoch: int, level: float) -> NDArray[np.float64]:
    gradient = settings.rng("sky gradient", epoch).uniform(-1, 1, 2) * settings.sky_gradient * level
    return np.array([level, *(gradient / settings.shape[::-1])])


def _draw_transform(settings: SimulationSettings, epoch: int, reference: int) -> NDArray[np.float64]:
    """Rotation about the frame centre, then a shift."""
    if epoch == reference:
        return np.eye(2, 3)
    rng = settings.rng("pointing", epoch)
    shift = rng.uniform(-1, 1, 2) * settings.dither
    angle = np.deg2rad(rng.uniform(-1, 1) * settings.rotation)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = np.array(frame_centre(settings))
    return np.column_stack([turn, centre - turn @ centre + shift])


def _noise_of(settings: SimulationSettings, is_reference: bool) -> tuple[float, float]:
    """Gain and read noise of the mean of `depth` exposures, counted in the electrons of them all."""
    depth = min(settings.reference_depth, _NOISE_FREE_DEPTH) if is_reference else 1.0
    return settings.gain * depth, settings.read_noise * float(np.sqrt(depth))
