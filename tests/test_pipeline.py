"""The job end to end, through the command line as a user types it: what it writes, what bad input does to it."""

import os
import shutil

import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import Table
from astropy.timeseries import TimeSeries
from astropy.wcs import WCS
from conftest import held
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

import gpudia
from gpudia.cli import main
from gpudia.errors import ConfigError
from gpudia.flags import FRAME_FLAGS, SOURCE_FLAGS
from gpudia.pipeline.listing import expand_frames
from gpudia.simulate import SimulationSettings, simulate_field, write_series

SETTINGS = SimulationSettings(shape=(180, 190), n_epochs=5, seed=4, rotation=0.02, fwhm_range=(2.8, 4.0),
                              n_variables=0)


@pytest.fixture(scope="module")
def series():
    return simulate_field(SETTINGS)


@pytest.fixture(scope="module")
def frames(series, tmp_path_factory):
    """Folder of LCO frames."""
    folder = tmp_path_factory.mktemp("frames")
    write_series(series, folder)
    return folder


@pytest.fixture(scope="module")
def target(series):
    """Options: the target and a kernel that does not depend on which frames are usable."""
    return ["--ra", str(series.truth["ra"][0]), "--dec", str(series.truth["dec"][0]), "--size", "150", "--kernel-size",
            "15"]


def reference_of(series, output):
    """The simulated frame that a run chose as its reference."""
    name = Table.read(output / "target.ecsv").meta["reference"]
    return next(f for f in series.frames if f.name == name)


@pytest.fixture(scope="module")
def done(frames, target, tmp_path_factory):
    """Output folder of a run on good frames."""
    output = tmp_path_factory.mktemp("run") / "out"
    assert main(["run", str(frames), *target, "--output", str(output), "--quiet"]) == 0
    return output


def test_the_output_folder_holds_the_contract(done):
    held(done)
    epochs = Table.read(done / "epochs.ecsv")
    assert len(epochs) == 5
    assert set(epochs["status"]) == {"ok"}
    assert (epochs["flags"] & FRAME_FLAGS.is_reference > 0).sum() == 1
    target = TimeSeries.read(done / "target.ecsv", format="ascii.ecsv", time_column="time")
    assert len(target) == 5
    assert {"flux_diff_ap", "flux_diff_psf"} <= set(target.colnames)
    with fits.open(done / "reference.fits") as hdus:
        assert {"IMAGE", "ERR", "MASK", "CATALOG", "PSF"} <= {h.name for h in hdus}
    for path in (done / "difference").glob("*.fits"):
        with fits.open(path, checksum=True) as hdus:
            assert hdus[0].header["GPUDIA"] == gpudia.__version__
            assert hdus[0].header["REFERENC"] in {str(n) for n in epochs["name"]}


@pytest.fixture(scope="module")
def stacked(frames, target, tmp_path_factory):
    """Output folder of a run on the same frames with the best three as reference."""
    output = tmp_path_factory.mktemp("stacked") / "out"
    assert main(["run", str(frames), *target, "--reference", "stack", "--stack-size", "3", "--output", str(output),
                 "--quiet"]) == 0
    return output


def test_light_curves_against_two_references_agree(done, stacked):
    """In one unit the changes of every star are the same within their errors, which the two share in part."""
    one, many = (gpudia.read_lightcurves(folder) for folder in (done, stacked))
    tied = gpudia.tie_references(many, one)
    assert tied.n == 5
    assert tied.ratio == pytest.approx(1.0, abs=0.02)  # the unit of the stack is that of its best frame
    distance, index = cKDTree(np.column_stack([many.sources["x"], many.sources["y"]])).query(
        np.column_stack([one.sources["x"], one.sources["y"]]))
    pulls = []
    for star in np.flatnonzero(distance < 0.5):
        a, b = ((np.asarray(c.planes["FLUX_DIFF"][:, k], float), np.asarray(c.planes["FLUX_DIFF_ERR"][:, k], float))
                for c, k in ((one, star), (tied.curves, index[star])))
        error = np.hypot(a[1], b[1])
        off = a[0] - b[0]
        pulls.append((off - np.average(off, weights=error**-2)) / error)
    pulls = np.concatenate(pulls)
    pulls = pulls[np.isfinite(pulls)]
    assert len(pulls) > 100
    assert np.sqrt(np.median(pulls**2) / 0.4549) < 1.0
    assert np.mean(np.abs(pulls) > 3) < 0.02


def test_a_target_that_varies_in_the_stack_is_said_to(frames, target, tmp_path, caplog):
    output = tmp_path / "out"
    assert main(["run", str(frames), *target, "--reference", "stack", "--stack-size", "5", "--output", str(output),
                 "--no-products", "--quiet"]) == 0
    assert any("the target varies among the 5 frames of the stack" in text
               for text in Table.read(output / "target.ecsv").meta["doubts"])
    assert "the target varies among the 5 frames" in caplog.text
    assert Table.read(output / "epochs.ecsv").meta["doubts"] == Table.read(output / "target.ecsv").meta["doubts"]
    assert "The target varies among the 5 frames of the stack" in (output / "report.html").read_text(encoding="utf-8")


