"""Sky, noise, and what a header does not say: gain, saturation level, unexposed parts of the detector."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from gpudia.errors import InputError
from gpudia.images.smoothing import smoothed

__all__ = [
    "NOISE_SOURCES",
    "SkyMaps",
    "estimate_variance",
    "expected_noise",
    "guess_gain",
    "guess_saturation",
    "measure_sky",
    "noise_ratio",
    "sky_and_noise",
    "unexposed",
]

#: What variances can be made of: see `estimate_variance`.
NOISE_SOURCES = ("auto", "header", "data")

#: Side of the meshes in which sky and noise are measured: several times the widest PSF, small against the sky's slope.
MESH = 32


class SkyMaps(NamedTuple):
    """What `measure_sky` found: `sky` and `noise` of shape (H, W), ADU; `white`, the noise without what is correlated
    between neighbouring pixels, be it by resampling or because it is the light of stars too crowded to be told apart.
    """

    sky: NDArray[np.float32]
    noise: NDArray[np.float32]
    white: NDArray[np.float32]


def sky_and_noise(
    data: NDArray, mask: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Measure the smooth sky and the noise of one sky pixel.

    The sky is the clipped mode ``2.5 median - 1.5 mean`` of meshes of 32 px [Bertin & Arnouts 1996]. The noise is
    the scaled median absolute value of the second differences ``[1, -2, 1] x [1, -2, 1] / 6`` [Immerkaer 1996], which
    the light of stars hardly touches: in a field with a star every 80 px it is 2 % too large, a clipped standard
    deviation 23 %. Second differences miss noise that is correlated between neighbouring pixels (resampled frames);
    the whole map is therefore scaled by the ratio of the two measures in the emptiest tenth of the meshes, if above 1.

    Parameters
    ----------
    data : ndarray, shape (H, W)
        Image, ADU.
    mask : ndarray of bool, shape (H, W), optional
        True = ignore.

    Returns
    -------
    sky, noise : ndarray of float32, shape (H, W)
        ADU, and ADU (1 sigma). The noise is positive unless the frame is constant.

    Raises
    ------
    InputError
        `data` is not 2-D or no pixel of it is good.
    """
    return measure_sky(data, mask)[:2]


def measure_sky(data: NDArray, mask: NDArray[np.bool_] | None = None) -> SkyMaps:
    """Measure sky and noise as `sky_and_noise` does (same arguments and errors), and the share that is white."""
    if data.ndim != 2:
        raise InputError(f"data must be two-dimensional, got shape {data.shape}")
    good = np.isfinite(data) if mask is None else np.isfinite(data) & ~mask
    if not good.any():
        raise InputError("mask must leave at least one finite pixel of data, got none")
    level, spread, rough = _mesh_values(np.where(good, data, np.nan).astype(np.float32, copy=False))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = spread / rough
    ratio = ratio[np.isfinite(ratio) & (ratio > 0.1)]  # meshes with hardly a pixel have no spread but rounding
    correlation = max(1.0, float(np.percentile(ratio, 10))) if ratio.size else 1.0
    noise = np.where(rough > 0, rough * correlation, spread)  # coarsely quantised data have no second differences
    sky, noise = _smooth_maps((level, noise), data.shape)
    return SkyMaps(sky, noise, noise / np.float32(correlation))


