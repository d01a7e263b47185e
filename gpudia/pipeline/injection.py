"""Injection and recovery: variables of known flux in the user's own frames, through the whole job."""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.table import Table
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from gpudia.config import RunConfig
from gpudia.errors import ConfigError, DataWarning, FrameError
from gpudia.images import (
    Frame,
    FrameLayout,
    Region,
    Registration,
    copy_with_light,
    cut,
    detect_stars,
    frame_quality,
    identity_registration,
    read_frame,
    register,
    sky_and_noise,
    write_table,
)
from gpudia.photometry import Psf, Stamps, empirical_psf
from gpudia.photometry.psf import shifted_psf
from gpudia.pipeline.job import run
from gpudia.pipeline.outputs import RunResult
from gpudia.pipeline.recovery import Recovery, recover
from gpudia.report.injection import write_injection_plot
from gpudia.simulate import magnification

__all__ = ["SHAPES", "Injection", "inject"]

log = logging.getLogger("gpudia.pipeline")

Float = NDArray[np.float64]
#: Light curves.
SHAPES = ("constant", "step", "sine", "paczynski")
#: Signal to noise on a typical difference between which fluxes lie by default.
_LEAST_SNR, _MOST_SNR = 2.0, 60.0
#: Distances in FWHM: between injected stars, and to the bright stars that they avoid.
_APART, _AWAY = 4.0, 2.0
#: Signal to noise of a bright star.
_BRIGHT = 100.0


@dataclass(frozen=True)
class Injection:
    """What is put into the frames.

    Parameters
    ----------
    n : int
        Stars at most; there are fewer where there is no room for so many.
    flux : (float, float), optional
        Range of the change of flux, ADU of the reference, spread evenly in magnitude. Default: signal to noise of 2 to
        60 on a typical difference.
    shape : {"constant", "step", "sine", "paczynski"}
        ``constant``: half of the stars are there in all frames but the reference, the others in the reference alone;
        ``step``: half appear in the later half of the series, the others, which are on the reference, vanish then;
        ``sine``: about a constant flux as large as the amplitude, one to five periods; ``paczynski``: a microlensing
        event of a star that is there in all frames.
    seed : int
    anywhere : bool
        Next to bright stars, too; else 2 FWHM from stars of signal to noise 100 and more, and from masked pixels.

    Raises
    ------
    ConfigError
        If a value breaks its rule.
    """

    n: int = 50
    flux: tuple[float, float] | None = None
    shape: str = "constant"
    seed: int = 1
    anywhere: bool = False

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.shape not in SHAPES:
            raise ConfigError(f"shape must be one of {', '.join(SHAPES)}, got {self.shape!r}")
        if self.flux is not None:
            low, high = self.flux
            if not 0 < low <= high < math.inf:
                raise ConfigError(f"flux must be two positive numbers in ascending order, got {self.flux}")


@dataclass(frozen=True)
class Exposure:
    """One frame as the injection sees it; the PSF from its own stars, at positions of the cut `region`."""

    path: Path
    name: str
    mjd: float
    scale: float
    is_reference: bool
    registration: Registration
    psf: Psf
    region: Region
    shape: tuple[int, int]
    gain: float
    flux_noise: float

    def psf_at(self, places: Float) -> Float:
        """PSFs of the frame (S, m, m) at positions of the reference frame."""
        return self.psf.at(self.region.to_cutout(self.registration.apply(places)))


