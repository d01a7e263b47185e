"""The stars of the field, their sky positions and their light curves."""

from __future__ import annotations

import numpy as np
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import ArrayLike, NDArray

from gpudia.simulate.settings import VARIABLE_KINDS, SimulationSettings

__all__ = ["draw_stars", "magnification", "tan_wcs"]

# Stars this far beyond the reach of the dithers still leave wings in a frame.
_MARGIN = 20.0


def tan_wcs(settings: SimulationSettings, transform: NDArray[np.float64]) -> WCS:
    """Gnomonic WCS of a frame that lies on the reference by an affine transform.

    Parameters
    ----------
    settings : SimulationSettings
        Position on the sky and pixel scale; north is up and east to the left in the reference.
    transform : ndarray, shape (2, 3)
        Takes a pixel (x, y) of the reference to one of the frame: ``p' = A p + b``.

    Returns
    -------
    astropy.wcs.WCS
        Exact: with CD' = CD A^-1 and CRPIX' = A CRPIX + b both frames give a star the same sky position.
    """
    scale = settings.pixel_scale / 3600
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.cunit = ["deg", "deg"]
    wcs.wcs.crval = [settings.ra, settings.dec]
    wcs.wcs.crpix = transform @ [*frame_centre(settings), 1.0] + 1.0
    wcs.wcs.cd = np.diag([-scale, scale]) @ np.linalg.inv(transform[:, :2])
    wcs.wcs.radesys = "ICRS"
    wcs.pixel_shape = settings.shape[::-1]
    wcs.wcs.set()
    return wcs


def frame_centre(settings: SimulationSettings) -> tuple[float, float]:
    """Centre (x, y) of a frame, 0-based pixels."""
    return (settings.shape[1] - 1) / 2, (settings.shape[0] - 1) / 2


def draw_stars(settings: SimulationSettings, mjd: NDArray[np.float64]) -> Table:
    """Draw the field: positions, magnitudes, and the flux of every star in every epoch.

    Parameters
    ----------
    settings : SimulationSettings
        Density, slope and range of magnitudes, variables.
    mjd : ndarray, shape (n_epochs,)
        Times of the light curves, days.

    Returns
    -------
    astropy.table.Table
        Columns ``id`` (the row number), ``ra``, ``dec`` (degrees), ``x``, ``y`` (reference pixels, 0-based),
        ``mag`` (without variation), ``kind``, ``flux`` (n_epochs values, ADU at transparency 1). Row 0 is the target.
    """
    x, y = _draw_positions(settings)
    mag = _draw_magnitudes(settings, x.size)
    mag[0] = settings.target_mag
    kind = np.full(x.size, "constant", dtype="U12")
    relative = np.ones((x.size, mjd.size))
    if settings.microlensing:
        kind[0] = "microlensing"
        relative[0] = _microlensing(mjd)
    for n, star in enumerate(_choose_variables(settings, x, y, mag)):
        kind[star] = VARIABLE_KINDS[n % len(VARIABLE_KINDS)]
        relative[star] = _LIGHT_CURVES[str(kind[star])](settings.rng("light curve", n), mjd, settings.cadence)
    flux = 10 ** (0.4 * (settings.zero_point - mag))[:, None] * relative
    ra, dec = tan_wcs(settings, np.eye(2, 3)).all_pix2world(x, y, 0)
    columns = {"id": np.arange(x.size), "ra": ra, "dec": dec, "x": x, "y": y, "mag": mag, "kind": kind, "flux": flux}
    table = Table(columns)
    for name, unit in {"ra": "deg", "dec": "deg", "x": "pix", "y": "pix", "mag": "mag", "flux": "adu"}.items():
        table[name].unit = unit
    return table


