"""The first interface. Every defect of the module that it follows has a test that shows it absent:

====================================================================  =================================================
defect                                                                test
====================================================================  =================================================
masks elements, not rows                                              test_masked_pixels_are_deleted_rows
zeroes background columns under the mask, then models with them       test_the_model_under_the_mask_is_right
divides the reference by the noise of the wrong pixel                 test_uneven_errors_leave_an_exact_kernel_exact
``if error:`` on an array                                             the same
unweighted                                                            test_masked_pixels_are_deleted_rows
one pass, no clipping                                                 test_a_cosmic_ray_is_clipped
covariance without weights, background, degrees of freedom            test_kernel_errors_are_those_of_many_draws
scale error 1000 times too large                                      the same; test_model_statistics.py
square images only                                                    test_indexes_are_those_of_the_double_loop and all
                                                                      images here, which are oblong
even kernel sizes crash                                               test_wrong_arguments_are_named
positions from a fractional origin                                    test_apertures_are_where_the_stars_are
no bounds check                                                       test_a_target_at_the_edge_is_masked_not_shifted
corners after a rotation zero and good                                test_a_rotated_image_has_its_corners
error resampled with negative lobes                                   the same; test_model_resample.py
RANSAC: 0.01 px, unseeded                                             test_twice_is_the_same
L1FWHM (arcsec) used as pixels                                        test_the_aperture_is_in_pixels
WCS by position of the layer                                          test_the_order_of_the_layers_does_not_matter
bare excepts, breakpoints                                             test_no_bare_except_and_no_breakpoint
NaN stops it                                                          test_the_model_under_the_mask_is_right
files never closed                                                    test_inputs_are_closed_and_unchanged
raw file and layers overwritten                                       the same; test_inputs_are_never_replaced
results never saved                                                   test_the_new_file_has_old_and_new_layers
one failed image ends the series                                      test_a_failed_image_fails_alone
====================================================================  =================================================
"""

import ast
import gc
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.nddata import CCDData, StdDevUncertainty
from astropy.table import Table
from scipy.signal import convolve2d

import gpudia
from gpudia import (
    DIAPhotometryAnalyst,
    build_the_U_indexes,
    build_the_U_matrix,
    run_dia_photometry,
    run_difference_image,
    use_backend,
)
from gpudia.backend import to_device, to_host, transfers
from gpudia.errors import ConfigError, FrameError, InputError
from gpudia.flags import FRAME_FLAGS, PIXEL_FLAGS, SOURCE_FLAGS
from gpudia.images import Registration, detect_stars, read_frame
from gpudia.layers import wcs_of_image
from gpudia.simulate import SimulationSettings, simulate_field, write_series

K = 7


# --- the design matrix ---------------------------------------------------------------------------------------------


def _double_loop(image, size):
    """U as the definition of a convolution says, one element at a time."""
    rows = []
    for y in range(image.shape[0] - size + 1):
        for x in range(image.shape[1] - size + 1):
            rows.append([image[y + size - 1 - a, x + size - 1 - b] for a in range(size) for b in range(size)])
    return np.array(rows)


@pytest.mark.parametrize(("shape", "size"), [((9, 14), 5), ((14, 9), 3), ((7, 7), 7), ((5, 6), 1)])
def test_indexes_are_those_of_the_double_loop(shape, size):
    rng = np.random.default_rng(1)
    image, kernel = rng.normal(size=shape), rng.normal(size=(size, size))
    indi, indj = build_the_U_indexes(image, kernel)
    assert indi.dtype.kind == indj.dtype.kind == "i"
    np.testing.assert_array_equal(image[indi, indj], _double_loop(image, size))
    expected = convolve2d(image, kernel, mode="valid").ravel()
    np.testing.assert_allclose(image[indi, indj] @ kernel.ravel(), expected, rtol=0, atol=1e-13 * size**2)
    for one, other in zip(build_the_U_matrix(image, size), (_double_loop(image, size), indi, indj), strict=True):
        np.testing.assert_array_equal(one, other)


def test_indexes_live_where_the_image_lives(backend):
    image = np.arange(30.0).reshape(5, 6)
    U, indi, indj = build_the_U_matrix(to_device(image, backend), 3)
    np.testing.assert_array_equal(to_host(U), _double_loop(image, 3))
    assert type(indi) is type(indj) is type(U)


@pytest.mark.parametrize(("kernel", "message"), [
    (4, r"kernel must be odd and at most the image's shorter side \(8 px\), got 4"),
    (9, "kernel must be odd .* got 9"), (-3, "kernel must be odd .* got -3"),
    (2.5, "kernel must be odd .* got 2.5"), (np.ones((3, 5)), r"integer or square \(K, K\), got shape \(3, 5\)"),
])
def test_impossible_kernels_are_named(kernel, message):
    with pytest.raises(InputError, match=message):
        build_the_U_indexes(np.ones((8, 12)), kernel)
    with pytest.raises(InputError, match=r"reference_image must have two axes \(y, x\), got shape \(8,\)"):
        build_the_U_indexes(np.ones(8), 3)