def test_where_all_frames_are_to_be_resampled_the_stack_is_of_these(frames, target, stacked, tmp_path):
    """As deep as one of the same frames that were shifted, and the best frame's own unit of flux."""
    assert main(["run", str(frames), *target, "--reference", "stack", "--resample", "always", "--output",
                 str(tmp_path / "out"), "--no-products", "--quiet"]) == 0
    epochs = Table.read(tmp_path / "out" / "epochs.ecsv")
    assert (epochs["flags"] & FRAME_FLAGS.resampled > 0).all()
    with fits.open(tmp_path / "out" / "reference.fits") as made, fits.open(stacked / "reference.fits") as shifted:
        assert made[0].header["NCOMBINE"] == shifted[0].header["NCOMBINE"] == 3
        own = epochs[epochs["name"] == made[0].header["FRAME000"]][0]
    assert abs(own["scale"] - 1) < 0.3 * own["scale_err"]


def test_a_stack_is_a_deeper_reference(series, stacked, done):
    """Of three frames: its noise is what inverse squares add up to; it has the flux scale of the best frame."""
    output = stacked
    held(output)
    single, stack = fits.open(done / "reference.fits"), fits.open(output / "reference.fits")
    with single, stack:
        header = stack[0].header
        weights = np.array([header[f"WEIGH{k:03d}"] for k in range(3)])
        assert (header["NCOMBINE"], header["FRAME000"], weights.sum()) == (3, single[0].header["REFERENC"],
                                                                         pytest.approx(1.0))
        assert single[0].header["NCOMBINE"] == 1
        noise = [float(np.median(h["ERR"].data)) for h in (single, stack)]
        # a member's noise over its scale is at most that which its weight allows for: w ~ (noise FWHM)^-2
        assert noise[1] == pytest.approx(noise[0] * np.sqrt(weights[0]), rel=0.1)
        good = (stack["MASK"].data == 0) & (single["MASK"].data == 0)
        assert np.median((stack["IMAGE"].data - single["IMAGE"].data)[good]) == pytest.approx(0, abs=0.2 * noise[0])
    epochs = Table.read(output / "epochs.ecsv")
    scales = [epochs[epochs["name"] == frame.name]["scale"][0] / frame.transparency for frame in series.frames]
    best = next(f for f in series.frames if f.name == header["FRAME000"])
    # on the scale of the best frame, within the stated errors of 0.6 to 1 %
    errors = [epochs[epochs["name"] == frame.name]["scale_err"][0] / frame.transparency for frame in series.frames]
    assert (np.abs(np.array(scales) * best.transparency - 1) < 3.5 * np.array(errors) * best.transparency).all()
    assert max(errors) < 0.02
    # ... whose own scale is that of the last round, but for masks and weights: far within the noise of the two
    own = epochs[epochs["name"] == header["FRAME000"]][0]
    assert abs(own["scale"] - 1) < 0.3 * own["scale_err"]
    member = np.asarray(epochs["flags"] & FRAME_FLAGS.in_reference) > 0
    assert member.sum() == 3
    assert not (epochs["flags"] & FRAME_FLAGS.bad_chi2).any()  # though members have less noise than two frames apart
    # F = F_ref + dF has the noise of the frame alone; what it shares with F_ref lowers the error of dF only
    curves = gpudia.read_lightcurves(output)
    wider = np.nanmedian(curves.planes["FLUX_ERR"] / curves.planes["FLUX_DIFF_ERR"], axis=1)
    assert (wider[member] > 1.05).all()
    assert np.abs(wider[~member] - 1).max() < 0.01
    assert not (epochs["flags"] & FRAME_FLAGS.is_reference).any()


def test_a_stack_needs_two_frames(frames, target, tmp_path, capsys):
    one = next(iter(sorted(frames.iterdir())))
    assert main(["run", str(one), *target, "--reference", "stack", "--output", str(tmp_path / "out")]) == 2
    assert "where fewer than 2 frames can be stacked, got 'stack' with 1 of 1 frames" in capsys.readouterr().err


def test_frames_without_stars_make_no_stack(tmp_path):
    for i in range(3):
        sky = np.random.default_rng(i).normal(300, 17, (90, 90)).astype("f4")
        fits.writeto(tmp_path / f"{i}.fits", sky, fits.Header({"GAIN": 1.0}))
    config = gpudia.RunConfig(str(tmp_path), str(tmp_path / "out"), reference="stack", kernel_size=5, align=False)
    with pytest.raises(ConfigError, match="fewer than 2 frames can be stacked, got 'stack' with 1 of 3 frames"):
        gpudia.run(config)


