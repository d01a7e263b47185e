"""The simulator: laws of its renderer, its noise, its geometry, its truth and its files."""

import math
from dataclasses import replace

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import dblquad
from scipy.stats import kstest

from gpudia.errors import InputError
from gpudia.flags import PIXEL_FLAGS
from gpudia.simulate import (
    VARIABLE_KINDS,
    MoffatField,
    SimulationSettings,
    add_stars,
    magnification,
    simulate_field,
    write_series,
)
from gpudia.simulate.psf import MISSING_FLUX

SMALL = SimulationSettings(shape=(140, 110), n_epochs=4, seed=3)
CLEAN = replace(
    SMALL,
    psf_variation=0,
    ellipticity=0,
    sky_gradient=0,
    bad_pixels=0,
    bad_columns=0,
    cosmic_rays=0,
    dither=0,
    rotation=0,
    saturation=math.inf,
    n_variables=0,
    microlensing=False,
)


@pytest.fixture(scope="module")
def series():
    return simulate_field(SMALL)


@pytest.fixture(scope="module")
def wide_turns():
    """Big dithers and rotations."""
    return simulate_field(replace(SMALL, dither=20, rotation=30))


def moffat(fwhm, e1=0.0, e2=0.0, beta=3.5):
    return MoffatField(beta, (0.0, 0.0), np.column_stack([[fwhm, e1, e2], np.zeros((3, 2))]))


def point_profile(psf, x, y):
    """The Moffat function as it is defined, at one point: slow and obvious."""
    fwhm, e1, e2 = psf.shape_at(0.0, 0.0)
    a = fwhm / 2 / math.sqrt(2 ** (1 / psf.beta) - 1)
    q = np.array([[1 - e1, -e2], [-e2, 1 + e1]]) / a**2 / math.sqrt(1 - e1**2 - e2**2)
    d = np.array([x, y])
    return (psf.beta - 1) / math.pi / a**2 * (1 + d @ q @ d) ** -psf.beta


# ---------------------------------------------------------------------------------------------- renderer


@pytest.mark.parametrize("fwhm", [3.0, 6.0])
@pytest.mark.parametrize("pixel", [(0, 0), (1, 0), (2, -3), (5, 1), (9, -9)])
def test_pixel_is_the_integral_of_the_profile(fwhm, pixel):
    psf, x, y = moffat(fwhm, 0.1, -0.05), 0.31, -0.42
    rendered = psf.stamp(x, y, 25)[12 + pixel[1], 12 + pixel[0]]
    left, bottom = pixel[0] - 0.5 - x, pixel[1] - 0.5 - y
    exact, _ = dblquad(lambda v, u: point_profile(psf, u, v), left, left + 1, bottom, bottom + 1, epsabs=1e-12)
    assert abs(rendered - exact) < 1e-5 * point_profile(psf, 0, 0)


@settings(max_examples=25, deadline=None)
@given(
    x=st.floats(-0.5, 0.5),
    y=st.floats(-0.5, 0.5),
    fwhm=st.floats(3, 6),
    e1=st.floats(-0.15, 0.15),
    e2=st.floats(-0.15, 0.15),
    beta=st.floats(2.5, 4.5),
)
def test_renderer_conserves_flux(x, y, fwhm, e1, e2, beta):
    psf, half = moffat(fwhm, e1, e2, beta), 60
    missing = 1 - psf.stamp(x, y, 2 * half + 1).sum()
    # Flux outside of an ellipse with (d^T Q d) = s: (1 + s)^(1 - beta); the square lies between two such ellipses.
    eigen = np.array([1 - math.hypot(e1, e2), 1 + math.hypot(e1, e2)])
    s_min, s_max = eigen / psf.scale_length(fwhm) ** 2 / math.sqrt(np.prod(eigen))
    outside_largest = (1 + 2 * s_max * (half + 1) ** 2) ** (1 - beta)
    outside_smallest = (1 + s_min * half**2) ** (1 - beta)
    assert outside_largest - 1e-5 < missing < outside_smallest + 1e-5


def test_half_maximum_lies_at_the_fwhm_along_either_axis():
    e, fwhm = 0.3, 60.0
    stamp = moffat(fwhm, e, 0.0).stamp(0, 0, 121)
    stretch = ((1 + e) / (1 - e)) ** 0.25
    half = pytest.approx(stamp[60, 60] / 2, rel=2e-3)
    assert np.interp(60 + fwhm / 2 * stretch, np.arange(121), stamp[60]) == half
    assert np.interp(60 + fwhm / 2 / stretch, np.arange(121), stamp[:, 60]) == half


