"""The search of every difference for what varies, and the list of candidates that its epochs add up to."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from astropy import units as u
from astropy.table import Table
from astropy.wcs.utils import proj_plane_pixel_scales
from numpy.typing import NDArray

from gpudia.backend import to_device, to_host
from gpudia.flags import CANDIDATE_FLAGS, PIXEL_FLAGS
from gpudia.images import write_table
from gpudia.model import DifferenceStack, Score, decorrelate, score_image
from gpudia.photometry import DETECTION_COLUMNS, KnownStars, associate, detect_peaks, epoch_psf
from gpudia.pipeline.blank import sky_scatter
from gpudia.pipeline.looks import Look
from gpudia.pipeline.measure import EpochFluxes, Measures
from gpudia.pipeline.reference import RunReference

__all__ = ["Detections", "detect_epoch", "write_candidates"]

log = logging.getLogger("gpudia.pipeline")

#: Columns of `DETECTION_COLUMNS` as plain arrays, one row a detection; fluxes in ADU of the reference.
Detections = dict[str, NDArray]

#: FWHM that is taken where a frame's own is not known, pixels.
_FWHM = 4.0
#: Detections of an epoch that are kept; more means that something is wrong with it.
_MOST = 2000


def detect_epoch(look: Look, stack: DifferenceStack, i: int, bits: NDArray[np.uint8], measures: Measures,
                 noise_ratio: NDArray | None, reference: RunReference,
                 threshold: float) -> tuple[Detections, dict[str, NDArray]]:
    """Search image `i` of a stack (host side): its detections, and the planes DECORR and SCORE.

    The reference's own difference is nothing but zeros: no detections.
    """
    backend, scale = reference.plan.backend, float(stack.scale[i])
    bits = bits | stack.flags[i]
    own = stack.image_variance[i] if noise_ratio is None else stack.image_variance[i] * noise_ratio
    difference, own, psf, kernel, other = (to_device(plane, backend, float) for plane in (
        stack.difference[i], own, measures.psf.stamp, stack.coefficients[i], measures.reference_variance))
    mask = to_device((bits & (255 - PIXEL_FLAGS.clipped)) != 0, backend)
    shared = reference.weights.get(look.name, 0.0) / scale
    score = Score(*map(to_host, score_image(difference, own, psf, kernel, other, mask=mask, shared=shared)))
    white = to_host(decorrelate(difference, own, kernel, other, mask=mask).difference)
    n = len(reference.stars)
    bits = bits | (reference.cutout.mask & np.uint8(PIXEL_FLAGS.saturated))  # to know what lies near such stars
    table = detect_peaks(
        score, stack.difference[i], stack.variance[i], bits, epoch_psf(measures.psf.stamp, stack.kernel[i]),
        look.fwhm if math.isfinite(look.fwhm) else _FWHM,
        KnownStars(measures.positions[:n], measures.flux["psf"][:n] * scale), threshold)
    if reference.is_made_of(look):
        table = table[:0]
    if len(table) > _MOST:
        log.warning("%s: %d detections; the %d most significant are kept", look.path, len(table), _MOST)
    found = {name: np.asarray(table[name])[:_MOST] for name in table.colnames}
    found["flux_diff"], found["flux_diff_err"] = found["flux_diff"] / scale, found["flux_diff_err"] / scale
    return found, {"DECORR": white, "SCORE": score.score}


def write_candidates(output: Path, looks: Sequence[Look], reference: RunReference,
                     detections: Mapping[str, Detections], fluxes: Mapping[str, EpochFluxes]) -> Table:
    """Write ``detections.ecsv``, and ``candidates.ecsv`` which has one row for each place on the sky; return that.

    Errors and scores count what the sky of an epoch scatters by beyond its noise, at the blank places of `fluxes`; what
    is not significant then is left out.
    """
    done = [look for look in looks if look.name in detections and not look.reason]
    found = _judged(_joined(done, detections), done, fluxes, reference.config.detect)
    fwhm = [look.fwhm for look in done if math.isfinite(look.fwhm)] or [_FWHM]
    tolerance = max(float(np.median(fwhm)) / 2, 1.0)
    places = associate(np.column_stack([found["x"], found["y"]]), np.asarray(found["score"]), tolerance)
    found.add_column(places.astype(np.int32) + 1, index=0, name="candidate")
    found["candidate"].description = "id in candidates.ecsv"
    rows = [_candidate(found[places == k]) for k in range(places.max(initial=-1) + 1)]
    names = ("id", "x", "y", "n_epochs", "n_positive", "n_negative", "first_mjd", "last_mjd", "score", "image",
             "flux_diff", "flux_diff_err", "fwhm", "ellipticity", "sharpness", "source_id", "distance", "flags")
    kinds = (int, float, float, int, int, int, float, float, float, str, *[float] * 5, np.int64, float, np.int32)
    table = Table(rows=rows or None, names=names, dtype=kinds)
    table["image"] = table["image"].astype(str)
    _finish(table, reference)
    found["x"], found["y"] = reference.region.to_frame(np.column_stack([found["x"], found["y"]])).T
    for one in (found, table):
        one.meta["reference"], one.meta["flags"] = reference.look.name, "bits of gpudia.flags.CANDIDATE_FLAGS"
        one.meta["origin"] = list(reference.region.origin)
    write_table(found, output / "detections.ecsv")
    write_table(table, output / "candidates.ecsv")
    return table


def _joined(done: Sequence[Look], detections: Mapping[str, Detections]) -> Table:
    """All detections of all epochs in one table."""
    table = Table()
    counts = [len(detections[look.name]["x"]) for look in done]
    table["image"] = np.repeat(np.array([look.name for look in done], dtype=str), counts)
    table["mjd"] = np.repeat(np.array([look.mjd for look in done], dtype=float), counts)
    for name, unit, about in DETECTION_COLUMNS:
        parts = [detections[look.name][name] for look in done]
        table[name] = np.concatenate(parts) if parts else np.empty(0)
        table[name].unit, table[name].description = unit or None, about
    for name in ("x", "y"):
        table[name].description = "0-based, in the reference frame"
    return table


def _judged(found: Table, done: Sequence[Look], fluxes: Mapping[str, EpochFluxes], threshold: float) -> Table:
    """Those that are significant with what the sky scatters by in their errors."""
    size = dict(zip([look.name for look in done], sky_scatter([fluxes[look.name] for look in done], "psf")[1],
                    strict=True)) if done else {}
    stated = np.asarray(found["flux_diff_err"], float)
    error = np.hypot(stated, np.array([size[name] for name in found["image"]], float))
    found["score"], found["flux_diff_err"] = found["score"] * (stated / error), error
    return found[np.abs(found["score"]) >= threshold]


def _candidate(found: Table) -> tuple:
    """One row: the mean position, the numbers of the most significant detection, the flags that half of them have."""
    score, mjd = np.asarray(found["score"]), np.asarray(found["mjd"])
    mjd = mjd[np.isfinite(mjd)]
    best = found[int(np.argmax(np.abs(score)))]
    x, y = (float(np.average(found[name], weights=score**2)) for name in ("x", "y"))
    flags = np.asarray(found["flags"])
    common = sum(flag.value for flag in CANDIDATE_FLAGS if 2 * ((flags & flag.value) != 0).sum() >= len(found))
    n = len(set(found["image"]))
    common |= CANDIDATE_FLAGS.one_epoch if n == 1 else 0
    return (int(best["candidate"]), x, y, n, int((score > 0).sum()), int((score < 0).sum()),
            mjd.min() if len(mjd) else math.nan, mjd.max() if len(mjd) else math.nan, best["score"], best["image"],
            best["flux_diff"], best["flux_diff_err"], best["fwhm"], best["ellipticity"], best["sharpness"],
            int(best["star"]), best["distance"], common)


def _finish(table: Table, reference: RunReference) -> None:
    """Sky positions, ids of the nearest stars, positions in the frame, units and descriptions."""
    xy, wcs = np.column_stack([table["x"], table["y"]]).reshape(-1, 2), reference.cutout.wcs
    sky = np.full((2, len(table)), np.nan)
    if wcs is not None and len(table):
        place = wcs.pixel_to_world(*xy.T).icrs
        sky = np.array([place.ra.deg, place.dec.deg])
        table["distance_arcsec"] = table["distance"] * float(np.mean(proj_plane_pixel_scales(wcs))) * 3600
    table.add_columns(list(sky), names=["ra", "dec"], indexes=[1, 1])
    row = np.asarray(table["source_id"], dtype=int)
    ids = np.asarray(reference.stars["source_id"])
    table["source_id"] = np.where(row >= 0, ids[row], -1) if len(ids) else np.full(len(table), -1)
    table["x"], table["y"] = reference.region.to_frame(xy).T
    table["thumbnail"] = np.array([f"candidates/{k}.png" for k in table["id"]], dtype=str)
    about = {"x": "0-based, in the reference frame", "y": "0-based, in the reference frame",
             "n_epochs": "with a detection", "score": "of the most significant detection, sigma", "image": "its image",
             "flux_diff": "ADU of the reference, in that image", "source_id": "nearest star of the reference, -1: none",
             "distance": "to it", "flags": "bits of gpudia.flags.CANDIDATE_FLAGS that half of its detections have",
             "first_mjd": "of its detections", "thumbnail": "reference, image, difference, where products are written"}
    for name, text in about.items():
        table[name].description = text
    for name, unit in (("ra", u.deg), ("dec", u.deg), ("x", u.pix), ("y", u.pix), ("distance", u.pix),
                       ("fwhm", u.pix), ("first_mjd", u.day), ("last_mjd", u.day)):
        table[name].unit = unit
