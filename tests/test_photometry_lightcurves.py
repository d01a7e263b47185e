"""Light curves: from differences to fluxes and magnitudes, in memory, on disk, as tables."""

from __future__ import annotations

import builtins
import importlib
import mmap

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.timeseries import TimeSeries
from numpy.testing import assert_allclose, assert_array_equal

from gpudia.errors import FrameError, InputError
from gpudia.flags import SOURCE_FLAGS
from gpudia.photometry import LightCurves, ZeroPoint, combine, magnitudes, read_lightcurves, target_table, variability

N_EPOCHS, N_SOURCES = 5, 7
PLANES = ("FLUX_DIFF", "FLUX_DIFF_ERR", "FLUX", "FLUX_ERR")


@pytest.fixture
def curves():
    rng = np.random.default_rng(0)
    sources = Table({"source_id": 6 * 10**17 + np.arange(N_SOURCES)})
    for name in ("ra", "dec", "x", "y", "flux_ref", "flux_ref_err", "chi2"):
        sources[name] = rng.uniform(size=N_SOURCES)
    sources["n_good"] = sources["flags"] = np.zeros(N_SOURCES, np.int32)
    epochs = Table({"file": [f"frame_{i}.fits" for i in range(N_EPOCHS)], "mjd": 60000.0 + np.array([3, 1, 2, 5, 4.0]),
                    "status": ["ok"] * N_EPOCHS, "reason": [""] * N_EPOCHS})
    planes = {name: rng.normal(size=(N_EPOCHS, N_SOURCES)).astype(np.float32) for name in PLANES}
    planes["FLUX_DIFF"][2, 3] = np.nan
    planes["FLAGS"] = rng.integers(0, 512, (N_EPOCHS, N_SOURCES)).astype(np.int32)
    planes["FLUX_DIFF_PSF"] = planes["FLUX_DIFF"] * 2
    return LightCurves(sources, epochs, planes)


def test_combine_follows_the_formulas():
    result = combine(60.0, 6.0, 1000.0, 1.5, 0.03, fraction=0.8)
    assert_allclose(result.flux_diff, 50.0)
    assert_allclose(result.flux_diff_err, 5.0)
    assert_allclose(result.flux, 1050.0)
    assert_allclose(result.flux_err**2, 25 + (1050**2 - 1000**2) * 0.02**2)


def test_combine_has_the_scatter_that_an_error_of_the_scale_brings():
    """Var(F) over draws of the kernel's sum alone equals the formula, for stars that rise and that fade a little."""
    rng = np.random.default_rng(4)
    reference, delta, sigma, draws = 1000.0, np.array([0.0, 300.0, 2000.0, -100.0]), 0.01, 20000
    scale = 1 + sigma * rng.normal(size=(draws, 1))
    left_by_kernel = (reference + delta) - scale * reference  # true scale 1: I - M at the star
    flux = combine(left_by_kernel, 0.0, reference, scale).flux
    # Var(f) holds the kernel's error at the constant star, (F_ref sigma_P)^2: what g^T C g is.
    stated = combine(delta, reference * sigma, reference, 1.0, sigma).flux_err
    ratio = flux.std(axis=0) / stated
    # sd of a sd: 1 / sqrt(2 n), and terms of order sigma beyond the first
    assert_allclose(ratio[:3], 1, atol=4 / np.sqrt(2 * draws) + sigma)
    assert 0.85 < ratio[3] <= 1 + 4 / np.sqrt(2 * draws)  # fading: the stated error is an upper bound


def test_combine_broadcasts_and_refuses_scales_that_are_not_positive():
    flux = np.ones((3, 4))
    result = combine(flux, flux, np.arange(4.0), np.array([[1.0], [2.0], [-1.0]]), 0.1)
    assert result.flux.shape == (3, 4)
    assert_allclose(result.flux_diff[:2, 0], [1.0, 0.5])
    assert np.isnan(result.flux[2]).all()
    assert np.isnan(result.flux_err[2]).all()