def test_registration_and_scale_are_the_truth(done, series):
    epochs = Table.read(done / "epochs.ecsv")
    reference = reference_of(series, done)
    for row, frame in zip(epochs, series.frames, strict=True):
        centre = np.array(reference.data.shape[::-1]) / 2 - 0.5
        on_first = np.linalg.solve(reference.transform[:, :2], centre - reference.transform[:, 2])
        shift = frame.transform[:, :2] @ on_first + frame.transform[:, 2] - centre
        assert row["shift_x"] == pytest.approx(shift[0], abs=0.15)
        assert row["shift_y"] == pytest.approx(shift[1], abs=0.15)
        truth = frame.transparency / reference.transparency
        # a kernel of 15 px leaves up to 2 % of the light of the widest PSF outside
        assert row["scale"] == pytest.approx(truth, abs=4 * row["scale_err"] + 0.02 * truth)
        assert row["chi2"] < 1.3


def test_how_well_each_frame_is_registered_is_in_the_table(done, series):
    epochs = Table.read(done / "epochs.ecsv")
    reference = reference_of(series, done).name
    itself = np.asarray(epochs["name"]) == reference
    assert (np.asarray(epochs["registration_kind"])[itself] == "shift").all()
    assert set(epochs["registration_kind"][~itself]) <= {"similarity", "affine"}
    assert (np.asarray(epochs["registration_error"])[itself] == 0).all()
    error, rms, largest = (np.asarray(epochs[f"registration_{c}"])[~itself] for c in ("error", "rms", "max"))
    assert ((error > 0) & (error < 0.2)).all()
    assert ((rms < largest) & (largest <= 1.5)).all()


def test_products_have_the_sky_of_the_reference_whatever_the_wcs_of_an_image(done, frames, series, target, tmp_path):
    """One frame's WCS is off by 30 arcsec, another has none: same registrations, same sky on every product."""
    reference = reference_of(series, done)
    folder = tmp_path / "in"
    shutil.copytree(frames, folder)
    off, without = [p for p in sorted(folder.iterdir()) if not p.name.startswith(reference.name)][:2]
    with fits.open(off, mode="update") as hdus:
        hdus["SCI"].header["CRVAL2"] += 30 / 3600
    with fits.open(without, mode="update") as hdus:
        header = hdus["SCI"].header
        for key in [k for k in header if k.startswith(("CTYPE", "CRVAL", "CRPIX", "CUNIT", "CDELT", "CD1_", "CD2_"))]:
            del header[key]
        assert not WCS(header).has_celestial
    chosen = next(p for p in folder.iterdir() if p.name.startswith(reference.name))
    output = tmp_path / "out"
    assert main(["run", str(folder), *target, "--reference", str(chosen), "--output", str(output), "--quiet"]) == 0
    before, after = (Table.read(o / "epochs.ecsv") for o in (done, output))
    for column in ("shift_x", "shift_y"):
        np.testing.assert_allclose(after[column], before[column], rtol=0, atol=1e-6)
    sky = SkyCoord(*(np.asarray(series.truth[c][:5]) for c in ("ra", "dec")), unit="deg")
    for path in [output / "reference.fits", *(output / "difference").glob("*.fits")]:
        with fits.open(path) as hdus:
            plane = hdus["IMAGE" if path.name == "reference.fits" else "DIFF"].header
            x0, y0 = (fits.getval(output / "reference.fits", key) for key in ("X0", "Y0"))
        want = np.array(reference.wcs.world_to_pixel(sky)) - np.array([[x0], [y0]])
        np.testing.assert_allclose(WCS(plane).world_to_pixel(sky), want, rtol=0, atol=1e-6)


def test_the_target_light_curve_follows_the_event(done, series):
    """Pulls of the injected variable against the truth; all share the reference's noise."""
    target = Table.read(done / "target.ecsv")
    reference = reference_of(series, done)
    truth = np.array(series.truth["flux"][0])
    pulls = []
    for row in target:
        frame = next(f for f in series.frames if f.name == row["image"])
        if frame is not reference:
            expected = (truth[frame.index] - truth[reference.index]) * reference.transparency
            pulls.append((row["flux_diff"] - expected) / row["flux_diff_err"])
    assert len(pulls) == 4
    assert np.abs(pulls).max() < 4.5


def test_light_curves_read_back(done):
    curves = gpudia.read_lightcurves(done)
    star = int(curves.sources["source_id"][np.argmax(curves.sources["n_good"])])
    assert len(curves.timeseries(star)) == 5
    assert len(curves.to_table()) == 5 * len(curves.sources)


def test_every_star_is_in_the_list_of_variables(done):
    """The simulated stars are constant but for the target, which heads the list; unmeasured ones say why."""
    curves, listed = gpudia.read_lightcurves(done), Table.read(done / "variables.ecsv")
    assert sorted(listed["source_id"]) == sorted(curves.sources["source_id"])
    assert listed["rank"].tolist() == list(range(1, len(listed) + 1))
    score = np.asarray(listed["score"])
    known = np.isfinite(score)
    assert (np.diff(score[known]) <= 0).all()
    assert not known[known.sum():].any()
    unmeasured = listed[listed["n_good"] == 0]
    assert len(unmeasured)
    assert (unmeasured["flags"] != 0).all()
    target_meta = Table.read(done / "target.ecsv").meta
    assert target_meta["position"].startswith(f"star {listed['source_id'][0]},")
    assert listed["flags"][0] & SOURCE_FLAGS.variable
    assert (listed["flags"] & SOURCE_FLAGS.variable > 0).sum() == 1
    near = np.hypot(listed["x"] - listed["x"][0], listed["y"] - listed["y"][0]) < 2 * target_meta["aperture_radius"]
    near[0] = False
    np.testing.assert_array_equal(listed["beside"], np.where(near, listed["source_id"][0], -1))


