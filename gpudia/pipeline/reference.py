"""The reference of a run: its region, the stars to be measured, and the plan."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from astropy.table import Table
from scipy.spatial import cKDTree

from gpudia.backend import Backend, active_backend, to_device
from gpudia.config import RunConfig
from gpudia.errors import ConfigError, FrameError
from gpudia.flags import SOURCE_FLAGS
from gpudia.images import Frame, Region, cut
from gpudia.model import ReferencePlan, automatic_kernel_size, choose_degree, choose_support, count_terms
from gpudia.pipeline.looks import Look, region_of, target_position
from gpudia.pipeline.positions import with_positions
from gpudia.pipeline.prepare import PreparedBatch
from gpudia.pipeline.stages import stage

__all__ = ["RunReference", "also_varying", "carried_model", "make_reference", "provisional", "reference_of",
           "settle_model", "trial_looks", "widest_seeing"]

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
    config : RunConfig
        With the numbers of the kernel's model in place of "auto".
    support : str or (K, K) bool
        Pixels of the kernel.
    weights : dict of str to float
        Weights of the frames in a stack, by name, of sum 1; empty where the reference is one frame.
    unit_error : float
        Relative error of a stack's unit of flux, that of its best frame, by the noise of that frame; 0 for one frame.
    varying : (N, 2)
        What is kept out of the kernel fit: the target, the positions that were given, and bright stars that were found
        to vary, in the cutout.
    reach : float
        Radius around these that is kept out, pixels.
    scale_bias : float
        That of the plan, which is not built to say it; NaN until the model is settled.
    """

    look: Look
    cutout: Frame
    region: Region
    stars: Table
    target: tuple[float, float] | None
    target_note: str
    kernel_size: int
    config: RunConfig
    support: Any
    weights: dict[str, float] = field(default_factory=dict)
    unit_error: float = 0.0
    varying: np.ndarray = field(default_factory=lambda: np.empty((0, 2)))
    reach: float = 6.0
    scale_bias: float = math.nan

    def is_made_of(self, look: Look) -> bool:
        """Whether the reference is this one frame."""
        return not self.weights and look.path == self.look.path

    @cached_property
    def plan(self) -> ReferencePlan:
        """The plan on the backend in force, built when it is first asked for: in every process that solves."""
        with stage("reference"):
            return _make_plan(self, active_backend())


#: Entries of a catalog nearer to each other than this are one star, pixels.
_ONE_PLACE = 0.5
#: Bright stars in the region for every polynomial term of the kernel.
_STARS_PER_TERM = 30
_BRIGHT = 50.0
#: Highest degree tried by itself.
_MOST_DEGREE = 2
#: Radius around what varies that is kept out of the kernel fit, in units of the widest FWHM: 2 % of a star's light lie
#: further out. Where that takes more than a quarter of the pixels, in units of the reference's.
_TARGET, _MOST_OUT = 2.0, 0.25


def _most_degrees(look: Look, region: Region) -> int:
    """Highest degree of the kernel's variation that the region's stars can carry, at most 2: 30 bright ones a term.

    Each polynomial term has a whole kernel of unknowns. With few stars (above S/N 50, not saturated) these fit noise:
    on a simulated sparse field degree 1 biased the scale by 30 %, degree 0 by no more than its error.
    """
    stars = look.stars
    bright = (np.asarray(stars["flux"]) > _BRIGHT * np.asarray(stars["flux_err"]))
    bright &= (np.asarray(stars["flags"]) & SOURCE_FLAGS.saturated) == 0
    count = int((bright & region.contains(np.column_stack([stars["x"], stars["y"]]))).sum())
    carried = [degree for degree in range(1, _MOST_DEGREE + 1) if count >= _STARS_PER_TERM * count_terms(degree)]
    return max(carried, default=0)


def provisional(config: RunConfig) -> RunConfig:
    """Return the settings to begin with, while `settle_model` has not yet chosen: a constant kernel, a full circle."""
    changed = _of_degree(config, 0 if config.spatial_degree == "auto" else int(config.spatial_degree))
    return changed.replace(kernel_support="circle" if config.kernel_support == "aic" else config.kernel_support)


