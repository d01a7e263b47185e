"""Blind detection of what varies: the peaks of a score image, with what tells stars from artefacts."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from astropy.table import Table
from numpy.typing import NDArray
from photutils.detection import find_peaks
from photutils.utils.exceptions import NoDetectionsWarning
from scipy.spatial import cKDTree

from gpudia.errors import InputError
from gpudia.flags import CANDIDATE_FLAGS, PIXEL_FLAGS
from gpudia.model import Score
from gpudia.photometry.inputs import as_positions, check_plane
from gpudia.photometry.psf import check_psf, shifted_psf
from gpudia.photometry.stamps import FloatArray, Stamps

__all__ = ["DETECTION_COLUMNS", "KnownStars", "associate", "detect_peaks"]

#: Name, unit and description of the columns of a table of detections.
DETECTION_COLUMNS = (
    ("x", "pix", "0-based, in the region"), ("y", "pix", "0-based, in the region"),
    ("score", "", "significance, sigma; negative where the star is fainter than on the reference"),
    ("flux_diff", "", "of a star at the peak"), ("flux_diff_err", "", "1 sigma"),
    ("sharpness", "", "peak pixel over that of a star of this flux; 1 is a star"), ("sharpness_err", "", "1 sigma"),
    ("fwhm", "pix", "from moments; NaN where there are none"), ("ellipticity", "", "1 - b/a, from the same moments"),
    ("masked", "", "share of the star that masked pixels hide"),
    ("star", "", "row of the nearest star, -1: none"), ("distance", "pix", "to it"),
    ("flags", "", "bits of gpudia.flags.CANDIDATE_FLAGS"),
)

#: Peaks below this share of a brighter one within 3 FWHM are its side lobes, or what its PSF has wrong.
_LOBE = 0.1
_LOBE_REACH = 3.0
#: Peaks sharper than a star by more than this, less two sigma, are no stars.
_SHARP = 1.5
#: Largest distance, FWHM, and least ratio of the fluxes of two lobes that are a dipole.
_DIPOLE_REACH, _DIPOLE_RATIO = 1.5, 1 / 3
#: Share of a star within 1.5 FWHM that may be left by its subtraction.
_RESIDUAL = 0.02


@dataclass(frozen=True)
class KnownStars:
    """Stars of the reference: positions (S, 2), and fluxes (S,) in ADU of the image (NaN: not known)."""

    positions: FloatArray
    flux: FloatArray


def detect_peaks(score: Score, difference: NDArray[Any], variance: NDArray[Any], bits: NDArray[np.uint8], psf: Any,
                 fwhm: float, stars: KnownStars, threshold: float = 5.0) -> Table:
    """List the peaks of a score image, of either sign, that reach a threshold.

    Parameters
    ----------
    score : Score
        From `gpudia.score_image`, host side.
    difference, variance : (H, W)
        ADU, ADU^2.
    bits : (H, W)
        Bits of `gpudia.flags.PIXEL_FLAGS`.
    psf : (m, m)
        PSF of the image.
    fwhm : float
        Of the image, pixels.
    stars : KnownStars
        To find the nearest one, and what its subtraction may leave.
    threshold : float
        Least significance, sigma.

    Returns
    -------
    Table
        `DETECTION_COLUMNS`, the most significant first. Fluxes in ADU of the image. The position is that of a parabola
        through the peak, the score its value there: without it a star half-way between pixels loses some per cent.

    Raises
    ------
    InputError
        Shapes do not agree, or `fwhm` or `threshold` is not positive.
    """
    plane, flux, error, masked = (check_plane("score", part) for part in score)
    for name, other in {"difference": difference, "variance": variance, "bits": bits}.items():
        check_plane(name, other, plane.shape)
    for name, value in (("fwhm", fwhm), ("threshold", threshold)):
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} must be finite and positive, got {value}")
    pixels = np.concatenate([_peaks(sign * plane, threshold, fwhm) for sign in (1, -1)])
    x, y = pixels.T
    value = plane[y, x]
    keep = _without_lobes(pixels, value, fwhm)
    pixels, value = pixels[keep], value[keep]
    offsets, gain = _parabola(plane, pixels)
    table = _empty_table(len(pixels))
    x, y = pixels.T
    table["x"], table["y"] = (pixels + offsets).T
    table["score"], table["flux_diff"] = value * gain, flux[y, x] * gain
    table["flux_diff_err"], table["masked"] = error[y, x], masked[y, x]
    _add_shapes(table, difference, variance, bits, check_psf(psf), fwhm)
    _add_stars(table, stars)
    table["flags"] = _flags(table, bits, stars, fwhm)
    return table


def _empty_table(n: int) -> Table:
    table = Table()
    for name, unit, about in DETECTION_COLUMNS:
        dtype = np.int32 if name in ("star", "flags") else float
        table[name] = np.full(n, -1 if name == "star" else 0, dtype)
        table[name].unit, table[name].description = unit or None, about
    return table


def _peaks(score: FloatArray, threshold: float, fwhm: float) -> NDArray[np.int64]:
    """Local maxima (x, y) that reach the threshold, the highest first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoDetectionsWarning)
        filled = np.where(np.isfinite(score), score, -np.inf)
        found = find_peaks(np.nan_to_num(filled, neginf=-1e30), threshold, box_size=2 * math.ceil(fwhm / 2) + 1)
    if found is None:
        return np.empty((0, 2), np.int64)
    found.sort("peak_value", reverse=True)
    return np.column_stack([found["x_peak"], found["y_peak"]]).astype(np.int64)


