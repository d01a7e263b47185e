"""Sites and barycentric times, against an Earth on a Kepler ellipse around a wobbling Sun, and published bounds."""

import socket

import numpy as np
import pytest
from astropy.io.fits import Header

from gpudia.images import barycentric_times, site_of

CTIO = (-70.8, -30.17, 2198.0)
#: Light travel time of one astronomical unit, s (IAU 2012).
AU = 499.004784
#: TT - UTC from 2017 on: 37 leap seconds and 32.184 s.
TT_UTC = 69.184


def seconds_from_utc(mjd, site, ra, dec):
    """BJD_TDB - JD_UTC in seconds."""
    mjd = np.atleast_1d(np.asarray(mjd, float))
    return (barycentric_times(mjd, [site] * len(mjd), ra, dec) - 2400000.5 - mjd) * 86400


def earth_by_kepler(mjd):
    """Position of the Earth from the barycentre, AU, equatorial: elements of Standish (EMB, J2000) less the Sun's.

    Jupiter and Saturn on mean circular orbits pull the Sun; what is left out is below 1e-3 AU (0.5 s).
    """
    century = (mjd - 51544.5) / 36525
    longitude = np.radians(100.46457166 + 35999.37244981 * century)
    perihelion = np.radians(102.93768193 + 0.32327364 * century)
    eccentricity = 0.01671123 - 4.392e-5 * century
    mean = longitude - perihelion
    anomaly = mean + eccentricity * np.sin(mean)
    for _ in range(20):
        anomaly = mean + eccentricity * np.sin(anomaly)
    x, y = np.cos(anomaly) - eccentricity, np.sqrt(1 - eccentricity**2) * np.sin(anomaly)
    plane = np.array([x * np.cos(perihelion) - y * np.sin(perihelion),
                      x * np.sin(perihelion) + y * np.cos(perihelion)])
    for mass, radius, at_j2000, rate in ((1 / 1047.35, 5.2034, 34.4, 3034.746), (1 / 3497.9, 9.537, 49.95, 1222.49)):
        angle = np.radians(at_j2000 + rate * century)
        plane -= mass * radius * np.array([np.cos(angle), np.sin(angle)])
    tilt = np.radians(23.4392911)
    return np.array([plane[0], plane[1] * np.cos(tilt), plane[1] * np.sin(tilt)])


def direction(ra, dec):
    ra, dec = np.radians([ra, dec])
    return np.array([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)])


@pytest.mark.parametrize(("ra", "dec"), [
    (267.9175, -29.89), (10.0, 41.0), (83.6, 22.0), (270.0, 66.5607), (0.0, -89.0)])
def test_an_earth_on_an_ellipse_gives_the_same_times(ra, dec):
    mjd = np.arange(58000.0, 61400.0, 31.7)
    expected = TT_UTC + AU * direction(ra, dec) @ earth_by_kepler(mjd)
    # Jupiter's eccentricity (5 % of 2.5 s) and the planets beyond: half a second in all
    np.testing.assert_allclose(seconds_from_utc(mjd, CTIO, ra, dec), expected, atol=1.0)


def test_the_delay_is_a_year_long_wave_as_high_as_the_ecliptic_latitude_says():
    mjd = np.arange(60000.0, 60365.25, 1.0)
    pole = seconds_from_utc(mjd, CTIO, 270.0, 66.5607)  # at the pole of the ecliptic: the Sun's wobble alone
    assert np.abs(pole - TT_UTC).max() < 1.0
    plane = seconds_from_utc(mjd, CTIO, 266.4, -23.4)  # on the ecliptic: 499 s and the Sun's 2.7 s, not more
    assert 490 < (plane.max() - plane.min()) / 2 < AU * 1.007
    bulge = seconds_from_utc(mjd, CTIO, 267.9175, -29.89) - TT_UTC
    assert np.abs(bulge).max() < AU * 1.023  # aphelion, and the Sun off the barycentre
    assert np.argmax(bulge) == pytest.approx(np.argmax(plane), abs=2)


