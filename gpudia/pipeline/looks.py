"""The first look at every frame: stars, quality and header facts; where the region of the run is on it."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from astropy.coordinates import SkyCoord
from astropy.io.fits import Header
from astropy.table import Table
from astropy.wcs.utils import proj_plane_pixel_scales

from gpudia.config import RunConfig
from gpudia.errors import ConfigError, FrameError, InputError, OutputError
from gpudia.images import (
    Frame,
    FrameLayout,
    FrameQuality,
    Region,
    Registration,
    catalog_of,
    cut,
    detect_stars,
    flag_defects,
    flag_lacosmic,
    frame_quality,
    read_frame,
    region_around,
    site_of,
    whole_frame,
)
from gpudia.images.catalogs import USED_BY_RUNS
from gpudia.pipeline.codec import decode, encode
from gpudia.pipeline.stages import stage
from gpudia.pipeline.storage import writing

__all__ = [
    "FrameStore",
    "Look",
    "Seen",
    "frame_errors",
    "region_of",
    "stamp_of",
    "take_look",
    "target_position",
]

log = logging.getLogger("gpudia.pipeline")

#: Pieces of frames that were looked at are kept on disk up to this size in all; beyond it frames are read again.
_KEEP_BYTES = 10 << 30
_BYTES_PER_PIXEL = 9
#: Room around the region in a piece, of the region's side and in pixels: for a WCS that is off, and a rotation.
_PIECE_MARGIN, _PIECE_MARGIN_PX = 0.05, 24


@dataclass(frozen=True)
class Seen:
    """The large part of a first look: stars found, the frame's own catalog if it has ids or magnitudes, and its WCS."""

    stars: Table | None = None
    catalog: Table | None = None
    wcs: Any = None


@dataclass
class Look:
    """What is known of one input image: filled step by step, complete when its epoch is done.

    `reason` is empty as long as nothing went wrong; a look with a reason takes no part in what follows: it is a failed
    row, or a skipped one. `seen` is a function where the large part is on disk: thousands of looks stay small.
    """

    path: Path
    name: str
    seen: Seen | Callable[[], Seen] = Seen()
    stamp: tuple[int, int] = (0, 0)
    quality: FrameQuality | None = None
    pixel_scale: float = math.nan
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

    def large(self) -> Seen:
        """Return stars, catalog and world coordinates, read from disk where they are kept there."""
        return self.seen() if callable(self.seen) else self.seen

    @property
    def stars(self) -> Table | None:
        """Stars found on the frame."""
        return self.large().stars

    @property
    def catalog(self) -> Table | None:
        """The frame's own catalog."""
        return self.large().catalog

    @property
    def wcs(self) -> Any:
        """World coordinates of the frame."""
        return self.large().wcs

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

    def failed(self, error: FrameError) -> Look:
        """Return this look, failed."""
        self.fail(error)
        return self


class FrameStore:
    """Frames by their looks, read as the settings say; the pieces that the solve will need may be kept as files.

    Parameters
    ----------
    config : RunConfig
    pieces : Path, optional
        Folder for the pieces.
    n_frames : int
        Frames of the run: pieces are kept where those of all frames take no more than 10 GB.
    """

    def __init__(self, config: RunConfig, pieces: Path | None = None, n_frames: int = 1) -> None:
        self.layout = FrameLayout(**config.layout())
        self._config, self._pieces, self._n_frames = config, pieces, n_frames

    def read(self, path: Path) -> Frame:
        """Read a frame from its file, without the defects that need to know its FWHM."""
        with stage("read"):
            frame = read_frame(path, self.layout, catalog_with=USED_BY_RUNS)
            return flag_lacosmic(frame) if self._config.lacosmic else frame

    def whole(self, look: Look) -> Frame:
        """Return the whole frame of a look.

        Raises
        ------
        FrameError
            If it cannot be read, or changed since it was looked at.
        """
        if look.stamp != (0, 0) and stamp_of(look.path) != look.stamp:
            raise FrameError("file must stay as it is during a run, got one that was changed or removed", look.path)
        return self.without_defects(self.read(look.path), look)

    def without_defects(self, frame: Frame, look: Look) -> Frame:
        """Flag the pixels that are sharper than the look's stars, where the settings ask for it."""
        if not self._config.find_defects or look.quality is None:
            return frame
        with stage("look"):
            return flag_defects(frame, look.quality.fwhm)

    def keep(self, frame: Frame, look: Look, region: Region) -> None:
        """Keep the part of a frame around a region, if there is room for those of all frames."""
        margin = math.ceil(_PIECE_MARGIN * max(region.shape)) + _PIECE_MARGIN_PX
        around = Region(region.x0 - margin, region.y0 - margin,
                        (region.shape[0] + 2 * margin, region.shape[1] + 2 * margin)).inside(frame.shape)
        if self._pieces is None or math.prod(around.shape) * _BYTES_PER_PIXEL * self._n_frames > _KEEP_BYTES:
            return
        piece = cut(replace(frame, header=Header(), wcs=None, catalog=None), around)
        with stage("write"), writing(self._piece_of(look)):
            self._piece_of(look).write_bytes(encode(piece))

    def part(self, look: Look, needed: Region) -> Frame:
        """Return a frame that has the needed region, as far as it is on the file's: a kept piece or the whole."""
        with contextlib.suppress(OSError, ValueError, AttributeError, FrameError), stage("read"):
            piece = decode(self._piece_of(look).read_bytes())
            inside = needed.inside(look.shape)
            kept = Region(*piece.origin, piece.shape)
            if inside.shifted(-kept.x0, -kept.y0).inside(kept.shape).shape == inside.shape:
                return piece
        return self.whole(look)

    def drop(self, look: Look) -> None:
        """Delete the piece of a frame that is not needed any more."""
        if self._pieces is not None:
            self._piece_of(look).unlink(missing_ok=True)

    def _piece_of(self, look: Look) -> Path:
        return Path() if self._pieces is None else self._pieces / f"{look.name}.piece"


