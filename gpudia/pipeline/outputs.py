"""The output folder: difference files, tables, light curves, the reference, and the result handed to Python."""

from __future__ import annotations

import logging
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.table import Table
from astropy.timeseries import TimeSeries
from astropy.wcs import WCS

from gpudia import __version__
from gpudia.backend import active_backend
from gpudia.config import RunConfig
from gpudia.flags import FRAME_FLAGS
from gpudia.images import write_hdus, write_images, write_table
from gpudia.messages import printable
from gpudia.model import DifferenceStack
from gpudia.photometry import (
    CombinedFluxes,
    LightCurves,
    constant_star_epsilon,
    model_error,
    table_hdu,
    variability,
)
from gpudia.pipeline.blank import with_sky_excess
from gpudia.pipeline.calibrate import calibrated
from gpudia.pipeline.executors import Executor
from gpudia.pipeline.looks import Look
from gpudia.pipeline.measure import EpochFluxes, Measures, recommended, separated
from gpudia.pipeline.reference import RunReference
from gpudia.pipeline.sifting import series_table
from gpudia.pipeline.target import place_of_target, target_series
from gpudia.pipeline.variables import add_variability, variables_table

__all__ = ["RunResult", "provenance", "write_difference", "write_results", "write_stack_image"]

log = logging.getLogger("gpudia.pipeline")

_NUMBERS = ("shift_x", "shift_y", "registration_rms", "registration_max", "registration_error", "n_matched", "route",
            "registration_kind", "scale", "scale_err", "epsilon", "epsilon_err", "model_error", "sky_excess", "chi2",
            "correlation", "noise_gain", "kernel_x", "kernel_y", "kernel_fwhm", "n_masked", "n_clipped", "n_pixels",
            "iterations")
_ABOUT = {
    "scale": "photometric scale, image over reference, at the centre",
    "scale_err": "1 sigma of scale: noise of image and reference in the fit (of a stack: of its best frame, which has "
                 "the unit), wings that the kernel cannot reach, and what epsilon shows beyond 2 sigma; scale_err of "
                 "light curves has the noise of the image alone",
    "epsilon": "relative error of scale that the constant stars show",
    "model_error": "what the model leaves at bright constant stars beyond the noise, as a share of their flux",
    "sky_excess": "scatter of fluxes at blank places over their errors; what is beyond 1 is in the errors of all stars",
}
#: Flags of a frame that speak against its fluxes.
DOUBTS = ("bad_chi2", "not_white", "scale_mismatch", "poor_registration", "noise_mismatch", "deconvolving")
#: Sigma up to which a scale error that the stars show is chance.
_CHANCE = 2.0
_WHOLE = ("n_matched", "n_masked", "n_clipped", "n_pixels", "iterations")


@dataclass(frozen=True, repr=False)
class RunResult:
    """What a run made; as text, and in a notebook, its `summary`.

    Attributes
    ----------
    output : Path
        The folder.
    n_ok, n_failed, n_skipped : int
        Frames by status.
    report : Path
        The HTML page.
    epochs : Table
        One row per input frame.
    target : TimeSeries or None
        Light curve of the target.
    lightcurves : LightCurves
        All stars.
    candidates : Table or None
        What the search of the differences found; None where it was not asked for.
    times : dict of str to float
        Seconds by stage, of all threads and processes together; those of an earlier run that was gone on with, too.
    wall : float
        Seconds that this run took.
    """

    output: Path
    n_ok: int
    n_failed: int
    n_skipped: int
    report: Path
    epochs: Table
    target: TimeSeries | None
    lightcurves: LightCurves
    candidates: Table | None = None
    times: dict[str, float] = field(default_factory=dict)
    wall: float = math.nan

    def __repr__(self) -> str:
        return f"RunResult in {self.output}: {self.summary()}"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.summary())}</pre>"

    def summary(self) -> str:
        """Return what a person wants to know in ten seconds."""
        total = self.n_ok + self.n_failed + self.n_skipped
        lines = [f"{self.n_ok} of {total} frames ok, {self.n_failed} failed, {self.n_skipped} skipped; "
                 f"{len(self.lightcurves.sources)} stars"]
        bad = [f"  {row['file']}: {row['reason']}" for row in self.epochs if row["status"] == "failed"]
        lines += bad[:10] + ([f"  ... and {len(bad) - 10} more"] if len(bad) > 10 else [])
        unwanted = Counter(row["reason"].split(", got ")[0] for row in self.epochs if row["status"] == "skipped")
        lines += [f"  {count} {reason}" for reason, count in unwanted.most_common()]
        lines += self._doubtful()
        if self.candidates is not None:
            lines.append(f"{len(self.candidates)} candidates, "
                         f"{int((self.candidates['flags'] == 0).sum())} of them without flags: candidates.ecsv")
        lines += self._most_of_the_time()
        return "\n".join([*lines, f"report: {self.report}"])

    def _doubtful(self) -> list[str]:
        """How many of the frames that are ok have which flag that speaks against them."""
        flags = np.asarray(self.epochs["flags"])[np.asarray(self.epochs["status"]) == "ok"]
        found = {name: int((flags & getattr(FRAME_FLAGS, name) != 0).sum()) for name in DOUBTS}
        named = [f"{count} {name}" for name, count in found.items() if count]
        return [f"  flagged among the ok: {', '.join(named)}"] if named else []

    def _most_of_the_time(self) -> list[str]:
        """Where the time went, the bottleneck first."""
        longest = sorted(self.times.items(), key=lambda stage: -stage[1])[:4]
        if not longest or not math.isfinite(self.wall):
            return []
        rest = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in longest[1:])
        return [f"{self.wall:.3g} s; most of the time went to {longest[0][0]} ({longest[0][1]:.3g} s), then {rest}"]


