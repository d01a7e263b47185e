"""The layered file of one image: its original layers as they are, and the results of the difference beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from astropy.wcs.utils import fit_wcs_from_points

from gpudia.images import Registration, write_hdus
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

    With p_image = A p + t the linear part becomes CD A^-1 about A crpix + t, exactly. Distortions by SIP or tables are
    functions of the reference's pixels: there a new SIP is fitted to a grid of positions.

    Parameters
    ----------
    wcs : WCS
        Of the reference, whole frame.
    registration : Registration
        From the reference to the image.
    shape : (H, W)
        Of the image.
    """
    if wcs.has_distortion:
        y, x = (v.ravel() for v in np.meshgrid(*(np.linspace(0, n - 1, 20) for n in shape), indexing="ij"))
        there = registration.inverse().apply(np.column_stack([x, y]))
        return fit_wcs_from_points((x, y), wcs.pixel_to_world(*there.T), sip_degree=4)
    moved = WCS(wcs.to_header(relax=True))
    moved.wcs.crpix = registration.apply(wcs.wcs.crpix - 1) + 1
    moved.wcs.pc = wcs.pixel_scale_matrix @ np.linalg.inv(registration.matrix[:, :2])
    moved.wcs.cdelt = 1.0, 1.0
    return moved
