"""What headers say, under the names that observatories use: gain, times, filter, world coordinates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io.fits import Header
from astropy.time import Time
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_scales

from gpudia.errors import ConfigError, DataWarning
from gpudia.flags import mask_bits_of
from gpudia.images.noise import NOISE_SOURCES
from gpudia.messages import printable

__all__ = ["FrameLayout", "exposure_facts", "name_of", "pixel_scale", "sane_wcs"]

#: Keywords of the clock where a date stands alone.
_CLOCKS = ("UTSTART", "TIME-OBS", "UTC-OBS", "UT", "UTC")
#: Dates above this are Julian ones: as MJD it would be the year 4597.
_JULIAN = 1_000_000.0
#: Dates beyond this (year 2406), and exposures of more than this (four months), are none.
_LAST_MJD, _LONGEST = 200_000.0, 1e7
#: Gains and read noises from here on, and gains up to its inverse, are none either.
_ABSURD = 1e6


@dataclass(frozen=True)
class FrameLayout:
    """Where things stand in a FITS file: names of HDUs and keywords, tried in order; and values that override.

    Attributes
    ----------
    image_hdu, error_hdu, mask_hdu, catalog_hdu : tuple of str
        EXTNAMEs. Where none of `image_hdu` is there, the first 2-D image is taken.
    gain_keys, read_noise_keys, saturation_keys, exptime_keys : tuple of str
        e-/ADU, e-, ADU, seconds.
    mid_keys, mjd_keys : tuple of str
        Middle and start of the exposure, UTC, as MJD or ISO date; the middle wins. Start plus half the exposure time
        is the middle.
    filter_keys, instrument_keys : tuple of str
        Text.
    airmass_keys : tuple of str
        Of the middle or the start of the exposure.
    fwhm_keys : tuple of str
        Seeing, arcsec.
    scale_keys : tuple of str
        Pixel scale, arcsec/pixel, used where there is no WCS.
    gain, read_noise, saturation : float or None
        Used instead of the header's (e-/ADU, e-, ADU).
    noise : {"auto", "header", "data"}
        What variances are made of where there is no error plane: see `gpudia.images.estimate_variance`.
    mask_bits : optional
        Which bits of the mask mean "do not use", by name or value, or what the bits of another pipeline's mask mean:
        see `gpudia.flags.mask_bits_of`. Default: every bit. Boolean masks have no bits: True is bad in any case.

    Raises
    ------
    ConfigError
        A value is not positive (the read noise: negative); `noise` or a name in `mask_bits` is unknown.
    """

    image_hdu: tuple[str, ...] = ("SCI",)
    error_hdu: tuple[str, ...] = ("ERR", "ERROR", "UNCERT")
    mask_hdu: tuple[str, ...] = ("BPM", "MASK")
    catalog_hdu: tuple[str, ...] = ("CAT",)
    gain_keys: tuple[str, ...] = ("GAIN",)
    read_noise_keys: tuple[str, ...] = ("RDNOISE", "READNOIS", "READNOISE")
    saturation_keys: tuple[str, ...] = ("SATURATE", "SATURATN", "SATLEVEL")
    exptime_keys: tuple[str, ...] = ("EXPTIME", "EXPOSURE")
    mid_keys: tuple[str, ...] = ("MJD-MID", "MJD-AVG", "DATE-AVG")
    mjd_keys: tuple[str, ...] = ("MJD-OBS", "MJD", "DATE-OBS")
    filter_keys: tuple[str, ...] = ("FILTER", "FILTER1")
    instrument_keys: tuple[str, ...] = ("INSTRUME",)
    airmass_keys: tuple[str, ...] = ("AIRMASS", "AMSTART", "SECZ")
    fwhm_keys: tuple[str, ...] = ("L1FWHM", "L1SEESEC")
    scale_keys: tuple[str, ...] = ("PIXSCALE", "SECPIX", "CCDSCALE")
    gain: float | None = None
    read_noise: float | None = None
    saturation: float | None = None
    noise: str = "auto"
    mask_bits: Any = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "mask_bits":
                object.__setattr__(self, item.name, mask_bits_of(value))
            elif item.name == "noise":
                if value not in NOISE_SOURCES:
                    raise ConfigError(f"noise must be one of {', '.join(NOISE_SOURCES)}, got {value!r}")
            elif isinstance(item.default, tuple):
                names = (value,) if isinstance(value, str) else tuple(value)
                object.__setattr__(self, item.name, names)
            elif value is not None:
                lowest = 0.0 if item.name == "read_noise" else math.ulp(0.0)
                if not (math.isfinite(value) and value >= lowest):
                    raise ConfigError(f"{item.name} must be a positive number, got {value}")


def name_of(path: str | Path | None) -> str:
    """File name without folder and without ``.fits``, ``.fit``, ``.fts``, ``.fz``, ``.gz`` endings."""
    stem = "frame" if path is None else Path(path).name
    for ending in (".fz", ".gz", ".fits", ".fit", ".fts"):
        if stem.lower().endswith(ending):
            stem = stem[: -len(ending)]
    return stem


def exposure_facts(header: Header, layout: FrameLayout) -> dict[str, Any]:
    """Read what the header says about the exposure.

    Parameters
    ----------
    header : Header
        Of the image.
    layout : FrameLayout
        Keywords and overriding values.

    Returns
    -------
    dict
        ``gain``, ``read_noise``, ``saturation``, ``exptime``, ``mjd`` (mid-exposure, UTC), ``airmass``,
        ``fwhm_arcsec``: float, NaN if unknown; ``filter``, ``instrument``: str.
    """
    facts: dict[str, Any] = {}
    for name in ("gain", "read_noise", "saturation"):
        given = getattr(layout, name)
        facts[name] = _number(header, getattr(layout, f"{name}_keys")) if given is None else float(given)
    if not facts["gain"] <= 0 and not 1 / _ABSURD < facts["gain"] < _ABSURD:
        facts["gain"] = math.nan
    facts["read_noise"] = facts["read_noise"] if abs(facts["read_noise"]) < _ABSURD else math.nan
    exptime = _number(header, layout.exptime_keys)
    facts["exptime"] = exptime if 0 <= exptime < _LONGEST else math.nan
    facts["mjd"] = _mid_exposure(header, layout, facts["exptime"])
    airmass = _number(header, layout.airmass_keys)
    facts["airmass"] = airmass if airmass > 0.99 else math.nan  # 0 and -999 where it was not known
    fwhm = _number(header, layout.fwhm_keys)
    facts["fwhm_arcsec"] = fwhm if fwhm > 0 else math.nan  # LCO and LT write 0 or -999 where it was not measured
    for name in ("filter", "instrument"):
        facts[name] = _text(header, getattr(layout, f"{name}_keys"))
    return facts


def _number(header: Header, keywords: Iterable[str]) -> float:
    for key in keywords:
        try:
            value = float(header[key])
        except (KeyError, TypeError, ValueError):
            continue
        if math.isfinite(value):
            return value
    return math.nan


def _text(header: Header, keywords: Iterable[str]) -> str:
    values = (printable(header.get(key, "")).strip() for key in keywords)
    return next((v for v in values if v and v.upper() not in ("UNKNOWN", "N/A", "NONE")), "")


def _mid_exposure(header: Header, layout: FrameLayout, exptime: float) -> float:
    middle = _first_mjd(header, layout.mid_keys)
    if math.isfinite(middle):
        return middle
    half = exptime / 2 if math.isfinite(exptime) else 0.0
    return _first_mjd(header, layout.mjd_keys) + half / 86400


def _first_mjd(header: Header, keywords: Iterable[str]) -> float:
    """Time of the first keyword that has one; of a whole day only where none says more."""
    days = []
    for key in keywords:
        if (value := header.get(key)) is None:
            continue
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="ERFA function .*dubious year")
                mjd = _number_to_mjd(float(value), header) if _is_number(value) else _date_to_mjd(str(value), header)
        except (TypeError, ValueError):
            continue
        if 0 < mjd < _LAST_MJD:
            if mjd % 1:
                return mjd
            days.append(mjd)
    return days[0] if days else math.nan


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _number_to_mjd(value: float, header: Header) -> float:
    """MJD, UTC, of an MJD or a Julian date in the header's time scale."""
    if value <= _JULIAN and _time_scale(header) == "utc":
        return value
    return float(Time(value, format="jd" if value > _JULIAN else "mjd", scale=_time_scale(header)).utc.mjd)