def provenance(backend: str, reference: str, settings: Mapping[str, Any]) -> fits.Header:
    """Cards that say which program made a file, from what and how."""
    header = fits.Header()
    header["GPUDIA"] = (__version__, "version of gpudia")
    header["BACKEND"] = (backend, "where the numbers were computed")
    for key, (value, comment) in {"REFERENC": (reference, "reference frame"), **settings}.items():
        if isinstance(value, str):
            value = _ascii(value)
            comment = comment if len(value) + len(comment) <= 60 else ""  # a card has 80 characters
        header[key] = (value if not isinstance(value, float) or math.isfinite(value) else "unknown", comment)
    return header


def _ascii(text: str) -> str:
    """Text that a FITS card can hold: printable ASCII, the end of it where it is long."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)[-60:]


def write_difference(path: Path, look: Look, stack: DifferenceStack, i: int, bits: np.ndarray,
                     reference: RunReference, more: Mapping[str, np.ndarray] | None = None) -> None:
    """Write the difference file of one epoch, with `more` planes by name."""
    config = reference.config
    cards = provenance(active_backend().name, reference.look.name, {
        "IMAGE": (look.name, "the frame"), "KSIZE": (reference.kernel_size, "[pix] side of the kernel"),
        "SDEGREE": (config.spatial_degree, "degree of the kernel over the frame"),
        "BDEGREE": (config.background_degree, "degree of the background"),
        "SCALE": (float(stack.scale[i]), "image flux over reference flux, at the centre"),
        "SCALEERR": (float(stack.scale_error[i]), "1 sigma of SCALE by noise"),
        "CHI2": (float(stack.chi2[i]), "chi^2 per degree of freedom of the fit"),
        "FLAGS": (look.flags, "bits of gpudia.flags.FRAME_FLAGS"), "MJD": (look.mjd, "[d] mid-exposure, UTC")})
    write_stack_image(path, stack, i, bits, cards, reference.cutout.wcs, more)


def write_stack_image(path: Path, stack: DifferenceStack, i: int, bits: np.ndarray, cards: fits.Header,
                      wcs: WCS | None, more: Mapping[str, np.ndarray] | None = None) -> None:
    """DIFF, MODEL, ERR, MASK, `more`, KERNEL (at the centre), BKG (coefficients), KERNELS (every polynomial term)."""
    with np.errstate(invalid="ignore"):
        error = np.sqrt(stack.variance[i])
    planes = {"DIFF": stack.difference[i], "MODEL": stack.model[i], "ERR": error, "MASK": bits, **(more or {})}
    images = {name: np.asarray(plane, np.uint8 if name == "MASK" else np.float32) for name, plane in planes.items()}
    images |= {"KERNEL": stack.kernel[i], "BKG": stack.background[i]}
    if stack.coefficients.shape[1] > 1:
        images["KERNELS"] = stack.coefficients[i]
    headers = {} if wcs is None else dict.fromkeys(planes, wcs.to_header(relax=True))
    headers["BKG"] = fits.Header()
    headers["BKG"]["COMMENT"] = "Coefficients of 1, x, y, x^2, xy, y^2, ... with x, y from -1 to 1 over the frame."
    write_images(path, cards, images, headers)


def write_results(output: Path, config: RunConfig, backend: str, looks: Sequence[Look], reference: RunReference,
                  measures: Measures, results: Mapping[str, EpochFluxes], meta: Mapping[str, Any],
                  executor: Executor) -> RunResult:
    """Put the epochs together: tables, light curves, reference and report; `meta` goes with the table of epochs."""
    done = [look for look in looks if look.name in results and not look.reason]
    fluxes = separated(measures, [results[look.name] for look in done])
    best = recommended(measures, fluxes)
    with ThreadPoolExecutor(1) as beside:  # the other core is idle
        place = beside.submit(place_of_target, fluxes, reference)
        fluxes = _judged(done, fluxes, measures, best, config.max_epsilon)
    epochs = epoch_table(looks)
    curves, doubt = calibrated(_light_curves(done, fluxes, reference, measures, epochs, best), config, reference.look)
    doubts = _doubts(done, fluxes, reference, measures, best) + ([doubt] if doubt else [])
    for text in doubts:
        log.warning("%s", text)
    for key, value in (("OBJECT", reference.cutout.header.get("OBJECT", "")), ("BACKEND", backend),
                       ("REFERENC", reference.look.name), ("GPUDIA", __version__), *_versions()):
        epochs.meta[key] = printable(value)
    epochs.meta |= dict(meta) | ({"doubts": doubts} if doubts else {})
    write_table(epochs, output / "epochs.ecsv")
    curves.write(output / "lightcurves.fits", overwrite=True)
    write_table(variables_table(curves.sources), output / "variables.ecsv")
    target = None
    if reference.target is not None and done:
        target = target_series(done, fluxes, reference, measures, curves.zero_point, best, place.result())
        target.meta |= {"doubts": doubts} if doubts else {}
        write_table(target, output / "target.ecsv")
    write_hdus(_reference_hdus(backend, reference, measures, curves), output / "reference.fits")
    from gpudia.report import write_report  # processes that read and solve start without

    report = write_report(output, executor.map)
    n_failed, n_skipped = (sum(look.status == status for look in looks) for status in ("failed", "skipped"))
    return RunResult(output, len(done), n_failed, n_skipped, report, epochs, target, curves)


def _versions() -> list[tuple[str, str]]:
    """What else the numbers depend on: Python and the libraries that compute them."""
    packages = [(name.upper(), metadata.version(name)) for name in ("numpy", "scipy", "astropy", "photutils")]
    return [("PYTHON", platform.python_version()), *packages]


def _doubts(done: Sequence[Look], fluxes: Sequence[EpochFluxes], reference: RunReference,
            measures: Measures, best: str) -> list[str]:
    """What speaks against the reference: images sharper than it, no PSF of its own, a target that varies in a stack."""
    doubts = []
    if measures.psf.method == "assumed":
        doubts.append("no star of the reference was fit to make a PSF of: a profile of its FWHM is assumed, and PSF "
                      "fluxes and aperture corrections may be wrong by a factor common to all epochs")
    sharper = [look for look in done if look.flags & FRAME_FLAGS.deconvolving and look.name not in reference.weights]
    if 4 * len(sharper) > len(done):
        doubts.append(f"{len(sharper)} of {len(done)} frames are sharper than the reference, whose noise is amplified "
                      "in them; take a sharper one with --reference FILE, or fewer frames with --stack-size")
    members = [epoch.fluxes[best] for look, epoch in zip(done, fluxes, strict=True)
               if look.name in reference.weights]
    if reference.target is not None and len(members) > 2:
        spread = variability(*(np.array([getattr(m, name)[-1:] for m in members], float)
                               for name in ("flux_diff", "flux_diff_err")))
        if float(spread.chi2[0]) > 1 + 5 * math.sqrt(2 / (len(members) - 1)):
            doubts.append(f"the target varies among the {len(members)} frames of the stack (chi^2 per degree of "
                          f"freedom {float(spread.chi2[0]):.1f}): differences are right, its flux on the reference is "
                          "a mean")
    return doubts


def _judged(done: Sequence[Look], fluxes: Sequence[EpochFluxes], measures: Measures, best: str,
            limit: float) -> list[EpochFluxes]:
    """Add the sky's scatter, check the scales, then add the model's error, which has what the scales are off by in it.

    In this order: the model's error would hide that of the scales.
    """
    fluxes = with_sky_excess(done, fluxes, best)
    _check_scales(done, fluxes, measures, best, limit)
    return _with_model_error(done, fluxes, ~measures.varying, best)


def _with_model_error(done: Sequence[Look], fluxes: Sequence[EpochFluxes], constant: np.ndarray,
                      best: str) -> list[EpochFluxes]:
    """Add to the errors what the model leaves at bright stars beyond the noise, by epoch; note that of `best`.

    What is known to vary is not looked at: of 150 variables put into a sparse field medians took the variation for the
    model's error.
    """
    def share(method: str) -> np.ndarray:
        delta, error, total, _ = (_stacked(fluxes, method, name, len(constant)) for name in CombinedFluxes._fields)
        flags = np.array([epoch.flags[method] for epoch in fluxes])
        return model_error(delta, error, total, (flags == 0) & constant)

    methods = list(fluxes[0].fluxes) if fluxes else []
    shares = dict(zip(methods, active_backend().run_all(share, methods), strict=True))
    result = []
    for i, (look, epoch) in enumerate(zip(done, fluxes, strict=True)):
        look.numbers["model_error"] = float(shares[best][i])
        widened = {}
        for method, one in epoch.fluxes.items():
            # a star without a flux on the reference keeps the error of its difference
            more = shares[method][i] * np.where(np.isfinite(one.flux), one.flux, np.nan_to_num(one.flux_diff))
            widened[method] = one._replace(flux_diff_err=np.hypot(one.flux_diff_err, more),
                                           flux_err=np.hypot(one.flux_err, more))
        result.append(replace(epoch, fluxes=widened))
    return result


def _check_scales(done: Sequence[Look], fluxes: Sequence[EpochFluxes], measures: Measures, method: str,
                  limit: float) -> None:
    """Measure each epoch's scale error from the stars, one entry of each, not what varies; flag what is beyond it.

    What the stars show beyond 2 sigma is an error of the scale that the fit does not know of: it goes into the stated
    one. (It is not put right: epsilon of the stars is one number, the error may be another at the target.)
    """
    count = len(measures.first)
    each = (measures.first == np.arange(count)) & ~measures.varying
    delta, sigma = (_stacked(fluxes, method, name, count) for name in ("flux_diff", "flux_diff_err"))
    good = each & (np.array([epoch.flags[method] for epoch in fluxes]).reshape(delta.shape) == 0)
    found = constant_star_epsilon(delta, sigma, measures.flux[method], good)
    for look, epsilon, error in zip(done, found.epsilon.tolist(), found.error.tolist(), strict=True):
        look.numbers["epsilon"], look.numbers["epsilon_err"] = epsilon, error
        total = math.hypot(error, look.numbers["scale_err"] / look.numbers["scale"])
        if abs(epsilon) > max(3 * total, limit):
            look.flags |= FRAME_FLAGS.scale_mismatch
        beyond = max(0.0, epsilon**2 - (_CHANCE * error) ** 2)  # NaN is none
        look.numbers["scale_err"] = math.hypot(look.numbers["scale_err"], look.numbers["scale"] * math.sqrt(beyond))


def epoch_table(looks: Sequence[Look]) -> Table:
    """Return ``epochs.ecsv``: one row for each input frame, the series table and what came of the frame."""
    table = series_table(looks)
    flags = np.array([look.flags for look in looks], dtype=np.int64)
    table.add_columns([[look.status for look in looks], [look.reason for look in looks], flags],
                      names=["status", "reason", "flags"], indexes=[table.index_column("exptime")] * 3)
    for name in _NUMBERS:
        missing: Any = "" if name in ("route", "registration_kind") else -1 if name in _WHOLE else math.nan
        table[name] = [look.numbers.get(name, missing) for look in looks]
    table["seconds"] = [round(look.seconds, 3) for look in looks]
    table["status"].description = "ok, failed, or skipped (not selected)"
    table["flags"].description = "bits of gpudia.flags.FRAME_FLAGS"
    for name, about in _ABOUT.items():
        table[name].description = about
    for name, unit in (("shift_x", "pix"), ("shift_y", "pix"), ("registration_rms", "pix"), ("registration_max", "pix"),
                       ("registration_error", "pix"), ("kernel_x", "pix"), ("kernel_y", "pix"), ("kernel_fwhm", "pix"),
                       ("seconds", "s")):
        table[name].unit = unit
    return table


def _stacked(fluxes: Sequence[EpochFluxes], method: str, name: str, count: int) -> np.ndarray:
    return np.array([getattr(epoch.fluxes[method], name)[:count] for epoch in fluxes]).reshape(len(fluxes), count)


def _light_curves(done: Sequence[Look], fluxes: Sequence[EpochFluxes], reference: RunReference, measures: Measures,
                  epochs: Table, best: str) -> LightCurves:
    n = len(reference.stars)
    planes: dict[str, np.ndarray] = {}
    for suffix, method in (("", best), *((f"_{name.upper()}", name) for name in measures.flux)):
        for name in ("flux_diff", "flux_diff_err", "flux", "flux_err"):
            planes[name.upper() + suffix] = _stacked(fluxes, method, name, n).astype(np.float32)
        flags = np.array([epoch.flags[method][:n] for epoch in fluxes], dtype=np.int32)
        planes["FLAGS" + suffix] = flags.reshape(len(fluxes), n)
    sources = reference.stars.copy()
    sources["flux_ref"], sources["flux_ref_err"] = measures.flux[best][:n], measures.flux_error[best][:n]
    sources["flags"] = (np.asarray(sources["flags"]) | measures.flags[best][:n]).astype(np.int32)
    ok = np.isin(epochs["name"], [look.name for look in done])
    epochs = Table(epochs[ok], meta={})
    add_variability(sources, epochs, planes, measures.radius)
    return LightCurves(sources, epochs, planes)


def _member_cards(reference: RunReference) -> dict[str, tuple[Any, str]]:
    weights = reference.weights or {reference.look.name: 1.0}
    cards: dict[str, tuple[Any, str]] = {"NCOMBINE": (len(weights), "frames in the reference")}
    for k, (name, weight) in enumerate(weights.items()):
        cards |= {f"FRAME{k:03d}": (name, "frame in it"), f"WEIGH{k:03d}": (weight, "weight of that frame")}
    return cards


def _reference_hdus(backend: str, reference: RunReference, measures: Measures,
                    curves: LightCurves) -> fits.HDUList:
    cutout = reference.cutout
    cards = provenance(backend, reference.look.name, {
        "OBJECT": (str(cutout.header.get("OBJECT", "")), "from the reference frame"),
        "X0": (reference.region.x0, "[pix] first column in the frame, 0-based"),
        "Y0": (reference.region.y0, "[pix] first row in the frame, 0-based"),
        "MJD": (cutout.mjd, "[d] mid-exposure, UTC"), "FWHM": (float(reference.look.quality.fwhm), "[pix]"),
        "APRADIUS": (float(measures.radius), "[pix] aperture"), "PSFKIND": (measures.psf.method, "how PSF was made"),
        "PSFSTARS": (measures.psf.n_stars, "stars that PSF was made of"),
        "SCALEBIA": (reference.scale_bias if math.isfinite(reference.scale_bias) else None,
                     "expected bias of scales, by its noise"),
        **_member_cards(reference), **curves.zero_point.cards()})
    wcs = None if cutout.wcs is None else cutout.wcs.to_header(relax=True)
    hdus = fits.HDUList([fits.PrimaryHDU(header=cards)])
    for name, plane in (("IMAGE", cutout.data.astype(np.float32)), ("ERR", np.sqrt(cutout.variance).astype(np.float32)),
                        ("MASK", cutout.mask)):
        hdus.append(fits.ImageHDU(plane, header=wcs, name=name))
    hdus.append(table_hdu(curves.sources, "CATALOG"))
    hdus.append(fits.ImageHDU(measures.psf.stamp, name="PSF"))
    if measures.psf.varies:
        terms = fits.ImageHDU(measures.psf.terms, name="PSF_TERMS")
        terms.header["COMMENT"] = "PSF = plane 1 + u * plane 2 + v * plane 3; u, v from -1 to 1 over columns, rows."
        hdus.append(terms)
    return hdus