def test_a_target_that_some_frames_do_not_have(frames, series, target, done, tmp_path):
    """Masked in one frame, outside another: rows with NaN and a flag; the other rows as before."""
    reference = reference_of(series, done).name
    folder = tmp_path / "in"
    shutil.copytree(frames, folder)
    masked, outside = [p for p in sorted(folder.glob("sim*.fits")) if reference not in p.name][:2]
    index = {p.name: i for i, p in enumerate(sorted(folder.glob("sim*.fits")))}
    x, y = (round(float(v)) for v in series.frames[index[masked.name]].wcs.world_to_pixel(
        SkyCoord(series.truth["ra"][0], series.truth["dec"][0], unit="deg")))
    with fits.open(masked, mode="update") as hdus:
        hdus["BPM"].data[y - 8:y + 9, x - 8:x + 9] |= 1
    with fits.open(outside, mode="update") as hdus:  # without its left half and a bit
        for name in ("SCI", "BPM", "ERR"):
            hdus[name].data = hdus[name].data[:, x + 10:]
        hdus["SCI"].header["CRPIX1"] -= x + 10
        del hdus["CAT"]
    output = tmp_path / "out"
    assert main(["run", str(folder), *target, "--reference", str(folder / f"{reference}.fits"), "--output",
                 str(output), "--no-products", "--quiet"]) == 0
    held(output)
    rows, before = (TimeSeries.read(o / "target.ecsv", format="ascii.ecsv", time_column="time") for o in (output, done))
    assert rows["image"].tolist() == before["image"].tolist()
    for row in rows:
        lost = row["image"] in (masked.stem, outside.stem)
        for name in ("flux_diff", "flux_diff_err", "flux", "flux_err", "mag", "mag_err", "limit"):
            assert np.isnan(getattr(row[name], "value", row[name])) == (lost or name == "limit"), (row["image"], name)
        assert bool(row["flags"] & (SOURCE_FLAGS.masked_pixels | SOURCE_FLAGS.outside)) == lost
    kept = [i for i, name in enumerate(rows["image"]) if name not in (masked.stem, outside.stem, reference)]
    for i in kept:
        assert abs(rows["flux"][i] - before["flux"][i]) < 0.5 * before["flux_err"][i]


def test_two_catalog_entries_at_one_place_are_said_to_be(frames, series, target, tmp_path):
    """The second entry of the target is flagged, and the target's light curve is in the pictures once."""
    from gpudia.report.data import read_run
    from gpudia.report.scatter import most_variable

    folder = tmp_path / "in"
    shutil.copytree(frames, folder)
    ra, dec = (float(series.truth[c][0]) for c in ("ra", "dec"))
    for path in sorted(folder.glob("sim*.fits")):
        with fits.open(path) as hdus:
            catalog = Table(hdus["CAT"].data)
            catalog.add_column(np.arange(len(catalog)) + 5000, name="id", index=0)
            first = int(np.argmin(np.hypot((catalog["ra"] - ra) * np.cos(np.radians(dec)), catalog["dec"] - dec)))
            catalog["id"][first] = 7
            catalog.add_row(catalog[first])
            catalog["id"][-1], catalog["x"][-1] = 9, catalog["x"][-1] + 0.2
            hdus["CAT"] = fits.BinTableHDU(catalog, name="CAT")
            hdus.writeto(path, overwrite=True)
    output = tmp_path / "out"
    assert main(["run", str(folder), *target, "--output", str(output), "--no-products", "--quiet"]) == 0
    listed = Table.read(output / "variables.ecsv")
    assert listed["source_id"][listed["flags"] & SOURCE_FLAGS.duplicate > 0].tolist() == [9]
    assert set(listed["source_id"][:2]) == {7, 9}
    shown = [curve.label.split()[1] for curve in most_variable(read_run(output))]
    assert shown[0] == "7"
    assert "9" not in shown


