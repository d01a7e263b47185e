"""The layered file of one image: its original layers as they are, and the results of the difference beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS, Sip
from numpy.polynomial.polynomial import polyval2d

from gpudia.images import Region, Registration, whole_frame, write_hdus
from gpudia.model import DifferenceStack

__all__ = ["layer_names", "result_layers", "wcs_of_image", "write_layers"]

#: Layers of results; older ones of these names are replaced.
_RESULTS = ("WCS", "DIA_PHOT", "DIFF", "DIFF_ERR", "DIFF_MASK", "KERNEL")


def layer_names(path: Path) -> list[str]:
    """Names of the HDUs in a file, which is closed again."""
    with path.open("rb") as file, fits.open(file, memmap=False) as hdus:
        return [hdu.name for hdu in hdus]


def write_layers(original: Path, results: Sequence[Any], output: Path) -> Path:
    """Write the layers of a file, those of earlier results left out, and then `results`; whole or not at all."""
    # Compressed and scaled layers are copied as they are, never unpacked and packed again.
    with original.open("rb") as file, fits.open(
            file, memmap=False, disable_image_compression=True, do_not_scale_image_data=True) as hdus:
        kept = [hdu for hdu in hdus if hdu is hdus[0] or hdu.name not in _RESULTS]
        return write_hdus(fits.HDUList([*kept, *results]), output)


def result_layers(stack: DifferenceStack, bits: np.ndarray, table: Table, cards: fits.Header, cutout_wcs: WCS,
                  image_wcs: WCS) -> list[Any]:
    """Make the layers of results.

    Parameters
    ----------
    stack : DifferenceStack
        Of one image, host side.
    bits : (H, W) uint8
        Pixel flags.
    table : Table
        Aperture photometry.
    cards : Header
        Provenance, for the difference.
    cutout_wcs, image_wcs : WCS
        Of the difference's pixels, and of the original image's.

    Returns
    -------
    list of HDU
        WCS, DIA_PHOT, DIFF, DIFF_ERR, DIFF_MASK, KERNEL.
    """
    header = cards.copy()
    header.update(cutout_wcs.to_header(relax=True))
    photometry = fits.table_to_hdu(table)
    photometry.name = "DIA_PHOT"
    with np.errstate(invalid="ignore"):
        error = np.sqrt(stack.variance[0])
    planes = {"DIFF": stack.difference[0], "DIFF_ERR": error, "DIFF_MASK": bits}
    return [fits.ImageHDU(header=image_wcs.to_header(relax=True), name="WCS"), photometry,
            *(fits.ImageHDU(plane, header=header, name=name) for name, plane in planes.items()),
            fits.ImageHDU(stack.kernel[0], header=cards, name="KERNEL")]


def wcs_of_image(wcs: WCS, registration: Registration, shape: tuple[int, int]) -> WCS:
    """World coordinates of an image's own pixels: those of the reference, moved by the registration.

    With p_image = A p + t the linear part becomes CD A^-1 about A crpix + t. A SIP distortion s(u) becomes
    A s(A^-1 u), a polynomial of the same degree. Both are exact; distortion tables are left out, and of a registration
    with polynomial terms the affine map that is nearest to it over the frame is taken.

    Parameters
    ----------
    wcs : WCS
        Of the reference, whole frame.
    registration : Registration
        From the reference to the image.
    shape : (H, W)
        Of the image.
    """
    straight = registration.local(_reference_area(registration, shape))[0]
    turn = straight[:, :2]
    moved = WCS(wcs.to_header(relax=True))
    moved.wcs.crpix = turn @ (wcs.wcs.crpix - 1) + straight[:, 2] + 1
    moved.wcs.pc = wcs.pixel_scale_matrix @ np.linalg.inv(turn)
    moved.wcs.cdelt = 1.0, 1.0
    if wcs.sip is not None:
        moved.sip = _moved_sip(wcs.sip, turn, moved.wcs.crpix, max(shape))
    return moved


def _reference_area(registration: Registration, shape: tuple[int, int]) -> Region:
    """Pixels of the reference that an image of this shape covers."""
    corners = registration.to_reference(whole_frame(shape).corners)
    low, high = np.floor(corners.min(axis=0)).astype(int), np.ceil(corners.max(axis=0)).astype(int)
    return Region(int(low[0]), int(low[1]), (int(high[1] - low[1] + 1), int(high[0] - low[0] + 1)))


def _moved_sip(sip: Sip, turn: np.ndarray, crpix: np.ndarray, side: int) -> Sip:
    """Coefficients of A s(A^-1 u), through its values on a grid (in units of the frame's side, for good condition)."""
    degree = max(len(sip.a), len(sip.b)) - 1
    p, q = (v.ravel() for v in np.mgrid[:degree + 1, :degree + 1])
    terms = (p + q >= 2) & (p + q <= degree)
    u = np.stack([v.ravel() for v in np.mgrid[-1:1:20j, -1:1:20j]])
    x, y = np.linalg.inv(turn) @ (side * u)
    values = turn @ np.stack([polyval2d(x, y, c) for c in (sip.a, sip.b)])
    fit = np.linalg.lstsq((u[0][:, None] ** p * u[1][:, None] ** q)[:, terms], values.T, rcond=None)[0]
    planes = np.zeros((2, (degree + 1) ** 2))
    planes[:, terms] = fit.T / float(side) ** (p + q)[terms]
    a, b = planes.reshape(2, degree + 1, degree + 1)
    return Sip(a, b, None, None, crpix)
