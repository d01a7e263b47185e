"""One exposure in memory: data, variance, mask, world coordinates and the facts of its header."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from astropy import units as u
from astropy.io.fits import Header
from astropy.nddata import CCDData, NDData, StdDevUncertainty
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import ArrayLike, NDArray

from gpudia.errors import DataWarning, FrameError
from gpudia.flags import FILE_FLAGS, FRAME_FLAGS, PIXEL_FLAGS
from gpudia.images.headers import FrameLayout, exposure_facts, name_of, pixel_scale, sane_wcs
from gpudia.images.noise import (
    SkyMaps,
    estimate_variance,
    expected_noise,
    guess_gain,
    guess_saturation,
    measure_sky,
    noise_ratio,
    unexposed,
)

__all__ = ["Frame", "frame_from_nddata", "make_frame"]

#: Values from here on are no light: their squares leave the range of float32.
_LARGEST = 1e18


@dataclass(frozen=True)
class Frame:
    """One exposure. Arrays are native-endian, C-contiguous, of one shape (H, W), and finite everywhere.

    Attributes
    ----------
    name : str
        File stem, without ``.fits``, ``.fits.fz`` and so on.
    data : ndarray of float32 or float64
        ADU; pixels without data hold the local sky.
    variance : ndarray of the same dtype
        ADU^2, positive.
    mask : ndarray of uint8
        Bits of `gpudia.flags.PIXEL_FLAGS`; 0 = good.
    wcs : WCS or None
        Only where it is celestial and sane.
    catalog : Table or None
        The frame's own catalog as read, positions in the full frame; `gpudia.images.catalog_of` brings it into a
        common form.
    mjd : float
        Mid-exposure, UTC; NaN if unknown.
    exptime : float
        Seconds; NaN if unknown.
    filter, instrument : str
        Empty if unknown.
    airmass : float
        NaN if unknown.
    gain : float
        e-/ADU; NaN if unknown and not to be had from the data.
    read_noise : float
        e-; NaN if unknown.
    saturation : float
        ADU; NaN if unknown.
    fwhm : float
        From the header, pixels; NaN if unknown. `gpudia.images.frame_quality` measures it.
    sky, sky_noise : float
        Level and noise of a typical sky pixel, ADU.
    origin : tuple of int
        (x0, y0) of the first pixel in the full frame that this is a part of; (0, 0) for a whole frame.
    header : Header
        Primary header updated by that of the image.
    flags : int
        Bits of `gpudia.flags.FRAME_FLAGS`.
    path : Path or None
        The file.
    """

    name: str
    data: NDArray
    variance: NDArray
    mask: NDArray[np.uint8]
    sky: float
    sky_noise: float
    wcs: WCS | None = None
    catalog: Table | None = None
    mjd: float = float("nan")
    exptime: float = float("nan")
    filter: str = ""
    instrument: str = ""
    airmass: float = float("nan")
    gain: float = float("nan")
    read_noise: float = float("nan")
    saturation: float = float("nan")
    fwhm: float = float("nan")
    header: Header = field(default_factory=Header, repr=False)
    flags: int = 0
    path: Path | None = None
    origin: tuple[int, int] = (0, 0)

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W), pixels."""
        return self.data.shape[0], self.data.shape[1]

    @property
    def bad(self) -> NDArray[np.bool_]:
        """Boolean mask, True = ignore."""
        return self.mask != 0

    @cached_property
    def sky_maps(self) -> SkyMaps:
        """Sky and noise of every pixel, ADU, as `gpudia.images.sky_and_noise` measures them; kept."""
        return measure_sky(self.data, self.bad)

    def to_ccddata(self) -> CCDData:
        """Return the frame as an `~astropy.nddata.CCDData`, with arrays of its own.

        Data in ADU, uncertainty a standard deviation, mask boolean (True = ignore), its bits in ``flags``, the WCS of
        these pixels, the header as read. `frame_from_nddata` makes the frame of it again, but for its catalog, origin
        and path, and gain, read noise and saturation where they are not the header's.
        """
        return CCDData(
            self.data.copy(), uncertainty=StdDevUncertainty(np.sqrt(self.variance)), mask=self.bad,
            flags=self.mask.copy(), wcs=None if self.wcs is None else self.wcs.deepcopy(), meta=self.header.copy(),
            unit="adu",
        )  # fmt: skip