def test_magnitudes_and_limits():
    result = magnitudes([100.0, 3.0, 2.9, -50.0, np.nan, 5.0], [1.0, 1.0, 1.0, 2.0, 1.0, 0.0], 25.0)
    assert_allclose(result.mag, [20.0, 25 - 2.5 * np.log10(3), np.nan, np.nan, np.nan, np.nan])
    assert_allclose(result.mag_err[:2], 2.5 / np.log(10) * np.array([0.01, 1 / 3]))
    assert_allclose(result.limit, [np.nan, np.nan, 25 - 2.5 * np.log10(3), 25 - 2.5 * np.log10(6), np.nan, np.nan])


def test_variability_of_constant_stars_is_one():
    rng = np.random.default_rng(1)
    sigma = rng.uniform(1, 5, (200, 300))
    flux = 100 + sigma * rng.normal(size=sigma.shape)
    flux[rng.uniform(size=flux.shape) < 0.1] = np.nan
    flux[:, 0], flux[1:, 1], sigma[:, 2] = np.nan, np.nan, 0.0
    result = variability(flux, sigma)
    assert_array_equal(result.n_good[:3], [0, 1, 0])
    assert np.isnan(result.chi2[:3]).all()
    assert np.isnan(result.mean[[0, 2]]).all()
    assert_allclose(result.mean[1], flux[0, 1])
    dof = result.n_good[3:] - 1
    assert abs((result.chi2[3:] * dof).sum() / dof.sum() - 1) < 4 * np.sqrt(2 / dof.sum())
    pulls = (result.mean[3:] - 100) / result.mean_err[3:]
    assert abs(pulls.std() - 1) < 4 / np.sqrt(2 * len(pulls))