def test_lightcurve_command_prints_a_star(done, capsys):
    star = gpudia.read_lightcurves(done).sources["source_id"][0]
    assert main(["lightcurve", str(done), "--source", str(star), "--format", "csv", "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mjd,image,flux_diff")
    assert len(lines) == 6


@pytest.mark.parametrize("layout", ["plain", "fz", "ids"])
def test_other_layouts_give_the_same_field(series, target, layout, tmp_path):
    folder = tmp_path / "frames"
    options = {"plain": {"layout": "plain"}, "fz": {"compress": True}, "ids": {"catalog_ids": True}}[layout]
    folder.mkdir()
    paths = write_series(series, folder, **options)
    output = tmp_path / "out"
    assert main(["run", *map(str, paths[:3]), *target, "--output", str(output), "--quiet"]) == 0
    held(output)
    epochs = Table.read(output / "epochs.ecsv")
    assert (epochs["chi2"] < 1.3).all()
    if layout == "ids":
        assert set(epochs["route"]) == {"id", "none"}


def test_whole_frames_without_a_target(frames, tmp_path):
    output = tmp_path / "out"
    assert main(["run", str(frames), "--output", str(output), "--no-products", "--quiet"]) == 0
    assert not (output / "target.ecsv").exists()
    assert not list((output / "difference").iterdir())
    with fits.open(output / "reference.fits") as hdus:
        assert hdus["IMAGE"].shape == SETTINGS.shape


def spoil(path, how):
    """Make one bad frame out of a good one."""
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:20000])
    elif how == "not FITS":
        path.write_text("hello")
    elif how == "no image":
        fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU(Table({"a": [1]}))]).writeto(path, overwrite=True)
    else:
        with fits.open(path, mode="update") as hdus:
            data = hdus["SCI"].data
            noise = np.random.default_rng(0).normal(1000, 10, data.shape)
            hdus["SCI"].data = {"all NaN": np.full_like(data, np.nan), "constant": np.full_like(data, 7),
                                "no stars": noise.astype("f4"), "other shape": data[:100]}[how]


BAD = {"missing": "must exist", "truncated": "", "not FITS": "", "no image": "image",
       "all NaN": "finite|good", "constant": "constant|equal|same", "no stars": "stars|match|ids",
       "other shape": "shape"}


@pytest.mark.parametrize("how", BAD)
def test_a_bad_frame_is_a_row_with_a_reason_and_harms_no_other(frames, target, done, how, tmp_path):
    import re

    folder = tmp_path / "frames"
    shutil.copytree(frames, folder)
    names = sorted(p.name for p in folder.glob("*.fits"))
    reference = Table.read(done / "target.ecsv").meta["reference"]
    bad = next(n for n in names if reference not in n)
    spoil(folder / bad, how)
    output = tmp_path / "out"
    paths = [str(folder / n) for n in names]
    options = ["--no-align"] if how == "other shape" else []
    assert main(["run", *paths, *target, "--output", str(output), "--quiet", "--reference",
                 str(folder / f"{reference}.fits"), *options]) == 3
    held(output)
    epochs = Table.read(output / "epochs.ecsv")
    row = epochs[[bad in f for f in epochs["file"]]][0]
    assert row["status"] == "failed"
    assert re.search(BAD[how], row["reason"])
    assert (epochs["status"] == "ok").sum() == 4
    if how != "other shape":
        before = Table.read(done / "epochs.ecsv")
        for name in ("scale", "chi2"):
            same = {r["name"]: r[name] for r in before}
            for r in epochs[epochs["status"] == "ok"]:
                assert r[name] == pytest.approx(same[r["name"]], rel=0.02)


@pytest.mark.parametrize(("options", "code", "text"), [
    (["--kernel-size", "16"], 2, "kernel_size must be 'auto' or an odd integer of at least 3, got 16"),
    (["--kernel-size", "81"], 2, r"size must be at least twice kernel_size \(81\)"),
    (["--reference", "nowhere.fits"], 2, "reference must be a usable frame, got nowhere.fits"),
    (["--ra", "10", "--dec", "10"], 1, "target must lie on a frame with a celestial WCS"),
    (["--ra", "10"], 2, "dec|ra"),
    (["--size", "4"], 2, "size must be an integer of at least 16, got 4"),
    (["--gain", "0"], 2, r"gain must be a number of e-/ADU, above 0, got 0"),
    (["--backend", "cuda"], 2, "backend must be one of auto, numpy, cupy, got 'cuda'")])
def test_wrong_settings_are_refused_by_name(frames, target, options, code, text, tmp_path, capsys):
    import re

    chosen = [] if "--ra" in options else target
    assert main(["run", str(frames), *chosen, "--output", str(tmp_path / "out"), *options]) == code
    assert re.search(text, capsys.readouterr().err)


@pytest.mark.parametrize(("option", "content", "text"), [
    ("positions", None, "positions must be a table that astropy can read"),
    ("positions", "RA,declination\n1,2\n", r"positions must have columns x, y or ra, dec, got ra, declination in"),
    ("positions", "x,y\n1,2\n,3\n", "positions must be finite numbers .*: x, y has values that are not finite"),
    ("positions", "ra,dec\n10,95\n", "positions must be finite numbers .*95"),
    ("positions", "id,x,y\n1.5,1,2\n", "positions must be finite numbers with whole numbers as id"),
    ("positions", "id,x,y\n7,1,2\n7,3,4\n", "positions must have ids of their own, got twice the same in"),
    ("photometric-catalog", None, "photometric_catalog must be a table that astropy can read"),
    ("photometric-catalog", "ra,dec\n10,20\n", "photometric_catalog must have a column"),
    ("reference", None, r"reference must be a usable frame, got .*\.csv: there is no such file")])