# --- one difference image ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact(crowded):
    """A noise-free reference, and image, kernel and background that belong to it exactly."""
    reference, kernel, background = crowded["reference"], crowded["kernels"][0], crowded["backgrounds"][0]
    height, width = reference.shape
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    image = convolve2d(reference, kernel, mode="same") + background[0] + background[1] * x + background[2] * y
    return reference, image, kernel, background


def _interior(plane):
    return plane[K // 2:-(K // 2), K // 2:-(K // 2)]


def test_the_kernel_and_the_background_of_an_exact_image(exact):
    reference, image, kernel, background = exact
    found = run_difference_image(reference, image, K)
    assert found._fields == ("dia_image", "image_model", "kernel", "bkg_coeffs", "kernel_errors")
    np.testing.assert_allclose(found.kernel, kernel, rtol=0, atol=1e-8 * kernel.max())
    # an error of the kernel's sum moves the constant by the sky level times it
    np.testing.assert_allclose(found.bkg_coeffs, background, rtol=0, atol=1e-5)
    assert found.dia_image.shape == found.image_model.shape == image.shape
    inside = np.zeros(image.shape, bool)
    _interior(inside)[:] = True
    for plane in (found.dia_image, found.image_model):
        np.testing.assert_array_equal(np.isfinite(plane), inside)
    np.testing.assert_allclose(_interior(found.dia_image), 0, atol=1e-9 * image.max())


def test_uneven_errors_leave_an_exact_kernel_exact(exact):
    reference, image, kernel, _ = exact
    error = 10 ** np.random.default_rng(2).uniform(-1, 2, image.shape)
    found = run_difference_image(reference, image, K, error=error)
    np.testing.assert_allclose(found.kernel, kernel, rtol=0, atol=1e-7 * kernel.max())


def test_the_model_under_the_mask_is_right(exact):
    reference, image, kernel, background = exact
    mask = np.random.default_rng(3).random(image.shape) < 0.05
    broken = np.where(mask, 1e9, image)
    broken[20, 30:34] = np.nan  # masked by definition
    found = run_difference_image(reference, broken, K, mask=mask)
    np.testing.assert_allclose(found.kernel, kernel, rtol=0, atol=1e-8 * kernel.max())
    np.testing.assert_allclose(found.bkg_coeffs, background, rtol=0, atol=1e-5)
    expected = _interior(np.where(np.isfinite(broken), image, np.nan))
    np.testing.assert_allclose(_interior(found.image_model), expected, rtol=1e-9)
    assert np.isnan(found.dia_image[20, 30:34]).all()


def test_masked_pixels_are_deleted_rows(crowded):
    """Oracle: weighted least squares on the explicit U with the rows of masked pixels left out."""
    reference, image, mask = crowded["reference"], crowded["images"][1], crowded["masks"][1]
    error = np.where(np.arange(image.shape[1]) < 40, 20.0, 60.0) * np.ones(image.shape)
    stack = gpudia.subtract(reference, image, error, mask, kernel_size=K, solver="direct", passes=1, clip=np.inf,
                            keep=("image_variance",))
    sigma = np.sqrt(_interior(stack.image_variance[0]).ravel())
    assert np.ptp(sigma) > 30  # the weights are the errors'
    height, width = image.shape
    y, x = (_interior(v).ravel() for v in np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width),
                                                      indexing="ij"))
    U = np.column_stack([build_the_U_matrix(reference, K)[0], np.ones(len(x)), x, y])
    rows = ~_interior(mask).ravel()
    oracle = np.linalg.lstsq(U[rows] / sigma[rows, None], _interior(image).ravel()[rows] / sigma[rows], rcond=None)[0]
    # condition number of U below 1e5: normal equations lose 1e10 of 1e16
    np.testing.assert_allclose(stack.kernel[0], oracle[:K * K].reshape(K, K), rtol=0, atol=1e-6 * oracle[:K * K].max())
    garbage = np.where(mask, -1e7, image)
    for one, other in zip(run_difference_image(reference, image, K, mask, error)[2:],
                          run_difference_image(reference, garbage, K, mask, error)[2:], strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_cosmic_ray_is_clipped(crowded):
    reference, image, error = crowded["reference"], crowded["images"][0], crowded["errors"][0]
    hit = image.copy()
    hit[40:42, 50] += 30 * error[40:42, 50]
    clean, found = (run_difference_image(reference, i, K, error=error) for i in (image, hit))
    # what is left is the information of the twelve pixels that are missing
    assert (np.abs(found.kernel - clean.kernel) < clean.kernel_errors).all()
    np.testing.assert_allclose(found.dia_image[40:42, 50], 30 * error[40:42, 50], atol=6 * error[40, 50])


def test_kernel_errors_are_those_of_many_draws(crowded):
    reference, error = crowded["reference"], crowded["errors"][0]
    truth = crowded["kernels"][0]
    model = run_difference_image(reference, convolve2d(reference, truth, mode="same"), K).image_model
    model = np.where(np.isfinite(model), model, 0.0)
    rng = np.random.default_rng(4)
    n, pulls = 30, []
    for _ in range(n):
        found = run_difference_image(reference, model + error * rng.normal(size=model.shape), K, error=error)
        pulls.append((found.kernel - truth) / found.kernel_errors)
    # the relative error of a standard deviation from n draws is 1 / sqrt(2 n), neighbours are not independent
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(pulls))), 1.0, atol=4 / np.sqrt(2 * n))


