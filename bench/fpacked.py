"""A 250 px cutout read from an fpacked LCO-like frame, against unpacking all of its planes, in one run.

    python bench/fpacked.py
    python bench/fpacked.py --small    # a small frame, seconds: does the bench itself still run? Keeps nothing

`tiles_over_unpacking`: the cutout's tiles of SCI, BPM and ERR unpacked, against all of them. `read_over_unpacking`: all
that `read_frame` does for the cutout (headers, WCS, catalog, sky and noise of the cutout), against the same unpacking.
`read_over_read`: the same against `read_frame` for the whole frame and `cut`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import Table
from common import best_of, save

from gpudia.images import Region, cut, read_frame

ROWS, SQUARES = None, (256, 256)
#: How the planes are packed: fpack's default is RICE in tiles of one row; floats quantized to a 16th of their noise.
CASES = {"rice, rows": ("RICE_1", ROWS), "rice, 256 x 256": ("RICE_1", SQUARES), "gzip, rows": ("GZIP_1", ROWS),
         "gzip, 256 x 256": ("GZIP_1", SQUARES)}
PLANES = ("SCI", "BPM", "ERR")


def planes(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Table]:
    """Sky of 1000 ADU with stars at a gain of 1.6 e-/ADU, a mask of 0.5 % of the pixels, the error, a catalog."""
    rng = np.random.default_rng(3)
    data = np.full((side, side), 1000.0, np.float32)
    n = side * side // 400
    x, y = rng.integers(10, side - 10, (2, n))
    flux = 150 * 10 ** (0.4 * np.minimum(-np.log10(rng.uniform(size=n)) / 0.3, 7))
    offset = np.arange(-6, 7)
    profile = np.exp(-(offset[:, None] ** 2 + offset**2) / 2 / 1.7**2)
    np.add.at(data, (y[:, None, None] + offset[:, None], x[:, None, None] + offset),
              flux[:, None, None] * profile / profile.sum())
    error = np.sqrt(data / 1.6 + 16).astype(np.float32)
    data += error * rng.standard_normal(data.shape, np.float32)
    bits = np.where(rng.random(data.shape) < 0.005, 2 ** rng.integers(0, 4, data.shape), 0).astype(np.uint8)
    return data, bits, error, Table({"x": x + 1.0, "y": y + 1.0, "flux": flux})


def write(path: Path, made: tuple, how: str, tile: tuple[int, int] | None) -> None:
    """The layout of BANZAI: an empty primary, SCI, CAT, BPM, ERR."""
    data, bits, error, catalog = made
    side = len(data)
    cards = fits.Header({"GAIN": 1.6, "RDNOISE": 6.4, "SATURATE": 100000.0, "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN",
                         "CRVAL1": 268.0, "CRVAL2": -30.0, "CRPIX1": side / 2, "CRPIX2": side / 2,
                         "CDELT1": -1e-4, "CDELT2": 1e-4})

    def packed(values: np.ndarray, name: str) -> fits.CompImageHDU:
        return fits.CompImageHDU(values, cards if name == "SCI" else None, name=name, compression_type=how,
                                 tile_shape=tile, quantize_level=16, quantize_method=1, dither_seed=1)

    fits.HDUList([fits.PrimaryHDU(), packed(data, "SCI"), fits.BinTableHDU(catalog, name="CAT"), packed(bits, "BPM"),
                  packed(error, "ERR")]).writeto(path)  # fmt: skip


def unpack(path: Path, region: Region | None = None) -> list[np.ndarray]:
    """The three planes with nothing done to them, whole or of a region."""
    with fits.open(path, memmap=False) as hdus:
        return [hdus[name].data if region is None else hdus[name].section[region.slices] for name in PLANES]


def measure(path: Path, region: Region, repeats: int) -> dict[str, float]:
    """Best times, seconds, and their ratios; the pixels have to be the same."""
    unpack_s, _ = best_of(lambda: unpack(path), repeats)
    tiles_s, _ = best_of(lambda: unpack(path, region), repeats)
    read_s, part = best_of(lambda: read_frame(path, region=region), repeats)
    whole_s, whole = best_of(lambda: cut(read_frame(path), region), 1)
    same = all(np.array_equal(getattr(part, n)[whole.mask == 0], getattr(whole, n)[whole.mask == 0])
               for n in ("data", "variance")) and np.array_equal(part.mask, whole.mask)
    if not same:
        raise SystemExit(f"the region of {path.name} must be that of the whole frame, got other pixels")
    times = {"unpack_s": unpack_s, "tiles_s": tiles_s, "read_region_s": read_s, "read_whole_s": whole_s}
    ratios = {"tiles_over_unpacking": tiles_s / unpack_s, "read_over_unpacking": read_s / unpack_s,
              "read_over_read": read_s / whole_s}
    return {name: float(f"{value:.3g}") for name, value in (times | ratios).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small frame; prints, keeps nothing")
    small = parser.parse_args().small
    side, size, repeats = (512, 50, 1) if small else (4096, 250, 5)
    region = Region(side // 2 - size // 3, side // 2 - size // 4, (size, size))
    figures, made = {}, planes(side)
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, (how, tile)) in enumerate(CASES.items()):
            path = Path(scratch) / f"{number}.fits.fz"
            write(path, made, how, tile)
            figures[name] = {"file_MB": round(path.stat().st_size / 1e6, 1), **measure(path, region, repeats)}
            path.unlink()
    if small:
        print(json.dumps(figures, indent=1))
    else:
        save("fpacked", {"side": side, "size": size, "cases": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