def test_a_file_that_cannot_serve_is_refused_before_any_frame_is_read(frames, tmp_path, option, content, text, capsys):
    import re

    output, file = tmp_path / "out", tmp_path / "given.csv"
    if content is not None:
        file.write_text(content)
    assert main(["run", str(frames), "--output", str(output), f"--{option}", str(file)]) == 2
    assert re.search(text, capsys.readouterr().err)
    assert '"event": "read"' not in (output / "journal.jsonl").read_text()


@pytest.mark.parametrize("readers", [0, 2])
def test_what_is_doubtful_about_all_frames_is_said_once(frames, target, readers, tmp_path, capsys):
    """No header has the gain under this name. The log file has a line for every frame, the terminal one and a count."""
    output, settings = tmp_path / "out", tmp_path / "settings.toml"
    settings.write_text('[layout]\ngain_keys = ["NOSUCH"]\n')
    assert main(["run", str(frames), *target, "--output", str(output), "--config", str(settings), "--no-products",
                 "--readers", str(readers)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "gain must be positive" in line]
    names = sorted(path.name for path in frames.glob("*.fits"))
    assert len(said) == 2
    assert any(name in said[0] for name in names)
    assert said[1].startswith(f"gpudia: {len(names)} frames (")
    assert all(name in said[1] for name in names)
    lines = (output / "gpudia.log").read_text().splitlines()
    detailed = [line for line in lines if "DEBUG" in line and "gain must be positive" in line]
    assert len({name for name in names for line in detailed if name in line}) >= len(names) - 1 > 0


def test_an_output_folder_with_results_is_not_touched(frames, target, done, capsys):
    before = (done / "epochs.ecsv").read_bytes()
    assert main(["run", str(frames), *target, "--output", str(done)]) == 2
    assert "output must be a new folder" in capsys.readouterr().err
    assert (done / "epochs.ecsv").read_bytes() == before


def test_overwrite_replaces_the_results_and_nothing_else(frames, target, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    for options, searched in (["--detect"], True), (["--overwrite"], False):
        assert main(["run", str(frames), *target, "--output", str(output), "--quiet", "--no-products", *options]) == 0
        assert (output / "candidates").is_dir() == searched
    assert (output / "notes.txt").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(frames, target, tmp_path, capsys):
    (tmp_path / "ro").mkdir(mode=0o500)
    assert main(["run", str(frames), *target, "--output", str(tmp_path / "ro" / "out")]) == 2
    assert "output must be a folder that can be written to" in capsys.readouterr().err


def test_nothing_found_is_wrong_usage(tmp_path, capsys):
    assert main(["run", str(tmp_path / "*.fits"), "--output", str(tmp_path / "out")]) == 2
    assert "frames must match at least one file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_hidden_frames_of_a_folder_are_counted_not_used(tmp_path, caplog):
    for name in ("b.fits", ".a.fits", ".notes", *(f".c{i}.FITS" for i in range(6))):
        (tmp_path / name).touch()
    (tmp_path / ".d.fits").mkdir()
    assert expand_frames(tmp_path) == [tmp_path / "b.fits"]
    assert [r.getMessage() for r in caplog.records] == [
        f"frames: 7 hidden in {str(tmp_path)!r} passed over: .a.fits, .c0.FITS, .c1.FITS, .c2.FITS, .c3.FITS, ...; "
        "name them to use them"]
    caplog.clear()
    assert expand_frames([tmp_path / "b.fits", tmp_path / ".a.fits"]) == [tmp_path / ".a.fits", tmp_path / "b.fits"]
    assert not caplog.records


def test_subtract_command(frames, tmp_path, capsys):
    names = sorted(frames.glob("*.fits"))
    output = tmp_path / "diff.fits"
    arguments = ["subtract", str(names[1]), str(names[2]), "--output", str(output)]
    assert main([*arguments, "--quiet"]) == 0
    assert "chi^2 per pixel" in capsys.readouterr().out
    with fits.open(output) as hdus:
        assert {"DIFF", "MODEL", "ERR", "MASK", "KERNEL", "BKG"} <= {h.name for h in hdus}
        good = hdus["MASK"].data == 0
        pulls = (hdus["DIFF"].data / hdus["ERR"].data)[good]
    assert np.median(np.abs(pulls)) / 0.6745 == pytest.approx(1, abs=0.1)
    assert main(arguments) == 2
    assert "output must be a new file" in capsys.readouterr().err


def test_subtract_takes_a_mask_and_an_error_and_checks_their_shape(frames, tmp_path, capsys):
    names = sorted(frames.glob("*.fits"))
    mask = np.zeros(SETTINGS.shape, np.uint8)
    mask[50:60, 70:80] = 1
    fits.PrimaryHDU(mask).writeto(tmp_path / "mask.fits")
    fits.PrimaryHDU(np.full(SETTINGS.shape, 50.0)).writeto(tmp_path / "error.fits")
    fits.PrimaryHDU(mask[:9]).writeto(tmp_path / "small.fits")
    base = ["subtract", str(names[1]), str(names[1]), "--no-align", "--quiet", "--output"]
    assert main([*base, str(tmp_path / "d.fits"), "--mask", str(tmp_path / "mask.fits"), "--error",
                 str(tmp_path / "error.fits"), "--kernel-size", "7"]) == 0
    with fits.open(tmp_path / "d.fits") as hdus:
        assert (hdus["MASK"].data[50:60, 70:80] & 1 == 1).all()
    assert main([*base, str(tmp_path / "e.fits"), "--mask", str(tmp_path / "small.fits")]) == 1
    assert "mask must be an image of shape (180, 190), got (9, 190)" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_command(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path / "demo"), "--quiet"]) == 0
    held(tmp_path / "demo" / "run")
    assert str(tmp_path / "demo" / "run" / "report.html") in capsys.readouterr().out
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 2