def _mesh_values(image: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Clipped mode, clipped standard deviation and second-difference noise (h, w) of every mesh; NaN is left out.

    Meshes with too few good pixels take the median of the others.
    """
    difference = np.diff(np.diff(np.pad(image, 1, mode="edge"), 2, axis=0), 2, axis=1)
    difference /= 6
    pixels, rough = _meshes(image), _meshes(np.abs(difference, out=difference))
    count = np.count_nonzero(np.isfinite(rough), axis=-1)  # of differences that touch no masked pixel
    enough = count > 0.25 * rough.shape[-1]
    if not enough.any():  # hardly a good pixel anywhere: take whatever there is
        enough = np.isfinite(pixels).any(axis=-1)
        rough = np.where(np.isnan(rough), np.abs(pixels - np.nanmedian(pixels)), rough)
        count = np.isfinite(rough).sum(axis=-1)
    median, mean, spread = _clipped(pixels[enough])
    noise = 1.4826 * _middle(np.sort(rough[enough], axis=-1), 0, count[enough])
    maps = []
    for values in (2.5 * median - 1.5 * mean, spread, noise):
        maps.append(np.full(enough.shape, np.median(values)))
        maps[-1][enough] = values
    maps[1][~enough] = 0.0  # no pixels, no spread
    return maps[0], maps[1], maps[2]


def _clipped(values: NDArray, sigma: float = 3.0, rounds: int = 5) -> tuple[NDArray, NDArray, NDArray]:
    """Median, mean and standard deviation along the last axis of (N, n), NaN left out, clipped about the median."""
    values = np.sort(values, axis=-1)  # what is kept is a range then; NaN comes last
    first, finite = np.zeros(len(values), np.intp), np.isfinite(values).sum(axis=-1)
    count = finite
    origin = _middle(values, first, count)
    offset = values - origin[:, None]
    offset[np.isnan(offset)] = 0.0
    row = np.arange(len(values))
    for _ in range(rounds + 1):
        before, median = count, _middle(values, first, first + count)
        mean = offset.sum(axis=-1) / count
        spread = np.sqrt(np.maximum(np.vecdot(offset, offset) / count - mean**2, 0))
        low, high = ((median + k * spread).astype(values.dtype)[:, None] for k in (-sigma, sigma))
        above = values > high
        kept = (values >= low) & ~above
        first, last = kept.argmax(axis=-1), above.argmax(axis=-1)
        count = np.where(kept[row, first], np.where(last > 0, last, finite) - first, 0)
        if (count == before).all():
            break
        np.copyto(offset, 0.0, where=~kept)
    return median, origin + mean, spread


def _middle(ordered: NDArray, first: NDArray | int, last: NDArray) -> NDArray[np.float64]:
    """Medians of the entries from `first` to before `last` of each row of (N, n), in ascending order."""
    row, half = np.arange(len(ordered)), first + last
    return (ordered[row, (half - 1) // 2].astype(np.float64) + ordered[row, half // 2]) / 2


def _meshes(image: NDArray) -> NDArray:
    """Cut an (H, W) image into (h, w, n) meshes, padded with NaN."""
    side = min(MESH, *image.shape)
    h, w = (-(-size // side) for size in image.shape)
    padded = np.full((h * side, w * side), np.nan, np.float32)
    padded[: image.shape[0], : image.shape[1]] = image
    return padded.reshape(h, side, w, side).swapaxes(1, 2).reshape(h, w, side * side)


def _smooth_maps(meshes: tuple[NDArray, ...], shape: tuple[int, ...]) -> list[NDArray[np.float32]]:
    """Median-filter the meshes of some maps 3 x 3 and interpolate them linearly to every pixel."""
    side = min(MESH, *shape)
    rows, columns = (_hats(size, count, side) for size, count in zip(shape, meshes[0].shape, strict=True))
    smooth = (ndimage.median_filter(mesh, size=3, mode="nearest") for mesh in meshes)
    return [(rows @ mesh @ columns.T).astype(np.float32) for mesh in smooth]


def _hats(size: int, count: int, side: int) -> NDArray[np.float64]:
    """Weights (size, count) of the meshes for every pixel along one axis: linear from centre to centre."""
    place = np.clip((np.arange(size) + 0.5) / side - 0.5, 0, count - 1)
    return np.maximum(1 - np.abs(place[:, None] - np.arange(count)), 0)


def estimate_variance(
    data: NDArray,
    mask: NDArray[np.bool_] | None = None,
    gain: float = np.nan,
    read_noise: float = np.nan,
    maps: tuple[NDArray, NDArray] | SkyMaps | None = None,
    source: str = "auto",
) -> NDArray:
    """Variance of every pixel of a frame without an error plane.

    ``auto``: ``max(noise^2, (read_noise/gain)^2) + max(smooth(data) - sky, 0)/gain``, where sky and noise are measured
    in the frame itself (`sky_and_noise`): this holds for sky-subtracted frames too and survives a wrong gain where
    there is only sky. ``data``: the same without the read noise, which lifts the noise of averaged frames too high.
    ``header``: ``max(smooth(data), 1/gain)/gain + (read_noise/gain)^2``, for frames with their whole sky in them whose
    noise cannot be measured (no empty sky between the stars). The data are smoothed (3 x 3 mean) so that the variance
    does not follow the noise.

    Parameters
    ----------
    data : ndarray, shape (H, W)
        Image, ADU.
    mask : ndarray of bool, shape (H, W), optional
        True = ignore.
    gain : float
        e-/ADU. Not finite or not positive: unknown, the photon noise of stars is left out.
    read_noise : float
        e-. Not finite: unknown.
    maps : pair of ndarray, shape (H, W), optional
        What `sky_and_noise` gave for the same data, when it is there already.
    source : {"auto", "header", "data"}
        What the variance is made of.

    Returns
    -------
    ndarray, shape (H, W)
        ADU^2, positive and finite; float32, or float64 for float64 data.

    Raises
    ------
    InputError
        `source` is unknown, or "header" without a gain and a read noise.
    """
    if source not in NOISE_SOURCES:
        raise InputError(f"source must be one of {', '.join(NOISE_SOURCES)}, got {source!r}")
    if source == "header" and not (gain > 0 and read_noise >= 0):
        raise InputError(f"gain and read_noise must be known for source='header', got {gain} and {read_noise}")
    sky, noise = sky_and_noise(data, mask) if maps is None else maps[:2]
    variance = noise.astype(np.float64) ** 2
    gain = np.float64(gain)
    with np.errstate(over="ignore"):  # an absurd gain leads beyond any number
        read = np.square(read_noise / gain) if gain > 0 else np.nan
    if source == "auto" and gain > 0 and read_noise >= 0:
        variance = np.maximum(variance, read)
    if gain > 0:
        good = np.isfinite(data) if mask is None else np.isfinite(data) & ~mask
        box = np.ones(3)
        excess = smoothed(np.where(good, data - sky, 0.0), box) / np.maximum(smoothed(good.astype(np.float32), box), 1)
        with np.errstate(over="ignore"):
            if source == "header":
                variance = np.maximum(sky + excess, 1 / gain) / gain + read
            else:
                variance += np.maximum(excess, 0) / gain
    single = np.finfo(np.float32)
    return np.clip(variance, single.tiny, single.max).astype(np.float64 if data.dtype == np.float64 else np.float32)


def expected_noise(
    maps: SkyMaps, gain: float, read_noise: float = np.nan, step: float = 0.0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Least and largest noise that gain and read noise allow for the sky.

    The two agree where the sky stands at least 10 sigma above zero. Elsewhere some of it may have been subtracted: the
    noise is at least the read noise, and may be anything above it.

    Parameters
    ----------
    maps : SkyMaps
        Of the frame.
    gain, read_noise : float
        e-/ADU, positive, and e-; a read noise that is not finite counts as zero.
    step : float
        Quantum of the data, ADU: 1 for integers.

    Returns
    -------
    lowest, highest : ndarray of float32, shape (H, W)
        ADU; `highest` is infinite where nothing is known.
    """
    own = (read_noise / gain) ** 2 if read_noise > 0 else 0.0
    own += step**2 / 12
    whole = maps.sky > 10 * maps.noise
    noise = np.sqrt(np.where(whole, maps.sky, 0) / np.float32(gain) + np.float32(own))
    return noise, np.where(whole, noise, np.float32(np.inf))


def noise_ratio(
    maps: SkyMaps, sky_pixels: NDArray[np.bool_], lowest: NDArray, highest: NDArray
) -> tuple[float, float]:
    """Compare the noise that was measured with the one that is expected.

    The frame is taken at its best: only what nine tenths of it say counts, and of what is correlated between pixels
    (crowded stars raise it, resampling hides noise in it) the share that makes the two agree better.

    Parameters
    ----------
    maps : SkyMaps
        Of the frame.
    sky_pixels : ndarray of bool, shape (H, W)
        Where to look.
    lowest, highest : ndarray, shape (H, W)
        Expected noise, ADU.

    Returns
    -------
    ratio : float
        Measured over expected; 1 where they agree or cannot be compared.
    limit : float
        A ratio above it, or below its inverse, is a disagreement: 1.5, and 5 sigma of what so many pixels can tell (the
        robust measure has 37 % of the efficiency of a standard deviation).
    """
    n = np.count_nonzero(sky_pixels)
    limit = float(1.5 + 5 / np.sqrt(0.74 * max(n, 1)))
    if not n:
        return 1.0, limit
    for found, stated, beyond, percent in ((maps.white, highest, np.greater, 10), (maps.noise, lowest, np.less, 90)):
        if np.count_nonzero(sky_pixels & beyond(found, stated)) > 0.8 * n:  # else that percentile cannot be beyond
            with np.errstate(divide="ignore", over="ignore"):
                ratio = float(np.percentile(found[sky_pixels] / stated[sky_pixels], percent, method="nearest"))
            if beyond(ratio, 1):
                return ratio, limit
    return 1.0, limit


def guess_gain(sky: float, noise: float, read_noise: float = np.nan) -> float:
    """Gain from the photon transfer relation at the sky.

    Solves ``noise^2 = sky/gain + (read_noise/gain)^2``; without a read noise this is ``gain = sky/noise^2``.

    Parameters
    ----------
    sky, noise : float
        Sky level and noise of one sky pixel, ADU.
    read_noise : float
        e-; not finite counts as zero.

    Returns
    -------
    float
        e-/ADU; NaN where the sky is not above 10 times its noise (sky-subtracted frames carry no such information).
    """
    if not (noise > 0 and sky > 10 * noise):
        return float("nan")
    extra = read_noise if read_noise > 0 else 0.0
    return float((sky + np.sqrt(sky**2 + 4 * (noise * extra) ** 2)) / (2 * noise**2))


def guess_saturation(data: NDArray, good: NDArray[np.bool_], sky: float, noise: float, dtype: np.dtype) -> float:
    """Saturation level from the data's own pile-up, else from the integer type.

    A pile-up is a largest value that at least 4 good pixels share, far (100 sigma) above the sky.

    Parameters
    ----------
    data : ndarray, shape (H, W)
        Image, ADU.
    good : ndarray of bool, shape (H, W)
        Pixels to look at.
    sky, noise : float
        ADU.
    dtype : dtype
        Type of the values in the file.

    Returns
    -------
    float
        ADU; NaN where neither says anything.
    """
    top = data[good].max()
    if top > sky + 100 * noise and np.count_nonzero(data[good] == top) >= 4:
        return float(top)
    return float(np.iinfo(dtype).max) if np.issubdtype(dtype, np.integer) else float("nan")


def unexposed(data: NDArray, good: NDArray[np.bool_], sky: float, noise: float) -> NDArray[np.bool_]:
    """Find the parts of the frame that saw no sky: blocks of exact zeros, and dark (vignetted) borders.

    Parameters
    ----------
    data : ndarray, shape (H, W)
        Image, ADU, finite.
    good : ndarray of bool, shape (H, W)
        Pixels not masked so far.
    sky, noise : float
        Sky level and noise of the frame, ADU.

    Returns
    -------
    ndarray of bool, shape (H, W)
        True = no data. Exact zeros count in solid blocks of at least 100 px, when less than half the frame is zero.
        Dark means below 0.6 of the sky, in a block of at least 200 px that touches the border, grown by 4 px; it is
        looked for only where the sky stands at least 10 sigma above zero.
    """
    zero = (data == 0) & good
    if 0 < np.count_nonzero(zero) < 0.5 * data.size:
        core = ndimage.binary_opening(zero, np.ones((5, 5)))
        found = _large(ndimage.binary_propagation(core, mask=zero), 100) if core.any() else np.zeros_like(zero)
    else:
        found = np.zeros_like(zero)
    if sky > 10 * noise:
        smooth = smoothed(data.astype(np.float32, copy=False), np.full(5, 0.2))
        dark = smooth < 0.6 * sky
        dark = _touching(_large(dark, 200)) if np.count_nonzero(dark) >= 200 else np.zeros_like(dark)
        if dark.any():
            found |= ndimage.binary_dilation(dark, iterations=4)
    return found


def _large(blocks: NDArray[np.bool_], area: int) -> NDArray[np.bool_]:
    labels, _ = ndimage.label(blocks)
    keep = np.bincount(labels.ravel()) >= area
    keep[0] = False
    return keep[labels]


def _touching(blocks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Keep the blocks that touch the border of the frame."""
    labels, count = ndimage.label(blocks)
    keep = np.zeros(count + 1, bool)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        keep[edge] = True
    keep[0] = False
    return keep[labels]
