"""Stamps of all stars at once: where they lie, what they cut out of a frame, which of their pixels are good."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from gpudia.backend import Backend, to_device
from gpudia.flags import PIXEL_FLAGS, SOURCE_FLAGS

__all__ = ["FloatArray", "ForcedFluxes", "Stamps", "StampsOn", "inner", "rows_of", "source_flags"]

FloatArray = NDArray[np.float64]


class ForcedFluxes(NamedTuple):
    """Fluxes of S stars at positions given beforehand, on one difference image or on each of B.

    Attributes
    ----------
    flux, error : (S,) or (B, S), float64
        ADU of the difference image, one sigma; NaN where not measured.
    flags : (S,) or (B, S), int32
        Bits of `gpudia.flags.SOURCE_FLAGS`.
    n_masked : (S,) or (B, S), int32
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

    def __getitem__(self, which: NDArray[np.int64] | slice) -> Stamps:
        return Stamps(self.positions[which], self.size)


def rows_of(numbers: NDArray[np.int64] | slice, backend: Backend) -> Any:
    """What picks stars of an array of the backend: their numbers there, or a slice as it is, which copies nothing."""
    return numbers if isinstance(numbers, slice) else to_device(numbers, backend)


class StampsOn:
    """Stamps on frames of one shape, of a backend: a gather of pixels for all of them.

    Parameters
    ----------
    stamps : Stamps
    shape : (H, W)
        Of the frames.
    backend : Backend
        Where the frames are.
    """

    def __init__(self, stamps: Stamps, shape: tuple[int, int], backend: Backend) -> None:
        self.stamps, self.shape, self.backend = stamps, shape, backend
        self._places: dict[int, tuple[Any, Any]] = {}

    def __len__(self) -> int:
        return len(self.stamps)

    @cached_property
    def _corners(self) -> NDArray[np.int64] | None:
        """First column and row of stamps that all lie in a frame of the host: cut out as windows, in half the time."""
        if self.backend.array_type is not np.ndarray or not len(self):
            return None
        first = self.stamps.centres - self.stamps.size // 2
        inside = (first >= 0).all() and (first + self.stamps.size <= (self.shape[1], self.shape[0])).all()
        return first.T if inside else None

    def only(self, numbers: NDArray[np.int64] | slice) -> StampsOn:
        """Return the same for some of the stars."""
        other, which = StampsOn(self.stamps[numbers], self.shape, self.backend), rows_of(numbers, self.backend)
        other._places = {margin: (flat[which], None if inside is None else inside[which])
                         for margin, (flat, inside) in self._places.items()}
        return other

    def _place(self, margin: int) -> tuple[Any, Any]:
        """Numbers of the pixels in the flat frame, and which lie in it (None: all)."""
        if margin not in self._places:
            x, y = self.stamps.coordinates(margin)
            height, width = self.shape
            flat = np.clip(y, 0, height - 1)[:, :, None] * width + np.clip(x, 0, width - 1)[:, None, :]
            inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
            self._places[margin] = (to_device(flat, self.backend),
                                    None if inside.all() else to_device(inside, self.backend))
        return self._places[margin]

    def gather(self, frame: Any, margin: int = 0, outside: Any = 0) -> Any:
        """Cut the stamps, grown by `margin`, out of a frame (H, W): (S, M, M), with `outside` beyond its edges."""
        if margin == 0 and self._corners is not None and frame.flags.c_contiguous:
            (x, y), size = self._corners, self.stamps.size
            windows = (frame.shape[0] - size + 1, frame.shape[1] - size + 1, size, size)
            return as_strided(frame, windows, frame.strides * 2, writeable=False)[y, x]
        flat, inside = self._place(margin)
        cut = self.backend.xp.take(frame.reshape(-1), flat)
        return cut if inside is None else self.backend.xp.where(inside, cut, outside).astype(cut.dtype)


def inner(a: Any, b: Any) -> Any:
    """Inner products of the stamps or rows of a and b, (S, m, m) or (S, n) each: (S,) float64.

    As products of matrices of one row and one column: a third of the time of a sum of the product.
    """
    shape = len(a), math.prod(a.shape[1:])
    return (a.reshape(*shape[:1], 1, shape[1]) @ b.reshape(*shape, 1)).reshape(len(a)).astype(float)


#: Bits of pixels that raise a bit of their own in the star's flags. All that is ignored, but for what lies beyond an
#: edge (or too near to one for the kernel), also counts as "masked_pixels".
_SOURCE_BIT = (
    (PIXEL_FLAGS.saturated, SOURCE_FLAGS.saturated),
    (PIXEL_FLAGS.reference, SOURCE_FLAGS.reference_masked),
    (PIXEL_FLAGS.border, SOURCE_FLAGS.outside),
    (PIXEL_FLAGS.clipped, SOURCE_FLAGS.clipped_pixels),
    (255 & ~(PIXEL_FLAGS.border | PIXEL_FLAGS.clipped), SOURCE_FLAGS.masked_pixels),
)


def source_flags(xp: Any, bits: Any) -> Any:
    """Flags (S,) int32 of stars from the pixel bits (S, m, m) uint8 that matter."""
    flags = xp.zeros(len(bits), dtype=xp.int32)
    for pixel_bits, source_bit in _SOURCE_BIT:
        seen = ((bits & pixel_bits) != 0).any(axis=(1, 2))
        flags = flags | xp.where(seen, source_bit, 0).astype(xp.int32)
    return flags