def test_turned_and_mirrored_frames_are_registered_exactly(series, target, tmp_path):
    """A flipped pier: no interpolation, the same scale."""
    folder = tmp_path / "frames"
    folder.mkdir()
    paths = write_series(series, folder, layout="plain")
    reference = paths[series.reference_index]
    turned = next(p for p in paths if p != reference)
    with fits.open(turned, mode="update") as hdus:
        hdus[0].data = np.ascontiguousarray(np.rot90(hdus[0].data, 2))
        for key in [k for k in hdus[0].header if k[:2] in ("CT", "CR", "CD", "PC", "CU")]:
            del hdus[0].header[key]
    output = tmp_path / "out"
    assert main(["run", str(reference), str(turned), *target, "--reference", str(reference), "--resample", "never",
                 "--output", str(output), "--quiet"]) == 0
    row = Table.read(output / "epochs.ecsv")
    row = row[row["flags"] & FRAME_FLAGS.is_reference == 0][0]
    frame = next(f for f in series.frames if f.name == row["name"])
    assert row["route"] in ("offset", "pattern")
    assert row["scale"] == pytest.approx(frame.scale, abs=4 * row["scale_err"] + 0.03)


@pytest.mark.realdata
def test_rise_series(real_data, tmp_path):
    """Real frames with a dither of 100 px: six of six, scales near one, scatter as the errors say."""
    output = tmp_path / "out"
    assert main(["run", str(real_data / "rise"), "--ra", "253.4659", "--dec", "62.9002", "--size", "500", "--output",
                 str(output), "--quiet", "--no-products"]) == 0
    epochs = Table.read(output / "epochs.ecsv")
    assert (epochs["status"] == "ok").sum() == 6
    # 30 stars, single frame as reference: errors of 1 %; the night was clear
    assert np.abs(epochs["scale"] - 1).max() < 0.08
    assert np.ptp(epochs["shift_x"]) > 90
    curves = gpudia.read_lightcurves(output)
    independent = np.asarray(curves.epochs["flags"]) & FRAME_FLAGS.is_reference == 0
    flux, error = (np.asarray(curves.planes[n], float)[independent] for n in ("FLUX", "FLUX_ERR"))
    bright = np.isfinite(flux).all(axis=0) & (np.asarray(curves.sources["flux_ref"]) > 5000)
    assert bright.sum() >= 4
    ratio = flux[:, bright].std(axis=0, ddof=1) / np.sqrt((error[:, bright] ** 2).mean(axis=0))
    assert 0.5 < np.median(ratio) < 2
    # what the flat field left of the sky, 0.2 % over a star's width, is at other places after a dither
    dithered = np.abs(np.asarray(epochs["shift_x"])) > 50
    assert (epochs["sky_excess"][dithered] > 1.25).all()
    assert (epochs["sky_excess"][~dithered] < 1.2).all()
    # four bright stars tell what they have in common, not that of single epochs: 1 to 5 % after the dither
    assert np.abs(epochs["model_error"][dithered] - 0.03).max() < 0.02


def subtract_decam(real_data, tmp_path, letter, *options):
    """Difference of a frame and frame a, and its photometric scale."""
    a, image = (real_data / "decam" / f"DEC-OBS18{x}.mini.fits" for x in ("a", letter))
    output = tmp_path / "d.fits"
    assert main(["subtract", str(a), str(image), "--no-align", "--kernel-size", "17", "--output", str(output),
                 "--quiet", "--overwrite", *options]) == 0
    with fits.open(output) as hdus:
        return hdus["DIFF"].data.astype(float), hdus[0].header["SCALE"]


def robust_sigma(values):
    values = values[np.isfinite(values)]
    return 1.4826 * np.median(np.abs(values - np.median(values)))


@pytest.mark.realdata
def test_decam_differences_are_no_noisier_than_an_unweighted_fit(real_data, tmp_path):
    """Robust sigma of b - a: 45.8 ADU with a plain unweighted delta kernel (17 px)."""
    assert robust_sigma(subtract_decam(real_data, tmp_path, "b", "--no-correct-bias")[0]) <= 45.8