def inject(config: RunConfig, injection: Injection | None = None, progress: bool = False) -> Recovery:
    """Put variables into copies of the frames, run the whole job on these and compare.

    Parameters
    ----------
    config : RunConfig
        Settings of the run. `output` gets the folders ``plain`` (a run without them), ``frames`` (the copies), ``run``,
        the tables ``injection.ecsv`` (by magnitude) and ``injection_epochs.ecsv`` (every measurement), and
        ``injection.png``.
    injection : Injection, optional
    progress : bool
        Show progress bars.

    Returns
    -------
    Recovery

    Raises
    ------
    ConfigError
        If the output holds something already and may not be overwritten, the reference is a stack, or as `run`.
    FrameError
        If no frame but the reference is usable, there is no room for any star, or as `run`.

    Notes
    -----
    Each frame gets the stars with the PSF of its own stars, not with the one that the photometry will use, at the
    places where its registration has them, with the photon noise of their light, and in the brightness of its own scale
    in the run without them. The fluxes are compared in ADU of each frame, so that the scale is not tested (constant
    stars do that: ``epsilon``). A single variable among many stars moves neither kernel nor sky; a hundred at once do:
    so the injected stars are kept out of the fit, the model (sizes and degrees) is that of the run without them, and as
    many get fainter as brighter, except in ``paczynski``. (Eighty that were in the fit and all appeared in 320 x 320 px
    lifted the sky so that each came out 6 % fainter; on the sparse RISE frames they made a quarter of the kernel.)
    """
    injection = injection or Injection()
    if config.reference == "stack":
        raise ConfigError("reference must be 'auto' or a file for an injection, got 'stack'")
    output = _prepare(config)
    plain = run(config.replace(output=str(output / "plain"), detect=None, positions=None), progress)
    frame = _ReferenceField.read(output / "plain")
    exposures = _exposures(config, plain, frame)
    if not any(not one.is_reference for one in exposures):
        raise FrameError("frames must be at least two that can be subtracted, got none beside the reference")
    rng = np.random.default_rng(injection.seed)
    places = frame.places(injection, rng)
    truth = _truth(exposures, places, injection, rng)
    (output / "frames").mkdir(exist_ok=True)
    copies = [_write(one, places, truth["light"][i], config, output / "frames", rng) for i, one in enumerate(exposures)]
    ids = -1 - np.arange(len(places))  # no catalog has these, whatever stars are found on the copies
    write_table(Table({"id": ids, "x": places[:, 0], "y": places[:, 1]}), output / "positions.ecsv")
    reference = copies[[one.is_reference for one in exposures].index(True)]
    result = run(_same_model(config, output / "plain").replace(
        frames=tuple(map(str, copies)), output=str(output / "run"), reference=str(reference), products=True,
        positions=str(output / "positions.ecsv"), detect=config.detect or 5.0), progress)
    recovery = recover(output, result, exposures, ids, places, truth, injection.shape, config.detect or 5.0)
    write_injection_plot(recovery.epochs, recovery.bins, output / "injection.png")
    return recovery


def _same_model(config: RunConfig, folder: Path) -> RunConfig:
    """Return the settings with the sizes and degrees that an earlier run chose."""
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = next(line for line in reversed(lines) if line["event"] == "reference")
    radius = fits.getval(folder / "reference.fits", "APRADIUS")
    return config.replace(aperture_radius=radius, **{
        name: chosen[name] for name in ("kernel_size", "spatial_degree", "background_degree")})


def _prepare(config: RunConfig) -> Path:
    output = Path(os.path.expanduser(config.output))
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output must be a folder, got the file {output}")
    if output.exists() and any(output.iterdir()) and not config.overwrite:
        raise ConfigError(f"output must be a new or empty folder, got {output}; say overwrite (--overwrite) to replace "
                          "the results")
    output.mkdir(parents=True, exist_ok=True)
    return output