def _date_to_mjd(text: str, header: Header) -> float:
    text = text.strip()
    beside = next((str(header[key]).strip() for key in _CLOCKS if ":" in str(header.get(key, ""))), "")
    if "T" not in text and ":" not in text and beside:  # a date alone: the time may stand beside it
        text = f"{text}T{beside}"
    return float(Time(text, format="isot" if "T" in text else "iso", scale=_time_scale(header)).utc.mjd)


def _time_scale(header: Header) -> str:
    """Astropy's name of the scale that TIMESYS says; UTC where it is not there or says another."""
    name = str(header.get("TIMESYS", "")).strip().lower()
    return {"et": "tt", "tdt": "tt", "iat": "tai"}.get(name, name if name in ("tai", "tt", "tdb") else "utc")


def sane_wcs(wcs: WCS | None, shape: tuple[int, ...], path: Any = None) -> WCS | None:
    """Return the WCS if it can be trusted with positions, else None.

    Parameters
    ----------
    wcs : WCS or None
        World coordinate system of the image.
    shape : tuple of int
        (H, W) of the image.
    path : str or path-like, optional
        Named in the warning.

    Returns
    -------
    WCS or None
        None, with a `DataWarning` where one was given, when it is not celestial, its scale is not between 0.001 and
        600 arcsec/pixel, or the frame's centre does not come back to within 1 px from the sky.
    """
    if wcs is None or not wcs.has_celestial:
        return None
    try:
        if wcs.naxis != 2 or (wcs.wcs.lng, wcs.wcs.lat) != (0, 1):  # a copy takes its time
            wcs = wcs.celestial
        centre = (shape[1] - 1) / 2, (shape[0] - 1) / 2
        with np.errstate(all="ignore"):
            scales = proj_plane_pixel_scales(wcs) * 3600
            back = wcs.world_to_pixel_values(*wcs.pixel_to_world_values(*centre))
        sane = bool(np.all((scales > 1e-3) & (scales < 600)) and np.hypot(*np.subtract(back, centre)) < 1.0)
        reason = f"scale {scales} arcsec/px"
    except (ValueError, RuntimeError) as exc:  # wcslib's errors derive from these
        sane, reason = False, str(exc).strip().splitlines()[-1]
    if sane:
        return wcs
    warnings.warn(f"{path or 'frame'}: WCS not usable and left out ({reason})", DataWarning, stacklevel=3)
    return None


def pixel_scale(wcs: WCS | None, header: Header, layout: FrameLayout) -> float:
    """Arcsec per pixel from the WCS, else from the header; NaN if unknown."""
    if wcs is not None:
        return float(np.mean(proj_plane_pixel_scales(wcs))) * 3600
    scale = _number(header, layout.scale_keys)
    return scale if scale > 0 else math.nan
