"""Stamps of all stars at once: where they lie, what they cut out of a frame, which of their pixels are good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpudia.flags import PIXEL_FLAGS, SOURCE_FLAGS

__all__ = ["FloatArray", "Footprint", "ForcedFluxes", "Stamps", "footprint"]

FloatArray = NDArray[np.float64]


class ForcedFluxes(NamedTuple):
    """Fluxes of S stars on one difference image, at positions given beforehand.

    Attributes
    ----------
    flux, error : (S,), float64
        ADU of the difference image, one sigma; NaN where not measured.
    flags : (S,), int32
        Bits of `gpudia.flags.SOURCE_FLAGS`.
    n_masked : (S,), int32
        Ignored pixels under the star's weights, those outside the frame included.
    """

    flux: FloatArray
    error: FloatArray
    flags: NDArray[np.int32]
    n_masked: NDArray[np.int32]


@dataclass(frozen=True)
class Stamps:
    """Square stamps of one size, one a star: which part of a frame each of them covers.

    Parameters
    ----------
    positions : (S, 2) float
        Star positions (x, y), 0-based pixel centres. One that is not finite gets a stamp outside of any frame.
    size : int
        Side m, odd, pixels. The star lies within half a pixel of the stamp's central pixel.
    """

    positions: FloatArray
    size: int

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def centres(self) -> NDArray[np.int64]:
        """Central pixel of each stamp, (S, 2) as (x, y)."""
        return np.rint(np.nan_to_num(self.positions, nan=-1e7, posinf=-1e7, neginf=-1e7)).astype(np.int64)

    @property
    def offsets(self) -> FloatArray:
        """Position minus central pixel, (S, 2) as (x, y), -0.5 to 0.5; 0 where the position is not finite."""
        return np.nan_to_num(self.positions - self.centres, posinf=0.0, neginf=0.0)

    def coordinates(self, margin: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pixel coordinates x and y of the stamps grown by `margin`, each (S, m + 2 margin)."""
        half = self.size // 2 + margin
        grid = self.centres[:, :, None] + np.arange(-half, half + 1)
        return grid[:, 0], grid[:, 1]

    def gather(self, frame: NDArray[Any], margin: int = 0, outside: Any = 0) -> NDArray[Any]:
        """Cut the stamps, grown by `margin`, out of a frame (H, W): (S, M, M), with `outside` beyond its edges."""
        x, y = self.coordinates(margin)
        height, width = frame.shape
        cut = frame[np.clip(y, 0, height - 1)[:, :, None], np.clip(x, 0, width - 1)[:, None, :]]
        inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
        return np.where(inside, cut, np.asarray(outside, dtype=cut.dtype))

    def __getitem__(self, which: slice) -> Stamps:
        return Stamps(self.positions[which], self.size)


#: Bits of pixels that raise a bit of their own in the star's flags. All that is ignored, but for what lies beyond an
#: edge (or too near to one for the kernel), also counts as "masked_pixels".
_SOURCE_BIT = (
    (PIXEL_FLAGS.saturated, SOURCE_FLAGS.saturated),
    (PIXEL_FLAGS.reference, SOURCE_FLAGS.reference_masked),
    (PIXEL_FLAGS.border, SOURCE_FLAGS.outside),
    (PIXEL_FLAGS.clipped, SOURCE_FLAGS.clipped_pixels),
    (~(PIXEL_FLAGS.border | PIXEL_FLAGS.clipped), SOURCE_FLAGS.masked_pixels),
)


class Footprint(NamedTuple):
    """What lies under each star: pixels to ignore, how many, their share of the weight, the star's flags."""

    ignore: NDArray[np.bool_]
    n_masked: NDArray[np.int32]
    fraction: FloatArray
    flags: NDArray[np.int32]


def footprint(difference: NDArray[Any], variance: NDArray[Any], mask: NDArray[Any] | None, stamps: Stamps,
              shape: FloatArray, faint: float = 0.0) -> Footprint:
    """Find the pixels to ignore under the stars.

    Parameters
    ----------
    difference, variance : (H, W)
        A pixel whose difference is not finite or whose variance is not finite and positive is ignored.
    mask : (H, W) bool or bits of `gpudia.flags.PIXEL_FLAGS`, or None
        True or any bit but "clipped" = ignore.
    stamps : Stamps
        Where the stars lie, of side m.
    shape : (S, m, m)
        What each pixel counts, 0 or more: only pixels above 0 are looked at.
    faint : float
        Pixels that count less than this share of the star's largest raise no flag (they are ignored all the same).
    """
    bits = _mask_bits(mask, stamps, difference.shape)
    counts = shape > 0
    ignore = counts & ((bits & ~PIXEL_FLAGS.clipped) != 0)
    bad = counts & ~ignore & ~_measured(stamps.gather(difference), stamps.gather(variance))
    bits = np.where(bad, bits | PIXEL_FLAGS.no_data, bits)
    ignore |= bad
    matters = counts & (shape >= faint * shape.max(axis=(1, 2), keepdims=True))
    lost = np.where(ignore, shape, 0.0).sum(axis=(1, 2)) / shape.sum(axis=(1, 2))
    return Footprint(ignore, ignore.sum(axis=(1, 2)).astype(np.int32), lost, _source_flags(bits, matters))


def _measured(difference: NDArray[Any], variance: NDArray[Any]) -> NDArray[np.bool_]:
    return np.isfinite(difference) & np.isfinite(variance) & (variance > 0)


def _source_flags(bits: NDArray[np.int32], matters: NDArray[np.bool_]) -> NDArray[np.int32]:
    seen = np.bitwise_or.reduce(np.where(matters, bits, 0).reshape(len(bits), -1), axis=1)
    flags = np.zeros(len(bits), np.int32)
    for pixel_bits, source_bit in _SOURCE_BIT:
        flags |= np.where(seen & pixel_bits, source_bit, 0).astype(np.int32)
    return flags


def _mask_bits(mask: NDArray[Any] | None, stamps: Stamps, shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Pixel bits on the stamps; beyond the frame's edges the bit "border"."""
    bits = np.broadcast_to(np.int32(0), shape) if mask is None else mask.astype(np.int32)
    if mask is not None and mask.dtype.kind == "b":
        bits = bits * np.int32(PIXEL_FLAGS.bad)
    return stamps.gather(bits, outside=PIXEL_FLAGS.border)