def test_the_place_on_earth_is_worth_21_milliseconds_at_most():
    mjd = np.linspace(60100, 60101, 49)
    centre = seconds_from_utc(mjd, (0.0, 0.0, -6378137.0), 268.0, -29.0)
    there = seconds_from_utc(mjd, CTIO, 268.0, -29.0)
    assert 0.010 < np.abs(there - centre).max() < 0.0214
    west, east = (seconds_from_utc(mjd, (lon, 0.0, 0.0), 268.0, 0.0) - centre_of(mjd) for lon in (-90.0, 90.0))
    np.testing.assert_allclose(west, -east, atol=5e-4)  # opposite sides of the Earth; a JD resolves 40 microseconds


def centre_of(mjd):
    return seconds_from_utc(mjd, (0.0, 0.0, -6378137.0), 268.0, 0.0)


def test_unknown_and_impossible_times_and_sites_are_nan():
    mjd = [np.nan, 60000.0, 1.0, -5.0, 1e9, np.inf, 60000.0]
    found = barycentric_times(mjd, [CTIO] * 6 + [None], 268.0, -29.0)
    assert np.isfinite(found).tolist() == [False, True, False, False, False, False, False]
    assert barycentric_times([], [], 268.0, -29.0).shape == (0,)


def test_frames_of_several_sites_do_not_disturb_each_other():
    sites = [CTIO, (20.8, -32.4, 1760.0), None, CTIO]
    found = barycentric_times([60000.0] * 4, sites, 268.0, -29.0)
    for value, site in zip(found, sites, strict=True):
        np.testing.assert_array_equal(value, barycentric_times([60000.0], [site], 268.0, -29.0)[0])
    assert found[0] != found[1]


def test_far_dates_need_neither_network_nor_warnings(monkeypatch):
    def refused(*_, **__):
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    found = barycentric_times([41000.0, 60000.0, 75000.0, 120000.0], [CTIO] * 4, 268.0, -29.0)
    assert np.isfinite(found).all()


@pytest.mark.parametrize(("cards", "site"), [
    ({"LATITUDE": -30.1673833, "LONGITUD": -70.8047889, "HEIGHT": 2198.0}, (-70.8047889, -30.1673833, 2198.0)),
    ({"LATITUDE": 28.7624, "LONGITUD": -17.8792}, (-17.8792, 28.7624, 0.0)),
    ({"LATITUDE": "28.7624", "LONGITUD": "-17.8792"}, (-17.8792, 28.7624, 0.0)),
    ({"OBSGEO-L": 289.2, "OBSGEO-B": -30.17, "OBSGEO-H": 2198.0}, (289.2, -30.17, 2198.0)),
    ({"OBSGEO-X": 6378137.0, "OBSGEO-Y": 0.0, "OBSGEO-Z": 0.0}, (0.0, 0.0, 0.0)),
    ({"OBSGEO-X": 0.0, "OBSGEO-Y": 0.0, "OBSGEO-Z": 0.0}, None),
    ({"LATITUDE": -999.0, "LONGITUD": -999.0}, None),
    ({"LATITUDE": 0.0, "LONGITUD": 0.0}, None),
    ({"LATITUDE": "UNKNOWN", "LONGITUD": "UNKNOWN"}, None),
    ({"TELESCOP": "1m0-05"}, None),
    ({}, None),
])
def test_sites_of_headers(cards, site):
    found = site_of(Header(cards))
    assert (found is None) == (site is None)
    if site is not None:
        np.testing.assert_allclose(found, site, atol=1e-6)


def test_geocentric_and_geodetic_cards_agree():
    from astropy.coordinates import EarthLocation

    place = EarthLocation.from_geodetic(*CTIO)
    cards = {f"OBSGEO-{axis}": getattr(place, axis.lower()).to_value("m") for axis in "XYZ"}
    np.testing.assert_allclose(site_of(Header(cards)), CTIO, atol=1e-4)
    hierarchical = Header()
    for name, value in zip(("GEOLON", "GEOLAT", "GEOELEV"), CTIO, strict=True):
        hierarchical[f"HIERARCH ESO TEL {name}"] = value
    assert site_of(hierarchical) == CTIO