@dataclass(frozen=True)
class _ReferenceField:
    """What the run without the injected stars says of the reference: its region, stars and good pixels."""

    name: str
    region: Region
    fwhm: float
    stars: Table
    good: NDArray[np.bool_]
    margin: int

    @classmethod
    def read(cls, folder: Path) -> _ReferenceField:
        with fits.open(folder / "reference.fits", memmap=False) as hdus:
            header, mask = hdus[0].header, np.asarray(hdus["MASK"].data)
            region = Region(int(header["X0"]), int(header["Y0"]), mask.shape)
            fwhm = header["FWHM"] if isinstance(header["FWHM"], float) else 4.0
            return cls(header["REFERENC"], region, fwhm, Table.read(hdus["CATALOG"]), mask == 0,
                       int(hdus["PSF"].shape[-1]))

    def places(self, injection: Injection, rng: np.random.Generator) -> Float:
        """Draw places for the stars, (N, 2) in the reference frame.

        Raises
        ------
        FrameError
            If there is no room.
        """
        height, width = self.region.shape
        x, y = (rng.uniform(self.margin, n - 1 - self.margin, 40 * injection.n) if n > 2 * self.margin + 1
                else np.empty(0) for n in (width, height))
        n = min(len(x), len(y))
        some = np.column_stack([x[:n], y[:n]])
        if n and not injection.anywhere:
            some = some[self._quiet(some)]
        chosen: list[Float] = []
        for place in some:
            if all(np.hypot(*(place - other)) > _APART * self.fwhm for other in chosen):
                chosen.append(place)
            if len(chosen) == injection.n:
                break
        if not chosen:
            raise FrameError(f"region must have room for injected stars, got {height} x {width} px with none that is "
                             f"{self.margin} px from its border and away from bright stars")
        if len(chosen) < injection.n:
            log.warning("there is room for %d injected stars, not for %d", len(chosen), injection.n)
        return self.region.to_frame(np.array(chosen))

    def _quiet(self, places: Float) -> NDArray[np.bool_]:
        bad = cKDTree(np.argwhere(~self.good)[:, ::-1]) if not self.good.all() else None
        quiet = np.ones(len(places), bool) if bad is None else bad.query(places)[0] > _AWAY * self.fwhm
        flux, error = (np.asarray(self.stars[name], float) for name in ("flux_ref", "flux_ref_err"))
        with np.errstate(invalid="ignore"):
            bright = ~(flux < _BRIGHT * error)
        if bright.any():
            xy = np.column_stack([self.stars["x_cutout"], self.stars["y_cutout"]])[bright]
            quiet &= cKDTree(xy).query(places)[0] > _AWAY * self.fwhm
        return quiet


def _exposures(config: RunConfig, plain: RunResult, field: _ReferenceField) -> list[Exposure]:
    """PSF, registration and gain of every frame that could be subtracted."""
    layout, rows = FrameLayout(**config.layout()), [row for row in plain.epochs if row["status"] == "ok"]
    rows.sort(key=lambda row: row["name"] != field.name)  # the reference comes first
    if not rows or rows[0]["name"] != field.name:
        raise ConfigError(f"reference must be one of the frames for an injection, got {field.name}")
    found: list[Exposure] = []
    first: Any = None
    for row in rows:
        frame = _read_quietly(Path(row["file"]), layout)
        stars = detect_stars(frame, config.max_stars, config.detection_threshold)
        if first is None:
            first = frame, stars
        try:
            registration = _registration(config, first, (frame, stars))
        except FrameError as error:
            log.warning("%s: no stars injected: %s", row["file"], error.reason)
            continue
        corners = registration.apply(field.region.corners)
        low, high = np.floor(corners.min(axis=0)).astype(int), np.ceil(corners.max(axis=0)).astype(int)
        region = Region(int(low[0]), int(low[1]), (int(high[1] - low[1]) + 1, int(high[0] - low[0]) + 1))
        part, fwhm = cut(frame, region), frame_quality(frame, stars).fwhm
        xy = region.to_cutout(np.column_stack([stars["x"], stars["y"]]))
        sky = sky_and_noise(part.data, part.mask != 0)
        psf = empirical_psf(part.data - sky[0], part.variance, part.mask, xy[region.contains(region.to_frame(xy))],
                            fwhm if math.isfinite(fwhm) else 4.0)
        noise = float(sky[1].mean()) / math.sqrt((psf.stamp**2).sum()) / row["scale"]
        found.append(Exposure(Path(row["file"]), row["name"], float(row["mjd"]), float(row["scale"]), not found,
                              registration, psf, region, frame.shape, frame.gain, noise))
    order = np.argsort([one.mjd for one in found], kind="stable")
    return [found[i] for i in order]


def _registration(config: RunConfig, first: tuple[Frame, Table], other: tuple[Frame, Table]) -> Registration:
    """Registration of a frame with the reference, each with its stars."""
    if not config.align or first[0] is other[0]:
        return identity_registration()
    return register(first[1], other[1], first[0].wcs, other[0].wcs, max_rms=config.max_rms,
                    min_matches=config.min_matches)


def _read_quietly(path: Path, layout: FrameLayout) -> Frame:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # the run has said them
        return read_frame(path, layout)