@pytest.mark.parametrize("dtype", ["u2", ">i4", ">f4", ">f8", "f4"])
def test_every_dtype_gives_the_same_numbers(exact, dtype):
    reference, image = (np.round(a[:40, :48]) for a in exact[:2])
    expected = run_difference_image(reference, image, 5)
    found = run_difference_image(reference.astype(dtype), image.astype(dtype), 5)
    np.testing.assert_allclose(found.kernel, expected.kernel, rtol=0, atol=1e-9)
    assert found.dia_image.dtype.isnative


def test_masked_arrays_and_ccddata_are_their_planes(crowded):
    reference, image, error, mask = (crowded[k] if k == "reference" else crowded[k][0]
                                     for k in ("reference", "images", "errors", "masks"))
    expected = run_difference_image(reference, image, K, mask, error)
    ccd = CCDData(image, unit="adu", mask=mask, uncertainty=StdDevUncertainty(error))
    for found in (run_difference_image(reference, np.ma.array(image, mask=mask), K, error=error),
                  run_difference_image(CCDData(reference, unit="adu"), ccd, K)):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_arrays_come_back_where_they_came_from(backend, exact):
    reference, image = exact[:2]
    expected = run_difference_image(reference, image, K)
    found = run_difference_image(to_device(reference, backend), to_device(image, backend), K)
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, backend.array_type)
        np.testing.assert_allclose(to_host(one), other, rtol=0, atol=1e-6 * np.nanmax(np.abs(other)))


def test_host_arrays_are_computed_where_the_switch_points(strict, monkeypatch, exact):
    monkeypatch.setattr("gpudia.difference.active_backend", lambda: strict)
    reference, image = exact[:2]
    transfers.reset()
    found = run_difference_image(reference, image, K)
    assert transfers.up >= 2
    assert all(type(array) is np.ndarray for array in found)
    with pytest.raises(InputError, match="arrays must be all of one backend"):
        run_difference_image(to_device(reference, strict), image, K)


@pytest.mark.parametrize(("change", "message"), [
    ({"kernel_size": 6}, "kernel_size must be odd and at least 3, got 6"),
    ({"kernel_size": 41}, r"kernel_size must be at most half the frame's shorter side \(80 px\), got 41"),
    ({"aligned_image": np.ones((80, 80))},
     r"aligned_image must have the shape of reference_image \(80, 96\), got \(80, 80\)"),
    ({"mask": np.ones((3, 3))}, r"mask of aligned_image must have the shape of aligned_image \(80, 96\), got \(3, 3\)"),
    ({"error": np.ones((3, 3))}, r"error of aligned_image must have the shape .* got \(3, 3\)"),
    ({"indi": np.ones((2, 2), int)}, r"indi must have shape \(6660, 49\), got \(2, 2\)"),
])
def test_wrong_arguments_are_named(exact, change, message):
    arguments = {"reference_image": exact[0], "aligned_image": exact[1], "kernel_size": K} | change
    with pytest.raises(InputError, match=message):
        run_difference_image(**arguments)


def test_indexes_are_accepted_and_change_nothing(exact):
    reference, image = exact[:2]
    indi, indj = build_the_U_indexes(reference, K)
    np.testing.assert_array_equal(run_difference_image(reference, image, K, indi=indi, indj=indj).kernel,
                                  run_difference_image(reference, image, K).kernel)


@pytest.mark.parametrize(("image", "message"), [
    (np.full((80, 96), np.nan), r"no solution \(.*not_finite.*\)"),
    (None, r"no solution \(.*no_pixels\): 0 good pixels"),
])
def test_a_fit_without_solution_says_why(exact, image, message):
    mask = None if image is not None else np.ones((80, 96), bool)
    with pytest.raises(FrameError, match=message):
        run_difference_image(exact[0], exact[1] if image is None else image, K, mask=mask)


