"""The first look at every frame: stars, quality and header facts; then the reference and the registrations."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from astropy.coordinates import SkyCoord
from astropy.table import Table
from astropy.wcs.utils import proj_plane_pixel_scales

from gpudia.config import RunConfig
from gpudia.errors import ConfigError, FrameError, InputError
from gpudia.images import (
    Frame,
    FrameLayout,
    FrameQuality,
    Region,
    Registration,
    catalog_of,
    check_series,
    detect_stars,
    flag_defects,
    flag_lacosmic,
    frame_quality,
    identity_registration,
    rank_references,
    read_frame,
    region_around,
    register,
    site_of,
    whole_frame,
)

__all__ = [
    "FrameStore",
    "Look",
    "choose_reference",
    "frame_errors",
    "rank_looks",
    "region_of",
    "register_all",
    "take_look",
    "target_position",
]

log = logging.getLogger("gpudia.pipeline")

#: Frames of the first look stay in memory up to this size in all; beyond it they are read again.
_KEEP_BYTES = 2 << 30
#: FWHM of a reference over that of the sharpest frame, at most.
_BLUNTEST = 1.15


@dataclass
class Look:
    """What is known of one input image: filled step by step, complete when its epoch is done.

    `reason` is empty as long as nothing went wrong; a look with a reason takes no part in what follows: it is a failed
    row, or a skipped one.
    """

    path: Path
    name: str
    stars: Table | None = None
    catalog: Table | None = None
    quality: FrameQuality | None = None
    wcs: Any = None
    shape: tuple[int, int] = (0, 0)
    mjd: float = math.nan
    bjd_tdb: float = math.nan
    exptime: float = math.nan
    filter: str = ""
    instrument: str = ""
    airmass: float = math.nan
    site: tuple[float, float, float] | None = None
    flags: int = 0
    usable_share: float = 1.0
    registration: Registration | None = None
    reason: str = ""
    skipped: bool = False
    seconds: float = 0.0
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """``ok``, ``failed`` or ``skipped``."""
        return "skipped" if self.skipped else "failed" if self.reason else "ok"

    @property
    def fwhm(self) -> float:
        """FWHM in pixels of the reference, once the frame is registered; NaN where it is not known."""
        if self.quality is None:
            return math.nan
        scale = 1.0
        if self.registration is not None:
            scale = math.sqrt(abs(float(np.linalg.det(self.registration.matrix[:, :2]))))
        return self.quality.fwhm / scale

    def skip(self, reason: str) -> None:
        """Make this a skipped row: a frame that is not wanted, which is no failure."""
        self.reason, self.skipped = reason, True

    def fail(self, error: FrameError) -> None:
        """Make this a failed row."""
        self.reason = error.reason
        log.warning("%s failed: %s", self.path, error.reason)


class FrameStore:
    """Frames by path; those of the first look are kept while there is room, others read again."""

    def __init__(self, layout: FrameLayout, lacosmic: bool = False) -> None:
        self.layout = layout
        self._lacosmic = lacosmic
        self._fwhm: dict[Path, float] = {}
        self._kept: dict[Path, Frame] = {}
        self._bytes = 0

    def read(self, path: Path) -> Frame:
        """Return a frame, from memory or from its file."""
        if path in self._kept:
            return self._kept[path]
        frame = read_frame(path, self.layout)
        if self._lacosmic:
            frame = flag_lacosmic(frame)
        if path in self._fwhm:
            return flag_defects(frame, self._fwhm[path])
        size = frame.data.nbytes + frame.variance.nbytes + frame.mask.nbytes
        if self._bytes + size <= _KEEP_BYTES:
            self._kept[path] = frame
            self._bytes += size
        return frame

    def flag_defects(self, path: Path, fwhm: float) -> None:
        """Have the pixels flagged that are sharper than stars of this FWHM, now and whenever the frame is read."""
        self._fwhm[path] = fwhm
        if path in self._kept:
            self._kept[path] = flag_defects(self._kept[path], fwhm)

    def drop(self, path: Path) -> None:
        """Forget a frame that will not be needed again."""
        frame = self._kept.pop(path, None)
        if frame is not None:
            self._bytes -= frame.data.nbytes + frame.variance.nbytes + frame.mask.nbytes


@contextlib.contextmanager
def frame_errors(path: Path) -> Iterator[None]:
    """Turn what nobody expected of a frame into a `FrameError`: it fails alone. Wrong arguments and settings pass."""
    try:
        yield
    except (FrameError, InputError, ConfigError):
        raise
    except Exception as error:
        log.exception("%s: unexpected error", path)
        raise FrameError(f"unexpected {type(error).__name__}: {error}", path) from error


def take_look(path: Path, name: str, store: FrameStore, config: RunConfig) -> Look:
    """Read a frame, find its stars and measure its quality; a frame that cannot be read becomes a failed look."""
    start, look = time.perf_counter(), Look(path, name)
    try:
        with frame_errors(path):
            _fill(look, store, config)
    except FrameError as error:
        look.fail(error)
    look.seconds = time.perf_counter() - start
    return look


def _fill(look: Look, store: FrameStore, config: RunConfig) -> None:
    path = look.path
    frame = store.read(path)
    look.shape, look.wcs, look.flags, look.site = frame.shape, frame.wcs, frame.flags, site_of(frame.header)
    for name in ("mjd", "exptime", "filter", "instrument", "airmass"):
        setattr(look, name, getattr(frame, name))
    look.stars = detect_stars(frame, config.max_stars, config.detection_threshold)
    look.catalog = catalog_of(frame)
    look.quality = frame_quality(frame, look.stars)
    look.usable_share = _usable_share(frame, config)
    if config.find_defects:
        store.flag_defects(path, look.quality.fwhm)


def target_position(config: RunConfig, wcs: Any, path: Path) -> tuple[float, float] | None:
    """Pixel position of the target on a frame; None when no target was given.

    Raises
    ------
    FrameError
        If a target was given and the frame has no celestial WCS.
    """
    if config.ra is None:
        return None
    if wcs is None:
        raise FrameError("target needs a celestial WCS on the reference, got none (run without --ra and --dec)", path)
    x, y = wcs.world_to_pixel(SkyCoord(config.ra, config.dec, unit="deg"))
    return float(x), float(y)


def region_of(config: RunConfig, look: Look) -> Region:
    """Region of the run on the reference: around the target, or the whole frame."""
    target = target_position(config, look.wcs, look.path)
    return whole_frame(look.shape) if target is None else region_around(*target, config.size, look.shape)


def _usable_share(frame: Frame, config: RunConfig) -> float:
    """Share of the region's pixels that this frame has and that are good: what it is worth as a reference."""
    if config.ra is not None and frame.wcs is None:
        return 0.0
    try:
        target = target_position(config, frame.wcs, Path())
        region = whole_frame(frame.shape) if target is None else region_around(*target, config.size, frame.shape)
    except FrameError:
        return 0.0
    height, width = region.shape
    y, x = max(region.y0, 0), max(region.x0, 0)
    inside = frame.mask[y:region.y0 + height, x:region.x0 + width]
    return float((inside == 0).sum() / (height * width))


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
    ratios = [_flux_ratio(best, look, config) for look in usable]
    worth = [ratio * look.usable_share**2 for ratio, look in zip(ratios, usable, strict=True)]
    return [usable[int(i)] for i in rank_references(qualities, worth)]