@pytest.mark.realdata
@pytest.mark.parametrize("letter", ["b", "c", "e"])
def test_decam_fluxes_are_unbiased_and_no_noisier_than_with_an_unweighted_fit(real_data, tmp_path, letter):
    """The plain fit leans on the bright stars, where the reference's noise does no harm: its scale is the oracle.

    Noise is that of the difference smoothed by a PSF of 1.5 px, over the scale. Without the correction the scale is
    10 % low in frames c and e.
    """
    reference, image = (fits.getdata(real_data / "decam" / f"DEC-OBS18{x}.mini.fits").astype(float)
                        for x in ("a", letter))
    U, _, _ = gpudia.build_the_U_matrix(reference, 17)
    U, inside = np.column_stack([U, np.ones(len(U))]), (slice(8, -8),) * 2
    plain = np.linalg.lstsq(U, image[inside].ravel(), rcond=None)[0]
    residual = image[inside] - (U @ plain).reshape(image[inside].shape)
    difference, scale = subtract_decam(real_data, tmp_path, letter)
    assert scale == pytest.approx(plain[:-1].sum(), rel=0.01)
    ours, theirs = (robust_sigma(gaussian_filter(d, 1.5)) for d in (difference[inside], residual))
    assert ours / scale < 1.01 * theirs / plain[:-1].sum()


@pytest.mark.realdata
def test_eso085_integers_without_wcs_and_with_saturation(real_data, tmp_path):
    output = tmp_path / "out"
    assert main(["run", str(real_data / "eso085"), "--output", str(output), "--quiet"]) == 0
    epochs = Table.read(output / "epochs.ecsv")
    assert (epochs["flags"] & FRAME_FLAGS.saturation_guessed > 0).all()
    for row in epochs:
        with fits.open(output / "difference" / f"{row['name']}.fits") as hdus:
            assert ((hdus["MASK"].data & 2) > 0).sum() > 10


def test_files_of_one_name_and_of_any_letters_are_kept_apart(frames, target, done, tmp_path):
    """Two a.fits in different folders, a real a-2.fits, and a name that FITS cards cannot hold."""
    names = sorted(frames.glob("*.fits"))
    places = [tmp_path / name for name in ("x/a.fits", "y/a.fits", "x/a-2.fits", "é star.fits")]
    for source, place in zip(names, places, strict=False):
        place.parent.mkdir(exist_ok=True)
        shutil.copy(source, place)
    output = tmp_path / "out"
    assert main(["run", *map(str, places), *target, "--output", str(output), "--quiet"]) == 0
    held(output)
    epochs = Table.read(output / "epochs.ecsv")
    assert len(set(epochs["name"])) == 4
    assert len(list((output / "difference").glob("*.fits"))) == 4
    before = {row["mjd"]: row["sky"] for row in Table.read(done / "epochs.ecsv")}
    assert all(before[row["mjd"]] == row["sky"] for row in epochs)
    assert len(set(Table.read(output / "target.ecsv")["flux"])) == 4


def test_inputs_are_never_overwritten(frames, done, tmp_path, capsys):
    names = sorted(frames.glob("*.fits"))
    before = names[1].read_bytes()
    assert main(["subtract", str(names[0]), str(names[1]), "--output", str(names[1]), "--overwrite"]) == 2
    assert "output must be another file than the inputs" in capsys.readouterr().err
    assert names[1].read_bytes() == before
    products = sorted((done / "difference").glob("*.fits"))
    assert main(["run", *map(str, products), "--output", str(done), "--overwrite"]) == 2
    assert "frames must not be results that overwrite would remove" in capsys.readouterr().err
    assert all(path.exists() for path in products)


def test_a_run_that_came_to_nothing_does_not_block_its_folder(frames, target, tmp_path):
    output = tmp_path / "out"
    assert main(["run", str(frames), "--ra", "10", "--dec", "10", "--output", str(output), "--quiet"]) == 1
    assert main(["run", str(frames), *target, "--output", str(output), "--quiet", "--no-products"]) == 0


def test_an_unexpected_error_stays_with_its_frame(frames, target, tmp_path, monkeypatch):
    from gpudia.pipeline import epochs as work

    real = work._cosmic_rays

    def fails_once(stack, i, *rest):
        if i == 1:
            raise ZeroDivisionError("nobody thought of this")
        return real(stack, i, *rest)

    monkeypatch.setattr(work, "_cosmic_rays", fails_once)
    output = tmp_path / "out"
    assert main(["run", str(frames), *target, "--output", str(output), "--quiet", "--no-products"]) == 3
    epochs = Table.read(output / "epochs.ecsv")
    assert (epochs["status"] == "ok").sum() == 4
    assert "unexpected ZeroDivisionError: nobody thought of this" in [str(r) for r in epochs["reason"]]
    assert "Traceback" in (output / "gpudia.log").read_text()


def test_a_batch_that_does_not_fit_is_tried_in_halves(frames, target, done, tmp_path, monkeypatch):
    from gpudia.pipeline import tasks

    real = tasks.place_batch

    def small(batch, *rest):
        if len(batch) > 2:
            raise MemoryError("5 frames are too many")
        return real(batch, *rest)

    monkeypatch.setattr(tasks, "place_batch", small)
    output = tmp_path / "out"
    assert main(["run", str(frames), *target, "--output", str(output), "--quiet", "--no-products"]) == 0
    one, other = Table.read(output / "epochs.ecsv"), Table.read(done / "epochs.ecsv")
    np.testing.assert_array_equal(one["scale"], other["scale"])