def test_variability_equals_a_loop():
    flux, sigma = np.array([[1.0, 5.0], [2.0, np.nan], [4.0, 7.0]]), np.array([[1.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
    result = variability(flux, sigma)
    mean = np.average([1, 2, 4], weights=[1, 0.25, 1])
    assert_allclose(result.mean[0], mean)
    assert_allclose(result.chi2[0], ((1 - mean) ** 2 + (2 - mean) ** 2 / 4 + (4 - mean) ** 2) / 2)
    with pytest.raises(InputError, match=r"flux and flux_err must be \(n_epochs, n_sources\)"):
        variability(flux, sigma[:2])


def test_target_table_round_trip(tmp_path):
    mjd = np.array([60002.5, 60001.25, 60003.0])
    aperture = combine([10.0, 5.0, -995.0], [1.0, 2.0, 3.0], 1000.0, 1.0, 0.001)
    psf = combine([11.0, 6.0, -990.0], [0.5, 1.0, 4.0], 1000.0, 1.0, 0.001)
    table = target_table(mjd, ["b.fits", "a.fits", "c.fits"], {"ap": aperture, "psf": psf}, "psf", flux_ref=1000.0,
                         scale=[1.0, 0.9, 1.1], scale_err=0.001, flags=[0, 1, 2],
                         zero_point=ZeroPoint(25.0, source="given"))
    contract = ["time", "image", "flux_diff", "flux_diff_err", "flux_ref", "flux", "flux_err", "method", "scale",
                "scale_err", "mag", "mag_err", "limit", "flags"]
    assert table.colnames[: len(contract)] == contract
    assert table.colnames[len(contract) :] == ["flux_diff_ap", "flux_diff_err_ap", "flux_diff_psf", "flux_diff_err_psf"]
    table.write(tmp_path / "target.ecsv", format="ascii.ecsv")
    back = TimeSeries.read(tmp_path / "target.ecsv", format="ascii.ecsv", time_column="time")
    assert back.time.scale == "utc"
    assert_allclose(back.time.mjd, [60001.25, 60002.5, 60003.0], rtol=0, atol=1e-9)
    assert back["image"].tolist() == ["a.fits", "b.fits", "c.fits"]
    assert_allclose(back["flux_diff"], [6.0, 11.0, -990.0])
    assert_allclose(back["flux_diff_ap"], [5.0, 10.0, -995.0])
    assert_allclose(back["scale"], [0.9, 1.0, 1.1])
    assert set(back["method"]) == {"psf"}
    assert back["flags"].tolist() == [1, 0, 2 | SOURCE_FLAGS.limit]
    assert np.isnan(back["mag"]).tolist() == [False, False, True]
    assert np.isfinite(back["limit"]).tolist() == [False, False, True]


def test_target_table_keeps_barycentric_times_with_their_rows(tmp_path):
    mjd = np.array([60002.5, 60001.25])
    one = combine([10.0, 5.0], [1.0, 2.0], 1000.0, 1.0, 0.001)
    table = target_table(mjd, ["b", "a"], {"ap": one}, "ap", flux_ref=1000.0, scale=1.0, scale_err=0.001, flags=0,
                         bjd_tdb=mjd + 2400000.503)
    table.write(tmp_path / "target.ecsv", format="ascii.ecsv")
    back = TimeSeries.read(tmp_path / "target.ecsv", format="ascii.ecsv", time_column="time")
    assert_allclose(np.asarray(back["bjd_tdb"]) - back.time.mjd, 2400000.503, rtol=0, atol=1e-8)
    assert str(back["bjd_tdb"].unit) == "d"
    assert "BJD_TDB" in back["bjd_tdb"].info.description
    assert back.colnames[-1] == "bjd_tdb"  # after the columns of the contract, whose places stay


def test_target_table_names_what_is_wrong():
    one = combine([1.0], [1.0], 10.0, 1.0)
    rest = {"flux_ref": 1.0, "scale": 1.0, "scale_err": 0.0, "flags": 0}
    with pytest.raises(InputError, match=r"method must be one of \['ap'\], got 'psf'"):
        target_table([60000.0], ["a"], {"ap": one}, "psf", **rest)
    with pytest.raises(InputError, match=r"image must have one value for each of the 1 times, got shape \(2,\)"):
        target_table([60000.0], ["a", "b"], {"ap": one}, "ap", **rest)


def test_round_trip_through_the_file_or_its_folder(curves, tmp_path):
    path = tmp_path / "lightcurves.fits"
    curves.write(path)
    assert [p.name for p in tmp_path.iterdir()] == ["lightcurves.fits"]
    for place in (path, tmp_path, str(tmp_path)):
        back = read_lightcurves(place)
        assert list(back.planes) == list(curves.planes)
        for name, plane in curves.planes.items():
            assert_array_equal(back.planes[name], plane)
        assert back.sources.colnames == curves.sources.colnames
        assert_array_equal(back.sources["source_id"], curves.sources["source_id"])
        assert back.epochs["file"].tolist() == curves.epochs["file"].tolist()
        assert all(back.sources[c].dtype.isnative for c in back.sources.colnames)
    with fits.open(path) as hdus:
        assert [h.name for h in hdus[1:3]] == ["SOURCES", "EPOCHS"]
        assert {h.data.dtype.newbyteorder("=") for h in hdus[3:]} == {np.dtype("f4"), np.dtype("i4")}


def test_planes_are_mapped_from_disk(curves, tmp_path):
    curves.write(tmp_path / "lightcurves.fits")
    owner = read_lightcurves(tmp_path).planes["FLUX"]
    while isinstance(owner, np.ndarray):
        owner = owner.base
    assert isinstance(owner, mmap.mmap)


def test_timeseries_of_one_star(curves, tmp_path):
    curves.write(tmp_path / "lightcurves.fits")
    for source in (curves, read_lightcurves(tmp_path)):
        series = source.timeseries(6 * 10**17 + 3)
        assert_allclose(series.time.mjd, 60000.0 + np.arange(1, 6))
        assert series["image"].tolist() == [f"frame_{i}.fits" for i in (1, 2, 0, 4, 3)]
        assert_array_equal(series["flux"], curves.planes["FLUX"][[1, 2, 0, 4, 3], 3])
        assert np.isnan(series["flux_diff"][1])
        assert series["flux_diff_psf"].dtype.isnative
        assert series.meta["source_id"] == 6 * 10**17 + 3
        assert_array_equal(source.timeseries(str(6 * 10**17 + 3))["flux"], series["flux"])
    series.write(tmp_path / "one.ecsv", format="ascii.ecsv")
    with pytest.raises(InputError, match="source_id must be one of the 7 sources, got 17"):
        curves.timeseries(17)


def test_an_epoch_without_a_time_is_a_row_at_the_end(curves, tmp_path):
    curves.epochs["mjd"][1] = np.nan
    series = curves.timeseries(curves.sources["source_id"][3])
    series.write(tmp_path / "series.ecsv")
    for rows in (series, TimeSeries.read(tmp_path / "series.ecsv", format="ascii.ecsv", time_column="time")):
        assert_array_equal(rows["time"].mask, [False] * 4 + [True])
        assert_array_equal(rows["time"].mjd[:4], [60002, 60003, 60004, 60005])
        assert rows["image"][4] == "frame_1.fits"


def test_long_table(curves):
    table = curves.to_table()
    assert len(table) == N_EPOCHS * N_SOURCES
    row = table[(table["source_id"] == 6 * 10**17 + 3) & (table["image"] == "frame_4.fits")]
    assert len(row) == 1
    assert row["flux"][0] == curves.planes["FLUX"][4, 3]
    assert row["mjd"][0] == 60004.0
    assert row["flags"][0] == curves.planes["FLAGS"][4, 3]


def test_parquet(curves, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    curves.to_parquet(tmp_path / "all.parquet")
    back, table = parquet.read_table(tmp_path / "all.parquet"), curves.to_table()
    assert back.column_names == table.colnames
    for name in table.colnames:
        assert_array_equal(back[name].to_numpy(), np.asarray(table[name]))
    assert [p.name for p in tmp_path.iterdir()] == ["all.parquet"]


def test_parquet_without_pyarrow_says_what_to_do(curves, tmp_path, monkeypatch):
    def refuse(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return importlib.__import__(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr("gpudia.photometry.lightcurves.import_module", refuse)
    with pytest.raises(InputError, match=r"Parquet needs pyarrow: pip install 'gpudia\[parquet\]'"):
        curves.to_parquet(tmp_path / "all.parquet")


def test_string_ids_and_no_epochs(curves, tmp_path):
    sources = curves.sources.copy()
    sources["source_id"] = [f"star-{i}" for i in range(N_SOURCES)]
    empty = LightCurves(sources, curves.epochs[:0], {n: p[:0] for n, p in curves.planes.items()})
    empty.write(tmp_path / "lightcurves.fits")
    back = read_lightcurves(tmp_path)
    assert len(back.timeseries("star-2")) == 0
    assert len(back.to_table()) == 0


def test_writing_does_not_overwrite_and_leaves_no_part(curves, tmp_path, monkeypatch):
    path = tmp_path / "lightcurves.fits"
    curves.write(path)
    with pytest.raises(InputError, match="path must not exist"):
        curves.write(path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("gpudia.photometry.lightcurves.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        curves.write(path, overwrite=True)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["lightcurves.fits"]


def test_wrong_contents_are_named(curves):
    sources, epochs, planes = curves.sources, curves.epochs, curves.planes
    double = sources.copy()
    double["source_id"][1] = double["source_id"][0]
    cases = [
        ((sources[["ra"]], epochs, planes), "sources must have .* got none named source_id"),
        ((sources, epochs[["file"]], planes), "epochs must have file, mjd, got none named mjd"),
        ((sources, epochs, {"FLUX": planes["FLUX"]}), "planes must have .* got none named FLUX_DIFF"),
        ((sources, epochs, planes | {"FLUX": np.ones((2, 2))}), r"FLUX must have shape \(epochs, sources\) = \(5, 7\)"),
        ((double, epochs, planes), "source_id must be unique, got 600000000000000000 more than once"),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message):
            LightCurves(*arguments)


def test_reading_names_the_file(curves, tmp_path):
    with pytest.raises(InputError, match=r"no lightcurves\.fits there"):
        read_lightcurves(tmp_path)
    with pytest.raises(InputError, match=r"no x\.fits there"):
        read_lightcurves(tmp_path / "x.fits")
    (tmp_path / "junk.fits").write_text("junk")
    with pytest.raises(FrameError, match=r"junk\.fits: not a file of light curves"):
        read_lightcurves(tmp_path / "junk.fits")
    fits.writeto(tmp_path / "image.fits", np.ones((3, 3)))
    with pytest.raises(FrameError, match=r"image\.fits: not a file of light curves.*SOURCES"):
        read_lightcurves(tmp_path / "image.fits")