def make_frame(
    data: ArrayLike,
    *,
    error: ArrayLike | None = None,
    bits: ArrayLike | None = None,
    header: Header | None = None,
    wcs: WCS | None = None,
    catalog: Table | None = None,
    layout: FrameLayout | None = None,
    path: str | Path | None = None,
    name: str | None = None,
) -> Frame:
    """Make a `Frame` of an image and what came with it.

    Parameters
    ----------
    data : array_like, shape (H, W)
        Image, ADU, any real dtype and byte order.
    error : array_like, shape (H, W), optional
        One sigma, ADU; made by `estimate_variance` when not given, of what ``layout.noise`` says. Pixels where it is
        not finite or not positive are masked.
    bits : array_like of int or bool, shape (H, W), optional
        Bits of `gpudia.flags.FILE_FLAGS`, unless the layout says otherwise; True counts as bad.
    header : Header, optional
        Where gain, time and so on are looked up.
    wcs : WCS, optional
        Dropped, with a warning, if it is not celestial or not sane.
    catalog : Table, optional
        The frame's own star catalog.
    layout : FrameLayout, optional
        Keywords, overriding values, which bits of the mask count.
    path, name
        Where it came from and what to call it.

    Returns
    -------
    Frame
        With the flag ``noise_mismatch``, and a `DataWarning`, where the noise of its sky is not what `error`, or else
        gain and read noise of the header, say.

    Raises
    ------
    FrameError
        The image is not 2-D or not numeric, `error` or `bits` has another shape, no pixel is good, all good pixels are
        equal, or ``layout.noise`` is "header" and gain or read noise is missing.
    """
    layout, header = layout or FrameLayout(), Header() if header is None else header
    values, dtype = _native(data, "image", path)
    mask = _pixel_bits(bits, values.shape, layout, path)
    no_light = ~(np.abs(values) < _LARGEST)
    values[no_light] = np.nan
    mask[no_light] |= PIXEL_FLAGS.no_data
    sigma = None
    if error is not None:
        sigma = _matching(_native(error, "error plane", path)[0], values.shape, "error plane", path)
        mask[~((sigma < _LARGEST) & (sigma > 0))] |= PIXEL_FLAGS.no_data
    _refuse_empty(values, mask == 0, path)
    facts = exposure_facts(header, layout)
    if layout.noise == "header" and sigma is None and not (facts["gain"] > 0 and facts["read_noise"] >= 0):
        raise FrameError(f"gain and read noise must be known where noise is 'header', got {facts['gain']:g} and "
                         f"{facts['read_noise']:g}", path)
    seen = mask != 0
    maps = measure_sky(values, seen)
    sky, noise = (_typical(m, ~seen) for m in maps[:2])
    _refuse_noiseless(noise, path)
    np.copyto(values, maps.sky, where=no_light)
    facts, flags = _complete(facts, values, mask, (sky, noise), dtype, layout, path)
    with np.errstate(invalid="ignore", over="ignore"):
        mask[values >= facts["saturation"]] |= PIXEL_FLAGS.saturated
    good = mask == 0
    _refuse_empty(values, good, path)
    if sigma is not None or not (layout.noise == "data" or flags & FRAME_FLAGS.gain_guessed):
        flags |= _noise_flag(values, good, maps, sigma, facts, dtype, path)
    variance = _known_variance(sigma, values.dtype)
    known = np.isfinite(variance) & (variance > 0)
    if not known.all():
        made = estimate_variance(values, ~good, facts["gain"], facts["read_noise"], maps, layout.noise)
        variance = np.where(known, variance, made)
    wcs = sane_wcs(wcs, values.shape, path)
    fwhm = facts.pop("fwhm_arcsec") / pixel_scale(wcs, header, layout)
    sky, noise = (_typical(m, good) for m in maps[:2])
    frame = Frame(
        name=name or name_of(path), data=values, variance=variance, mask=mask, sky=sky, sky_noise=noise, wcs=wcs,
        catalog=catalog, fwhm=fwhm, header=header, flags=flags, path=None if path is None else Path(path), **facts,
    )  # fmt: skip
    if not (mask[~seen] & ~np.uint8(PIXEL_FLAGS.saturated)).any():
        frame.__dict__["sky_maps"] = maps  # pixels found saturated since then were clipped
    return frame


