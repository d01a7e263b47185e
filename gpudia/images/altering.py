"""Copies of frames with light added: the same file, but for the pixels of the image and of its error plane."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from numpy.typing import NDArray

from gpudia.images.headers import FrameLayout
from gpudia.images.reading import _image_hdu, _named
from gpudia.images.writing import write_hdus

__all__ = ["copy_with_light"]


def copy_with_light(source: Path, target: Path, light: NDArray[np.float64], gain: float = float("nan"),
                    layout: FrameLayout | None = None) -> Path:
    """Write a copy of a FITS file with light added to its image; all else stays as it is, compression excepted.

    Parameters
    ----------
    source, target : Path
        The file and where to write.
    light : (H, W)
        ADU, with its own noise. Sums are rounded and limited to the range of an image of integers.
    gain : float
        e-/ADU, by which an error plane grows: error^2 + light / gain. Not finite or not positive: it stays.
    layout : FrameLayout, optional
        Names of the HDUs.

    Raises
    ------
    FrameError
        No image is found.
    """
    layout = layout or FrameLayout()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AstropyWarning)
        with source.open("rb") as file, fits.open(file, memmap=False) as hdus:
            image = _image_hdu(hdus, layout, source)
            copies = fits.HDUList()
            for hdu in hdus:
                data = None
                if hdu is image:
                    data = _sum(hdu.data, light)
                elif hdu.is_image and _named(hdu, layout.error_hdu) and gain > 0:
                    squared = np.asarray(hdu.data, float) ** 2 + np.maximum(light, 0).reshape(hdu.data.shape) / gain
                    data = np.sqrt(squared).astype(hdu.data.dtype.newbyteorder("="))
                elif isinstance(hdu, fits.CompImageHDU):
                    data = hdu.data
                copies.append(hdu.copy() if data is None else _of_kind(hdu, data, not len(copies)))
            return write_hdus(copies, target)


def _sum(data: NDArray, light: NDArray[np.float64]) -> NDArray:
    """Add light to pixels and keep their kind of number."""
    kind = data.dtype.newbyteorder("=")
    total = np.asarray(data, float) + light.reshape(data.shape)
    if kind.kind not in "iu":
        return total.astype(kind)
    limits = np.iinfo(kind)
    return np.clip(np.rint(total), limits.min, limits.max).astype(kind)


def _of_kind(hdu: fits.ImageHDU, data: NDArray, first: bool) -> fits.PrimaryHDU | fits.ImageHDU:
    header = hdu.header.copy(strip=True)
    for key in ("BSCALE", "BZERO", "CHECKSUM", "DATASUM"):
        header.remove(key, ignore_missing=True, remove_all=True)
    return fits.PrimaryHDU(data, header) if first else fits.ImageHDU(data, header, name=hdu.name or None)
