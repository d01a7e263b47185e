"""The seed's aperture photometry of one image."""

from __future__ import annotations

import astropy.units as u
import numpy as np
import pytest
from astropy.nddata import CCDData, NDData, StdDevUncertainty, VarianceUncertainty
from numpy.testing import assert_allclose

from gpudia.errors import InputError
from gpudia.flags import SOURCE_FLAGS
from gpudia.photometry import aperture_photometry_table

IMAGE = np.random.default_rng(0).normal(100, 5, (40, 60))
ERROR = np.full((40, 60), 2.0)
POSITIONS = [(20.0, 15.0), (33.3, 21.7)]
NAMES = ["id", "xcenter", "ycenter", "aperture_sum", "aperture_sum_err", "flags"]


def brute_force(image, position, radius, fine=60):
    """Sum over sub-pixels whose centre is in the circle."""
    y, x = (np.indices((40 * fine, 60 * fine)) + 0.5) / fine - 0.5
    inside = (x - position[0]) ** 2 + (y - position[1]) ** 2 <= radius**2
    return (image * inside.reshape(40, fine, 60, fine).mean(axis=(1, 3))).sum()


def test_sums_and_columns():
    table = aperture_photometry_table(IMAGE, ERROR, POSITIONS, 4.0)
    assert table.colnames == NAMES
    assert table["id"].tolist() == [1, 2]
    assert_allclose(table["xcenter"], [20.0, 33.3])
    assert_allclose(table["ycenter"], [15.0, 21.7])
    assert_allclose(table["aperture_sum"], [brute_force(IMAGE, p, 4.0) for p in POSITIONS], rtol=1e-4)
    assert_allclose(table["aperture_sum_err"], 2 * np.sqrt(np.pi * 16), rtol=1e-12)
    assert table["flags"].tolist() == [0, 0]


@pytest.mark.parametrize("positions", [
    np.array([(5.0, 6.0), (7.0, 8.0), (9.0, 10.0)]),
    (np.array([5.0, 7.0, 9.0]), np.array([6.0, 8.0, 10.0])),
    [[5.0, 7.0, 9.0], [6.0, 8.0, 10.0]],
])
def test_positions_as_rows_or_as_a_pair_of_arrays(positions):
    expected = aperture_photometry_table(IMAGE, ERROR, [(5, 6), (7, 8), (9, 10)], 2.0)["aperture_sum"]
    assert_allclose(aperture_photometry_table(IMAGE, ERROR, positions, 2.0)["aperture_sum"], expected)


def test_a_single_position_and_none():
    assert len(aperture_photometry_table(IMAGE, ERROR, (20.0, 15.0), 4.0)) == 1
    assert aperture_photometry_table(IMAGE, ERROR, [], 4.0).colnames == NAMES


@pytest.mark.parametrize("error", [None, 2.0])
def test_error_may_be_missing_or_one_number(error):
    errors = aperture_photometry_table(IMAGE, error, POSITIONS, 4.0)["aperture_sum_err"]
    assert np.isnan(errors).all() if error is None else np.allclose(errors, 2 * np.sqrt(np.pi * 16))


@pytest.mark.parametrize("uncertainty", [StdDevUncertainty(ERROR), VarianceUncertainty(ERROR**2)])
@pytest.mark.parametrize("kind", [NDData, CCDData])
def test_nddata_brings_mask_uncertainty_and_unit(uncertainty, kind):
    mask = np.zeros(IMAGE.shape, bool)
    mask[15, 20] = True
    table = aperture_photometry_table(kind(IMAGE, uncertainty=uncertainty, mask=mask, unit="adu"), None, POSITIONS, 4.0)
    plain = aperture_photometry_table(IMAGE, ERROR, POSITIONS, 4.0, mask)
    assert table["aperture_sum"].unit == u.adu
    for name in NAMES:
        assert_allclose(np.asarray(table[name]), np.asarray(plain[name]), rtol=1e-12)
    assert plain["flags"].tolist() == [SOURCE_FLAGS.masked_pixels, 0]


def test_masked_quantity_and_big_endian_images():
    expected = aperture_photometry_table(IMAGE, ERROR, POSITIONS, 4.0)["aperture_sum"]
    quantity = aperture_photometry_table(IMAGE * u.electron, ERROR * u.electron, POSITIONS, 4.0)
    assert quantity["aperture_sum"].unit == u.electron
    assert_allclose(np.asarray(quantity["aperture_sum"]), expected)
    assert_allclose(aperture_photometry_table(IMAGE.astype(">f8"), ERROR, POSITIONS, 4.0)["aperture_sum"], expected)
    spoiled = IMAGE.copy()
    spoiled[15, 20] = 1e9
    hidden = aperture_photometry_table(np.ma.MaskedArray(spoiled, spoiled == 1e9), ERROR, POSITIONS, 4.0)
    assert_allclose(hidden["aperture_sum"], expected - np.array([IMAGE[15, 20], 0.0]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_pixels_that_are_not_finite_are_masked(bad):
    image = IMAGE.copy()
    image[15, 20] = bad
    table = aperture_photometry_table(image, ERROR, POSITIONS, 4.0)
    good = aperture_photometry_table(IMAGE, ERROR, POSITIONS, 4.0)
    assert_allclose(table["aperture_sum"][0], good["aperture_sum"][0] - IMAGE[15, 20])
    assert table["flags"].tolist() == [SOURCE_FLAGS.masked_pixels, 0]
    spoiled = aperture_photometry_table(IMAGE, np.where(np.isfinite(image), ERROR, bad), POSITIONS, 4.0)
    assert np.isfinite(spoiled["aperture_sum_err"]).all()


def test_edges():
    table = aperture_photometry_table(IMAGE, ERROR, [(3.5, 20.0), (3.4, 20.0), (-20, 3), (np.nan, 5), (1, 39)], 4.0)
    assert table["flags"].tolist() == [0] + 4 * [SOURCE_FLAGS.outside]
    assert np.isnan(table["aperture_sum"]).tolist() == [False, False, True, True, False]
    assert np.isnan(table["aperture_sum_err"]).tolist() == [False, False, True, True, False]
    assert_allclose(table["xcenter"][2], -20)


def test_an_aperture_with_no_good_pixel_has_no_sum():
    table = aperture_photometry_table(IMAGE, ERROR, POSITIONS, 4.0, np.ones(IMAGE.shape, bool))
    assert np.isnan(table["aperture_sum"]).all()
    assert (table["flags"] == SOURCE_FLAGS.masked_pixels).all()


@pytest.mark.parametrize(("change", "message"), [
    ({"radius": 0}, "radius must be positive"),
    ({"radius": -3}, "radius must be positive"),
    ({"radius": np.inf}, "radius must be a finite number"),
    ({"radius": "4"}, "radius must be a finite number of pixels, got '4'"),
    ({"radius": 41.0}, r"smaller than the image \(40 px\), got 41.0"),
    ({"image": np.ones(7)}, "image must be a 2-D array of numbers"),
    ({"error": np.ones((3, 3))}, r"error must have shape \(40, 60\), got \(3, 3\)"),
    ({"error": ERROR * u.m}, "error must have the unit of image"),
    ({"mask": np.ones((3, 3))}, "mask must have shape"),
    ({"positions": np.ones((3, 4))}, r"positions must have shape \(N, 2\), \(2,\) or \(2, N\), got \(3, 4\)"),
])
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(InputError, match=message):
        aperture_photometry_table(**({"image": IMAGE, "error": ERROR, "positions": POSITIONS, "radius": 4.0} | change))
