"""Simulated series as files."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TypeAlias

from astropy.io import fits
from astropy.table import Table

from gpudia.errors import InputError
from gpudia.simulate.field import SimulatedFrame, SimulatedSeries

__all__ = ["write_series"]

LAYOUTS = ("lco", "plain")
_Hdu: TypeAlias = fits.PrimaryHDU | fits.ImageHDU | fits.CompImageHDU | fits.BinTableHDU


def write_series(
    series: SimulatedSeries,
    folder: str | PathLike[str],
    layout: str = "lco",
    compress: bool = False,
    catalog_ids: bool = False,
) -> list[Path]:
    """Write the frames as FITS files and the truth as ``truth.ecsv``.

    ``layout="lco"`` writes what the LCO pipeline BANZAI does: SCI (first; its header has everything), CAT, BPM
    (uint8 bits) and ERR, found by EXTNAME. CAT has the columns ``x, y, flux, fluxerr, fwhm, ra, dec``, brightest
    first, where **x and y are 1-based** (FITS convention), as BANZAI writes them. ``layout="plain"`` writes the
    image alone, with the same header.

    Parameters
    ----------
    series : SimulatedSeries
        What to write.
    folder : path-like
        Made when it is not there; files of the same names in it are replaced.
    layout : {"lco", "plain"}
        As above.
    compress : bool
        Write ``.fits.fz``: an empty primary HDU and tile-compressed images, lossless (GZIP_2 for floating point,
        RICE_1 for integers).
    catalog_ids : bool
        Add the true ``id`` of each star to CAT (BANZAI has none).

    Returns
    -------
    list of pathlib.Path
        The FITS files in the order of the frames.

    Raises
    ------
    InputError
        When `layout` is not one of the two.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for frame in series.frames:
        hdus: list[_Hdu] = [fits.PrimaryHDU(frame.data, _header(frame))]
        if layout == "lco":
            hdus[0].name = "SCI"
            hdus += _lco_layers(frame, _catalog(series, frame.index, catalog_ids))
        path = folder / f"{frame.name}.fits{'.fz' if compress else ''}"
        fits.HDUList(_compressed(hdus) if compress else hdus).writeto(path, overwrite=True)
        paths.append(path)
    _truth_with_epochs(series, paths).write(folder / "truth.ecsv", overwrite=True)
    return paths


def _header(frame: SimulatedFrame) -> fits.Header:
    header = fits.Header(frame.header)
    wcs = frame.wcs.wcs
    for axis in (1, 2):
        header[f"CTYPE{axis}"] = wcs.ctype[axis - 1]
        header[f"CUNIT{axis}"] = "deg"
        header[f"CRPIX{axis}"] = wcs.crpix[axis - 1]
        header[f"CRVAL{axis}"] = wcs.crval[axis - 1]
        for other in (1, 2):
            header[f"CD{axis}_{other}"] = wcs.cd[axis - 1, other - 1]
    header["RADESYS"] = wcs.radesys
    return header


def _catalog(series: SimulatedSeries, epoch: int, with_ids: bool) -> Table:
    table = series.catalog(epoch)
    table["x"] += 1
    table["y"] += 1
    names = ["x", "y", "flux", "fluxerr", "fwhm", "ra", "dec"]
    return table[["id", *names] if with_ids else names]


def _lco_layers(frame: SimulatedFrame, catalog: Table) -> list[_Hdu]:
    return [
        fits.BinTableHDU(catalog, name="CAT"),
        fits.ImageHDU(frame.mask, name="BPM"),
        fits.ImageHDU(frame.error, name="ERR"),
    ]


def _compressed(hdus: list[_Hdu]) -> list[_Hdu]:
    return [fits.PrimaryHDU(), *(h if isinstance(h, fits.BinTableHDU) else _compressed_image(h) for h in hdus)]


def _compressed_image(hdu: fits.PrimaryHDU | fits.ImageHDU) -> fits.CompImageHDU:
    # Quantisation off: the default would round floating point pixels to a fraction of their noise.
    method = "GZIP_2" if hdu.data.dtype.kind == "f" else "RICE_1"
    return fits.CompImageHDU(hdu.data, hdu.header, hdu.name or None, compression_type=method, quantize_level=0)


def _truth_with_epochs(series: SimulatedSeries, paths: list[Path]) -> Table:
    """Stars with their flux in every epoch; the epochs are described in the table's meta data."""
    table = series.truth.copy()
    table.meta["target"] = 0
    table.meta["reference"] = paths[series.reference_index].name
    table.meta["epochs"] = [
        {"file": path.name, "mjd": frame.mjd, "transparency": frame.transparency, "scale": frame.scale,
         "fwhm": frame.fwhm, "target_flux": float(table["flux"][0][frame.index]),
         "target_floor": series.cramer_rao(0, frame.index)}
        for path, frame in zip(paths, series.frames, strict=True)
    ]  # fmt: skip
    return table
