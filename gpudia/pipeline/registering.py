"""The frames together: which of them is the reference, and the registration of the others with it."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from astropy.table import Table

from gpudia.config import RunConfig
from gpudia.errors import ConfigError, FrameError
from gpudia.images import Registration, check_series, identity_registration, rank_references, register
from gpudia.pipeline.looks import FrameStore, Look, frame_errors, take_look

__all__ = ["check_all", "choose_reference", "rank_looks", "register_looks"]

log = logging.getLogger("gpudia.pipeline")

#: FWHM of a reference over that of the sharpest frame, at most.
_BLUNTEST = 1.15
#: Frames whose stars are matched to compare their transparency: a matching takes as long as a registration.
_MATCHED = 64
#: Places among the brightest stars whose fluxes say roughly how transparent the sky was: the very first may vary, or be
#: saturated.
_BRIGHT = slice(5, 30)


def choose_reference(looks: Sequence[Look], config: RunConfig, store: FrameStore) -> Look:
    """Return the look of the reference: the file that the settings name, or the frame with the least noise.

    Of the sharp frames (FWHM at most 15 % above the best: a kernel can blur a reference, but not sharpen it) those are
    ranked by the expected noise of a PSF flux, sky noise times FWHM over transparency, with the transparency from stars
    matched with the best of them; a frame that has only a share s of the region counts as 1/s^2 noisier.

    Raises
    ------
    ConfigError
        If the file that was asked for cannot serve.
    FrameError
        If no frame can.
    """
    if config.reference not in ("auto", "stack"):
        return _named_reference(looks, config, store)
    return rank_looks(looks, config)[0]


def rank_looks(looks: Sequence[Look], config: RunConfig) -> list[Look]:
    """Sharp frames, the best reference first; see `choose_reference`.

    Of more than 64, stars are matched on those that come first by the fluxes of their brightest stars, whichever these
    are; the others follow in that order.

    Raises
    ------
    FrameError
        If none can serve.
    """
    usable = [look for look in looks if not look.reason and look.quality is not None]
    if not usable:
        raise FrameError("no frame is usable: " + "; ".join(f"{look.path.name}: {look.reason}" for look in looks[:5]))
    usable = _sharp_enough(_of_one_grid(usable))
    if all(look.usable_share == 0 for look in usable):
        raise FrameError("target must lie on a frame with a celestial WCS, got none such; run without --ra and --dec "
                         "for whole frames, or check the coordinates and the WCS")
    qualities = [look.quality for look in usable]
    best = usable[int(rank_references(qualities, [look.usable_share**2 for look in usable])[0])]
    if len(usable) > _MATCHED:
        usable = _ranked(usable, [_rough_flux_ratio(best, look) for look in usable])
    first, rest = usable[:_MATCHED], usable[_MATCHED:]
    return _ranked(first, [_flux_ratio(best, look, config) for look in first]) + rest


def _ranked(looks: Sequence[Look], flux_ratios: Sequence[float]) -> list[Look]:
    worth = [ratio * look.usable_share**2 for ratio, look in zip(flux_ratios, looks, strict=True)]
    return [looks[int(i)] for i in rank_references([look.quality for look in looks if look.quality], worth)]


def _of_one_grid(looks: list[Look]) -> list[Look]:
    """Frames with the pixel scale that most have, within 5 %; those without a WCS only where no frame has one.

    FWHM and noise are compared in pixels: a frame that was binned would win, and lose what the others resolve.
    """
    scales = {look.name: look.pixel_scale for look in looks if math.isfinite(look.pixel_scale)}
    if not scales:
        return looks
    middle = float(np.median(list(scales.values())))
    usual = min(scales.values(), key=lambda scale: abs(scale - middle))
    return [look for look in looks if look.name in scales and abs(scales[look.name] / usual - 1) < 0.05]


def _sharp_enough(looks: Sequence[Look]) -> list[Look]:
    most = max(look.usable_share for look in looks)
    whole = [look for look in looks if look.usable_share > 0.5 * most]
    widths = [look.quality.fwhm for look in whole if look.quality is not None and math.isfinite(look.quality.fwhm)]
    if not widths:
        return list(looks)
    return [look for look in whole if look.quality is not None and look.quality.fwhm <= _BLUNTEST * min(widths)]


def _named_reference(looks: Sequence[Look], config: RunConfig, store: FrameStore) -> Look:
    path = Path(os.path.expanduser(config.reference))
    for look in looks:
        if os.path.realpath(look.path) == os.path.realpath(path):
            break
    else:
        look = take_look(path, path.name, store, config)
    if look.reason and not look.skipped:  # one that was not selected can serve, when it is named
        raise ConfigError(f"reference must be a usable frame, got {path}: {look.reason}")
    return look


def _rough_flux_ratio(one: Look, other: Look) -> float:
    """Median ratio of the fluxes of the brightest stars, place by place; 1 where there are few."""
    fluxes = [-np.sort(-np.asarray(look.stars["flux"])[np.asarray(look.stars["flags"]) == 0])[_BRIGHT]
              for look in (one, other)]
    n = min(map(len, fluxes))
    return float(np.median(fluxes[1][:n] / fluxes[0][:n])) if n else 1.0


def _flux_ratio(one: Look, other: Look, config: RunConfig) -> float:
    """Median flux of matched stars on `other` over that on `one`; 1 where the frames cannot be matched."""
    if other is one:
        return 1.0
    try:
        found = register(one.stars, other.stars, one.wcs, other.wcs, max_rms=config.max_rms,
                         min_matches=config.min_matches)
    except FrameError:
        return 1.0
    moved = found.apply(np.column_stack([one.stars["x"], one.stars["y"]]))
    there = np.column_stack([other.stars["x"], other.stars["y"]])
    from scipy.spatial import cKDTree

    distance, index = cKDTree(there).query(moved, distance_upper_bound=1.5)
    matched = np.isfinite(distance) & (np.asarray(one.stars["flags"]) == 0)
    if matched.sum() < 3:
        return 1.0
    ratio = float(np.median(np.asarray(other.stars["flux"])[index[matched]] / np.asarray(one.stars["flux"])[matched]))
    return ratio if math.isfinite(ratio) and ratio > 0 else 1.0


def check_all(looks: Sequence[Look], reference: Look, config: RunConfig) -> None:
    """Fail the looks whose filter, or shape where nothing is aligned, is not the reference's."""
    same = () if "filter" in config.mixed else ("filter",)
    for index, error in check_series(looks, reference, shapes=not config.align, same=same).items():
        if not looks[index].reason:
            looks[index].fail(error)


def register_looks(looks: Iterable[Look], reference: Look, config: RunConfig) -> None:
    """Register every usable look with the reference; one that cannot be is a failed row."""
    for look in looks:
        if look.reason:
            continue
        start = time.perf_counter()
        if not config.align or look.path == reference.path:
            look.registration = identity_registration()
        else:
            try:
                with frame_errors(look.path):
                    look.registration = _register(reference, look, config)
            except FrameError as error:
                look.fail(error)
        look.seconds += time.perf_counter() - start


def _register(reference: Look, look: Look, config: RunConfig) -> Registration:
    """Ids of the frames' own catalogs first; else the stars that were detected, by sky, offset and pattern."""
    options = {"max_rms": config.max_rms, "min_matches": config.min_matches}
    if _has_ids(reference.catalog) and _has_ids(look.catalog):
        try:
            return register(reference.catalog, look.catalog, reference.wcs, look.wcs, routes=("id",), **options)
        except FrameError as error:
            log.info("%s: ids of the catalogs do not register it (%s); going on with detected stars", look.path, error)
    return register(reference.stars, look.stars, reference.wcs, look.wcs, **options)


def _has_ids(catalog: Table | None) -> bool:
    return catalog is not None and catalog.meta.get("ids") == "catalog"
