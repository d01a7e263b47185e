"""Regions of a frame: whole-pixel origins, parts outside the frame masked."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from astropy.wcs import WCS, Sip
from numpy.typing import ArrayLike, NDArray

from gpudia.errors import FrameError, InputError
from gpudia.flags import FRAME_FLAGS, PIXEL_FLAGS
from gpudia.images.frames import Frame

__all__ = ["Region", "cut", "region_around", "whole_frame"]


@dataclass(frozen=True)
class Region:
    """A rectangle of whole pixels; it may reach beyond the frame.

    Attributes
    ----------
    x0, y0 : int
        Full-frame coordinates of its first pixel.
    shape : tuple of int
        (H, W), pixels.
    """

    x0: int
    y0: int
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise InputError(f"shape must be two positive integers, got {self.shape}")

    @property
    def origin(self) -> tuple[int, int]:
        """(x0, y0)."""
        return self.x0, self.y0

    @property
    def centre(self) -> tuple[float, float]:
        """Full-frame (x, y) of its centre."""
        return self.x0 + (self.shape[1] - 1) / 2, self.y0 + (self.shape[0] - 1) / 2

    @property
    def corners(self) -> NDArray[np.float64]:
        """Full-frame (x, y) of the centres of its four corner pixels, shape (4, 2)."""
        x1, y1 = self.x0 + self.shape[1] - 1, self.y0 + self.shape[0] - 1
        return np.array([[self.x0, self.y0], [x1, self.y0], [x1, y1], [self.x0, y1]], float)

    def to_cutout(self, xy: ArrayLike) -> NDArray[np.float64]:
        """Full-frame (x, y), shape (..., 2), to the region's own: position minus origin, exactly."""
        return np.asarray(xy, float) - self.origin

    def to_frame(self, xy: ArrayLike) -> NDArray[np.float64]:
        """Positions in the region, shape (..., 2), to full-frame ones: the inverse of `to_cutout`."""
        return np.asarray(xy, float) + self.origin

    def contains(self, xy: ArrayLike) -> NDArray[np.bool_]:
        """Say which full-frame positions (x, y), shape (..., 2), lie on its pixels."""
        inside = self.to_cutout(xy) + 0.5
        return np.all((inside >= 0) & (inside < (self.shape[1], self.shape[0])), axis=-1)

    def shifted(self, dx: int, dy: int) -> Region:
        """Return the region moved by whole pixels."""
        return Region(self.x0 + int(dx), self.y0 + int(dy), self.shape)


def whole_frame(shape: tuple[int, int]) -> Region:
    """Region of a whole frame of this shape (H, W)."""
    return Region(0, 0, (int(shape[0]), int(shape[1])))


def region_around(x: float, y: float, size: int | tuple[int, int], frame_shape: tuple[int, int]) -> Region:
    """Region of a given size about a position, with an integer origin.

    Parameters
    ----------
    x, y : float
        Full-frame position; for an odd size its pixel becomes the central one.
    size : int or (int, int)
        Side, or (H, W), pixels.
    frame_shape : tuple of int
        (H, W) of the frame.

    Returns
    -------
    Region
        Never moved: near an edge it reaches beyond the frame.

    Raises
    ------
    FrameError
        The position is not on the frame.
    InputError
        The size is not positive.
    """
    height, width = size if isinstance(size, tuple) else (size, size)
    rows, columns = frame_shape
    if not whole_frame(frame_shape).contains((x, y)):  # also false for NaN
        raise FrameError(f"target must lie on the frame of shape ({rows}, {columns}), got (x, y) = ({x:.1f}, {y:.1f})")
    return Region(math.floor(x + 0.5) - width // 2, math.floor(y + 0.5) - height // 2, (height, width))


def cut(frame: Frame, region: Region) -> Frame:
    """Cut a region out of a frame.

    Parameters
    ----------
    frame : Frame
        Full frame.
    region : Region
        In the frame's coordinates.

    Returns
    -------
    Frame
        With arrays of its own in the region's shape and a WCS for its pixels. Parts outside the frame have the mask
        bit ``no_data``, the median of the region's good pixels as data and the square of the frame's sky noise as
        variance; the frame flag ``partly_outside`` is set. It carries no catalog (that is in full-frame coordinates).

    Raises
    ------
    FrameError
        The region does not overlap the frame.
    """
    (height, width), (rows, columns) = region.shape, frame.shape
    inside = (
        slice(max(region.y0, 0), min(region.y0 + height, rows)),
        slice(max(region.x0, 0), min(region.x0 + width, columns)),
    )
    if any(s.stop <= s.start for s in inside):
        raise FrameError(f"region must overlap the frame of shape {frame.shape}, got {region}", frame.path)
    target = tuple(slice(s.start - o, s.stop - o) for s, o in zip(inside, (region.y0, region.x0), strict=True))
    good = frame.mask[inside] == 0
    level = float(np.median(frame.data[inside][good])) if good.any() else frame.sky
    data = _placed(frame.data[inside], target, region.shape, level)
    variance = _placed(frame.variance[inside], target, region.shape, frame.sky_noise**2 or 1.0)
    mask = _placed(frame.mask[inside], target, region.shape, PIXEL_FLAGS.no_data)
    outside = FRAME_FLAGS.partly_outside if good.size < height * width else 0
    return replace(
        frame, data=data, variance=variance, mask=mask, wcs=_shifted_wcs(frame.wcs, region), catalog=None,
        flags=frame.flags | outside,
    )  # fmt: skip


def _placed(part: NDArray, where: tuple[slice, ...], shape: tuple[int, int], fill: float) -> NDArray:
    plane = np.full(shape, fill, part.dtype)
    plane[where] = part
    return plane


def _shifted_wcs(wcs: WCS | None, region: Region) -> WCS | None:
    """WCS of the region's pixels. Slicing a WCS cannot begin at a negative pixel; moving its reference pixel can."""
    if wcs is None:
        return None
    moved = wcs.deepcopy()
    moved.wcs.crpix = np.asarray(wcs.wcs.crpix) - region.origin
    if wcs.sip is not None:
        sip = wcs.sip
        moved.sip = Sip(sip.a, sip.b, sip.ap, sip.bp, np.asarray(sip.crpix) - region.origin)
    moved.pixel_shape = region.shape[::-1]
    return moved