def _without_lobes(pixels: NDArray[np.int64], value: FloatArray, fwhm: float) -> NDArray[np.int64]:
    """Peaks that are not side lobes of a brighter one; the most significant first."""
    order = np.argsort(-np.abs(value), kind="stable")
    if len(order) < 2:
        return order
    pairs = cKDTree(pixels).query_pairs(_LOBE_REACH * fwhm, output_type="ndarray")
    height = np.abs(value)
    faint = np.where(height[pairs[:, 0]] < height[pairs[:, 1]], pairs[:, 0], pairs[:, 1])
    bright = pairs.sum(axis=1) - faint
    lobes = set(faint[height[faint] < _LOBE * height[bright]].tolist())
    return np.array([i for i in order.tolist() if i not in lobes], np.int64)


def _parabola(score: FloatArray, pixels: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
    """Offset (x, y) of the vertex of a parabola through each peak, along either axis, and its height over the pixel's.

    None along an axis where a neighbour is missing.
    """
    padded = np.pad(score, 1, constant_values=np.nan)
    x, y = pixels.T + 1
    centre = padded[y, x]
    offsets, gain = np.zeros((len(pixels), 2)), np.ones(len(pixels))
    for axis, (dx, dy) in enumerate(((1, 0), (0, 1))):
        before, after = padded[y - dy, x - dx], padded[y + dy, x + dx]
        slope, bend = (after - before) / 2, before + after - 2 * centre
        usable = np.isfinite(slope) & (bend * centre < 0)
        move = np.clip(-np.where(usable, slope, 0.0) / np.where(usable, bend, 1.0), -0.5, 0.5)
        offsets[:, axis] = move
        gain += np.where(usable, (slope * move + bend * move**2 / 2) / centre, 0.0)
    return offsets, gain


def _add_shapes(table: Table, difference: NDArray[Any], variance: NDArray[Any], bits: NDArray[np.uint8],
                psf: FloatArray, fwhm: float) -> None:
    """Sharpness against the PSF; FWHM and ellipticity from moments under a Gaussian window."""
    size = 2 * math.ceil(1.5 * fwhm) + 1
    stamps = Stamps(np.column_stack([table["x"], table["y"]]), size)
    sign, flux = np.sign(table["score"])[:, None, None], np.asarray(table["flux_diff"])
    good = (stamps.gather(bits.astype(np.int32), outside=PIXEL_FLAGS.border) & ~PIXEL_FLAGS.clipped) == 0
    light = stamps.gather(difference)
    good &= np.isfinite(light)
    light = np.where(good, sign * light, 0.0)
    star = _cropped(shifted_psf(psf, stamps.offsets), size)
    near = slice(size // 2 - 1, size // 2 + 2)
    light9, star9, variance9 = (part[:, near, near].reshape(-1, 9) for part in (
        np.where(good, light, -np.inf), star, stamps.gather(variance)))
    rows, best = np.arange(len(table)), light9.argmax(axis=1)
    height, sigma = np.maximum(star9.max(axis=1), 1e-12), np.sqrt(variance9[rows, best])
    with np.errstate(invalid="ignore"):
        table["sharpness"] = light9[rows, best] / (np.abs(flux) * height)
        table["sharpness_err"] = sigma / (np.abs(flux) * height)
    table["fwhm"], table["ellipticity"] = _moments(light, stamps.offsets, fwhm)


def _cropped(stamps: FloatArray, size: int) -> FloatArray:
    """Central part of stamps (S, m, m), filled up with zeros where they are smaller."""
    missing = max(0, size - stamps.shape[-1] + 1) // 2
    stamps = np.pad(stamps, ((0, 0), (missing, missing), (missing, missing)))
    start = (stamps.shape[-1] - size) // 2
    return stamps[:, start:start + size, start:start + size]


def _moments(light: FloatArray, offsets: FloatArray, fwhm: float) -> tuple[FloatArray, FloatArray]:
    """FWHM and 1 - b/a: a Gaussian of covariance C under a window W has second moments (C^-1 + W^-1)^-1."""
    window = (fwhm / 2.3548) ** 2
    grid = np.arange(light.shape[-1]) - light.shape[-1] // 2
    dx, dy = grid - offsets[:, 0, None, None], grid[:, None] - offsets[:, 1, None, None]
    weighted = light * np.exp(-(dx**2 + dy**2) / (2 * window))
    total = weighted.sum(axis=(1, 2))
    xx, yy, xy = ((weighted * m).sum(axis=(1, 2)) / np.where(total > 0, total, np.nan)
                  for m in (dx**2, dy**2, dx * dy))
    with np.errstate(invalid="ignore", divide="ignore"):
        determinant = xx * yy - xy**2
        # the inverse of the covariance, and of that the eigenvalues
        a, b, c = yy / determinant - 1 / window, xx / determinant - 1 / window, -xy / determinant
        middle, half = (a + b) / 2, np.hypot((a - b) / 2, c)
        known = (determinant > 0) & (middle - half > 0)
        major, minor = (np.where(known, 1 / np.sqrt(middle + s * half), np.nan) for s in (-1, 1))
        return 2.3548 * np.sqrt((major**2 + minor**2) / 2), 1 - minor / major


def _add_stars(table: Table, stars: KnownStars) -> None:
    positions = as_positions(stars.positions)
    table["distance"] = np.nan
    if len(positions) and len(table):
        distance, index = cKDTree(positions).query(np.column_stack([table["x"], table["y"]]))
        table["star"], table["distance"] = index.astype(np.int32), distance
    table["distance"].unit = "pix"


def _flags(table: Table, bits: NDArray[np.uint8], stars: KnownStars, fwhm: float) -> NDArray[np.int32]:
    flags = np.zeros(len(table), np.int32)
    if not len(table):
        return flags
    flux = np.asarray(table["flux_diff"])
    sharp = np.asarray(table["sharpness"]) - 2 * np.asarray(table["sharpness_err"]) > _SHARP
    flags[sharp] |= CANDIDATE_FLAGS.cosmic_ray
    flags[np.asarray(table["masked"]) > 0.05] |= CANDIDATE_FLAGS.masked_pixels
    xy = np.column_stack([table["x"], table["y"]])
    around = Stamps(xy, 2 * math.ceil(2 * fwhm) + 1).gather(bits.astype(np.int32))
    flags[((around & PIXEL_FLAGS.saturated) != 0).any(axis=(1, 2))] |= CANDIDATE_FLAGS.saturated
    tree = cKDTree(xy)
    for i, j in tree.query_pairs(_DIPOLE_REACH * fwhm):
        if flux[i] * flux[j] < 0 and min(abs(flux[i] / flux[j]), abs(flux[j] / flux[i])) > _DIPOLE_RATIO:
            flags[[i, j]] |= CANDIDATE_FLAGS.dipole
    if len(stars.positions):
        near = cKDTree(as_positions(stars.positions)).query_ball_point(xy, 1.5 * fwhm)
        left = np.array([_RESIDUAL * np.nansum(stars.flux[group]) if group else 0.0 for group in near])
        flags[np.abs(flux) < left] |= CANDIDATE_FLAGS.bright_star
    return flags


def associate(positions: FloatArray, score: FloatArray, tolerance: float) -> NDArray[np.int64]:
    """Number the places on the sky that detections (x, y) of many epochs belong to, 0 being the most significant.

    The most significant detection that has no place yet takes all others without one within `tolerance`, pixels.
    """
    place = np.full(len(positions), -1, np.int64)
    if not len(positions):
        return place
    tree, count = cKDTree(positions), 0
    for i in np.argsort(-np.abs(score), kind="stable").tolist():
        if place[i] < 0:
            group = np.array(tree.query_ball_point(positions[i], tolerance))
            place[group[place[group] < 0]] = count
            count += 1
    return place