@pytest.mark.parametrize("flux", [30.0, 1e4, 4e5])
def test_truncated_wings_stay_below_the_level_asked_for(flux):
    psf, edge = moffat(4.0, 0.1, 0.05), 0.02
    image, whole = np.zeros((181, 161)), np.zeros((181, 161))
    add_stars(image, 80.3, 90.4, flux, psf, edge)
    whole += flux * psf.pixels(80.3, 90.4, (0, 161), (0, 181))
    lost = whole - image
    assert lost.max() <= edge * (1 + 1e-3)
    assert lost.sum() <= MISSING_FLUX * flux
    np.testing.assert_array_equal(image[image > 0], whole[image > 0])


def test_star_outside_the_frame_leaves_only_its_wing():
    psf, image, larger = moffat(4.0), np.zeros((20, 30)), np.zeros((40, 50))
    add_stars(image, -3.0, 25.0, 1e4, psf, 0.01)
    add_stars(larger, 7.0, 35.0, 1e4, psf, 0.01)
    np.testing.assert_allclose(image, larger[10:30, 10:40], rtol=1e-12)
    add_stars(image, -500.0, 0.0, 1.0, psf, 0.01)


# -------------------------------------------------------------------------------------------------- noise


def test_pixel_noise_has_the_stated_variance(series):
    for frame in series.frames:
        good = (frame.mask == 0) & (frame.cosmic_rays == 0)
        pull = (frame.data - frame.model) / np.sqrt(frame.variance)
        bright = good & (frame.model > 1.5 * np.median(frame.model))
        for chosen in (good & ~bright, bright):
            p = pull[chosen].astype(float)
            assert abs(p.mean()) < 4 / math.sqrt(p.size)
            assert abs(p.var() - 1) < 4 * math.sqrt(2.1 / p.size)


def test_error_comes_from_the_noisy_data_as_pipelines_do(series):
    frame = series.frames[0]
    expected = np.sqrt(np.abs(frame.data) / frame.gain + (frame.read_noise / frame.gain) ** 2)
    np.testing.assert_allclose(frame.error, expected, rtol=1e-6)
    assert (frame.data.dtype, frame.error.dtype, frame.mask.dtype) == (np.float32, np.float32, np.uint8)


def test_deep_reference_has_less_noise_and_says_so():
    once, deep = simulate_field(CLEAN), simulate_field(replace(CLEAN, reference_depth=9))
    np.testing.assert_allclose(deep.reference.variance, once.reference.variance / 9, rtol=1e-12)
    pull = (deep.reference.data - deep.reference.model) / np.sqrt(deep.reference.variance)
    assert abs(pull.std() - 1) < 4 / math.sqrt(2 * pull.size)
    assert deep.reference.header["GAIN"] == 9 * once.reference.header["GAIN"]
    other = (deep.reference_index + 1) % CLEAN.n_epochs
    np.testing.assert_array_equal(deep.frames[other].data, once.frames[other].data)


def test_infinitely_deep_reference_is_the_model():
    reference = simulate_field(replace(CLEAN, reference_depth=math.inf)).reference
    rounding = np.finfo(np.float32).eps * reference.model
    assert np.all(np.abs(reference.data - reference.model) < rounding + 6 * np.sqrt(reference.variance))
    assert np.sqrt(reference.variance).max() < 1e-4
    assert np.all(reference.error > 0)


# ------------------------------------------------------------------------------------------------ geometry


def test_wcs_and_transform_put_every_star_on_the_same_pixel(wide_turns):
    for frame in wide_turns.frames:
        x, y = frame.position(wide_turns.truth["x"], wide_turns.truth["y"])
        by_sky = frame.wcs.all_world2pix(wide_turns.truth["ra"], wide_turns.truth["dec"], 0)
        np.testing.assert_allclose(by_sky, [x, y], atol=1e-6)


def test_transform_is_rigid_and_the_reference_does_not_move(wide_turns):
    np.testing.assert_array_equal(wide_turns.reference.transform, np.eye(2, 3))
    for frame in wide_turns.frames:
        np.testing.assert_allclose(frame.transform[:, :2] @ frame.transform[:, :2].T, np.eye(2), atol=1e-12)


