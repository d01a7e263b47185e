"""The reference of a run: its region, the stars to be measured, and the plan."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from astropy.table import Table

from gpudia.backend import Backend, to_device
from gpudia.config import RunConfig
from gpudia.errors import ConfigError, FrameError
from gpudia.flags import SOURCE_FLAGS
from gpudia.images import Frame, Region, cut
from gpudia.model import ReferencePlan
from gpudia.pipeline.looks import Look, region_of, target_position

__all__ = ["RunReference", "automatic_degree", "automatic_kernel_size", "make_reference"]

log = logging.getLogger("gpudia.pipeline")


@dataclass(frozen=True)
class RunReference:
    """What the epochs of a run share, host side, and the plan on the device.

    Attributes
    ----------
    look : Look
    cutout : Frame
        The region of the reference frame.
    region : Region
    stars : Table
        Stars in the region: ``source_id, x, y`` (reference frame), ``x_cutout, y_cutout``, ``ra, dec``, ``flags``.
    target : (x, y) or None
        In the cutout.
    target_note : str
        Where the target's position comes from.
    kernel_size : int
    plan : ReferencePlan
    """

    look: Look
    cutout: Frame
    region: Region
    stars: Table
    target: tuple[float, float] | None
    target_note: str
    kernel_size: int
    plan: ReferencePlan


def automatic_kernel_size(fwhm: Sequence[float], reference_fwhm: float, side: int) -> int:
    """Odd kernel size for all epochs, from the seeing widths.

    Radius ceil(1.25 sqrt(|FWHM_I^2 - FWHM_R^2|)) + 4 px, between 4 and 15, for the epoch that needs the largest: wide
    enough that the scale is not biased by light of the wings left outside. At most a quarter of the region's side.
    """
    widths = np.asarray([f for f in fwhm if math.isfinite(f)])
    if not len(widths) or not math.isfinite(reference_fwhm):
        radius = 8
    else:
        largest = float(np.sqrt(np.abs(widths**2 - reference_fwhm**2)).max())
        radius = min(max(math.ceil(1.25 * largest) + 4, 4), 15)
    radius = min(radius, (side // 4 - 1) // 2)
    return 2 * max(radius, 1) + 1


#: Bright stars in the region for every polynomial term of the kernel.
_STARS_PER_TERM = 30
_BRIGHT = 50.0
#: Radius around the target that is kept out of the kernel fit, in units of the FWHM.
_TARGET = 2.0


def automatic_degree(look: Look, region: Region) -> int:
    """Degree of the kernel's variation that the region's stars can carry: 1 with 90 bright ones, else 0.

    Each polynomial term has a whole kernel of unknowns. With few stars (above S/N 50, not saturated) these fit noise:
    on a simulated sparse field degree 1 biased the scale by 30 %, degree 0 by no more than its error.
    """
    stars = look.stars
    bright = (np.asarray(stars["flux"]) > _BRIGHT * np.asarray(stars["flux_err"]))
    bright &= (np.asarray(stars["flags"]) & SOURCE_FLAGS.saturated) == 0
    inside = region.contains(np.column_stack([stars["x"], stars["y"]]))
    return int((bright & inside).sum() >= 3 * _STARS_PER_TERM)


def make_reference(look: Look, frame: Frame, looks: Sequence[Look], config: RunConfig,
                   backend: Backend) -> RunReference:
    """Cut the reference, list its stars, place it on the device and build the plan.

    Raises
    ------
    FrameError
        If the target is not on the frame or no pixel of the region is good.
    ConfigError
        If the kernel does not fit the region.
    """
    region = region_of(config, look)
    cutout = cut(frame, region)
    if not (cutout.mask == 0).any():
        raise FrameError("reference must have good pixels in the region, got none", look.path)
    widths = [other.quality.fwhm for other in looks if not other.reason and other.quality is not None]
    fwhm = look.quality.fwhm if look.quality is not None else math.nan
    size = config.kernel_size
    if size == "auto":
        size = automatic_kernel_size(widths, fwhm, min(region.shape))
        log.info("kernel size %d px (FWHM %.1f px on the reference, up to %.1f px)", size, fwhm,
                 max(widths, default=fwhm))
    size = int(size)
    if 2 * size > min(region.shape):
        raise ConfigError(f"kernel_size must be at most half the region's shorter side ({min(region.shape)} px), "
                          f"got {size}")
    stars = _stars_in(look, region)
    target, note = _target(config, look, region, stars, fwhm)
    plan = ReferencePlan(
        to_device(cutout.data, backend), size, error=to_device(np.sqrt(cutout.variance), backend),
        mask=to_device(cutout.mask != 0, backend),
        fit_mask=None if target is None else to_device(_disc(target, region.shape, _TARGET * fwhm), backend),
        spatial_degree=config.spatial_degree,
        background_degree=config.background_degree, support=config.kernel_support, passes=config.passes,
        clip=config.clip, solver=config.solver, covariance="exact" if config.solver == "direct" else "shared")
    return RunReference(look, cutout, region, stars, target, note, size, plan)


def _disc(centre: tuple[float, float], shape: tuple[int, int], radius: float) -> np.ndarray:
    """Pixels within `radius` of (x, y); the target varies, and a bright one would pull the kernel's scale with it."""
    y, x = np.ogrid[:shape[0], :shape[1]]
    return (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= (radius if math.isfinite(radius) else 6.0) ** 2


def _stars_in(look: Look, region: Region) -> Table:
    """Stars of the reference in the region: the catalog's ids where it has some, else running numbers."""
    found = look.stars
    ids = np.asarray(found["id"], dtype=np.int64)
    catalog = look.catalog
    if catalog is not None and catalog.meta.get("ids") == "catalog" and np.asarray(catalog["id"]).dtype.kind in "iu":
        found, ids = catalog, np.asarray(catalog["id"], dtype=np.int64)
    xy = np.column_stack([np.asarray(found["x"], float), np.asarray(found["y"], float)])
    inside = region.contains(xy)
    xy, table = xy[inside], Table()
    table["source_id"] = ids[inside]
    sky = "ra" in found.colnames
    for name in ("ra", "dec"):
        table[name] = np.asarray(found[name], float)[inside] if sky else np.full(len(xy), np.nan)
    table["x"], table["y"] = xy.T
    table["x_cutout"], table["y_cutout"] = region.to_cutout(xy).T
    table["flags"] = np.asarray(found["flags"])[inside] if "flags" in found.colnames else np.zeros(len(xy), np.int32)
    return table


def _target(config: RunConfig, look: Look, region: Region, stars: Table, fwhm: float) -> tuple[Any, str]:
    """Target in the cutout: the star within one FWHM of the coordinates, else the coordinates themselves."""
    position = target_position(config, look.wcs, look.path)
    if position is None:
        return None, ""
    xy = region.to_cutout(position)
    distance = np.hypot(stars["x_cutout"] - xy[0], stars["y_cutout"] - xy[1])
    limit = fwhm if math.isfinite(fwhm) else 3.0
    if len(distance) and distance.min() <= limit:
        star = stars[int(np.argmin(distance))]
        note = f"star {star['source_id']}, {distance.min():.2f} px from the coordinates"
        return (float(star["x_cutout"]), float(star["y_cutout"])), note
    return (float(xy[0]), float(xy[1])), f"coordinates (no star within {limit:.1f} px)"
