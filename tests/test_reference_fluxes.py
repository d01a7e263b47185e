"""What a run makes of its reference: the PSF in its file, fluxes of stars that overlap, what is said of a poor PSF."""

from types import SimpleNamespace

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from conftest import held
from numpy.testing import assert_allclose

from gpudia.cli import main
from gpudia.images import make_frame
from gpudia.photometry import Psf, moffat_psf
from gpudia.photometry.crowded import Scene
from gpudia.pipeline.measure import prepare_measures
from gpudia.pipeline.outputs import _doubts
from gpudia.simulate import SimulationSettings, simulate_field, write_series

SHAPE = (160, 170)


def reference_of(positions, fluxes, saturated=np.inf, target=None, seed=0):
    """All of a reference that its measures ask for."""
    model = Scene.of(np.asarray(positions, float), moffat_psf(4.0, 41), SHAPE).paint(np.asarray(fluxes, float)) + 200.0
    data = model + np.sqrt(model + 25.0) * np.random.default_rng(seed).normal(size=SHAPE)
    bits = np.where(data > saturated, 2, 0).astype(np.uint8)
    cutout = make_frame(data, error=np.sqrt(model + 25.0), bits=bits, header=fits.Header({"GAIN": 1.0}))
    x, y = np.asarray(positions, float).T
    return SimpleNamespace(cutout=cutout, stars=Table({"x_cutout": x, "y_cutout": y}), target=target, weights={},
                           varying=np.empty((0, 2)),
                           look=SimpleNamespace(quality=SimpleNamespace(fwhm=4.0), path=None, name="r"))


@pytest.fixture(scope="module")
def pairs():
    """Places of bright stars on a grid, each with a fainter one 1.2 FWHM beside it, and their fluxes."""
    x, y = np.meshgrid(np.arange(20, 160, 26.0), np.arange(20, 150, 26.0))
    rng = np.random.default_rng(2)
    bright = np.column_stack([x.ravel(), y.ravel()]) + rng.uniform(-0.5, 0.5, (x.size, 2))
    angle = rng.uniform(0, 2 * np.pi, len(bright))
    faint = bright + 4.8 * np.column_stack([np.cos(angle), np.sin(angle)])
    return np.concatenate([bright, faint]), np.repeat([6e4, 1.2e4], len(bright))


def test_fluxes_of_pairs_do_not_contain_each_other(pairs):
    positions, fluxes = pairs
    target = tuple(positions[40] + 0.1)
    measures = prepare_measures(reference_of(positions, fluxes, target=target), [4.0], 4.0, 1)
    assert measures.psf.method == "stack"
    assert len(measures.positions) == len(positions) + 1
    for name in ("ap", "psf"):
        flux, error = measures.flux[name], measures.flux_error[name]
        assert flux[-1] == flux[40]  # one star, whatever the number of its entries
        assert error[-1] == error[40]
        off = flux[:-1] / fluxes - 1
        assert np.abs(np.median(off)) < 0.01
        # 1 % of its bright neighbour, for the PSF, and the noise of a faint star
        assert np.percentile(np.abs(off[len(fluxes) // 2:]), 90) < 0.05 + 2 * np.median(error[:-1] / fluxes)


def test_a_reference_without_a_star_for_a_psf_is_said_to_be(pairs):
    positions, fluxes = pairs
    reference = reference_of(positions, fluxes, saturated=450.0)
    measures = prepare_measures(reference, [4.0], 4.0, 1)
    assert (measures.psf.method, measures.psf.n_stars) == ("assumed", 0)
    assert_allclose(measures.psf.stamp, moffat_psf(4.0, 25))
    assert any("no star of the reference was fit to make a PSF of" in text
               for text in _doubts([], [], reference, measures, "ap"))
    good = prepare_measures(reference_of(positions, fluxes), [4.0], 4.0, 1)
    assert _doubts([], [], reference, good, "psf") == []


def test_no_stars_at_all():
    reference = reference_of(np.empty((0, 2)), np.empty(0), target=(80.0, 70.0))
    measures = prepare_measures(reference, [4.0], 4.0, 1)
    assert measures.psf.method == "assumed"
    for name in ("ap", "psf"):
        assert abs(measures.flux[name][0]) < 5 * measures.flux_error[name][0]


def test_a_psf_that_varies_is_in_the_file_of_the_reference(tmp_path):
    settings = SimulationSettings(shape=(240, 240), n_epochs=3, seed=2, rotation=0.0, dither=2.0, n_variables=0,
                                  psf_variation=0.5, fwhm_range=(3.0, 3.6))
    series = simulate_field(settings)
    write_series(series, tmp_path / "frames")
    assert main(["run", str(tmp_path / "frames"), "--kernel-size", "13", "--spatial-degree", "0", "--output",
                 str(tmp_path / "out"), "--quiet"]) == 0
    held(tmp_path / "out")
    with fits.open(tmp_path / "out" / "reference.fits", memmap=False) as hdus:
        header, terms = hdus[0].header, hdus["PSF_TERMS"].data
        assert header["PSFKIND"] == "stack"
        assert header["PSFSTARS"] >= 12
        assert_allclose(terms[0], hdus["PSF"].data)
        shape = hdus["IMAGE"].data.shape
        name, origin = header["REFERENC"], (header["X0"], header["Y0"])
    frame = next(f for f in series.frames if f.name == name)
    places = np.array([(15.0, 15.0), (15.0, 200.0), (200.0, 15.0), (200.0, 200.0)])
    found = Psf(terms, "stack", header["PSFSTARS"], shape).at(places)
    widths = frame.psf_field.shape_at(*(places + origin).T)[0]
    # The peak falls as the inverse square of the width.
    peaks = found[:, terms.shape[1] // 2, terms.shape[1] // 2] * widths**2
    plain = np.full(4, terms[0].max()) * widths**2
    assert np.ptp(peaks) / peaks.mean() < 0.5 * np.ptp(plain) / plain.mean()