def test_stars_are_drawn_where_the_transform_says(wide_turns):
    """The pixel nearest to the brightest isolated stars is the peak of its neighbourhood in the model."""
    stars = wide_turns.truth
    for frame in wide_turns.frames:
        x, y = frame.position(stars["x"], stars["y"])
        inside = np.flatnonzero((x > 10) & (x < 99) & (y > 10) & (y < 129))
        star = inside[np.argmax(stars["flux"].data[inside, frame.index])]
        ix, iy = round(x[star]), round(y[star])
        window = frame.model[iy - 4 : iy + 5, ix - 4 : ix + 5]
        peak = np.unravel_index(window.argmax(), window.shape)
        assert max(abs(peak[0] - 4 - (y[star] - iy)), abs(peak[1] - 4 - (x[star] - ix))) < 1.1


# -------------------------------------------------------------------------------------------------- truth


def test_cramer_rao_is_the_scatter_of_a_weighted_fit(series):
    """Fit the target's flux on many noise draws, sky and neighbours known."""
    frame, size, n_draws = series.frames[1], 31, 2000
    x, y = (float(v) for v in frame.position(series.truth["x"][0], series.truth["y"][0]))
    window = np.s_[round(y) - 15 : round(y) + 16, round(x) - 15 : round(x) + 16]
    good = frame.mask[window] == 0
    model, variance = frame.model[window][good], frame.variance[window][good]
    psf = frame.psf(x, y, size)[good]
    flux = series.truth["flux"][0][frame.index] * frame.transparency
    rng = np.random.default_rng(1)
    electrons = rng.poisson(model * frame.gain, (n_draws, model.size))
    electrons = electrons + rng.normal(0, frame.read_noise, (n_draws, model.size))
    star_alone = electrons / frame.gain - (model - flux * psf)
    fitted = np.linalg.lstsq((psf / np.sqrt(variance))[:, None], (star_alone / np.sqrt(variance)).T, rcond=None)[0][0]
    floor = series.cramer_rao(0, 1)
    assert abs(fitted.mean() - flux) < 4 * floor / math.sqrt(n_draws)
    assert fitted.std() == pytest.approx(floor, rel=4 / math.sqrt(2 * n_draws))


def test_cramer_rao_of_the_lone_star_on_flat_sky_is_the_textbook_one():
    field = simulate_field(replace(CLEAN, star_density=0, target_mag=28.0))
    frame = field.frames[0]
    psf = frame.psf(*(float(v) for v in frame.position(field.truth["x"][0], field.truth["y"][0])), 81)
    sky_limited = math.sqrt(frame.variance.mean() / np.sum(psf**2))
    assert field.cramer_rao(0, 0) == pytest.approx(sky_limited, rel=1e-3)


def test_cramer_rao_outside_the_frame_is_infinite(series):
    far = int(np.argmax(np.hypot(series.truth["x"], series.truth["y"])))
    assert series.cramer_rao(far, 0) > 100 * series.cramer_rao(0, 0)
    lost = simulate_field(replace(CLEAN, bad_pixels=1.0))
    assert lost.cramer_rao(0, 0) == math.inf


def test_star_counts_rise_with_the_slope():
    field = replace(CLEAN, shape=(16, 16), n_epochs=1, star_density=1.0, slope=0.3, target_mag=20.0)
    mag = simulate_field(field).truth["mag"][1:]
    bright, faint = field.mag_range

    def expected(m):
        return (10 ** (0.3 * (m - bright)) - 1) / (10 ** (0.3 * (faint - bright)) - 1)

    assert kstest(mag, expected).pvalue > 1e-3
    assert bright <= mag.min()
    assert mag.max() <= faint


def test_flat_counts_and_density():
    field = replace(CLEAN, shape=(60, 80), n_epochs=1, slope=0.0, star_density=0.1)
    truth = simulate_field(field).truth
    assert kstest(truth["mag"][1:], "uniform", args=(15.0, 8.0)).pvalue > 1e-3
    inside = (np.abs(truth["x"] - 39.5) < 40) & (np.abs(truth["y"] - 29.5) < 30)
    assert abs(inside.sum() - 480) < 4 * math.sqrt(480)


def test_defaults_reach_below_the_noise_and_saturate():
    field = simulate_field()
    inside = np.flatnonzero((np.abs(field.truth["x"] - 150) < 140) & (np.abs(field.truth["y"] - 150) < 140))
    faintest = int(inside[np.argmax(field.truth["mag"][inside])])
    flux = [field.truth["flux"][faintest][f.index] * f.transparency for f in field.frames]
    snr = np.array(flux) / [field.cramer_rao(faintest, f.index) for f in field.frames]
    assert snr.max() < 2
    assert np.median(snr) < 1
    assert np.any(field.reference.mask & PIXEL_FLAGS.saturated)