def _draw_positions(settings: SimulationSettings) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rng = settings.rng("positions")
    height, width = settings.shape
    lever = min(np.deg2rad(settings.rotation) * np.hypot(height, width) / 2, max(height, width))
    margin = _MARGIN + settings.dither + lever
    n = max(1, round(settings.star_density * (height + 2 * margin) * (width + 2 * margin)))
    x = rng.uniform(-0.5 - margin, width - 0.5 + margin, n)
    y = rng.uniform(-0.5 - margin, height - 0.5 + margin, n)
    centre = frame_centre(settings)
    x[0], y[0] = centre + rng.uniform(-2, 2, 2)
    return x, y


def _draw_magnitudes(settings: SimulationSettings, n: int) -> NDArray[np.float64]:
    bright, faint = settings.mag_range
    u = settings.rng("magnitudes").uniform(size=n)
    if settings.slope == 0:
        return bright + u * (faint - bright)
    # Inverse of the cumulative distribution, counted from the faint end to keep the exponents small.
    least = 10 ** (settings.slope * (bright - faint))
    return faint + np.log10(least + u * (1 - least)) / settings.slope


def _choose_variables(
    settings: SimulationSettings, x: NDArray[np.float64], y: NDArray[np.float64], mag: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Stars well inside of the frame, neither among the brightest nor lost in the noise."""
    height, width = settings.shape
    edge = 0.1 * min(height, width)
    inside = (x > edge) & (x < width - edge) & (y > edge) & (y < height - edge)
    bright, faint = settings.mag_range
    bright_enough = (mag > bright + 0.1 * (faint - bright)) & (mag < bright + 0.6 * (faint - bright))
    candidates = np.flatnonzero(inside & bright_enough & (np.arange(x.size) > 0))
    return settings.rng("variables").permutation(candidates)[: settings.n_variables]


def magnification(mjd: ArrayLike, t0: float, t_e: float, u0: float) -> NDArray[np.float64]:
    """Magnification of a point source by a point lens.

    ``A = (u^2 + 2) / (u sqrt(u^2 + 4))``, ``u^2 = u0^2 + ((t - t0) / tE)^2`` [Paczynski 1986, ApJ 304, 1].

    Parameters
    ----------
    mjd : array_like
        Times, days.
    t0, t_e : float
        Time of the closest approach and Einstein time, days.
    u0 : float
        Impact parameter, Einstein radii.

    Returns
    -------
    ndarray
        Magnification, at least 1.
    """
    u2 = u0**2 + ((np.asarray(mjd, dtype=float) - t0) / t_e) ** 2
    return (u2 + 2) / np.sqrt(u2 * (u2 + 4))


def _microlensing(mjd: NDArray[np.float64]) -> NDArray[np.float64]:
    span = max(float(np.ptp(mjd)), 1.0)
    return magnification(mjd, t0=float(mjd.min()) + 0.55 * span, t_e=0.25 * span, u0=0.2)


def _sinusoid(rng: np.random.Generator, mjd: NDArray[np.float64], cadence: float) -> NDArray[np.float64]:
    period, phase = cadence * rng.uniform(2.3, 8.0), rng.uniform(0, 2 * np.pi)
    return 1 + rng.uniform(0.1, 0.4) * np.sin(2 * np.pi * mjd / period + phase)


def _eclipsing(rng: np.random.Generator, mjd: NDArray[np.float64], cadence: float) -> NDArray[np.float64]:
    # An epoch lies in the middle of an eclipse: a variable that never varies would test nothing.
    period, t0 = cadence * rng.uniform(2.3, 5.0), rng.choice(mjd)
    from_middle = (mjd - t0 + period / 2) % period - period / 2
    return 1 - rng.uniform(0.3, 0.6) * np.exp(-0.5 * (from_middle / (0.05 * period)) ** 2)


def _flare(rng: np.random.Generator, mjd: NDArray[np.float64], cadence: float) -> NDArray[np.float64]:
    age = mjd - rng.choice(mjd) + 0.1 * cadence
    return 1 + rng.uniform(0.5, 2.0) * np.where(age > 0, np.exp(-np.maximum(age, 0) / cadence), 0)


_LIGHT_CURVES = {"sinusoid": _sinusoid, "eclipsing": _eclipsing, "flare": _flare}
