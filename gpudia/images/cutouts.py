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

__all__ = ["Region", "cut", "region_around", "shifted_wcs", "whole_frame"]


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

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns, for the indices of an array that holds all of it."""
        return slice(self.y0, self.y0 + self.shape[0]), slice(self.x0, self.x0 + self.shape[1])

    def inside(self, frame_shape: tuple[int, int], path: object = None) -> Region:
        """Return the part that lies on a frame of this shape (H, W).

        Raises
        ------
        FrameError
            No pixel does; names `path`.
        """
        (height, width), (rows, columns) = self.shape, frame_shape
        x0, y0 = max(self.x0, 0), max(self.y0, 0)
        x1, y1 = min(self.x0 + width, columns), min(self.y0 + height, rows)
        if x1 <= x0 or y1 <= y0:
            raise FrameError(f"region must overlap the frame of shape ({rows}, {columns}), got {self}", path)
        return Region(x0, y0, (y1 - y0, x1 - x0))


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
        bit ``no_data``, the median of the region's good pixels (of some all over a large one) as data and the square of
        the frame's sky noise as variance; the frame flag ``partly_outside`` is set. `Frame.origin` says where it lies;
        the catalog stays in full-frame coordinates. `gpudia.images.read_frame` with a region reads no more than that of
        a file.

    Raises
    ------
    FrameError
        The region does not overlap the frame.
    """
    part = region.inside(frame.shape, frame.path)
    inside, target = part.slices, part.shifted(-region.x0, -region.y0).slices
    planes = {name: getattr(frame, name)[inside] for name in ("data", "variance", "mask")}
    flags = frame.flags
    if part == region:
        planes = {name: plane.copy() for name, plane in planes.items()}
    else:
        fill = {"data": _level(planes["data"], planes["mask"] == 0, frame.sky),
                "variance": frame.sky_noise**2 or 1.0, "mask": PIXEL_FLAGS.no_data}
        planes = {name: _placed(plane, target, region.shape, fill[name]) for name, plane in planes.items()}
        flags |= FRAME_FLAGS.partly_outside
    return replace(
        frame, **planes, wcs=shifted_wcs(frame.wcs, region), flags=flags,
        origin=(frame.origin[0] + region.x0, frame.origin[1] + region.y0),
    )  # fmt: skip


def _level(data: NDArray, good: NDArray[np.bool_], sky: float) -> float:
    """Median of the good pixels, of large parts that of 64 or more rows and columns; the sky where none is good."""
    thin = (slice(None, None, max(1, min(data.shape) // 64)),) * 2
    some = data[thin][good[thin]]
    some = some if some.size else data[good]
    return float(np.median(some)) if some.size else sky


def _placed(part: NDArray, where: tuple[slice, ...], shape: tuple[int, int], fill: float) -> NDArray:
    plane = np.full(shape, fill, part.dtype)
    plane[where] = part
    return plane


def shifted_wcs(wcs: WCS | None, region: Region) -> WCS | None:
    """World coordinates of a region's pixels, from those of its frame; None for None."""
    if wcs is None:
        return None
    # Slicing a WCS cannot begin at a negative pixel; moving its reference pixel can.
    moved = wcs.deepcopy()
    moved.wcs.crpix = np.asarray(wcs.wcs.crpix) - region.origin
    if wcs.sip is not None:
        sip = wcs.sip
        moved.sip = Sip(sip.a, sip.b, sip.ap, sip.bp, np.asarray(sip.crpix) - region.origin)
    for name in ("cpdis1", "cpdis2", "det2im1", "det2im2"):  # distortions given as tables
        table = getattr(moved, name)
        if table is not None:
            table.crval = tuple(np.subtract(table.crval, region.origin))
    moved.pixel_shape = region.shape[::-1]
    return moved