def test_epochs_span_their_ranges_and_the_best_seeing_is_the_reference():
    field = simulate_field(replace(SMALL, shape=(16, 16), n_epochs=30))
    fwhm = np.array([f.fwhm for f in field.frames])
    assert field.reference_index == fwhm.argmin()
    assert 3.0 <= fwhm.min() < 3.1
    assert 5.9 < fwhm.max() <= 6.0
    transparency = np.array([f.transparency for f in field.frames])
    assert 0.6 <= transparency.min() < 0.62
    assert 0.98 < transparency.max() <= 1.0
    np.testing.assert_allclose([f.scale for f in field.frames], transparency / transparency[field.reference_index])
    assert np.all(np.diff([f.mjd for f in field.frames]) > 0)


def test_psf_varies_over_the_field_by_what_was_asked():
    field = simulate_field(replace(CLEAN, psf_variation=0.06, shape=(16, 16)))
    for frame in field.frames:
        gradient = frame.psf_field.coefficients[0, 1:]
        assert np.hypot(*gradient) * 512 / frame.fwhm == pytest.approx(0.06)
    assert simulate_field(CLEAN).reference.psf_field.coefficients[0, 1] == 0


def test_scale_between_frames_is_the_ratio_of_the_starlight():
    """Same PSF and pointing: the models above the sky are proportional, with the scale as the factor."""
    field = simulate_field(replace(CLEAN, fwhm_range=(4.0, 4.0)))
    light = [(f.model - f.sky) for f in field.frames]
    core = light[field.reference_index] > 10
    for frame, stars in zip(field.frames, light, strict=True):
        np.testing.assert_allclose(stars[core] / light[field.reference_index][core], frame.scale, rtol=3e-3)


def test_paczynski_magnification():
    assert magnification(10.0, 10.0, 5.0, 1.0) == pytest.approx(3 / math.sqrt(5))
    t = np.linspace(-50, 50, 11)
    np.testing.assert_allclose(magnification(t, 0, 5, 0.1), magnification(-t, 0, 5, 0.1))
    assert magnification(1e9, 0, 5, 0.1) == pytest.approx(1)
    assert magnification(0, 0, 5, 1e-3) == pytest.approx(1e3, rel=1e-5)


def test_variables_of_every_kind_vary_and_the_others_do_not():
    series = simulate_field(replace(SMALL, n_epochs=8, shape=(160, 160)))
    kinds = list(series.variables["kind"])
    assert kinds[0] == "microlensing"
    assert set(kinds) == {"microlensing", *VARIABLE_KINDS}
    assert len(kinds) == 1 + SMALL.n_variables
    change = np.ptp(series.truth["flux"].data, axis=1) / series.truth["flux"].data.mean(axis=1)
    constant = series.truth["kind"] == "constant"
    assert np.all(change[constant] == 0)
    assert np.all(change[~constant] > 0.02)
    target = series.variables[0]
    assert target["flux"].max() > 2.5 * 10 ** (0.4 * (29.0 - 18.5))
    assert np.hypot(target["x"] - 79.5, target["y"] - 79.5) < 3
    assert series.variables["floor"].shape == (7, 8)
    assert np.all(series.variables["floor"] > 0)


def test_everything_can_be_switched_off():
    field = simulate_field(CLEAN)
    assert len(field.variables) == 0
    for frame in field.frames:
        np.testing.assert_array_equal(frame.transform, np.eye(2, 3))
        assert not frame.mask.any()
        assert not frame.cosmic_rays.any()
        assert np.ptp(frame.sky) == 0
        np.testing.assert_array_equal(frame.psf(30, 40), frame.psf(90, 100))


# ---------------------------------------------------------------------------------------------- detector