def _truth(exposures: Sequence[Exposure], places: Float, injection: Injection,
           rng: np.random.Generator) -> dict[str, Float]:
    """Amplitudes (S,), flux on the reference (S,), and the light in every frame (E, S), ADU of the frame."""
    noise = [one.flux_noise for one in exposures if not one.is_reference]
    on_reference = next(one.flux_noise for one in exposures if one.is_reference)
    typical = math.hypot(float(np.median(noise)), on_reference)
    low, high = injection.flux or (_LEAST_SNR * typical, _MOST_SNR * typical)
    amplitude = np.exp(rng.uniform(math.log(low), math.log(high), len(places)))
    flux = _CURVES[injection.shape](_phases(exposures), amplitude, rng)
    reference = [one.is_reference for one in exposures].index(True)
    if injection.shape in ("constant", "step"):
        fades = rng.permutation(len(places)) < len(places) // 2
        flux[:, fades] = amplitude[fades] - flux[:, fades]
        flux[reference] = np.where(fades, amplitude, 0.0)
    scales = np.array([one.scale for one in exposures])
    return {"amplitude": amplitude, "baseline": flux[reference].copy(), "light": flux * scales[:, None]}


def _phases(exposures: Sequence[Exposure]) -> Float:
    """Times from 0 to 1 over the series; numbers of the frames where no times are known, or all are the same."""
    mjd = np.array([one.mjd for one in exposures])
    if not np.isfinite(mjd).all() or np.ptp(mjd) == 0:
        mjd = np.arange(len(mjd), dtype=float)
    return (mjd - mjd.min()) / max(float(np.ptp(mjd)), 1e-12)


def _constant(phase: Float, amplitude: Float, _: np.random.Generator) -> Float:
    return np.tile(amplitude, (len(phase), 1))


def _step(phase: Float, amplitude: Float, _: np.random.Generator) -> Float:
    return np.where(phase[:, None] >= np.median(phase), amplitude, 0.0)


def _sine(phase: Float, amplitude: Float, rng: np.random.Generator) -> Float:
    turns, start = rng.uniform(1, 5, len(amplitude)), rng.uniform(0, 1, len(amplitude))
    return amplitude * (1 + np.sin(2 * np.pi * (turns * phase[:, None] + start)))


def _paczynski(phase: Float, amplitude: Float, rng: np.random.Generator) -> Float:
    t0, t_e, u0 = (rng.uniform(*limits, len(amplitude)) for limits in ((0.2, 0.8), (0.1, 0.4), (0.1, 0.5)))
    rise = np.array([magnification(phase, *event) for event in zip(t0, t_e, u0, strict=True)]).T - 1
    peak = np.array([float(magnification(0.0, 0.0, 1.0, u)) - 1 for u in u0])
    return amplitude / peak * (1 + rise)


_CURVES: dict[str, Callable[[Float, Float, np.random.Generator], Float]] = {
    "constant": _constant, "step": _step, "sine": _sine, "paczynski": _paczynski}


def _write(one: Exposure, places: Float, light: Float, config: RunConfig, folder: Path,
           rng: np.random.Generator) -> Path:
    """Write the copy of a frame with the stars in it."""
    shape, plane = one.shape, np.zeros(one.shape)
    where = one.registration.apply(places)
    stamps = Stamps(where, one.psf.stamp.shape[-1])
    models = light[:, None, None] * shifted_psf(one.psf_at(places), stamps.offsets)
    x, y = (np.broadcast_to(c, models.shape) for c in (
        stamps.coordinates()[0][:, None, :], stamps.coordinates()[1][:, :, None]))
    inside = (x >= 0) & (x < shape[1]) & (y >= 0) & (y < shape[0])
    np.add.at(plane, (y[inside], x[inside]), models[inside])
    gain = one.gain if math.isfinite(one.gain) and one.gain > 0 else math.nan
    if math.isfinite(gain):
        electrons = np.maximum(plane, 0.0) * gain
        plane += (rng.poisson(electrons) - electrons) / gain
    return copy_with_light(one.path, folder / f"{one.name}.fits", plane, gain, FrameLayout(**config.layout()))