def _known_variance(sigma: NDArray | None, dtype: np.dtype) -> NDArray:
    """Square of the error plane; NaN where there is none."""
    if sigma is None:
        return np.asarray(np.nan, dtype)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return sigma.astype(dtype) ** 2


def frame_from_nddata(
    image: NDData, *, layout: FrameLayout | None = None, name: str = "frame"
) -> Frame:
    """Make a `Frame` of an `~astropy.nddata.NDData` or ``CCDData`` with its mask, uncertainty, WCS and header.

    Parameters
    ----------
    image : NDData
        Data in ADU; the mask is boolean (True = ignore) or bits of `gpudia.flags.FILE_FLAGS`, which may also stand in
        the ``flags`` of a CCDData where they say the same as its mask; any uncertainty that astropy can turn into a
        standard deviation.
    layout : FrameLayout, optional
        Keywords and overriding values.
    name : str
        What to call it.

    Returns
    -------
    Frame
        With arrays of its own.

    Raises
    ------
    FrameError
        As in `make_frame`; or the image has another unit than adu.
    """
    unit = getattr(image, "unit", None)
    if unit is not None and unit not in (u.adu, u.dimensionless_unscaled):
        raise FrameError(f"image must be in adu, got {unit}; divide by the gain first")
    error = None
    if image.uncertainty is not None:
        error = image.uncertainty.represent_as(StdDevUncertainty).array
    meta = image.meta if isinstance(image.meta, Header) else Header(dict(image.meta))
    bits, flags = image.mask, getattr(image, "flags", None)
    if isinstance(flags, np.ndarray) and flags.dtype.kind in "iu" and np.array_equal(flags != 0, bits):
        bits = flags
    return make_frame(image.data, error=error, bits=bits, header=meta.copy(), wcs=image.wcs, layout=layout, name=name)


def _native(values: ArrayLike, what: str, path: Any) -> tuple[NDArray, np.dtype]:
    """A new native-endian C-contiguous float array, and the dtype of the input."""
    array = np.ma.filled(values.astype(float), np.nan) if np.ma.isMaskedArray(values) else np.asarray(values)
    if array.dtype.kind not in "iufb":
        raise FrameError(f"{what} must hold real numbers, got dtype {array.dtype}", path)
    if array.ndim != 2 or 0 in array.shape:
        raise FrameError(f"{what} must be two-dimensional and not empty, got shape {array.shape}", path)
    wide = array.dtype.itemsize > (4 if array.dtype.kind == "f" else 2)  # float32 holds 24 bits exactly
    with np.errstate(over="ignore"):
        native = np.array(array, dtype=np.float64 if wide else np.float32, order="C")
    return native, array.dtype.newbyteorder("=")


def _matching(plane: NDArray, shape: tuple[int, ...], what: str, path: Any) -> NDArray:
    if plane.shape != shape:
        raise FrameError(f"{what} must have the image's shape {shape}, got {plane.shape}", path)
    return plane


def _pixel_bits(
    bits: ArrayLike | None, shape: tuple[int, ...], layout: FrameLayout, path: Any
) -> NDArray[np.uint8]:
    """Bits of `PIXEL_FLAGS` from those of a file's mask."""
    if bits is None:
        return np.zeros(shape, np.uint8)
    plane = _matching(np.asarray(bits), shape, "mask", path)
    if plane.dtype.kind == "b":
        return plane.astype(np.uint8)
    lost = False
    if plane.dtype.kind not in "iu":
        lost = ~(np.abs(plane) < 2.0**62)  # no integer
        plane = np.where(lost, 0, plane).astype(np.int64)
    if layout.mask_bits is None:
        known = (plane & sum(f.value for f in FILE_FLAGS)).astype(np.uint8)
        known[(plane != 0) & (known == 0)] = PIXEL_FLAGS.bad  # a bit we have no name for still says: do not use
    else:
        known = np.zeros(shape, np.uint8)
        for name, value in layout.mask_bits:
            known[(plane.astype(np.int64) & value) != 0] |= getattr(PIXEL_FLAGS, name)
    known[lost] |= PIXEL_FLAGS.bad
    return known


