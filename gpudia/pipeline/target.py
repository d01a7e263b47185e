"""The target's light curve: measured where the light that varies is, as far as all differences together tell."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from astropy.timeseries import TimeSeries
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_scales

from gpudia.photometry import (
    CombinedFluxes,
    JointPosition,
    StarStamp,
    ZeroPoint,
    combine,
    fit_position,
    fluxes_at,
    target_table,
)
from gpudia.pipeline.looks import Look
from gpudia.pipeline.measure import EpochFluxes, Measures
from gpudia.pipeline.reference import RunReference
from gpudia.pipeline.sifting import known_barycentric

__all__ = ["place_of_target", "target_series"]

log = logging.getLogger("gpudia.pipeline")

#: A shift of the target is followed where it is that many times its error, and at least so many pixels: less changes no
#: flux by a thousandth.
_SIGMAS, _LEAST = 4.0, 0.05


def place_of_target(fluxes: Sequence[EpochFluxes], reference: RunReference) -> JointPosition | None:
    """Fit the target's place on all differences together; None without a target that varies (`fit_position`)."""
    stamps = [epoch.target for epoch in fluxes if epoch.target is not None]
    if reference.target is None or len(stamps) < len(fluxes):
        return None
    target = np.array(reference.target, float)
    return fit_position(stamps, target - np.rint(target))


def target_series(done: Sequence[Look], fluxes: Sequence[EpochFluxes], reference: RunReference, measures: Measures,
                  zero_point: ZeroPoint, best: str, found: JointPosition | None) -> TimeSeries:
    """Make the light curve of the target, with the columns of the measure `best` as the recommended ones.

    `found` is the `place_of_target`.
    """
    curves = {method: CombinedFluxes(*(
        np.array([getattr(epoch.fluxes[method], name)[-1] for epoch in fluxes])
        for name in CombinedFluxes._fields)) for method in measures.flux}
    target, note = np.array(reference.target, float), reference.target_note
    pixel = np.rint(target)
    if found is not None and _significant(found, target - pixel):
        stamps = [epoch.target for epoch in fluxes if epoch.target is not None]
        curves = _moved(curves, fluxes, stamps, measures, target - pixel, found.offset)
        shift = found.offset - (target - pixel)
        note += f"; moved by ({shift[0]:.2f}, {shift[1]:.2f}) px to where the light varies"
        log.info("target: %s", note)
        target = pixel + found.offset
    series = target_table(
        [look.mjd for look in done], [look.name for look in done], curves, best, flux_ref=measures.flux[best][-1],
        scale=[epoch.scale[-1] for epoch in fluxes], scale_err=[epoch.scale_error for epoch in fluxes],
        flags=[epoch.flags[best][-1] for epoch in fluxes], zero_point=zero_point, bjd_tdb=known_barycentric(done))
    series.meta |= _place(reference, target, found) | {
        "position": note, "reference": reference.look.name, "aperture_radius": float(measures.radius),
        "flux_ref_err": float(measures.flux_error[best][-1]), "flux_unit": "ADU of the reference"}
    return series


def _significant(found: JointPosition, offset: Any) -> bool:
    shift = np.abs(found.offset - offset)
    return bool((shift > _SIGMAS * found.error).any() and np.hypot(*shift) > _LEAST)


def _moved(curves: dict[str, CombinedFluxes], fluxes: Sequence[EpochFluxes], stamps: Sequence[StarStamp],
           measures: Measures, before: Any, after: Any) -> dict[str, CombinedFluxes]:
    """Light curves at another place: differences measured anew, errors as far as white noise changes them."""
    old, new = (fluxes_at(stamps, place, measures.radius) for place in (before, after))
    scale = np.array([epoch.scale[-1] for epoch in fluxes])
    scale_error = np.array([epoch.scale_error for epoch in fluxes])
    moved = {}
    for method, curve in curves.items():
        ratio = new[method][1] / old[method][1]
        known = np.isfinite(curve.flux_diff)
        flux = np.where(known, new[method][0], np.nan)
        found = combine(flux, curve.flux_diff_err * scale * ratio, measures.flux[method][-1], scale, scale_error)
        moved[method] = found._replace(flux_err=np.where(known, curve.flux_err * found.flux_diff_err
                                                         / curve.flux_diff_err, np.nan))
    return moved


def _place(reference: RunReference, target: Any, found: JointPosition | None) -> dict[str, Any]:
    """Where the target is: in the frame, on the sky, with the error of the joint fit where there is one."""
    x, y = reference.region.to_frame(tuple(target))
    place: dict[str, Any] = {"x": float(x), "y": float(y)}
    wcs: WCS | None = reference.cutout.wcs
    if wcs is not None:
        place |= dict(zip(("ra", "dec"), map(float, wcs.pixel_to_world_values(*target)), strict=True))
    if found is not None:
        place |= {"x_err": float(found.error[0]), "y_err": float(found.error[1]),
                  "variation_sigma": float(found.significance)}
        if wcs is not None:
            arcsec = float(np.mean(proj_plane_pixel_scales(wcs))) * 3600
            place["position_err_arcsec"] = float(np.hypot(*found.error) / np.sqrt(2) * arcsec)
    return place
