"""The verdict on an epoch: its numbers, the thresholds of the settings, and what the end of a run says."""

import math

import numpy as np
import pytest
from scipy.ndimage import uniform_filter
from test_resume import SETTINGS, _no_plots, frames, series, settings  # noqa: F401

import gpudia
from gpudia.errors import ConfigError
from gpudia.flags import FRAME_FLAGS
from gpudia.pipeline.epochs import _correlation, _kernel_shape


def test_the_correlation_of_white_and_of_smoothed_noise():
    """A mean of three along one axis: neighbours share two of three pixels along it, none across: (2/3 + 0)/2."""
    noise = np.random.default_rng(0).normal(size=(400, 400))
    bits, one = np.zeros(noise.shape, np.uint8), np.ones(noise.shape)
    error = 1 / np.sqrt(2 * noise.size)  # of one correlation; two axes
    assert abs(_correlation(noise, one, bits)) < 4 * error
    assert _correlation(uniform_filter(noise, (1, 3)), one, bits) == pytest.approx(1 / 3, abs=8 * error)
    star = 1e3 * np.exp(-((np.arange(400) - 200) ** 2 + (np.arange(400)[:, None] - 200) ** 2) / 2 / 2.0**2)
    assert abs(_correlation(noise + star, one, bits)) < 0.01  # it has 200 pixels above 3 sigma, of 160,000
    spoiled = np.where(np.arange(400) < 40, 1e6, noise)
    masked = np.where(np.arange(400) < 40, 1, bits).astype(np.uint8)
    assert abs(_correlation(spoiled, one, masked)) < 5 * error
    assert math.isnan(_correlation(noise, one, bits + np.uint8(1)))


def test_the_shape_of_a_kernel():
    """A Gaussian off the centre has its own centroid and width; a pixel has none; one that sharpens has no width."""
    y, x = np.mgrid[-15:16, -15:16]
    found = _kernel_shape(3 * np.exp(-((x - 1.2) ** 2 + (y + 0.4) ** 2) / 2 / 2.0**2))
    assert found == pytest.approx({"kernel_x": 1.2, "kernel_y": -0.4, "kernel_fwhm": 2.3548 * 2}, rel=1e-6)
    point = np.zeros((5, 5))
    point[2, 2] = 2.0
    assert _kernel_shape(point) == {"kernel_x": 0, "kernel_y": 0, "kernel_fwhm": 0}
    point[2, [1, 3]] = -0.2
    assert math.isnan(_kernel_shape(point)["kernel_fwhm"])


def test_thresholds_are_settings_and_the_end_says_what_is_doubtful(settings, tmp_path):  # noqa: F811
    """With thresholds that nothing meets every frame but the reference is flagged, and its numbers are the same."""
    usual = gpudia.run(settings.replace(output=str(tmp_path / "usual")))
    strict = gpudia.run(settings.replace(output=str(tmp_path / "strict"), max_chi2=1 + 1e-9, max_correlation=0.0,
                                         max_registration_error=1e-9))
    others = np.flatnonzero(np.asarray(usual.epochs["flags"]) & FRAME_FLAGS.is_reference == 0)
    assert len(others) == SETTINGS.n_epochs - 1
    for name in ("bad_chi2", "poor_registration"):
        flagged = np.asarray(strict.epochs["flags"]) & getattr(FRAME_FLAGS, name) != 0
        assert flagged[others].all()
        assert f"{flagged.sum()} {name}" in strict.summary()
    correlated = np.asarray(strict.epochs["correlation"]) > 0
    np.testing.assert_array_equal(np.asarray(strict.epochs["flags"]) & FRAME_FLAGS.not_white != 0, correlated)
    assert np.abs(np.asarray(usual.epochs["correlation"])[others]).max() < 0.5
    for name in ("chi2", "correlation", "kernel_x", "kernel_fwhm"):
        np.testing.assert_array_equal(usual.epochs[name], strict.epochs[name])


def test_the_end_of_a_run_says_where_the_time_went(settings, tmp_path):  # noqa: F811
    result = gpudia.run(settings.replace(output=str(tmp_path / "out")))
    longest = max(result.times, key=lambda name: result.times[name])
    assert {"read", "register", "solve", "photometry", "write", "report"} <= set(result.times)
    assert f"most of the time went to {longest} (" in result.summary()
    assert result.summary().endswith(f"report: {result.report}")
    assert len(result.summary().splitlines()) < 12
    assert repr(result) == f"RunResult in {tmp_path / 'out'}: {result.summary()}"
    assert result._repr_html_().startswith("<pre>6 of 6 frames ok")
    assert "seconds by stage: " in (tmp_path / "out" / "gpudia.log").read_text()


@pytest.mark.parametrize(("name", "value", "rule"), [("max_chi2", 1.0, "a number above 1"),
                                                     ("max_epsilon", -0.1, "a number of a share, not negative"),
                                                     ("max_registration_error", 0, "a number of pixels, above 0")])
def test_thresholds_have_rules(name, value, rule):
    with pytest.raises(ConfigError, match=f"{name} must be {rule}, got {value}"):
        gpudia.RunConfig("-", "-", **{name: value})
