"""Where a frame was taken, and its time at the barycentre of the solar system. Nothing here needs a network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
from astropy import units as u
from astropy.coordinates import EarthLocation, SkyCoord
from astropy.io.fits import Header
from astropy.time import Time
from astropy.utils import iers
from numpy.typing import ArrayLike, NDArray

__all__ = ["barycentric_times", "site_of"]

#: Longitude (degrees east), latitude (degrees), height (m). Names whose sign differs between observatories (OBS-LONG
#: counts westward at CTIO) are left out: rather no site than a wrong one.
_GEODETIC = (
    ("OBSGEO-L", "OBSGEO-B", "OBSGEO-H"),
    ("LONGITUD", "LATITUDE", "HEIGHT"),
    ("ESO TEL GEOLON", "ESO TEL GEOLAT", "ESO TEL GEOELEV"),
)
_GEOCENTRIC = ("OBSGEO-X", "OBSGEO-Y", "OBSGEO-Z")
#: Where geocentric coordinates in metres can be: from the bottom of the sea to a high balloon.
_RADII = (6.3e6, 6.5e6)
#: Times for which astropy has leap seconds and an ephemeris: 1960 to 2199.
_MJD_RANGE = (36934.0, 124593.0)


def site_of(header: Header) -> tuple[float, float, float] | None:
    """Read the place of the observatory.

    Parameters
    ----------
    header : Header
        With ``OBSGEO-X, -Y, -Z`` or ``OBSGEO-L, -B, -H`` (FITS standard), ``LONGITUD, LATITUDE, HEIGHT`` (LCO; the
        Liverpool Telescope without a height, which is then 0: 1000 m are 3 microseconds) or ESO's ``TEL GEOLON`` and so
        on.

    Returns
    -------
    tuple of float or None
        Longitude (degrees east), latitude (degrees), height (m); None where the header does not say or not sanely.
    """
    x, y, z = (_number(header, key) for key in _GEOCENTRIC)
    if _RADII[0] < math.sqrt(x * x + y * y + z * z) < _RADII[1]:
        place = EarthLocation.from_geocentric(x, y, z, unit=u.m).geodetic
        return float(place.lon.deg), float(place.lat.deg), float(place.height.to_value(u.m))
    for names in _GEODETIC:
        longitude, latitude, height = (_number(header, key) for key in names)
        if -180 <= longitude <= 360 and -90 <= latitude <= 90 and (longitude, latitude) != (0, 0):
            return longitude, latitude, height if math.isfinite(height) else 0.0
    return None


def _number(header: Header, key: str) -> float:
    try:
        return float(header[key])
    except (KeyError, TypeError, ValueError):
        return math.nan


def barycentric_times(mjd: ArrayLike, sites: Sequence[tuple[float, float, float] | None], ra: ArrayLike,
                      dec: ArrayLike) -> NDArray[np.float64]:
    """Return the times at which the light would have reached the barycentre of the solar system.

    Parameters
    ----------
    mjd : array_like, shape (N,)
        Mid-exposure, UTC, days.
    sites : sequence of N tuples or None
        Longitude (degrees east), latitude (degrees) and height (m) of every frame's observatory.
    ra, dec : float, or array_like of shape (S,)
        Where the light comes from, ICRS, degrees.

    Returns
    -------
    ndarray of float, shape (N,) or (N, S)
        BJD_TDB, days; NaN where time, site or direction are unknown, or before 1960 or after 2199.

    Notes
    -----
    The Earth's place is from astropy's built-in ephemeris (good to some microseconds of light travel time, this
    century), its rotation from the table of the IERS that comes with astropy. Beyond that table UT1 - UTC counts as 0,
    which is at most 0.9 s of the Earth's rotation, or 2 microseconds. A JD in double precision resolves 40
    microseconds.
    """
    times = np.asarray(mjd, float)
    ra, dec = np.broadcast_arrays(np.asarray(ra, float), np.asarray(dec, float))
    result = np.full(times.shape + ra.shape, np.nan)
    known = np.isfinite(times) & (times > _MJD_RANGE[0]) & (times < _MJD_RANGE[1])
    directed = np.isfinite(ra) & np.isfinite(dec)
    target = SkyCoord(np.where(directed, ra, 0.0), np.where(directed, dec, 0.0), unit="deg")
    for site in dict.fromkeys(site for site in sites if site is not None):
        here = known & np.array([other == site for other in sites], dtype=bool)
        if here.any():
            result[here] = np.where(directed, _barycentric(times[here], site, target), np.nan)
    return result


def _barycentric(mjd: NDArray[np.float64], site: tuple[float, float, float], target: SkyCoord) -> NDArray[np.float64]:
    place = EarthLocation.from_geodetic(site[0], site[1], site[2])
    time = Time(mjd.reshape(mjd.shape + (1,) * target.ndim), format="mjd", scale="utc", location=place)
    with (
        warnings.catch_warnings(),
        iers.earth_orientation_table.set(iers.IERS_B.open()),
        iers.conf.set_temp("iers_degraded_accuracy", "ignore"),
    ):
        warnings.simplefilter("ignore")  # about dates beyond the table; see the notes above
        travel = time.light_travel_time(target, kind="barycentric", ephemeris="builtin")
        return np.asarray((time.tdb + travel).jd, dtype=np.float64)