def test_aperture_photometry_is_that_of_the_photometry_room():
    table = run_dia_photometry(np.ones((30, 40)), np.ones((30, 40)), [(10.0, 12.0)], 3.0)
    assert table.colnames[:5] == ["id", "xcenter", "ycenter", "aperture_sum", "aperture_sum_err"]
    np.testing.assert_allclose([table["aperture_sum"][0], table["aperture_sum_err"][0] ** 2], 9 * np.pi)


# --- the analyst ---------------------------------------------------------------------------------------------------


SIZE = 110


def _write(folder, compress=False, **settings):
    series = simulate_field(SimulationSettings(**{"shape": (150, 180), "n_epochs": 3, "seed": 5, "rotation": 0.02,
                                                  "psf_variation": 0.0, "fwhm_range": (3.0, 4.0),
                                                  "microlensing": False, "n_variables": 0} | settings))
    return series, write_series(series, folder, compress=compress)


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    """Series and files: three dithered frames without PSF variation."""
    return _write(tmp_path_factory.mktemp("field"))


@pytest.fixture
def copies(field, tmp_path):
    """Series and files in a folder of this test's own."""
    series, paths = field
    return series, [Path(shutil.copy(path, tmp_path)) for path in paths]


def _other(series):
    return next(i for i in range(len(series.frames)) if i != series.reference_index)


def _analyst(series, paths, epoch=None, **change):
    image = paths[_other(series) if epoch is None else epoch]
    reference, target = paths[series.reference_index], series.truth[0]
    arguments = {"reference_name": "reference", "reference_path": reference, "image_name": image.name,
                 "image_path": image, "reference_catalog": None, "image_catalog": None,
                 "cutout_region": [target["ra"], target["dec"], SIZE], "kernel_size": 15,
                 "log_path": image.parent / "logs"}
    return DIAPhotometryAnalyst(**arguments | change)