def _of_degree(config: RunConfig, degree: int) -> RunConfig:
    sky = max(1, degree) if config.background_degree == "auto" else config.background_degree
    return config.replace(spatial_degree=degree, background_degree=sky)


def trial_looks(looks: Sequence[Look], reference: RunReference, config: RunConfig) -> list[Look]:
    """Frames on which the model is chosen: those of narrowest, middle and widest seeing; none where it is set.

    Frames of a stack share noise with it, which a kernel of higher degree cannot lower: others tell more.
    """
    carried = config.spatial_degree == "auto" and _most_degrees(reference.look, reference.region) > 0
    if not carried and config.kernel_support != "aic":
        return []
    usable = [look for look in looks if not look.reason and look is not reference.look and look.quality is not None]
    usable = [look for look in usable if look.name not in reference.weights] or usable
    usable.sort(key=lambda look: look.fwhm)
    picked = {0, len(usable) // 2, len(usable) - 1} if usable else set()
    return [usable[i] for i in sorted(picked)]


def settle_model(reference: RunReference, config: RunConfig, trial: PreparedBatch | None) -> RunReference:
    """Choose what is "auto" or "aic" in the kernel's model from some prepared frames.

    Parameters
    ----------
    reference : RunReference
        Made with the `provisional` settings.
    config : RunConfig
        The settings as the user gave them.
    trial : PreparedBatch or None
        A few frames; None: there are none, the provisional model stays.

    Returns
    -------
    RunReference
        With that model: numbers in place of "auto" in its `config`.
    """
    first = provisional(config)
    if trial is None or (config.spatial_degree != "auto" and config.kernel_support != "aic"):
        return reference
    support: Any = first.kernel_support
    if config.kernel_support == "aic":
        square = _plan_of(reference, _of_degree(first, 0), "square")
        support = choose_support(square, trial.data, trial.error, trial.mask)
        log.info("kernel support by AIC: %d of %d pixels", support.sum(), support.size)
    if config.spatial_degree != "auto":
        return replace(reference, config=first, support=support)
    sky = config.background_degree
    choice = choose_degree(
        lambda degree: _plan_of(reference, _of_degree(first.replace(background_degree=sky), degree), support),
        trial.data, trial.error, trial.mask, degrees=range(_most_degrees(reference.look, reference.region) + 1))
    log.info("spatial degree %d (%s)", choice.degree,
             ", ".join(f"AIC falls by {gain:.0f} with degree {degree}" for degree, gain in choice.gains.items())
             or "no more than 90 bright stars")
    settled = _of_degree(first.replace(background_degree=sky), choice.degree)
    return replace(reference, config=settled, support=support)


def carried_model(reference: RunReference, config: RunConfig, most: int) -> RunConfig:
    """Return settings with the degree that is set, or the highest up to `most` that the region's stars can carry."""
    degree = config.spatial_degree
    if degree == "auto":
        degree = min(most, _most_degrees(reference.look, reference.region))
    return _of_degree(provisional(config).replace(background_degree=config.background_degree), int(degree))


def _plan_of(reference: RunReference, config: RunConfig, support: Any) -> ReferencePlan:
    """Plan of a reference under other settings."""
    return replace(reference, config=config, support=support).plan


def _make_plan(reference: RunReference, backend: Backend) -> ReferencePlan:
    cutout, config = reference.cutout, reference.config
    shape, degree = (cutout.data.shape[0], cutout.data.shape[1]), int(config.spatial_degree)
    varying = _discs(reference.varying, shape, reference.reach) if len(reference.varying) else None
    return ReferencePlan(
        to_device(cutout.data, backend), reference.kernel_size, error=to_device(np.sqrt(cutout.variance), backend),
        mask=to_device(cutout.mask != 0, backend),
        fit_mask=None if varying is None else to_device(varying, backend),
        spatial_degree=degree, background_degree=config.background_degree, support=reference.support,
        scale_degree=degree if config.scale_degree == "auto" else min(int(config.scale_degree), degree),
        smoothness=config.smoothness,
        passes=config.passes, clip=config.clip, solver=config.solver, correct_bias=config.correct_bias,
        covariance="exact" if config.solver == "direct" else "shared")


def make_reference(look: Look, frame: Frame, looks: Sequence[Look], config: RunConfig) -> RunReference:
    """Cut the reference and list its stars.

    Raises
    ------
    FrameError
        If the target is not on the frame or no pixel of the region is good.
    ConfigError
        If the kernel does not fit the region.
    """
    region = region_of(config, look)
    return reference_of(look, cut(frame, region), region, looks, config)


def reference_of(look: Look, cutout: Frame, region: Region, looks: Sequence[Look], config: RunConfig) -> RunReference:
    """Make a reference of a cutout; see `make_reference`."""
    if not (cutout.mask == 0).any():
        raise FrameError("reference must have good pixels in the region, got none", look.path)
    widths = [other.fwhm for other in looks if not other.reason and math.isfinite(other.fwhm)]
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
    found = _stars_in(look, region)
    stars = with_positions(found, config.positions, look.wcs, region)
    target, note = _target(config, look, region, stars, fwhm)
    given = stars[len(found):]
    places = [*zip(given["x_cutout"], given["y_cutout"], strict=True), *([] if target is None else [target])]
    varying = np.array(places, dtype=float).reshape(-1, 2)
    return RunReference(look, cutout, region, stars, target, note, size, config, config.kernel_support, varying=varying,
                        reach=_reach(varying, cutout.shape, fwhm, widths))


def also_varying(reference: RunReference, places: np.ndarray) -> RunReference:
    """Return the reference with further places (N, 2) that are kept out of the fit, but for those that are already."""
    if len(reference.varying) and len(places):
        places = places[cKDTree(reference.varying).query(places)[0] > 1]
    if not len(places):
        return reference
    varying = np.vstack([reference.varying, places])
    reach = _not_too_far(reference.reach, varying, reference.cutout.shape, reference.look.fwhm)
    return replace(reference, varying=varying, reach=reach)


def widest_seeing(fwhms: Sequence[float]) -> float:
    """The worst seeing, but not that of a frame out of focus."""
    return min(max(fwhms), 1.5 * float(np.median(fwhms)))


def _reach(varying: np.ndarray, shape: tuple[int, int], fwhm: float, widths: Sequence[float]) -> float:
    """Radius of what is kept out around each of `varying`, by the worst seeing."""
    fwhm = fwhm if math.isfinite(fwhm) else 3.0
    widest = max(widest_seeing(widths), fwhm) if widths else fwhm
    return _not_too_far(_TARGET * widest, varying, shape, fwhm)


def _not_too_far(reach: float, varying: np.ndarray, shape: tuple[int, int], fwhm: float) -> float:
    """Return this radius where it takes no more than a quarter of the pixels, else that of the reference's seeing."""
    share = np.pi * reach**2 * len(varying) / math.prod(shape)
    return reach if share <= _MOST_OUT else _TARGET * (fwhm if math.isfinite(fwhm) else 3.0)


def _discs(centres: np.ndarray, shape: tuple[int, int], radius: float) -> np.ndarray:
    """Pixels within `radius` of places (x, y): what varies there would pull the kernel and the sky with it."""
    mask = np.zeros(shape, bool)
    for x, y in centres:
        rows, columns = (slice(max(math.floor(c - radius), 0), max(math.ceil(c + radius) + 1, 0)) for c in (y, x))
        inside = mask[rows, columns]
        dy, dx = np.arange(inside.shape[0]) + rows.start - y, np.arange(inside.shape[1]) + columns.start - x
        inside |= dx**2 + dy[:, None] ** 2 <= radius**2
    return mask


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
    table["flags"][_duplicates(xy)] |= SOURCE_FLAGS.duplicate
    return table


def _duplicates(xy: np.ndarray) -> list[int]:
    """Rows that lie within half a pixel of an earlier one that is none of these itself."""
    found: set[int] = set()
    for first, second in sorted(cKDTree(xy).query_pairs(_ONE_PLACE)) if len(xy) else ():
        if first not in found:
            found.add(second)
    if found:
        log.warning("%d stars of the catalog within %g px of another: flagged duplicate", len(found), _ONE_PLACE)
    return sorted(found)


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
