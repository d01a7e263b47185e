"""Star lists: detected on a frame, or brought along by it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy.spatial import KDTree

from gpudia.errors import DataWarning, InputError
from gpudia.flags import PIXEL_FLAGS, SOURCE_FLAGS
from gpudia.images.centroids import Shapes, measure_shapes
from gpudia.images.cutouts import Region, shifted_wcs
from gpudia.images.frames import Frame
from gpudia.images.smoothing import gaussian, smoothed

__all__ = ["USED_BY_RUNS", "FrameQuality", "catalog_of", "detect_stars", "frame_quality"]

# Column names by the first pixel's number. FITS tables made by others (BANZAI, SExtractor) count from 1; photutils'
# tables, those of the layered files included, and our own count from 0.
_POSITIONS = {
    1: (("xwin", "ywin"), ("x", "y"), ("xwin_image", "ywin_image"), ("x_image", "y_image")),
    0: (("xcenter", "ycenter"), ("x_center", "y_center"), ("xcentroid", "ycentroid"), ("x_centroid", "y_centroid")),
}
_SKY = (("ra", "dec"), ("alpha_j2000", "delta_j2000"), ("raj2000", "dej2000"))
_FLUX = ("flux", "aperture_sum", "flux_auto", "phot_g_mean_flux")
_MAGNITUDE_ERRORS = ("mag_err", "magerr", "e_mag")
_IDS = ("source_id", "gaia_id", "id", "star_id", "name")
#: Columns, in lower case, without which a run has no use for the catalog of a frame.
USED_BY_RUNS = (*_IDS, "mag")

#: What `detect_stars` measures over the FWHM of a header.
_WIDER = 1.12
#: Peaks that tell how wide a star is.
_ENOUGH = 500


@dataclass(frozen=True)
class FrameQuality:
    """How good a frame is.

    Attributes
    ----------
    fwhm : float
        Median of bright unsaturated stars, pixels; NaN without any.
    ellipticity : float
        ``1 - b/a``, median of the same stars; NaN without any.
    n_stars : int
        Stars detected.
    sky, sky_noise : float
        ADU.
    saturated_fraction : float
        Share of the frame's pixels that are saturated.
    """

    fwhm: float
    ellipticity: float
    n_stars: int
    sky: float
    sky_noise: float
    saturated_fraction: float


def detect_stars(frame: Frame, max_stars: int = 5000, threshold: float = 5.0, fwhm: float | None = None) -> Table:
    """Find stars and measure their positions.

    Peaks of the frame after a Gaussian matched filter, measured with a Gaussian window as wide as the median star
    (found in up to three rounds). Peaks less than half as wide as the median star (cosmic rays, hot pixels) are left
    out. Widths are those of the Gaussian that fits best in that window: the FWHM of a Gaussian star, 12 % above the
    width at half maximum of a Moffat star with beta = 3.

    Parameters
    ----------
    frame : Frame
        Masked pixels take no part, saturated ones do.
    max_stars : int
        Keep so many, the most significant first.
    threshold : float
        Of the filtered peak, in sigma of the sky.
    fwhm : float, optional
        First guess, pixels; default: the header's, else 4.

    Returns
    -------
    Table
        Brightest first: ``id`` (running number from 1), ``x, y`` (0-based pixels), ``flux, flux_err`` (ADU, of the
        Gaussian that fits the window: right to a factor common to the frame), ``peak`` (ADU above the sky), ``fwhm``
        (pixels), ``ellipticity``, ``x_err, y_err`` (pixels, from the noise), ``ra, dec`` (degrees, where the frame has
        a WCS), ``flags`` (`gpudia.flags.SOURCE_FLAGS`). No rows where there is no star.
        ``meta["ids"]`` is ``"running"``: the ids mean nothing outside this table.

    Raises
    ------
    InputError
        `max_stars` or `threshold` is not positive.
    """
    if max_stars < 1 or not threshold > 0:
        raise InputError(f"max_stars and threshold must be positive, got {max_stars} and {threshold}")
    sky, noise, _ = frame.sky_maps
    usable = (frame.mask & ~np.uint8(PIXEL_FLAGS.saturated)) == 0
    image = np.where(usable, frame.data - sky, 0)
    width = fwhm or (_WIDER * frame.fwhm if 1 < frame.fwhm < 30 else 4.0)
    for _ in range(3):
        peaks = _peaks(image, noise, usable, width, threshold)[:max_stars]
        shapes = measure_shapes(image, frame.variance, usable, peaks[:_ENOUGH], width)
        before, width = width, _typical_width(shapes, default=width)
        if abs(width / before - 1) < 0.1:
            break
    shapes = measure_shapes(image, frame.variance, usable, peaks, width)
    return _star_table(frame, shapes.select(_distinct(shapes, width)), width)


def _peaks(image: NDArray, noise: NDArray, usable: NDArray, fwhm: float, threshold: float) -> NDArray[np.intp]:
    """Positions (row, column) of significant local maxima of the filtered image, most significant first."""
    sigma = fwhm / 2.3548
    smooth = smoothed(image.astype(np.float32, copy=False), gaussian(sigma, int(3 * sigma + 0.5)))
    # A normalised Gaussian filter lowers white noise by 2 sqrt(pi) sigma.
    significance = smooth * (2 * math.sqrt(math.pi) * sigma) / noise
    found = np.column_stack(divmod(np.flatnonzero(_tops(smooth) & (significance > threshold) & usable), image.shape[1]))
    found = found[_highest(smooth, found, max(1, round(0.6 * fwhm)))]
    return found[np.argsort(-significance[tuple(found.T)], kind="stable")]


def _tops(image: NDArray) -> NDArray[np.bool_]:
    """Say which pixels none of their eight neighbours exceeds."""
    padded = np.pad(image, 1, mode="edge")
    rows = np.maximum(np.maximum(padded[:, :-2], padded[:, 2:]), padded[:, 1:-1])
    return image >= np.maximum(np.maximum(rows[:-2], rows[2:]), rows[1:-1])


def _highest(image: NDArray, pixels: NDArray[np.intp], reach: int) -> NDArray[np.bool_]:
    """Say which of some pixels (N, 2) no other exceeds within a square of this reach."""
    return image[tuple(pixels.T)] >= _around(image, *pixels.T, reach).max(axis=1)


def _around(image: NDArray, rows: NDArray[np.intp], columns: NDArray[np.intp], reach: int) -> NDArray:
    """Pixels (N, m) of the squares of this reach about N pixels; beyond the edge its pixels are repeated."""
    window = np.arange(-reach, reach + 1)
    y, x = (np.clip(at[:, None] + window, 0, size - 1) for at, size in zip((rows, columns), image.shape, strict=True))
    return image.take((y[:, :, None] * image.shape[1] + x[:, None, :]).reshape(len(rows), window.size**2))


def _typical_width(shapes: Shapes, default: float) -> float:
    """Median FWHM of the brightest stars that are round enough and not cut."""
    good = np.isfinite(shapes.fwhm) & (shapes.flux > 10 * shapes.flux_err) & (shapes.coverage > 0.95)
    widths = shapes.fwhm[good][:200]  # in order of significance
    widths = widths[widths > 1.2]  # a hot pixel has 0.9
    return float(np.clip(np.median(widths), 1.5, 30)) if widths.size else default


def _distinct(shapes: Shapes, width: float) -> NDArray[np.bool_]:
    """Drop failed measurements, what is too sharp for a star, and the fainter of two that became one."""
    keep = np.isfinite(shapes.x) & (shapes.flux > 0) & ~(shapes.fwhm < 0.5 * width)
    index = np.flatnonzero(keep)
    for i, j in KDTree(np.column_stack([shapes.x, shapes.y])[index]).query_pairs(0.5 * width) if index.size else ():
        keep[index[max(i, j)]] = False
    return keep


def _star_table(frame: Frame, shapes: Shapes, width: float) -> Table:
    order = np.argsort(-shapes.flux, kind="stable")
    shapes = shapes.select(order)
    columns = {"id": np.arange(1, len(order) + 1)}
    for name in ("x", "y", "flux", "flux_err", "peak", "fwhm", "ellipticity", "x_err", "y_err"):
        columns[name] = getattr(shapes, name)
    if frame.wcs is not None:
        columns["ra"], columns["dec"] = frame.wcs.pixel_to_world_values(shapes.x, shapes.y)
    columns["flags"] = _star_flags(frame, shapes, width)
    return Table(columns, meta={"ids": "running"}, copy=False)


def _star_flags(frame: Frame, shapes: Shapes, width: float) -> NDArray[np.int32]:
    flags = np.zeros(len(shapes.x), np.int32)
    if not len(flags):
        return flags
    rows, columns = frame.shape
    at = np.clip(np.rint(shapes.y).astype(int), 0, rows - 1), np.clip(np.rint(shapes.x).astype(int), 0, columns - 1)
    bits = np.bitwise_or.reduce(_around(frame.mask, *at, round(width)), axis=1)
    flags[(bits & np.uint8(PIXEL_FLAGS.saturated)) > 0] |= SOURCE_FLAGS.saturated
    flags[(bits & ~np.uint8(PIXEL_FLAGS.saturated)) > 0] |= SOURCE_FLAGS.masked_pixels
    edge = np.minimum.reduce([shapes.x, shapes.y, columns - 1 - shapes.x, rows - 1 - shapes.y])
    flags[edge < width] |= SOURCE_FLAGS.outside
    pairs = KDTree(np.column_stack([shapes.x, shapes.y])).query_pairs(2 * width, output_type="ndarray")
    flags[pairs.ravel()] |= SOURCE_FLAGS.neighbour
    return flags


def frame_quality(frame: Frame, stars: Table) -> FrameQuality:
    """Sum up how good a frame is.

    Parameters
    ----------
    frame : Frame
        The frame.
    stars : Table
        What `detect_stars` found on it.

    Returns
    -------
    FrameQuality
        FWHM and ellipticity are those of up to 200 stars, the brightest without any flag; of all without saturation
        where fewer than 5 have none.
    """
    flags = np.asarray(stars["flags"])
    good = flags == 0
    if good.sum() < 5:
        good = (flags & SOURCE_FLAGS.saturated) == 0
    flux, flux_err, widths, shapes = (np.asarray(stars[c]) for c in ("flux", "flux_err", "fwhm", "ellipticity"))
    bright = np.flatnonzero(good & np.isfinite(widths))[:200]
    bright = bright[flux[bright] > 10 * flux_err[bright]]
    fwhm, ellipticity = (float(np.median(v[bright])) if len(bright) else math.nan for v in (widths, shapes))
    saturated = np.count_nonzero(frame.mask & np.uint8(PIXEL_FLAGS.saturated)) / frame.mask.size
    return FrameQuality(fwhm, ellipticity, len(stars), frame.sky, frame.sky_noise, saturated)


def catalog_of(catalog: Frame | Table, wcs: WCS | None = None, first_pixel: int | None = None) -> Table | None:
    """Bring a catalog that came with a frame into a common form.

    Column names are compared without regard to case. Columns ``x, y`` and ``xwin, ywin`` (BANZAI; SExtractor's
    ``*_IMAGE``) count pixels from 1, as FITS does; ``xcenter, ycenter`` (the layered files' aperture table) and
    ``xcentroid, ycentroid`` (photutils) from 0.

    Parameters
    ----------
    catalog : Frame or Table
        A frame with a catalog, or the table itself.
    wcs : WCS, optional
        Of the full frame; used where positions or sky positions are missing. Default: the frame's.
    first_pixel : {0, 1}, optional
        Number of the first pixel, where the rule above does not hold.

    Returns
    -------
    Table or None
        ``id, x, y`` (0-based, in the full frame), ``ra, dec`` (degrees), ``flux``, ``mag`` and ``mag_err`` where known;
        rows without a position are left out, of rows with the same id the first is kept (with a `DataWarning`).
        ``meta["ids"]`` is ``"catalog"``, or ``"running"`` where the ids are missing or only number the rows. None where
        there is no catalog or no position in it.
    """
    if isinstance(catalog, Frame):
        wcs = wcs or _full_wcs(catalog)
        catalog = catalog.catalog
    if catalog is None or not len(catalog):
        return None
    columns = _named_columns(catalog, "iuf")
    table = Table()
    sky = _pair(columns, _SKY)
    if sky:
        table["ra"], table["dec"] = (_plain(catalog[c]) for c in sky)
    for first, names in _POSITIONS.items():
        pair = _pair(columns, names)
        if pair and "x" not in table.colnames:
            origin = first if first_pixel is None else first_pixel
            table["x"], table["y"] = (_plain(catalog[c]) - origin for c in pair)
    if "x" not in table.colnames and sky and wcs is not None:
        table["x"], table["y"] = wcs.world_to_pixel_values(table["ra"], table["dec"])
    if "x" not in table.colnames:
        return None
    if not sky and wcs is not None:
        table["ra"], table["dec"] = wcs.pixel_to_world_values(table["x"], table["y"])
    flux = next((columns[c] for c in _FLUX if c in columns), None)
    if flux:
        table["flux"] = _plain(catalog[flux])
    if "mag" in columns:
        error = next((columns[c] for c in _MAGNITUDE_ERRORS if c in columns), None)
        table["mag"] = _plain(catalog[columns["mag"]])
        table["mag_err"] = np.nan if error is None else _plain(catalog[error])
    columns = _named_columns(catalog, "iufSU")
    return _with_ids(table, catalog, next((columns[c] for c in _IDS if c in columns), None))


def _full_wcs(frame: Frame) -> WCS | None:
    """World coordinates of the full frame that a frame is a part of."""
    x0, y0 = frame.origin
    return frame.wcs if (x0, y0) == (0, 0) else shifted_wcs(frame.wcs, Region(-x0, -y0, frame.shape))


def _named_columns(catalog: Table, kinds: str) -> dict[str, str]:
    """Names by themselves in lower case, of columns with one entry a row of these kinds of dtype."""
    return {c.name.lower(): c.name for c in catalog.columns.values() if c.ndim == 1 and c.dtype.kind in kinds}


def _pair(columns: dict[str, str], names: tuple[tuple[str, str], ...]) -> tuple[str, str] | None:
    return next(((columns[a], columns[b]) for a, b in names if a in columns and b in columns), None)


def _plain(column: object) -> NDArray[np.float64]:
    values = np.ma.filled(np.ma.asarray(column).astype(float), np.nan)
    return np.array(values, dtype=np.float64)


def _with_ids(table: Table, catalog: Table, name: str | None) -> Table:
    ids = np.asarray(catalog[name]) if name else np.arange(1, len(catalog) + 1)
    running = ids.dtype.kind in "iuf" and (np.array_equal(ids, np.arange(len(ids)) + ids[0]) and ids[0] in (0, 1))
    table.add_column(ids, name="id", index=0)
    table.meta["ids"] = "running" if name is None or running else "catalog"
    table = table[np.isfinite(table["x"]) & np.isfinite(table["y"])]
    _, first = np.unique(np.asarray(table["id"]), return_index=True)
    if len(first) < len(table):
        warnings.warn(f"catalog ids must be unique, got {len(table) - len(first)} repeated; the first of each is kept",
                      DataWarning, stacklevel=3)  # fmt: skip
    return table[np.sort(first)]