def test_attributes_follow_the_steps(copies):
    series, paths = copies
    analyst = _analyst(series, paths)
    assert analyst.status == "pending"
    assert analyst.reference_layers == analyst.image_layers == ["SCI", "CAT", "BPM", "ERR"]
    assert analyst.image.shape == analyst.reference_image.shape == (150, 180)
    assert (analyst.size, analyst.kernel_size, analyst.ra) == (SIZE, 15, series.truth["ra"][0])
    analyst.cut_image_and_ref()
    assert analyst.image.shape == analyst.reference_image.shape == (SIZE, SIZE)
    x, y = analyst.reference_wcs.world_to_pixel_values(analyst.ra, analyst.dec)
    assert max(abs(x - SIZE // 2), abs(y - SIZE // 2)) <= 0.5
    analyst.align_image_to_ref()
    assert analyst.aligned is analyst.image
    assert analyst.image_wcs is analyst.reference_wcs
    assert analyst.run_dia_photometry() is None
    assert analyst.status == "ok"
    assert analyst.difference.difference.shape == (1, SIZE, SIZE)
    assert {"id", "xcenter", "ycenter", "aperture_sum", "aperture_sum_err", "flags", "ra", "dec"} == set(
        analyst.phot_table.colnames)
    assert not list(paths[0].parent.glob("*_dia.fits"))  # nothing is written unasked


def test_steps_do_those_before_them(copies):
    series, paths = copies
    analyst, whole = _analyst(series, paths), _analyst(series, paths)
    analyst.run_dia_photometry()
    assert whole.process_image(save=False) == "ok"
    np.testing.assert_array_equal(analyst.phot_table["aperture_sum"], whole.phot_table["aperture_sum"])


def test_apertures_are_where_the_stars_are(copies):
    """The catalog's positions, exactly; and there, with exact errors, what the stars did."""
    series, paths = copies
    epoch = _other(series)
    truth = series.truth[series.truth["kind"] == "constant"]
    catalog = Table({"source_id": truth["id"] + 7000, "xcenter": truth["x"], "ycenter": truth["y"]})
    analyst = _analyst(series, paths, reference_catalog=catalog, image_catalog=series_catalog(series, epoch))
    assert analyst.process_image(save=False) == "ok", analyst.reason
    table = analyst.phot_table
    rows = truth[np.searchsorted(truth["id"], table["id"] - 7000)]
    np.testing.assert_array_equal(table["xcenter"], rows["x"] - analyst.region.x0)
    np.testing.assert_array_equal(table["ycenter"], rows["y"] - analyst.region.y0)
    ra, dec = analyst.reference_wcs.pixel_to_world_values(table["xcenter"], table["ycenter"])
    np.testing.assert_allclose([table["ra"], table["dec"]], [ra, dec], rtol=0, atol=1e-9)
    good = (table["flags"] & ~np.int32(SOURCE_FLAGS.neighbour)) == 0
    pulls = np.asarray(table["aperture_sum"] / table["aperture_sum_err"])[good]
    assert good.sum() > 30
    # a median stands unmasked cosmic rays; its relative error is 1.17 / sqrt(n), and overlapping apertures share noise
    assert abs(1.4826 * np.median(np.abs(pulls)) - 1) < 4 * 1.17 / np.sqrt(good.sum())
    expected = series.frames[epoch].scale
    assert abs(table.meta["SCALE"] - expected) < 4 * table.meta["SCALEERR"]
    assert table.meta["SCALEERR"] < 0.05 * expected


def series_catalog(series, epoch):
    """Catalog of a frame with the same ids, 0-based columns."""
    found = series.catalog(epoch)
    return Table({"source_id": found["id"] + 7000, "xcenter": found["x"], "ycenter": found["y"]})


def test_ids_come_first(copies):
    series, paths = copies
    epochs = series.reference_index, _other(series)
    analyst = _analyst(series, paths, reference_catalog=series_catalog(series, epochs[0]),
                       image_catalog=series_catalog(series, epochs[1]))
    analyst.align_image_to_ref()
    assert analyst.registration.route == "id"
    found = detect_stars(read_frame(paths[epochs[1]]))
    assert _analyst(series, paths, image_catalog=found).image_catalog is found  # 0-based already, not moved by one


def _add_star(path, frame, x, y, flux):
    """Put light with the frame's own PSF at a position of the reference."""
    x, y = (float(v) for v in frame.position(x, y))
    column, row = round(x) - 15, round(y) - 15
    with fits.open(path, memmap=False) as hdus:
        light = flux * frame.psf_field.pixels(x, y, (column, column + 31), (row, row + 31))
        hdus["SCI"].data[row:row + 31, column:column + 31] += light.astype(np.float32)
        hdus.writeto(path, overwrite=True)


def test_a_star_that_brightened_is_measured_within_its_error(copies):
    series, paths = copies
    epoch = _other(series)
    before = _analyst(series, paths)
    before.process_image(save=False)
    quiet = np.flatnonzero(before.phot_table["flags"] == 0)
    row = before.phot_table[quiet[np.argmin(before.phot_table["aperture_sum_err"][quiet])]]
    x, y = before.region.to_frame((row["xcenter"], row["ycenter"]))
    _add_star(paths[epoch], series.frames[epoch], x, y, 5000.0)
    after = _analyst(series, paths)
    after.process_image(save=False)
    found = after.phot_table[after.phot_table["id"] == row["id"]][0]
    gained = found["aperture_sum"] - row["aperture_sum"]
    fraction = _light_within(series.frames[epoch], x, y, after.aperture_radius)
    # the same noise is in both: what differs is the kernel, which the new light must not move
    assert abs(gained - 5000 * fraction) < row["aperture_sum_err"]
    assert gained > 10 * found["aperture_sum_err"]


def _light_within(frame, x, y, radius):
    stamp = frame.psf(*(float(v) for v in frame.position(x, y)))
    middle = [stamp.shape[0] // 2] * 2
    return run_dia_photometry(stamp, None, [middle], radius)["aperture_sum"][0]


def test_a_target_at_the_edge_is_masked_not_shifted(copies):
    series, paths = copies
    reference = read_frame(paths[series.reference_index])
    ra, dec = reference.wcs.pixel_to_world_values(12.0, 70.0)
    analyst = _analyst(series, paths, cutout_region=[float(ra), float(dec), SIZE])
    assert analyst.process_image(save=False) == "ok", analyst.reason
    assert analyst.region.origin == (12 - SIZE // 2, 70 - SIZE // 2)
    left = SIZE // 2 - 12
    unusable = PIXEL_FLAGS.reference | PIXEL_FLAGS.border
    assert (analyst.difference.flags[0][:, :left + 7] & unusable != 0).all()
    near = analyst.phot_table["xcenter"] < left + 7
    assert near.any()
    assert np.isnan(analyst.phot_table["aperture_sum"][near]).all()
    assert (analyst.phot_table["flags"][near] & (SOURCE_FLAGS.reference_masked | SOURCE_FLAGS.outside) != 0).all()
    assert analyst.flags & FRAME_FLAGS.partly_outside
    outside = _analyst(series, paths, cutout_region=[float(ra) + 1, float(dec), SIZE])
    assert outside.process_image() == "failed"
    assert "target must lie on the frame" in outside.reason


def test_a_rotated_image_has_its_corners(tmp_path):
    """3 degrees move the corners of the cutout by 3 px: they come from beyond the image's own cutout."""
    series, paths = _write(tmp_path, rotation=3.0, n_epochs=2, seed=8, bad_columns=0.0, bad_pixels=0.0,
                           cosmic_rays=0.0, saturation=np.inf)
    analyst = _analyst(series, paths)
    assert analyst.process_image(save=False) == "ok", analyst.reason
    assert np.hypot(*(analyst.registration.matrix[:, :2] - np.eye(2))[0]) > 0.005
    assert analyst.flags & FRAME_FLAGS.resampled
    stack = analyst.difference
    half = analyst.kernel_size // 2
    inside = (slice(half, -half), slice(half, -half))
    assert np.isfinite(stack.difference[0][inside]).all()
    assert (stack.variance[0][inside] > 0).all()
    sky = series.frames[_other(series)].data.min()
    assert min(analyst.aligned[y, x] for y in (0, -1) for x in (0, -1)) > 0.8 * sky


def test_twice_is_the_same(copies):
    series, paths = copies
    results = []
    for _ in range(2):
        analyst = _analyst(series, paths)
        analyst.process_image(save=False)
        results.append((analyst.registration.matrix, analyst.phot_table["aperture_sum"], analyst.difference.kernel))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("pixel_scale", [0.2, 0.8])
def test_the_aperture_is_in_pixels(tmp_path, pixel_scale):
    """The header gives the seeing in arcsec; the radius is the same number of pixels at every pixel scale."""
    series, paths = _write(tmp_path, pixel_scale=pixel_scale, n_epochs=2)
    analyst = _analyst(series, paths)
    analyst.process_image(save=False)
    # 69 stars in a crowded field give the FWHM to a tenth; arcsec taken for pixels are off by 5 and by 1.25
    assert analyst.aperture_radius == pytest.approx(series.reference.fwhm, rel=0.12)
    chosen = _analyst(series, paths)
    chosen.aperture_radius = 2.5
    chosen.process_image(save=False)
    assert chosen.phot_table.meta["RADIUS"] == 2.5


def test_the_order_of_the_layers_does_not_matter(copies):
    series, paths = copies
    expected = _analyst(series, paths)
    expected.process_image(save=False)
    epoch = _other(series)
    with fits.open(paths[epoch], memmap=False) as hdus:
        layers = [fits.PrimaryHDU(), *(hdus[n] for n in ("ERR", "BPM", "CAT")),
                  fits.ImageHDU(hdus["SCI"].data, hdus["SCI"].header, name="SCI")]
        fits.HDUList(layers).writeto(paths[epoch], overwrite=True)
    found = _analyst(series, paths)
    found.process_image(save=False)
    assert found.image_layers == ["PRIMARY", "ERR", "BPM", "CAT", "SCI"]
    np.testing.assert_array_equal(found.phot_table["aperture_sum"], expected.phot_table["aperture_sum"])


def test_no_bare_except_and_no_breakpoint():
    found = []
    for path in Path(gpudia.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            bare = isinstance(node, ast.ExceptHandler) and node.type is None
            stop = isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
                "breakpoint", "set_trace")
            found += [f"{path.name}:{node.lineno}"] if bare or stop else []
    assert not found


def test_inputs_are_closed_and_unchanged(copies):
    series, paths = copies
    before = {path: path.read_bytes() for path in paths}
    analyst = _analyst(series, paths)
    analyst.process_image()
    analyst.update_image_with_new_layers(overwrite=True)
    assert {path: path.read_bytes() for path in paths} == before
    assert analyst.log.handlers == []
    gc.collect()  # a file left open is a ResourceWarning, and that an error


def test_inputs_are_never_replaced(copies):
    series, paths = copies
    analyst = _analyst(series, paths)
    with pytest.raises(FrameError, match="image must be processed before it is saved, got status 'pending'"):
        analyst.update_image_with_new_layers()
    analyst.process_image()
    for path in (analyst.image_path, analyst.reference_path):
        with pytest.raises(ConfigError, match="path must not be that of an input file, got"):
            analyst.update_image_with_new_layers(path, overwrite=True)
    with pytest.raises(ConfigError, match=r"path must be a new file \(or say overwrite\), got .*_dia.fits"):
        analyst.update_image_with_new_layers()
    with pytest.raises(ConfigError, match="path must be a new file"):
        _analyst(series, paths).process_image()
    assert analyst.process_image(overwrite=True) == "ok"


@pytest.mark.parametrize("compress", [False, True])
def test_the_new_file_has_old_and_new_layers(tmp_path, compress):
    series, paths = _write(tmp_path, compress=compress, n_epochs=2)
    analyst = _analyst(series, paths)
    assert analyst.process_image() == "ok", analyst.reason
    original = read_frame(analyst.image_path)
    output = tmp_path / f"{original.name}_dia.fits"
    with fits.open(output, memmap=False, checksum=True) as hdus:
        assert [h.name for h in hdus] == [*analyst.image_layers, "WCS", "DIA_PHOT", "DIFF", "DIFF_ERR", "DIFF_MASK",
                                          "KERNEL"]
        np.testing.assert_array_equal(hdus["DIFF"].data, analyst.difference.difference[0])
        np.testing.assert_array_equal(hdus["DIFF_ERR"].data ** 2 > 0, np.isfinite(hdus["DIFF"].data))
        np.testing.assert_array_equal(hdus["DIFF_MASK"].data & 127 != 0,
                                      analyst.difference.mask[0] | (hdus["DIFF_MASK"].data & 127 != 0))
        np.testing.assert_array_equal(hdus["KERNEL"].data, analyst.difference.kernel[0])
        np.testing.assert_array_equal(hdus["DIA_PHOT"].data["aperture_sum"], analyst.phot_table["aperture_sum"])
        assert hdus["DIFF"].header["SCALE"] == analyst.difference.scale[0]
        assert hdus["DIFF"].header["GPUDIA"] == gpudia.__version__
    again = read_frame(output)
    for name in ("data", "variance", "mask"):
        np.testing.assert_array_equal(getattr(again, name), getattr(original, name))
    # the updated WCS puts the image's pixels where the reference has them
    xy = np.array([(20.0, 30.0), (150.0, 100.0)])
    there = analyst.registration.apply(xy)
    reference = read_frame(analyst.reference_path)
    np.testing.assert_allclose(again.wcs.pixel_to_world_values(*there.T), reference.wcs.pixel_to_world_values(*xy.T),
                               rtol=0, atol=1e-9)
    table = Table.read(output, hdu="DIA_PHOT")
    assert table.colnames[:5] == ["id", "xcenter", "ycenter", "aperture_sum", "aperture_sum_err"]


def test_results_of_results_replace_the_earlier_ones(copies):
    series, paths = copies
    first = _analyst(series, paths)
    first.process_image()
    image = paths[_other(series)].with_name(f"{read_frame(first.image_path).name}_dia.fits")
    second = _analyst(series, paths, image_path=image)
    assert second.process_image() == "ok", second.reason
    with fits.open(image.with_name(image.stem + "_dia.fits")) as hdus:
        assert len(hdus) == len({h.name for h in hdus}) == 10


def test_distorted_and_turned_references_give_their_wcs_to_the_image(field):
    reference = read_frame(field[1][0])
    angle = np.deg2rad(91.0)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    registration = Registration(np.column_stack([1.01 * turn, (170.0, 3.0)]))
    xy = np.random.default_rng(1).uniform(0, 140, (50, 2))
    distorted = reference.wcs.deepcopy()
    header = distorted.to_header(relax=True)
    header.update({"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 2, "B_ORDER": 2, "A_2_0": 2e-5,
                   "B_1_1": -1e-5})
    bent = type(distorted)(header)
    straight = bent.world_to_pixel_values(*reference.wcs.pixel_to_world_values(*xy.T))
    assert np.abs(np.subtract(straight, xy.T)).max() > 0.1
    for wcs in (reference.wcs, bent):
        moved = wcs_of_image(wcs, registration, reference.shape)
        pixels = np.column_stack(moved.world_to_pixel_values(*wcs.pixel_to_world_values(*xy.T)))
        # astropy inverts a SIP by iteration, to 1e-4 px
        np.testing.assert_allclose(pixels, registration.apply(xy), rtol=0, atol=2e-4)
        again = type(wcs)(moved.to_header(relax=True))
        np.testing.assert_allclose(again.pixel_to_world_values(*xy.T), moved.pixel_to_world_values(*xy.T), rtol=1e-12)


def test_a_failed_image_fails_alone(copies):
    series, paths = copies
    folder = paths[0].parent
    (folder / "text.fits").write_text("no FITS")
    (folder / "cut.fits").write_bytes(paths[0].read_bytes()[:20000])
    other, = write_series(simulate_field(SimulationSettings(shape=(150, 180), n_epochs=1, seed=77, ra=10.0)),
                          folder / "elsewhere")
    other.rename(folder / "stranger.fits")
    with fits.open(paths[_other(series)], memmap=False) as hdus:
        hdus["BPM"].data[:] = 1
        hdus.writeto(folder / "masked.fits")
    images = {"missing.fits": "file must exist", "text.fits": "readable as FITS", "cut.fits": "complete",
              "masked.fits": "at least one good pixel", "stranger.fits": "no trustworthy match",
              paths[_other(series)].name: ""}
    for name, reason in images.items():
        analyst = _analyst(series, paths, image_name=name, image_path=folder)
        assert analyst.process_image() == ("failed" if reason else "ok")
        assert reason in analyst.reason
        text = (folder / "logs" / f"{name}.log").read_text()
        assert (text.count("failed: ") == 1 and reason in text) if reason else "scale" in text
        if reason:
            with pytest.raises(FrameError, match="image must be processed before it is saved, got status 'failed'"):
                analyst.update_image_with_new_layers()


def test_a_missing_reference_fails_its_images(copies):
    series, paths = copies
    analyst = _analyst(series, paths, reference_path=paths[0].with_name("none.fits"))
    with pytest.raises(FrameError, match=r"none.fits: file must exist, got none"):
        analyst.cut_image_and_ref()
    assert analyst.process_image() == "failed"


def test_folders_and_names_make_paths(copies):
    series, paths = copies
    folder, reference, image = paths[0].parent, paths[series.reference_index], paths[_other(series)]
    analyst = _analyst(series, paths, reference_path=folder, reference_name=reference.name, image_path=str(folder))
    assert (analyst.reference_path, analyst.image_path) == (reference, image)


def test_the_reference_itself_is_flagged(copies):
    series, paths = copies
    analyst = _analyst(series, paths, epoch=series.reference_index)
    assert analyst.process_image(save=False) == "ok"
    assert analyst.flags & FRAME_FLAGS.is_reference
    np.testing.assert_allclose(analyst.difference.scale[0], 1, rtol=1e-9)


def test_every_image_has_its_log_and_doubts_go_there(copies):
    series, paths = copies
    other = [i for i in range(3) if i != series.reference_index]
    with fits.open(paths[other[0]], memmap=False) as hdus:
        del hdus["SCI"].header["GAIN"]
        hdus.writeto(paths[other[0]], overwrite=True)
    handlers = logging.getLogger("gpudia").handlers.copy()
    for epoch in other:
        _analyst(series, paths, epoch=epoch, log_path=paths[0].parent / "new" / "logs").process_image(save=False)
    logs = [(paths[0].parent / "new" / "logs" / f"{paths[e].name}.log").read_text() for e in other]
    assert "gain must be positive, got nan" in logs[0]
    for own, foreign, text in zip(other, other[::-1], logs, strict=True):
        assert paths[own].name in text
        assert paths[foreign].name not in text
    assert logging.getLogger("gpudia").handlers == handlers


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"kernel_size": 10}, InputError, "kernel_size must be odd and at least 3, got 10"),
    ({"kernel_size": 57}, InputError, r"kernel_size must be at most half the frame's shorter side \(110 px\), got 57"),
    ({"cutout_region": [1.0, 2.0]}, InputError, r"cutout_region must be \[ra, dec, size\], got \[1.0, 2.0\]"),
    ({"cutout_region": [1.0, 95.0, 90]}, ConfigError, "dec must be -90 to 90 degrees.* got 95.0"),
    ({"cutout_region": [1.0, 2.0, 90.5]}, ConfigError, "size must be an integer of at least 16, got 90.5"),
    ({"reference_catalog": [1, 2]}, InputError, "reference_catalog must be an astropy Table or None, got list"),
    ({"image_catalog": Table({"a": [1]})}, InputError, r"image_catalog must have positions .* got columns a"),
])
def test_wrong_settings_are_named(field, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        _analyst(*field, log_path=tmp_path, **change)


def test_a_log_folder_that_cannot_be_is_named(field, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"log_path must be a folder that can be made, got .*file"):
        _analyst(*field, log_path=tmp_path / "file" / "logs")


def test_numbers_of_an_array_are_a_region(field, tmp_path):
    ra, dec = field[0].truth["ra"][0], field[0].truth["dec"][0]
    assert _analyst(*field, log_path=tmp_path, cutout_region=np.array([ra, dec, 90.0])).size == 90


@pytest.mark.parametrize("name", ["numpy"])
def test_the_switch_is_followed(copies, name):
    series, paths = copies
    analyst = _analyst(series, paths)
    with use_backend(name):
        assert analyst.process_image() == "ok"
    with fits.open(analyst.image_path.with_name(f"{analyst.image_path.stem}_dia.fits")) as hdus:
        assert hdus["DIFF"].header["BACKEND"] == name


@pytest.mark.realdata
def test_two_frames_of_a_real_night(real_data, tmp_path):
    """Ten minutes apart: the transparency is the same to a few percent, and no star varies beyond its noise."""
    paths = [Path(shutil.copy(path, tmp_path)) for path in sorted((real_data / "rise").glob("*.fits"))[:2]]
    analyst = DIAPhotometryAnalyst("first", paths[0], "second", paths[1], None, None, [253.4659, 62.9002, 300], 15,
                                   tmp_path / "logs")
    assert analyst.process_image() == "ok", analyst.reason
    assert abs(analyst.phot_table.meta["SCALE"] - 1) < 0.05
    good = analyst.phot_table[analyst.phot_table["flags"] == 0]
    pulls = np.abs(good["aperture_sum"] / good["aperture_sum_err"])
    assert 1.4826 * np.median(pulls) < 1 + 4 * 1.17 / np.sqrt(len(good))
