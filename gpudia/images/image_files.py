"""FITS files of a few images, written at the speed of the disk: headers that repeat are made once.

astropy takes ten times as long for the headers of a difference file as for its pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from gpudia.images.writing import write_atomically

__all__ = ["write_images"]

_BLOCK = 2880
_NO_SUM = "0" * 16


def write_images(path: str | Path, cards: fits.Header, images: Mapping[str, NDArray],
                 headers: Mapping[str, fits.Header] | None = None) -> Path:
    """Write a FITS file with one extension for each image, with checksums, whole or not at all.

    Parameters
    ----------
    path : str or path-like
        The file.
    cards : Header
        Of the primary HDU, which has no data.
    images : mapping of str to ndarray
        Pixels by EXTNAME: uint8, float32 or float64.
    headers : mapping of str to Header, optional
        Further cards by EXTNAME.

    Returns
    -------
    Path
        The file; errors as in `write_atomically`.
    """
    primary = fits.PrimaryHDU(header=cards)
    primary.add_checksum()
    parts = [primary.header.tostring().encode("ascii")]
    for name, image in images.items():
        more = (headers or {}).get(name)
        parts += _hdu(_header(name, image.dtype.str, image.shape, "" if more is None else more.tostring()), image)
    return write_atomically(path, lambda p: p.write_bytes(b"".join(parts)))


@lru_cache(maxsize=64)
def _header(name: str, dtype: str, shape: tuple[int, ...], cards: str) -> bytes:
    """Header of an image, with sums that are still to be filled in."""
    hdu = fits.ImageHDU(np.zeros(shape, dtype), header=fits.Header.fromstring(cards), name=name)
    hdu.header["CHECKSUM"] = (_NO_SUM, "HDU checksum")
    hdu.header["DATASUM"] = (_NO_SUM, "data unit checksum")
    return bytes(hdu.header.tostring().encode("ascii"))


def _hdu(header: bytes, image: NDArray) -> list[bytes]:
    """Header and data of one HDU."""
    data = np.ascontiguousarray(image, image.dtype.newbyteorder(">")).tobytes()
    data += bytes(-len(data) % _BLOCK)
    datasum = _sum(data)
    header = _filled(header, b"DATASUM ", f"{datasum:<16d}")
    return [_filled(header, b"CHECKSUM", _encoded(_folded(_sum(header) + datasum))), data]


def _filled(header: bytes, keyword: bytes, value: str) -> bytes:
    """Put 16 characters into the card of a keyword."""
    at = header.index(keyword + b"= '")
    at += 11
    return header[:at] + value.encode("ascii") + header[at + 16:]


def _sum(data: bytes) -> int:
    """Ones' complement sum of the 32-bit words of a data unit [FITS 4.0, appendix J]."""
    return _folded(int(np.frombuffer(data, ">u4").sum(dtype=np.uint64)))


def _folded(total: int) -> int:
    while total >> 32:
        total = (total & 0xFFFFFFFF) + (total >> 32)
    return total


def _encoded(total: int) -> str:
    """The sum's complement in 16 letters and digits, so that the HDU with it adds up to -0 [FITS 4.0, appendix J]."""
    quarters = np.zeros((4, 4), int)
    for k, byte in enumerate((~total & 0xFFFFFFFF).to_bytes(4, "big")):
        quarters[:, k] = byte // 4 + ord("0")
        quarters[0, k] += byte % 4
        for pair in (0, 2):
            while any(not chr(c).isalnum() for c in quarters[pair:pair + 2, k]):
                quarters[pair, k] += 1
                quarters[pair + 1, k] -= 1
    text = "".join(map(chr, quarters.ravel()))
    return text[-1] + text[:-1]