def stamp_of(path: Path) -> tuple[int, int]:
    """Size and time of change (ns) of a file, by which a change is noticed; zeros where there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def frame_errors(path: Path) -> Iterator[None]:
    """Turn what nobody expected of a frame into a `FrameError`: it fails alone. Wrong arguments and settings pass."""
    try:
        yield
    except (FrameError, InputError, ConfigError, OutputError):
        raise
    except Exception as error:
        log.exception("%s: unexpected error", path)
        raise FrameError(f"unexpected {type(error).__name__}: {error}", path) from error


def take_look(path: Path, name: str, store: FrameStore, config: RunConfig) -> Look:
    """Read a frame, find its stars and measure its quality; a frame that cannot be read becomes a failed look."""
    start, look = time.perf_counter(), Look(path, name, stamp=stamp_of(path))
    try:
        with frame_errors(path):
            _fill(look, store, config)
    except FrameError as error:
        look.fail(error)
    look.seconds = time.perf_counter() - start
    return look


def _fill(look: Look, store: FrameStore, config: RunConfig) -> None:
    frame = store.read(look.path)
    look.shape, look.flags, look.site = frame.shape, frame.flags, site_of(frame.header)
    for name in ("mjd", "exptime", "filter", "instrument", "airmass"):
        setattr(look, name, getattr(frame, name))
    with stage("look"):
        stars = detect_stars(frame, config.max_stars, config.detection_threshold)
        look.seen = Seen(stars, catalog_of(frame), frame.wcs)
        look.quality = frame_quality(frame, stars)
        if frame.wcs is not None:
            look.pixel_scale = float(np.mean(proj_plane_pixel_scales(frame.wcs)))
        region = _own_region(frame, config)
        look.usable_share = 0.0 if region is None else _usable_share(frame, region)
    if region is not None:
        store.keep(store.without_defects(frame, look), look, region)


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
    if wcs.wcs.radesys == "ICRS" and wcs.wcs.lngtyp == "RA":  # as most are: no other frame to go to
        x, y = wcs.world_to_pixel_values(config.ra, config.dec)
    else:
        x, y = wcs.world_to_pixel(SkyCoord(config.ra, config.dec, unit="deg"))
    return float(x), float(y)


def region_of(config: RunConfig, look: Look) -> Region:
    """Region of the run on the reference: around the target, or the whole frame.

    Raises
    ------
    ConfigError
        If it is more than twice as large as the frame: no memory holds what may be asked for.
    """
    target = target_position(config, look.wcs, look.path)
    if target is not None and config.size > 2 * max(look.shape):
        raise ConfigError(f"size must be at most twice the reference's longer side ({max(look.shape)} px), got "
                          f"{config.size}")
    return whole_frame(look.shape) if target is None else region_around(*target, config.size, look.shape)


def _own_region(frame: Frame, config: RunConfig) -> Region | None:
    """Region of the run by the frame's own coordinates; None where they do not say where the target is."""
    if config.ra is not None and frame.wcs is None:
        return None
    try:
        target = target_position(config, frame.wcs, Path())
        return whole_frame(frame.shape) if target is None else region_around(*target, config.size, frame.shape)
    except FrameError:
        return None


def _usable_share(frame: Frame, region: Region) -> float:
    """Share of the region's pixels that this frame has and that are good: what it is worth as a reference."""
    height, width = region.shape
    y, x = max(region.y0, 0), max(region.x0, 0)
    inside = frame.mask[y:region.y0 + height, x:region.x0 + width]
    return np.count_nonzero(inside == 0) / (height * width)