def test_a_third_of_the_cosmic_rays_is_not_in_the_mask():
    field = simulate_field(replace(CLEAN, cosmic_rays=300.0, n_epochs=2, star_density=0, target_mag=28.0))
    for frame in field.frames:
        hits = frame.cosmic_rays
        n = hits.max()
        unknown = np.unique(hits[(hits > 0) & ((frame.mask & PIXEL_FLAGS.cosmic_ray) == 0)])
        assert n > 25
        hidden = n - (np.unique(hits).size - 1)
        assert abs(unknown.size - n / 3) <= 0.5 + hidden
        pull = (frame.data - frame.model) / np.sqrt(frame.variance)
        assert np.all(pull[hits > 0] > 0.5 * 500 / np.sqrt(frame.variance.max()) - 6)
        assert np.all(hits[(frame.mask & PIXEL_FLAGS.cosmic_ray) > 0] > 0)


def test_defects_are_the_same_in_every_frame_and_masked():
    field = simulate_field(replace(CLEAN, bad_pixels=0.01, bad_columns=0.02))
    bad = field.frames[0].mask & PIXEL_FLAGS.bad
    assert all(np.array_equal(f.mask & PIXEL_FLAGS.bad, bad) for f in field.frames)
    columns = np.flatnonzero(bad.all(axis=0))
    assert columns.size == round(0.02 * 110)
    single = np.delete(bad, columns, axis=1)
    assert abs(single.mean() - 0.01) < 4 * math.sqrt(0.01 / single.size)
    columns_alone = simulate_field(replace(CLEAN, bad_columns=0.02, n_epochs=1)).frames[0]
    weak = (columns_alone.mask & PIXEL_FLAGS.bad) > 0
    residual = columns_alone.data[weak] - columns_alone.model[weak] / 2
    assert abs(residual.mean()) < 4 * math.sqrt(columns_alone.variance[weak].mean() / 4 / weak.sum())


def test_saturated_pixels_stand_at_the_level_and_are_masked():
    field = simulate_field(replace(CLEAN, saturation=5000.0, target_mag=15.0))
    for frame in field.frames:
        saturated = (frame.mask & PIXEL_FLAGS.saturated) > 0
        assert saturated.any()
        assert np.all(frame.data[saturated] == 5000)
        assert frame.data[~saturated].max() < 5000
        assert frame.header["SATURATE"] == 5000


def test_equal_seeds_give_equal_series(series):
    again, other = simulate_field(SMALL), simulate_field(replace(SMALL, seed=4))
    for a, b, c in zip(series.frames, again.frames, other.frames, strict=True):
        np.testing.assert_array_equal(a.data, b.data)
        np.testing.assert_array_equal(a.mask, b.mask)
        assert not np.array_equal(a.data, c.data)
    assert np.all(series.truth["flux"] == again.truth["flux"])
    assert np.all(series.catalog(0)["x"] == again.catalog(0)["x"])


def test_one_effect_off_leaves_the_others_alone(series):
    calm = simulate_field(replace(SMALL, cosmic_rays=0))
    for a, b in zip(series.frames, calm.frames, strict=True):
        untouched = a.cosmic_rays == 0
        np.testing.assert_array_equal(a.data[untouched], b.data[untouched])


# --------------------------------------------------------------------------------------------- catalog, files


def test_catalog_scatters_as_its_errors_say():
    field = simulate_field(replace(CLEAN, shape=(250, 250), n_epochs=2, star_density=1 / 200))
    pulls = []
    for frame in field.frames:
        found = field.catalog(frame.index)
        assert np.all(np.diff(found["flux"]) <= 0)
        true = field.truth[found["id"]]
        sigma = frame.fwhm / 2.35 * found["fluxerr"] / (true["flux"][:, frame.index] * frame.transparency)
        pulls += list((found["x"] - true["x"]) / sigma) + list((found["y"] - true["y"]) / sigma)
        pulls += list((found["flux"] - true["flux"][:, frame.index] * frame.transparency) / found["fluxerr"])
    assert len(pulls) > 60
    assert kstest(pulls, "norm").pvalue > 1e-3


def test_catalog_of_an_empty_field_is_empty():
    field = simulate_field(replace(CLEAN, star_density=0, target_mag=28.0, n_epochs=1))
    assert len(field.catalog(0)) == 0


