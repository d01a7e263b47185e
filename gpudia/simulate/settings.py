"""What a simulated series looks like: every effect has a number, and zero switches it off."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpudia.errors import InputError

__all__ = ["VARIABLE_KINDS", "SimulationSettings"]

#: Kinds of variable stars beside the microlensing event.
VARIABLE_KINDS = ("sinusoid", "eclipsing", "flare")


@dataclass(frozen=True)
class SimulationSettings:
    """Settings of `gpudia.simulate.simulate_field`; the defaults make a crowded, hard field.

    Each random effect draws from its own stream of random numbers: switching one off leaves the others as they are.

    Attributes
    ----------
    shape : tuple of int
        Height and width of the frames, pixels.
    n_epochs : int
        Number of frames. The one with the best seeing is the reference.
    seed : int
        Not negative. Two series with equal settings are equal bit by bit.
    star_density : float
        Stars per pixel, all magnitudes together.
    slope : float
        Number of stars per magnitude is proportional to ``10^(slope * mag)``.
    mag_range : tuple of float
        Brightest and faintest star.
    zero_point : float
        Magnitude of a star of 1 ADU per frame at transparency 1.
    fwhm_range : tuple of float
        Seeing from epoch to epoch, pixels, spread evenly: one epoch from each n-th part of the range.
    beta : float
        Exponent of the Moffat PSF, above 1.
    psf_variation : float
        Relative change of the FWHM over 512 px; the ellipticity changes by half as much.
    ellipticity : float
        Largest ellipticity of an epoch at the frame centre, (A^2 - B^2)/(A^2 + B^2).
    transparency_range : tuple of float
        Transparency from epoch to epoch.
    sky_range : tuple of float
        Sky level from epoch to epoch, ADU per pixel.
    sky_gradient : float
        Largest change of the sky over the frame (along either axis) over its level.
    gain : float
        Electrons per ADU.
    read_noise : float
        Electrons.
    saturation : float
        ADU; pixels are cut there. ``math.inf`` switches it off.
    bad_pixels, bad_columns : float
        Fractions of single bad pixels and of bad columns; the same in every frame.
    cosmic_rays : float
        Mean number of hits per 100 000 px and frame.
    cosmic_rays_unmasked : float
        Fraction of the hits that the mask does not know.
    dither : float
        Largest shift along either axis, pixels. The reference is at 0.
    rotation : float
        Largest rotation about the frame centre, degrees. The reference is at 0.
    reference_depth : float
        The reference is the mean of this many equal exposures (noise variance divided by it); ``math.inf``
        makes it free of noise but for the rounding to float32.
    pixel_scale : float
        Arcseconds per pixel.
    ra, dec : float
        Sky position of the reference's centre, degrees.
    microlensing : bool
        Whether the target (star 0, near the centre) is magnified.
    target_mag : float
        Its magnitude without magnification.
    n_variables : int
        Further variables, of the kinds of `VARIABLE_KINDS` in turn.
    exposure_time : float
        Seconds; it is written to the headers and changes no flux.
    mjd_start, cadence : float
        First epoch and mean interval, days (UTC).
    filter_name : str
        For the headers.

    Raises
    ------
    InputError
        When a setting breaks its rule; names setting, rule and value.
    """

    shape: tuple[int, int] = (300, 300)
    n_epochs: int = 12
    seed: int = 4
    star_density: float = 1 / 80
    slope: float = 0.3
    mag_range: tuple[float, float] = (15.0, 23.0)
    zero_point: float = 29.0
    fwhm_range: tuple[float, float] = (3.0, 6.0)
    beta: float = 3.5
    psf_variation: float = 0.06
    ellipticity: float = 0.08
    transparency_range: tuple[float, float] = (0.6, 1.0)
    sky_range: tuple[float, float] = (800.0, 4000.0)
    sky_gradient: float = 0.1
    gain: float = 1.5
    read_noise: float = 8.0
    saturation: float = 13000.0
    bad_pixels: float = 0.001
    bad_columns: float = 0.004
    cosmic_rays: float = 15.0
    cosmic_rays_unmasked: float = 1 / 3
    dither: float = 5.0
    rotation: float = 0.1
    reference_depth: float = 1.0
    pixel_scale: float = 0.389
    ra: float = 268.0
    dec: float = -29.0
    microlensing: bool = True
    target_mag: float = 18.5
    n_variables: int = 6
    exposure_time: float = 60.0
    mjd_start: float = 60000.0
    cadence: float = 1.0
    filter_name: str = "rp"

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 16:
            raise InputError(f"shape must be (height, width) of at least 16 px each, got {self.shape}")
        self._check("n_epochs", lambda v: v >= 1, "at least 1")
        for name in ("n_variables", "seed", "star_density", "psf_variation", "sky_gradient", "read_noise",
                     "cosmic_rays", "dither"):
            self._check(name, lambda v: v >= 0 and math.isfinite(v), "finite and not negative")
        for name in ("gain", "saturation", "reference_depth", "pixel_scale", "exposure_time", "cadence"):
            self._check(name, lambda v: v > 0, "positive")
        for name in ("bad_pixels", "bad_columns", "cosmic_rays_unmasked"):
            self._check(name, lambda v: 0 <= v <= 1, "from 0 to 1")
        for name in ("fwhm_range", "transparency_range", "sky_range"):
            self._check(name, lambda v: 0 < v[0] <= v[1], "two positive numbers in ascending order")
        self._check("mag_range", lambda v: v[0] < v[1], "two numbers in ascending order")
        self._check("beta", lambda v: v > 1, "above 1")
        self._check("ellipticity", lambda v: 0 <= v < 0.5, "from 0 to below 0.5")
        self._check("rotation", lambda v: 0 <= v <= 180, "from 0 to 180")
        self._check("dec", lambda v: abs(v) <= 90, "from -90 to 90")

    def _check(self, name: str, holds: Callable[[Any], bool], rule: str) -> None:
        value = getattr(self, name)
        if not holds(value):
            raise InputError(f"{name} must be {rule}, got {value}")

    def rng(self, stream: str, epoch: int = 0) -> np.random.Generator:
        """Random numbers of one effect in one epoch, independent of every other effect.

        Parameters
        ----------
        stream : str
            Name of the effect.
        epoch : int
            Index of the epoch.

        Returns
        -------
        numpy.random.Generator
        """
        return np.random.default_rng([self.seed, epoch, *stream.encode()])