def _of_one_grid(looks: list[Look]) -> list[Look]:
    """Frames with the pixel scale that most have, within 5 %; those without a WCS only where no frame has one.

    FWHM and noise are compared in pixels: a frame that was binned would win, and lose what the others resolve.
    """
    scales = {look.name: float(np.mean(proj_plane_pixel_scales(look.wcs))) for look in looks if look.wcs is not None}
    if not scales:
        return looks
    middle = float(np.median(list(scales.values())))
    usual = min(scales.values(), key=lambda scale: abs(scale - middle))
    return [look for look in looks if look.name in scales and abs(scales[look.name] / usual - 1) < 0.05]


def _sharp_enough(looks: Sequence[Look]) -> list[Look]:
    whole = [look for look in looks if look.usable_share > 0.5 * max(other.usable_share for other in looks)]
    widths = [look.quality.fwhm for look in whole if look.quality is not None and math.isfinite(look.quality.fwhm)]
    if not widths:
        return list(looks)
    return [look for look in whole if look.quality is not None and look.quality.fwhm <= _BLUNTEST * min(widths)]


def _named_reference(looks: Sequence[Look], config: RunConfig, store: FrameStore) -> Look:
    path = Path(config.reference).expanduser()
    for look in looks:
        if os.path.realpath(look.path) == os.path.realpath(path):
            break
    else:
        look = take_look(path, path.name, store, config)
    if look.reason and not look.skipped:  # one that was not selected can serve, when it is named
        raise ConfigError(f"reference must be a usable frame, got {path}: {look.reason}")
    return look


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


def register_all(looks: Iterable[Look], reference: Look, config: RunConfig, tick: Callable[[], object]) -> None:
    """Register every usable look with the reference; one that cannot be is a failed row."""
    looks = list(looks)
    same = () if "filter" in config.mixed else ("filter",)
    for index, error in check_series(looks, reference, shapes=not config.align, same=same).items():
        if not looks[index].reason:
            looks[index].fail(error)
    for look in looks:
        tick()
        if look.reason:
            continue
        start = time.perf_counter()
        if not config.align or look is reference:
            look.registration = identity_registration()
        else:
            try:
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
