"""The simulated series: frames with the truth behind them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from astropy.table import Table
from astropy.time import Time
from astropy.wcs import WCS
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from gpudia.errors import InputError
from gpudia.simulate.conditions import Conditions, draw_conditions
from gpudia.simulate.detector import expected_variance, expose
from gpudia.simulate.psf import MoffatField, add_stars
from gpudia.simulate.settings import SimulationSettings
from gpudia.simulate.sky import draw_stars, frame_centre, tan_wcs

__all__ = ["SimulatedFrame", "SimulatedSeries", "simulate_field"]

# The wings of a star are drawn down to this fraction of the sky's noise per pixel.
_EDGE = 3e-4


@dataclass(frozen=True, eq=False)
class SimulatedFrame:
    """One frame as a pipeline would deliver it, and what is true about it.

    Attributes
    ----------
    name : str
        Unique in its series; the stem of the file name.
    index : int
        Number of the epoch.
    data : ndarray, shape (H, W), float32
        ADU, sky included.
    error : ndarray, shape (H, W), float32
        One sigma, from the *noisy* data as pipelines do: ``sqrt(|data|/gain + (read_noise/gain)^2)``, ADU.
    mask : ndarray, shape (H, W), uint8
        Bits of `gpudia.flags.PIXEL_FLAGS`; some cosmic rays are not in it.
    wcs : astropy.wcs.WCS
        Exact TAN.
    mjd : float
        Mid-exposure, days (UTC).
    header : dict
        Keyword -> value of a pipeline's header (without the WCS); MJD-OBS and DATE-OBS are the start.
    transform : ndarray, shape (2, 3)
        Takes a pixel (x, y) of the reference to one of this frame.
    psf_field : MoffatField
        The true PSF.
    transparency : float
        Flux in this frame over flux at transparency 1.
    scale : float
        The photometric scale: flux in this frame over flux in the reference (of a constant star).
    sky : ndarray, shape (H, W), float64
        True sky, ADU.
    model : ndarray, shape (H, W), float64
        Expected value of every pixel (stars and sky), ADU, before defects and saturation.
    variance : ndarray, shape (H, W), float64
        True variance of the noise, from `model`, ADU^2.
    cosmic_rays : ndarray, shape (H, W), int32
        Number of the cosmic ray (from 1) that hit a pixel, 0 where none did.
    gain, read_noise : float
        Electrons per ADU, electrons.
    fwhm : float
        FWHM at the frame centre, pixels.
    """

    name: str
    index: int
    data: NDArray[np.float32]
    error: NDArray[np.float32]
    mask: NDArray[np.uint8]
    wcs: WCS
    mjd: float
    header: dict[str, str | float]
    transform: NDArray[np.float64]
    psf_field: MoffatField
    transparency: float
    scale: float
    sky: NDArray[np.float64]
    model: NDArray[np.float64]
    variance: NDArray[np.float64]
    cosmic_rays: NDArray[np.int32]
    gain: float
    read_noise: float
    fwhm: float

    def psf(self, x: float, y: float, size: int = 41) -> NDArray[np.float64]:
        """PSF of a star at (x, y), 0-based pixels of this frame, on the pixels around the one nearest to it.

        Returns
        -------
        ndarray, shape (size, size)
            Fraction of the flux in each pixel, [size//2, size//2] being pixel (round(y), round(x)). The integral
            over the infinite plane is 1, so that the sum is 1 less the wings outside of the stamp.
        """
        return self.psf_field.stamp(x, y, size)

    def position(self, x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Position (x, y) in this frame of positions in the reference, 0-based pixels."""
        new = np.tensordot(self.transform[:, :2], np.stack([x, y]), axes=1)
        return new[0] + self.transform[0, 2], new[1] + self.transform[1, 2]


@dataclass(frozen=True, eq=False)
class SimulatedSeries:
    """Frames of one field and the truth.

    Attributes
    ----------
    settings : SimulationSettings
        What was asked for.
    frames : list of SimulatedFrame
        In order of time.
    truth : astropy.table.Table
        Stars: ``id`` (the row number), ``ra``, ``dec``, ``x``, ``y`` (reference, 0-based; some lie outside),
        ``mag``, ``kind``, ``flux`` (one value per epoch, ADU at transparency 1). Star 0 is the target.
    reference_index : int
        The epoch with the best seeing.
    """

    settings: SimulationSettings
    frames: list[SimulatedFrame]
    truth: Table
    reference_index: int

    @property
    def reference(self) -> SimulatedFrame:
        """The frame of the best seeing; every `transform` and `scale` refers to it."""
        return self.frames[self.reference_index]

    @property
    def variables(self) -> Table:
        """The rows of `truth` that vary, with ``floor``: their Cramer-Rao bound in every epoch (ADU of the frame)."""
        rows = self.truth[self.truth["kind"] != "constant"]
        epochs = range(len(self.frames))
        floor = [[self.cramer_rao(int(star), i) for i in epochs] for star in rows["id"]]
        rows["floor"] = np.array(floor, dtype=float).reshape(len(rows), len(self.frames))
        rows["floor"].unit = "adu"
        return rows

    def cramer_rao(self, star: int, epoch: int) -> float:
        """Least 1-sigma error that any unbiased flux of a star can have in one epoch.

        ``1 / sqrt(sum psf^2 / variance)`` over the good pixels, for a known PSF, position, sky and neighbours.

        Parameters
        ----------
        star : int
            Its ``id``.
        epoch : int
            Index of the frame.

        Returns
        -------
        float
            ADU of that frame (not divided by its transparency); infinite for a star outside of it.

        Raises
        ------
        InputError
            When there is no such star or epoch.
        """
        _check_index("star", star, len(self.truth))
        _check_index("epoch", epoch, len(self.frames))
        row, frame = self.truth[star], self.frames[epoch]
        x, y = (float(v) for v in frame.position(row["x"], row["y"]))
        reach = int(np.ceil(6 * frame.fwhm))
        height, width = frame.data.shape
        columns = max(round(x) - reach, 0), min(round(x) + reach + 1, width)
        rows = max(round(y) - reach, 0), min(round(y) + reach + 1, height)
        if columns[0] >= columns[1] or rows[0] >= rows[1]:
            return float("inf")
        window = slice(*rows), slice(*columns)
        psf = np.where(frame.mask[window] == 0, frame.psf_field.pixels(x, y, columns, rows), 0)
        information = float(np.sum(psf**2 / frame.variance[window]))
        return information**-0.5 if information > 0 else float("inf")

    def catalog(self, epoch: int, min_snr: float = 10.0) -> Table:
        """The catalog that a pipeline would make of one frame: noisy, shallow, blends taken for one star.

        Parameters
        ----------
        epoch : int
            Index of the frame.
        min_snr : float
            Least signal-to-noise ratio of a star in it.

        Returns
        -------
        astropy.table.Table
            Columns ``id`` (of `truth`), ``x``, ``y`` (this frame, 0-based, scattered by FWHM / (2.35 S/N)), ``ra``,
            ``dec`` (of the measured position, degrees), ``flux``, ``fluxerr`` (ADU of this frame), ``fwhm`` (px);
            the brightest first.

        Raises
        ------
        InputError
            When there is no such epoch.
        """
        _check_index("epoch", epoch, len(self.frames))
        frame = self.frames[epoch]
        x, y = frame.position(self.truth["x"].data, self.truth["y"].data)
        flux = self.truth["flux"].data[:, epoch] * frame.transparency
        height, width = frame.data.shape
        stars = np.flatnonzero((x > 0) & (x < width - 1) & (y > 0) & (y < height - 1))
        stars = stars[np.argsort(-flux[stars], kind="stable")]
        stars = stars[_first_of_each_blend(x[stars], y[stars], frame.fwhm)]
        error = np.array([self.cramer_rao(int(star), epoch) for star in stars], dtype=float)
        seen = flux[stars] > min_snr * error
        stars, error = stars[seen], error[seen]
        return _measured(self.settings, frame, stars, x[stars], y[stars], flux[stars], error)


def simulate_field(settings: SimulationSettings | None = None) -> SimulatedSeries:
    """Simulate a series of frames of a crowded field, with the truth.

    Parameters
    ----------
    settings : SimulationSettings, optional
        Everything about it; the defaults make a field that is as hard as the sky.

    Returns
    -------
    SimulatedSeries
    """
    settings = settings or SimulationSettings()
    epochs = draw_conditions(settings)
    truth = draw_stars(settings, np.array([c.mjd for c in epochs]))
    reference = int(np.argmin([c.psf.coefficients[0, 0] for c in epochs]))
    frames = [_make_frame(settings, c, truth, c.transparency / epochs[reference].transparency) for c in epochs]
    return SimulatedSeries(settings, frames, truth, reference)


def _make_frame(settings: SimulationSettings, conditions: Conditions, truth: Table, scale: float) -> SimulatedFrame:
    sky = _sky_image(settings, conditions)
    model = sky.copy()
    x, y = conditions.transform @ np.stack([truth["x"], truth["y"], np.ones(len(truth))])
    flux = truth["flux"].data[:, conditions.index] * conditions.transparency
    edge_level = _EDGE * float(np.sqrt(expected_variance(sky, settings.gain, settings.read_noise).min()))
    add_stars(model, x, y, flux, conditions.psf, edge_level)
    data, mask, hits = expose(settings, conditions, model)
    error = np.sqrt(expected_variance(np.abs(data), conditions.gain, conditions.read_noise))
    return SimulatedFrame(
        name=f"sim-{conditions.index:04d}", index=conditions.index, data=data.astype(np.float32),
        error=error.astype(np.float32), mask=mask, wcs=tan_wcs(settings, conditions.transform), mjd=conditions.mjd,
        header=_header(settings, conditions), transform=conditions.transform, psf_field=conditions.psf,
        transparency=conditions.transparency, scale=scale, sky=sky, model=model,
        variance=expected_variance(model, conditions.gain, conditions.read_noise), cosmic_rays=hits,
        gain=conditions.gain, read_noise=conditions.read_noise, fwhm=float(conditions.psf.coefficients[0, 0]),
    )  # fmt: skip


def _sky_image(settings: SimulationSettings, conditions: Conditions) -> NDArray[np.float64]:
    level, along_x, along_y = conditions.sky
    centre = frame_centre(settings)
    columns, rows = np.arange(settings.shape[1]) - centre[0], np.arange(settings.shape[0]) - centre[1]
    return level + along_x * columns + (along_y * rows)[:, None]


def _header(settings: SimulationSettings, conditions: Conditions) -> dict[str, str | float]:
    start = conditions.mjd - settings.exposure_time / 2 / 86400
    header: dict[str, str | float] = {
        "OBJECT": "simulated field",
        "OBSTYPE": "EXPOSE",
        "FILTER": settings.filter_name,
        "EXPTIME": settings.exposure_time,
        "DATE-OBS": str(Time(start, format="mjd", scale="utc").isot),
        "MJD-OBS": start,
        "GAIN": conditions.gain,
        "RDNOISE": conditions.read_noise,
        "L1FWHM": float(conditions.psf.coefficients[0, 0]) * settings.pixel_scale,
        "PIXSCALE": settings.pixel_scale,
        "INSTRUME": "simulated",
        "LATITUDE": -30.1674,
        "LONGITUD": -70.8048,
        "HEIGHT": 2198.0,
        "BUNIT": "adu",
    }
    if np.isfinite(settings.saturation):
        header["SATURATE"] = settings.saturation
    return header


def _check_index(name: str, value: int, length: int) -> None:
    if not 0 <= value < length:
        raise InputError(f"{name} must be from 0 to {length - 1}, got {value}")


def _first_of_each_blend(x: NDArray[np.float64], y: NDArray[np.float64], distance: float) -> NDArray[np.bool_]:
    """Stars without a brighter one within `distance` (the stars come brightest first)."""
    pairs = cKDTree(np.column_stack([x, y])).query_pairs(distance, output_type="ndarray")
    keep = np.ones(x.size, dtype=bool)
    keep[pairs.max(axis=1)] = False
    return keep


def _measured(
    settings: SimulationSettings, frame: SimulatedFrame, stars: NDArray[np.int64], x: NDArray[np.float64],
    y: NDArray[np.float64], flux: NDArray[np.float64], error: NDArray[np.float64],
) -> Table:  # fmt: skip
    rng = settings.rng("catalog", frame.index)
    scatter = frame.fwhm / 2.35 * error / flux
    x, y = x + scatter * rng.normal(size=x.size), y + scatter * rng.normal(size=x.size)
    ra, dec = frame.wcs.all_pix2world(x, y, 0)
    table = Table({"id": stars, "x": x, "y": y, "ra": ra, "dec": dec, "flux": flux + error * rng.normal(size=x.size),
                   "fluxerr": error, "fwhm": frame.psf_field.shape_at(x, y)[0]})  # fmt: skip
    for name, unit in {"x": "pix", "y": "pix", "ra": "deg", "dec": "deg", "flux": "adu", "fluxerr": "adu"}.items():
        table[name].unit = unit
    table["fwhm"].unit = "pix"
    table.sort("flux", reverse=True)
    return table