def _refuse_empty(values: NDArray, good: NDArray[np.bool_], path: Any) -> None:
    if not good.any():
        raise FrameError(f"image must have at least one good pixel, got {good.size} masked or not finite", path)
    first = values.flat[good.argmax()]
    if not (good & (values != first)).any():
        raise FrameError(f"image must not be constant, got {first:g} in all {np.count_nonzero(good)} good pixels", path)


def _typical(smooth: NDArray, good: NDArray[np.bool_]) -> float:
    """Median of a map at the good pixels: at every fourth one along either axis, where some of these are good."""
    thin = (slice(None, None, 4),) * 2
    some = smooth[thin][good[thin]]
    return float(np.median(some if some.size else smooth[good]))


def _refuse_noiseless(noise: float, path: Any) -> None:
    if not noise > np.sqrt(np.finfo(np.float32).tiny):  # its square is a variance
        raise FrameError(f"noise of the sky must be positive, got {noise:g}", path)


def _complete(
    facts: dict[str, Any], values: NDArray, mask: NDArray, typical: tuple[float, float], dtype: np.dtype,
    layout: FrameLayout, path: Any,
) -> tuple[dict[str, Any], int]:
    """Fill in gain and saturation from the data where the header lacks them; mask what saw no sky."""
    (sky, noise), flags = typical, 0
    mask[unexposed(values, mask == 0, sky, noise)] |= PIXEL_FLAGS.no_data
    measured = guess_gain(sky, noise, facts["read_noise"])
    if layout.noise == "data" and measured > 0:
        facts["gain"] = measured
        flags |= FRAME_FLAGS.gain_guessed
    elif not (np.isfinite(facts["gain"]) and facts["gain"] > 0):
        found, facts["gain"] = facts["gain"], measured
        flags |= FRAME_FLAGS.gain_guessed
        warnings.warn(
            f"{path or 'frame'}: gain must be positive, got {found:g}; taken from the data: {facts['gain']:.3g} e-/ADU",
            DataWarning, stacklevel=4,
        )  # fmt: skip
    if not np.isfinite(facts["saturation"]):
        good = mask == 0
        facts["saturation"] = guess_saturation(values, good, sky, noise, dtype) if good.any() else np.nan
        flags |= FRAME_FLAGS.saturation_guessed
    return facts, flags


def _noise_flag(
    values: NDArray, good: NDArray[np.bool_], maps: SkyMaps, sigma: NDArray | None, facts: dict[str, Any],
    dtype: np.dtype, path: Any,
) -> int:
    """Flag and warn where the sky's noise is not what the error plane, or else gain and read noise, say."""
    thin = (slice(None, None, max(1, min(values.shape) // 125)),) * 2  # the maps are smooth
    maps, good = SkyMaps(*(m[thin] for m in maps)), good[thin]
    if sigma is not None:
        stated = "the error plane says", "errors in another unit than ADU", "errors in another unit than ADU"
        good = good & (values[thin] < maps.sky + maps.noise)
        bounds = sigma[thin], sigma[thin]
    else:
        stated = ("gain and read noise say", "a gain too large, or stars too crowded to see empty sky",
                  "a gain too small (that of a mean of N frames is N times larger), too large a read noise, smoothing "
                  "or resampling")
        step = float(np.issubdtype(dtype, np.integer))
        bounds = expected_noise(maps, facts["gain"], facts["read_noise"], step)
    ratio, limit = noise_ratio(maps, good, *bounds)
    if 1 / limit <= ratio <= limit:
        return 0
    warnings.warn(
        f"{path or 'frame'}: noise of the sky must be what {stated[0]}, to a factor of {limit:.2g}, got {ratio:.3g} "
        f"times that; it may come from {stated[1 if ratio > 1 else 2]}", DataWarning, stacklevel=4,
    )  # fmt: skip
    return FRAME_FLAGS.noise_mismatch