@pytest.mark.parametrize("compress", [False, True])
def test_lco_layout_on_disk(series, tmp_path, compress):
    paths = write_series(series, tmp_path / "new", compress=compress)
    assert sorted((tmp_path / "new").glob("*.fits*")) == paths
    for path, frame in zip(paths, series.frames, strict=True):
        with fits.open(path) as hdus:
            assert [h.name for h in hdus][compress:] == ["SCI", "CAT", "BPM", "ERR"]
            assert (hdus[0].data is None) == compress
            for name, plane in {"SCI": frame.data, "BPM": frame.mask, "ERR": frame.error}.items():
                assert isinstance(hdus[name], fits.CompImageHDU) == compress
                np.testing.assert_array_equal(hdus[name].data, plane)
            header = hdus["SCI"].header.copy()
            catalog = Table(hdus["CAT"].data)
        _check_header(header, frame, series.settings)
        assert catalog.colnames == ["x", "y", "flux", "fluxerr", "fwhm", "ra", "dec"]
        sky = WCS(header).all_pix2world(catalog["x"], catalog["y"], 1)
        np.testing.assert_allclose(sky, [catalog["ra"], catalog["dec"]], rtol=0, atol=1e-9)


def _check_header(header, frame, asked):
    assert header["MJD-OBS"] + asked.exposure_time / 2 / 86400 == pytest.approx(frame.mjd, abs=1e-9)
    assert header["L1FWHM"] == pytest.approx(frame.fwhm * asked.pixel_scale)
    assert header["DATE-OBS"].startswith("2023-0")
    found = {k: header[k] for k in ("GAIN", "RDNOISE", "SATURATE", "EXPTIME", "FILTER")}
    assert found == {"GAIN": 1.5, "RDNOISE": 8.0, "SATURATE": 13000.0, "EXPTIME": 60.0, "FILTER": "rp"}
    corners = np.array([[0, 0], [asked.shape[1] - 1, asked.shape[0] - 1]])
    by_header, by_frame = WCS(header).all_pix2world(corners, 0), frame.wcs.all_pix2world(corners, 0)
    np.testing.assert_allclose(by_header, by_frame, rtol=0, atol=1e-10)


def test_plain_layout_and_truth_on_disk(series, tmp_path):
    paths = write_series(series, tmp_path, layout="plain")
    with fits.open(paths[2]) as hdus:
        assert len(hdus) == 1
        np.testing.assert_array_equal(hdus[0].data, series.frames[2].data)
    truth = Table.read(tmp_path / "truth.ecsv")
    np.testing.assert_allclose(truth["flux"], series.truth["flux"], rtol=1e-12)
    epochs = truth.meta["epochs"]
    assert [e["file"] for e in epochs] == [p.name for p in paths]
    np.testing.assert_allclose([e["target_flux"] for e in epochs], series.truth["flux"][0])
    assert truth.meta["reference"] == paths[series.reference_index].name


def test_catalog_ids_on_request(series, tmp_path):
    path = write_series(series, tmp_path, catalog_ids=True)[0]
    catalog = Table.read(path, hdu="CAT")
    np.testing.assert_array_equal(catalog["id"], series.catalog(0)["id"])
    np.testing.assert_array_equal(catalog["x"], series.catalog(0)["x"] + 1)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"shape": (300, 8)}, r"shape must be .* at least 16 px each, got \(300, 8\)"),
        ({"n_epochs": 0}, "n_epochs must be at least 1, got 0"),
        ({"gain": 0.0}, "gain must be positive, got 0.0"),
        ({"read_noise": -1.0}, "read_noise must be finite and not negative, got -1.0"),
        ({"cosmic_rays_unmasked": 2.0}, "cosmic_rays_unmasked must be from 0 to 1, got 2.0"),
        ({"fwhm_range": (6.0, 3.0)}, "fwhm_range must be two positive numbers in ascending order"),
        ({"mag_range": (23.0, 15.0)}, "mag_range must be two numbers in ascending order"),
        ({"beta": 1.0}, "beta must be above 1, got 1.0"),
        ({"ellipticity": 0.7}, "ellipticity must be from 0 to below 0.5, got 0.7"),
        ({"dec": 91.0}, "dec must be from -90 to 90, got 91.0"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(InputError, match=message):
        SimulationSettings(**setting)


def test_bad_arguments_are_named(series, tmp_path):
    with pytest.raises(InputError, match="epoch must be from 0 to 3, got 4"):
        series.cramer_rao(0, 4)
    with pytest.raises(InputError, match=r"star must be from 0 to \d+, got -1"):
        series.cramer_rao(-1, 0)
    with pytest.raises(InputError, match="epoch must be from 0 to 3, got -1"):
        series.catalog(-1)
    with pytest.raises(InputError, match="size must be a positive odd number, got 20"):
        series.reference.psf(5, 5, size=20)
    with pytest.raises(InputError, match=r"layout must be one of .*, got 'sdss'"):
        write_series(series, tmp_path, layout="sdss")
