"""A frame as a stack of tiles that share one set of coefficients.

The tiles cut the *valid* pixels (those at least K//2 from the edge) into equal rectangles without overlap; the
reference under a tile has a margin of K//2 more on each side. A cutout is one tile. Large frames are many: each is
transformed within the processor's cache, and no work space grows with the frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from scipy.fft import next_fast_len

from gpudia.backend import namespace_of

__all__ = ["Tiling", "choose_tiling"]


@dataclass(frozen=True)
class Tiling:
    """Geometry of the tiles: frame (H, W), kernel size K, a tile's (h, w) valid pixels, grid (rows, columns).

    `numbers` are those of the tiles in use, row by row; None: all of them.
    """

    shape: tuple[int, int]
    kernel_size: int
    tile: tuple[int, int]
    grid: tuple[int, int]
    numbers: tuple[int, ...] | None = None

    @property
    def margin(self) -> int:
        """K // 2: width of the border without a model, pixels."""
        return self.kernel_size // 2

    @property
    def valid(self) -> tuple[int, int]:
        """Shape of the part of the frame where the model is defined."""
        return self.shape[0] - self.kernel_size + 1, self.shape[1] - self.kernel_size + 1

    @property
    def count(self) -> int:
        """Return the number of tiles T."""
        return self.grid[0] * self.grid[1] if self.numbers is None else len(self.numbers)

    def only(self, numbers: tuple[int, ...]) -> Tiling:
        """Return the tiling with some of the tiles alone."""
        return replace(self, numbers=numbers)

    def places(self) -> Iterator[tuple[int, int]]:
        """Row and column in the grid of each tile."""
        numbers = range(self.grid[0] * self.grid[1]) if self.numbers is None else self.numbers
        return (divmod(number, self.grid[1]) for number in numbers)

    @property
    def fft_shape(self) -> tuple[int, int]:
        """Shape of the transforms: a tile with its margins, rounded up to a fast length."""
        height, width = (next_fast_len(n + self.kernel_size - 1, real=True) for n in self.tile)
        return height, width

    def split(self, planes: Any) -> Any:
        """Cut planes (..., H, W) into tiles (..., T, h, w); beyond the valid pixels the tiles hold zeros."""
        if self.numbers is not None:
            return self.chosen(replace(self, numbers=None).split(planes))
        xp = namespace_of(planes)
        (rows, columns), (h, w), m, (vh, vw) = self.grid, self.tile, self.margin, self.valid
        inner = planes[..., m:m + vh, m:m + vw]
        lead = planes.shape[:-2]
        if (rows * h, columns * w) != (vh, vw):
            padded = xp.zeros((*lead, rows * h, columns * w), dtype=planes.dtype)
            padded[..., :vh, :vw] = inner
            inner = padded
        if rows * columns == 1:
            return inner.reshape(*lead, 1, h, w)
        tiles = xp.moveaxis(inner.reshape(*lead, rows, h, columns, w), -3, -2)
        return tiles.reshape(*lead, rows * columns, h, w)

    def chosen(self, tiles: Any) -> Any:
        """Of all tiles (..., rows x columns, h, w) those in use, (..., T, h, w)."""
        xp = namespace_of(tiles)
        return tiles if self.numbers is None else xp.stack([tiles[..., n, :, :] for n in self.numbers], axis=-3)

    def join(self, tiles: Any, fill: float) -> Any:
        """Put all tiles (..., T, h, w) together into planes (..., H, W) with a border of `fill`."""
        xp = namespace_of(tiles)
        (rows, columns), (h, w), m, (vh, vw) = self.grid, self.tile, self.margin, self.valid
        lead = tiles.shape[:-3]
        inner = tiles
        if self.count > 1:
            inner = xp.moveaxis(tiles.reshape(*lead, rows, columns, h, w), -3, -2)
        inner = inner.reshape(*lead, rows * h, columns * w)
        planes = xp.full((*lead, *self.shape), fill, dtype=tiles.dtype)
        planes[..., m:m + vh, m:m + vw] = inner[..., :vh, :vw]
        return planes

    def origins(self) -> Iterator[tuple[int, int]]:
        """Frame coordinates (y, x) of the corner of each tile's reference part (margin included)."""
        for row, column in self.places():
            yield row * self.tile[0], column * self.tile[1]

    def split_with_margin(self, image: Any) -> Any:
        """Cut one frame (H, W) into overlapping parts (T, h + K - 1, w + K - 1), zeros beyond the frame."""
        xp = namespace_of(image)
        height, width = (n + self.kernel_size - 1 for n in self.tile)
        parts = xp.zeros((self.count, height, width), dtype=image.dtype)
        for i, (y, x) in enumerate(self.origins()):
            part = image[y:y + height, x:x + width]
            parts[i, :part.shape[0], :part.shape[1]] = part
        return parts


def choose_tiling(shape: tuple[int, int], kernel_size: int, side: int) -> Tiling:
    """Tiling with transforms of about `side` pixels; a frame of up to 1.5 sides is one tile."""
    grid, tile = [], []
    for n in shape:
        valid = n - kernel_size + 1
        step = max(side - kernel_size + 1, kernel_size)
        count = 1 if n <= 1.5 * side else -(-valid // step)
        grid.append(count)
        tile.append(-(-valid // count))
    return Tiling(shape=(shape[0], shape[1]), kernel_size=kernel_size, tile=(tile[0], tile[1]), grid=(grid[0], grid[1]))
